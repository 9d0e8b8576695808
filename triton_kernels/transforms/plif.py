"""f(z) = intercept_k + slope_k z, k = clamp(floor((z - lo) / width), 0, K - 1).

The kernels read a table with two int64 for each piece. The first int64 has slope and intercept = value - slope * knot,
both float32, so that one load of 8 bytes gives both. The second int64 has the knot, which only the gradient of a slope
needs. slope * z is rounded at the size of z, while value + slope * (z - knot) would round smaller numbers. As f(0) = 0,
this matters only where f bends strongly. Constants: lo, width, 1 / width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import clamp_index, entry_at, halves_of


def pack(coefficients: Tensor, constants: Sequence[float]) -> Tensor:
    """[K, 2] int64 of the [2, K] slopes and values."""
    lo, width, _ = constants
    slopes, values = coefficients.double()
    knots = lo + width * torch.arange(slopes.shape[0], dtype=torch.float64, device=slopes.device)
    return torch.stack((slopes, values - slopes * knots, knots, knots), dim=1).float().view(torch.int64)


@triton.jit
def parameters(coefficients, size: tl.constexpr, c0, c1, c2):
    return coefficients, c0, c2


@triton.jit
def value(z, parameters, size: tl.constexpr):
    return point(z, parameters, size)[0]


@triton.jit
def point(z, parameters, size: tl.constexpr):
    table, lo, inverse_width = parameters
    # The same operations as in the reference, so that both find the same piece for a logit next to a knot.
    piece = clamp_index((z - lo) * inverse_width, size - 1.0)
    slope, intercept = halves_of(tl.load(entry_at(table, piece, 16, tl.int64)))
    return slope * z + intercept, slope, piece


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    knot = tl.load(entry_at(parameters[0], point[2], 16, tl.float32) + 2)
    return weight * (z - knot), weight
