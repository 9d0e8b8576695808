"""Monotonic rational quadratic spline, linear beyond its ends.

Coefficients: rows of x, width, y, height, d0, d1, of K pieces; size is a constexpr. With s = height / width, xi =
(z - x) / width, D = s (xi^2 + (1-xi)^2) + (d0 + d1) xi (1-xi):
    f  = y + height (s xi^2 + d0 xi (1-xi)) / D
    f' = s^2 (d1 xi^2 + 2 s xi (1-xi) + d0 (1-xi)^2) / D^2
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import divide


@triton.jit
def parameters(coefficients, size: tl.constexpr, c0, c1, c2):
    return (coefficients,)


@triton.jit
def value(z, parameters, size: tl.constexpr):
    return point(z, parameters, size)[0]


@triton.jit
def point(z, parameters, size: tl.constexpr):
    coefficients = parameters[0]
    piece = _piece(z, coefficients, size)
    x, width = tl.load(coefficients + piece), tl.load(coefficients + size + piece)
    y, height = tl.load(coefficients + 2 * size + piece), tl.load(coefficients + 3 * size + piece)
    d0, d1 = tl.load(coefficients + 4 * size + piece), tl.load(coefficients + 5 * size + piece)
    offset = z - x
    inside = tl.where(offset < 0, 0.0, tl.where(width < offset, width, offset))
    below = tl.where(offset < 0, offset, 0.0)
    above = tl.where(width < offset, offset - width, 0.0)
    inverse_width = divide(1.0, width)
    slope = height * inverse_width
    xi = inside * inverse_width
    bump = xi * (1.0 - xi)
    # xi^2 + (1-xi)^2 is 1 - 2 xi (1-xi)
    inverse_denominator = divide(1.0, slope + (d0 + d1 - 2.0 * slope) * bump)
    ratio = (slope * xi * xi + d0 * bump) * inverse_denominator
    steep = slope * inverse_denominator
    rest = 1.0 - xi
    derivative = steep * steep * (d1 * xi * xi + 2.0 * slope * bump + d0 * rest * rest)
    result = y + height * ratio + tl.where(offset < 0, d0 * below, d1 * above)
    return result, derivative, piece, xi, below, above, width, height, d0, d1, inverse_denominator, ratio


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    _, derivative, _, xi, below, above, width, height, d0, d1, inverse_denominator, ratio = point
    rest = 1.0 - xi
    scaled = height * (xi * rest) * inverse_denominator
    # With N the numerator: d(N/D)/ds = (xi^2 D - N (xi^2 + (1-xi)^2)) / D^2, whose parts in s cancel exactly.
    by_slope = scaled * inverse_denominator * (d1 * xi * xi - d0 * rest * rest)
    inverse_width = divide(1.0, width)
    # The derivative by width, for a fixed z inside the piece: xi decreases by xi / width.
    inside = -derivative * xi - by_slope * (height * inverse_width) * inverse_width
    return (
        -weight * derivative,
        weight * tl.where(above > 0, -d1, tl.where(below < 0, 0.0, inside)),
        weight,
        weight * (ratio + by_slope * inverse_width),
        weight * (scaled * (1.0 - ratio) + below),
        weight * (above - scaled * ratio),
    )


@triton.jit
def _piece(z, coefficients, size: tl.constexpr):
    """How many of x[1:] are <= z, by bisection; 0 for NaN."""
    found = tl.zeros(z.shape, tl.int32)
    width: tl.constexpr = triton.next_power_of_2(size)
    step = width // 2
    while step > 0:
        probe = found + step
        inside = probe < size
        knot = tl.load(coefficients + tl.where(inside, probe, 0))
        found = tl.where(inside & (knot <= z), probe, found)
        step = step // 2
    return found
