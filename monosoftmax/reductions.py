"""The divisors and scales of sums of losses."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import LossOptions
from .row_kernels import extension


def normalizer(reduction: str, target: Tensor, options: LossOptions, classes: int, dtype: torch.dtype) -> Tensor | None:
    """The divisor of a sum of losses: 1 for "sum", None for "none".

    For "mean" it is as in :func:`monosoftmax.cross_entropy`, and 0 if all rows are ignored.
    """
    if reduction == "none":
        return None
    if reduction == "sum":
        return torch.ones((), dtype=dtype, device=target.device)
    if target.is_floating_point():
        return torch.full((), target.shape[0], dtype=dtype, device=target.device)
    valid = target != options.ignore_index
    if options.weight is None:
        return valid.sum().to(dtype)
    inside = (target >= 0) & (target < classes)
    return (options.weight[torch.where(inside, target, 0)] * valid).sum()


def scale_of(reduction: str, target: Tensor, options: LossOptions, classes: int, dtype: torch.dtype) -> Tensor | None:
    """The factor of a sum of losses in kernels: 1 / :func:`normalizer`. ``target`` must have values."""
    counts = reduction == "mean" and options.weight is None and not target.is_floating_point()
    if counts and extension is not None and target.device.type == "cpu":
        scale: Tensor = extension.cpu.mean_scale(target, options.ignore_index, dtype)
        return scale
    divisor = normalizer(reduction, target, options, classes, dtype)
    return None if divisor is None else divisor.reciprocal()


def reduced(loss: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``scale`` and the scaled sum of ``loss``; both are empty without a scale."""
    return (loss.new_empty(0), loss.new_empty(0)) if scale is None else (scale, loss.sum() * scale)
