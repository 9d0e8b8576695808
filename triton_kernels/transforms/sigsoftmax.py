"""f(z) = z + log sigmoid(z)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import log1p, logistic


@triton.jit
def value(z, coefficients, size, c0, c1, c2):
    return _from(z, tl.exp(-tl.abs(z)))


@triton.jit
def point(z, coefficients, size, c0, c1, c2):
    _, complement, decay = logistic(z)
    return _from(z, decay), 1.0 + complement


@triton.jit
def contribution(index: tl.constexpr, point, z, weight, coefficients, size):
    tl.static_assert(False, "sigsoftmax has no coefficients")


@triton.jit
def _from(z, decay):
    return z + (tl.where(z < 0, z, 0.0) - log1p(decay))
