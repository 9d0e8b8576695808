"""f(z) = a sigmoid((z + b) / c). Coefficients: a, b, c."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import LOG2_E, clamp, divide, exp2, logistic


@triton.jit
def parameters(coefficients, size: tl.constexpr, c0, c1, c2):
    inverse = 1.0 / tl.load(coefficients + 2)
    return tl.load(coefficients), tl.load(coefficients + 1), inverse, -LOG2_E * inverse


@triton.jit
def value(z, parameters, size: tl.constexpr):
    a, b, _, steepness = parameters
    return divide(a, 1.0 + exp2((z + b) * steepness))


@triton.jit
def point(z, parameters, size: tl.constexpr):
    a, b, inverse, _ = parameters
    # The sigmoid is constant beyond 400; the clamp keeps inf * 0 out of the gradient of c.
    u = clamp((z + b) * inverse, -400.0, 400.0)
    sigmoid, complement, _ = logistic(u)
    return value(z, parameters, size), (a * inverse) * (sigmoid * complement), u, sigmoid


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    by_b = weight * point[1]
    return weight * point[3], by_b, -by_b * point[2]
