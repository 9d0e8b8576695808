"""f(z) = z / tau. Coefficients: tau."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def parameters(coefficients, size: tl.constexpr, c0, c1, c2):
    return (1.0 / tl.load(coefficients),)


@triton.jit
def value(z, parameters, size: tl.constexpr):
    return z * parameters[0] + 0.0


@triton.jit
def point(z, parameters, size: tl.constexpr):
    return value(z, parameters, size), tl.zeros(z.shape, tl.float32) + parameters[0]


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    return (-weight * (point[0] * parameters[0]),)
