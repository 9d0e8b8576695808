"""The head with the method "recompute", for :mod:`monosoftmax.chunked_head`, which chooses.

The losses come from :mod:`.linear_cross_entropy`, the gradients from :mod:`.linear_cross_entropy_backward`: no logits
in memory. Under ``torch.use_deterministic_algorithms`` the gradients are refused, as their sums are atomic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monosoftmax.float16 import float16_shift
from monosoftmax.groups import Head, HeadGradients, LossOptions, Transform, Upstream

from .launch import RowLoss, as_read
from .linear_cross_entropy import recompute_forward
from .linear_cross_entropy_backward import recompute_backward


def linear_cross_entropy(
    head: Head,
    target: Tensor,
    transform: Transform,
    options: LossOptions,
    upstream: Upstream | None = None,
    row_stats: Tensor | None = None,
    output_mask: Sequence[bool] = (False, False, False, False),
    filter_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, HeadGradients]:
    """Losses, lse, row_stats and the gradients that ``output_mask`` asks for, as :func:`.operators.cross_entropy`.

    ``filter_eps`` holds where ``row_stats`` are given; gradients that are computed along with the losses are exact.
    """
    losses = row_stats is None
    if any(output_mask):
        if upstream is None or (losses and upstream.loss is None):
            raise ValueError("monosoftmax: gradients need a scale")
        if upstream.entropy is not None:
            raise ValueError("monosoftmax: the gradient of the entropy needs logits in memory")
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                'method="recompute" sums gradients by atomics, in an order that changes from run to run, and '
                'torch.use_deterministic_algorithms(True) was called: use method="chunked"'
            )
    loss = RowLoss.of(target, transform, options)
    if row_stats is None:
        of_rows, lse, row_stats = recompute_forward(head, loss)
    else:
        of_rows, lse = (head.input.new_empty(0, dtype=torch.float32) for _ in range(2))
    if upstream is None or not any(output_mask):
        empty = head.input.new_empty(0)
        of_weight, of_bias = (empty.new_empty(0, dtype=torch.float32) for _ in range(2))
        none = HeadGradients(empty, of_weight, of_bias, transform.coefficients.new_empty(0))
        return of_rows, lse, row_stats, none
    shift = None
    if head.input.dtype == torch.float16 and target.numel() > 0:
        read = [each for each in as_read(upstream, row_stats) if each is not None]
        largest = torch.stack([each.abs().amax() for each in read]).amax()
        shift = float16_shift(largest, target, options.weight, options.ignore_index)
        upstream = Upstream(*(None if each is None else each * shift for each in upstream[:2]))
    gradients = recompute_backward(
        head, loss, upstream, row_stats, output_mask, filter_eps=0.0 if losses else filter_eps
    )
    if shift is not None:
        gradients = HeadGradients(*(each.div_(shift) for each in gradients))
    return of_rows, lse, row_stats, gradients
