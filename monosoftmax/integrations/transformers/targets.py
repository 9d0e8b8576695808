"""Targets and means as the losses of transformers have them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ...checks import Reduction


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
