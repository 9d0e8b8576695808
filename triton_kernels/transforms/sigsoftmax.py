"""f(z) = z + log sigmoid(z)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import decay, log1p, logistic


@triton.jit
def parameters(coefficients, size: tl.constexpr, c0, c1, c2):
    return (c0,)


@triton.jit
def value(z, parameters, size: tl.constexpr):
    return _from(z, decay(z))


@triton.jit
def point(z, parameters, size: tl.constexpr):
    _, complement, e = logistic(z)
    return _from(z, e), 1.0 + complement


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    tl.static_assert(False, "sigsoftmax has no coefficients")


@triton.jit
def _from(z, e):
    return z + (tl.minimum(z, 0.0) - log1p(e))
