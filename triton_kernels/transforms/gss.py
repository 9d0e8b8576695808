"""f(z) = k (z-c) + c - (k-1) softplus(z-c). Coefficients: k, c."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import LOG2_E, exp2, log1p, logistic


@triton.jit
def parameters(coefficients, size: tl.constexpr, c0, c1, c2):
    return tl.load(coefficients), tl.load(coefficients + 1)


@triton.jit
def value(z, parameters, size: tl.constexpr):
    k, c = parameters
    # A factor of -1 becomes part of exp2's instruction, as the absolute value does. A minus sign does not.
    return _from(z, log1p(exp2(tl.abs(z * LOG2_E - c * LOG2_E) * -1.0)), k, c)


@triton.jit
def point(z, parameters, size: tl.constexpr):
    k, c = parameters
    sigmoid, complement, e = logistic(z - c)
    log_term = log1p(e)
    by_k = tl.minimum(z - c, 0.0) - log_term
    return value(z, parameters, size), sigmoid + k * complement, by_k, (1.0 - k) * complement


@triton.jit
def contributions(group: tl.constexpr, point, z, weight, parameters, size: tl.constexpr):
    return weight * point[2], weight * point[3]


@triton.jit
def _from(z, log_term, k, c):
    # Written without the linear part of softplus, so that neither end has inf - inf.
    return tl.where(z < c, k * z + (1.0 - k) * c, z) - (k - 1.0) * log_term
