"""Targets, means and losses of logits as transformers has them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ...checks import Reduction
from ...functional import cross_entropy
from ...transforms import MonotonicTransform


def shifted(labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """(B, T), the target of each token: the label after it, or ``shift_labels`` where they are given."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels


def mean_over(num_items_in_batch: Tensor | int | None) -> tuple[Reduction, Callable[[Tensor], Tensor]]:
    """The reduction of a loss, and what is done to its result, so that it is a mean over ``num_items_in_batch``."""
    if num_items_in_batch is None:
        return "mean", lambda loss: loss
    return (
        "sum",
        lambda total: (
            total
            / (num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)
        ),
    )


def loss_of_logits(
    logits: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None,
    ignore_index: int,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """The loss of logits (B, T, V) with f, of targets (B, T)."""
    reduction, scaled = mean_over(num_items_in_batch)
    rows, target = logits.flatten(0, -2), target.to(logits.device).flatten()
    return scaled(cross_entropy(rows, target, transform, ignore_index=ignore_index, reduction=reduction))
