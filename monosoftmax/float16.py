"""Scales gradients in float16, which has no very small numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def float16_shift(upstream: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """A power of two for upstream gradients of at most ``upstream``, 0-dim, over float16 logits.

    The gradient of a logit is p times the gradient of its row. With a mean, the latter is only 1/N, and the product
    would underflow in float16. This power brings the largest gradient of a row between 8 and 16, so that p down to 1e-8
    does not underflow, and a slope of f of 4000 does not overflow. The power is undone exactly.
    """
    if weight is not None and target.is_floating_point():
        upstream = upstream * weight.amax()
    elif weight is not None and target.numel() > 0:
        inside = (target != ignore_index) & (target >= 0) & (target < weight.shape[0])
        upstream = upstream * (weight[torch.where(inside, target, 0)] * inside).amax()
    return float16_power(upstream)


def float16_power(upstream: Tensor) -> Tensor:
    """:func:`float16_shift` where no class weights multiply the upstream gradients."""
    mantissa, _ = torch.frexp(upstream)
    power = 16 * (mantissa / upstream)  # exact; exp2() of the exponent is not
    return torch.where(torch.isfinite(power), power, torch.ones_like(power))
