"""f(z) = k (z-c) + c - (k-1) softplus(z-c). Coefficients: k, c."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import log1p, logistic


@triton.jit
def value(z, coefficients, size, c0, c1, c2):
    c = tl.load(coefficients + 1)
    return _from(z - c, log1p(tl.exp(-tl.abs(z - c))), tl.load(coefficients), c)


@triton.jit
def point(z, coefficients, size, c0, c1, c2):
    k, c = tl.load(coefficients), tl.load(coefficients + 1)
    u = z - c
    sigmoid, complement, decay = logistic(u)
    log_term = log1p(decay)
    by_k = tl.where(u < 0, u, 0.0) - log_term
    return _from(u, log_term, k, c), sigmoid + k * complement, by_k, (1.0 - k) * complement


@triton.jit
def contribution(index: tl.constexpr, point, z, weight, coefficients, size):
    return weight * point[2 + index]


@triton.jit
def _from(u, log_term, k, c):
    # The linear part of softplus is taken out by hand: no inf - inf at either end.
    return c + tl.where(u < 0, k * u, u) - (k - 1.0) * log_term
