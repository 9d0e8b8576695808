"""What a sum of losses is divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import LossOptions
from .row_kernels import extension


def normalizer(reduction: str, target: Tensor, options: LossOptions, classes: int, dtype: torch.dtype) -> Tensor | None:
    """1 for "sum"; for "mean" what :func:`monosoftmax.cross_entropy` says, 0 where every row is ignored.

    None for "none".
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
    """What kernels multiply the sum of losses by: the reciprocal of :func:`normalizer`. ``target`` has values."""
    counts = reduction == "mean" and options.weight is None and not target.is_floating_point()
    if counts and extension is not None and target.device.type == "cpu":
        scale: Tensor = extension.cpu.mean_scale(target, options.ignore_index, dtype)
        return scale
    divisor = normalizer(reduction, target, options, classes, dtype)
    return None if divisor is None else divisor.reciprocal()


def reduced(loss: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``scale`` and the total, both empty where there is no scale."""
    return (loss.new_empty(0), loss.new_empty(0)) if scale is None else (scale, loss.sum() * scale)
