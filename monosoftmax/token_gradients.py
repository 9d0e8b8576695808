"""The gradients of log p of the targets, of the entropy and of lse, from the logits of some rows.

    dL/dy_j = a ([j = t] - p_j) - e p_j (log p_j + H) + h p_j

for the upstream gradients a of log p(t), e of the entropy H and h of lse. Two kernels of a backend make it. The kernel
of the loss has the terms of a and h. The backward kernel of log_softmax takes a gradient u of all log p, and gives
u_j - p_j sum_k u_k: with u_j = a [j = t] - e p_j log p_j, these are the terms of a and e. Beside the gradient, u and
log p take memory, two numbers of the arithmetic type for each logit, so that callers give chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import LossOptions, Transform, Upstream
from .row_kernels import RowKernels


class TokenUpstream(NamedTuple):
    """Upstream gradients, each [N] in the type of the coefficients. An absent gradient is zero."""

    log_prob: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenUpstream:
        """``function`` of the gradients that are there."""
        return TokenUpstream(*(None if each is None else function(each) for each in self))


def token_gradients(
    kernels: RowKernels,
    rows: Tensor,
    target: Tensor,
    transform: Transform,
    *,
    ignore_index: int,
    upstream: TokenUpstream,
    output_mask: Sequence[bool],
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``rows`` [N, V] and of the coefficients; empty unless the mask asks for them.

    An ignored row has no log p. What it holds has no effect if it has no other upstream gradient either. ``in_place``:
    nobody needs ``rows`` afterwards, and they may be overwritten.
    """
    mask = output_mask[0], output_mask[1]

    def of_loss(rows: Tensor, upstream: TokenUpstream) -> tuple[Tensor, Tensor]:
        """The terms of log p and of lse, by the kernel of the loss, which is -log p."""
        (a, _, h), options = upstream, LossOptions(None, ignore_index, 0.0, 0.0, True)
        if a is None:
            assert h is not None
            a = torch.zeros_like(h)
        found = kernels.cross_entropy(
            rows, target, transform, options, upstream=Upstream(-a, h), output_mask=mask,
            grad_rows=rows if in_place and mask[0] else None,
        )  # fmt: skip
        return found[3], found[4]

    if upstream.entropy is None:
        return of_loss(rows, upstream)
    valid = target != ignore_index
    counts = valid | (upstream.entropy != 0)
    if upstream.lse is not None:
        counts |= upstream.lse != 0
    # An ignored row may hold NaN, which an upstream gradient of 0 would not keep out of the sums.
    left_out = ~counts.unsqueeze(1)
    rows = rows.masked_fill_(left_out, 0) if in_place else rows.masked_fill(left_out, 0)
    log_p, row_stats = kernels.log_softmax(rows, transform, transform.coefficients.dtype)
    # p log p -> 0 as p -> 0: a finite number in the place of -inf.
    of_log_p = log_p.exp().mul_(log_p.clamp_(min=torch.finfo(log_p.dtype).min))
    of_log_p.mul_(upstream.entropy.neg().unsqueeze(1))
    if upstream.log_prob is not None:
        inside = valid & (target >= 0) & (target < rows.shape[1])
        place = torch.where(inside, target, 0).unsqueeze(1)
        added = torch.where(valid, torch.where(inside, upstream.log_prob, torch.nan), 0.0)
        of_log_p.scatter_add_(1, place, added.unsqueeze(1))
    del log_p
    grad_rows, grad_coefficients = kernels.log_softmax_backward(of_log_p, rows, transform, row_stats, mask)
    if upstream.lse is None:
        return grad_rows, grad_coefficients
    of_lse = of_loss(rows, TokenUpstream(None, None, upstream.lse))
    return grad_rows.add_(of_lse[0]), grad_coefficients + of_lse[1]
