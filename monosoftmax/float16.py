"""Gradients in float16, which has no small numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def float16_shift(upstream: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """A power of two for upstream gradients of at most ``upstream``, 0-dim, over float16 logits.

    The gradient of a logit is p times that of its row, and 1/N of a mean is small to begin with: as float16 it would
    underflow. Times this power, which is undone exactly, the largest gradient of a row is between 8 and 16: p down to
    1e-8 leaves something, and a slope of f of 4000 does not overflow.
    """
    if weight is not None and target.numel() > 0:
        inside = (target != ignore_index) & (target >= 0) & (target < weight.shape[0])
        upstream = upstream * (weight[torch.where(inside, target, 0)] * inside).amax()
    mantissa, _ = torch.frexp(upstream)
    power = 16 * (mantissa / upstream)  # exact, unlike exp2() of the exponent
    return torch.where(torch.isfinite(power), power, torch.ones_like(power))
