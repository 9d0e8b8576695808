"""f(z) = a sigmoid((z + b) / c). Coefficients: a, b, c."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import clamp, logistic


@triton.jit
def value(z, coefficients, size, c0, c1, c2):
    return point(z, coefficients, size, c0, c1, c2)[0]


@triton.jit
def point(z, coefficients, size, c0, c1, c2):
    a, b, c = tl.load(coefficients), tl.load(coefficients + 1), tl.load(coefficients + 2)
    # The sigmoid is constant beyond 400; the clamp keeps inf * 0 out of the gradient of c.
    u = clamp((z + b) / c, -400.0, 400.0)
    sigmoid, complement, _ = logistic(u)
    return a * sigmoid, (a / c) * (sigmoid * complement), u, sigmoid


@triton.jit
def contribution(index: tl.constexpr, point, z, weight, coefficients, size):
    if index == 0:
        return weight * point[3]
    elif index == 1:
        return weight * point[1]
    else:
        return -weight * point[1] * point[2]
