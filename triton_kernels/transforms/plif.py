"""f(z) = value_k + slope_k (z - knot_k), k = clamp(floor((z - lo) / width), 0, K - 1).

Coefficients: rows of slopes and of values, of K pieces. Constants: lo, width, 1 / width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import clamp_index


@triton.jit
def value(z, coefficients, size, c0, c1, c2):
    return point(z, coefficients, size, c0, c1, c2)[0]


@triton.jit
def point(z, coefficients, size, c0, c1, c2):
    # In these very operations the reference finds the piece: both see a logit next to a knot on the same side.
    piece = clamp_index(tl.floor((z - c0) * c2), size - 1.0)
    slope = tl.load(coefficients + piece)
    offset = z - (c0 + piece.to(tl.float32) * c1)
    return tl.load(coefficients + size + piece) + slope * offset, slope, piece, offset


@triton.jit
def contribution(index: tl.constexpr, point, z, weight, coefficients, size):
    if index == 0:
        return weight * point[3]
    else:
        return weight
