"""f(z) = w0 z + sum_h a_h tanh(b_h z + c_h). Coefficients: w0, a[H], b[H], c[H]; size is a constexpr."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import hyperbolic_tangent


@triton.jit
def value(z, coefficients, size: tl.constexpr, c0, c1, c2):
    return point(z, coefficients, size, c0, c1, c2)[0]


@triton.jit
def point(z, coefficients, size: tl.constexpr, c0, c1, c2):
    units: tl.constexpr = (size - 1) // 3
    linear = tl.load(coefficients)
    result = linear * z
    derivative = tl.zeros(z.shape, tl.float32) + linear
    for h in range(units):
        amplitude, steepness = tl.load(coefficients + 1 + h), tl.load(coefficients + 1 + units + h)
        tanh, slope = hyperbolic_tangent(steepness * z + tl.load(coefficients + 1 + 2 * units + h))
        result += amplitude * tanh
        derivative += amplitude * steepness * slope
    return result, derivative


@triton.jit
def contribution(index: tl.constexpr, point, z, weight, coefficients, size: tl.constexpr):
    # A unit is evaluated again: kept, 2 H values of each logit would leave the registers.
    if index == 0:
        return weight * z
    else:
        units: tl.constexpr = (size - 1) // 3
        unit: tl.constexpr = (index - 1) % units
        amplitude, steepness = tl.load(coefficients + 1 + unit), tl.load(coefficients + 1 + units + unit)
        tanh, slope = hyperbolic_tangent(steepness * z + tl.load(coefficients + 1 + 2 * units + unit))
        if index <= units:
            return weight * tanh
        elif index <= 2 * units:
            return weight * amplitude * slope * z
        else:
            return weight * amplitude * slope
