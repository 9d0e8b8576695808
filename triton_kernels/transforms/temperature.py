"""f(z) = z / tau. Coefficients: tau."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def value(z, coefficients, size, c0, c1, c2):
    return z / tl.load(coefficients)


@triton.jit
def point(z, coefficients, size, c0, c1, c2):
    tau = tl.load(coefficients)
    return z / tau, tl.full(z.shape, 1.0, tl.float32) / tau


@triton.jit
def contribution(index: tl.constexpr, point, z, weight, coefficients, size):
    return -weight * (point[0] * point[1])
