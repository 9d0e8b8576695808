"""The numbers of tokens whose logits are shared out among ranks by columns, and their derivatives: for every loss.

A rank's columns go through the row kernels that a single device has. For the numbers of rows they see its columns as if
there were no others, and for the gradients they get the row_stats of whole rows. So no kernel knows about ranks, and
every backend takes part.

Two ways through the rows: all gradients ahead, chunk by chunk, for which the ranks exchange the numbers of each chunk
(three products); or the numbers of all rows first, exchanged at once, and the logits again for the gradients (four).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import gradients_ahead
from .._dispatch import keeps_graph
from ..head_products import as_they_are
from .problem import ChunkLoss, Numbers, Problem, Statistics
from .row_gradients import gradients_of_numbers, with_gradients
from .row_numbers import numbers_of_all, numbers_of_tokens, statistics_of_tokens


def token_numbers(
    problem: Problem, operands: tuple[Tensor | None, ...], loss_of: ChunkLoss | None = None
) -> tuple[Tensor, Numbers, Statistics]:
    """The sum of ``loss_of`` over chunks, and the numbers of all tokens.

    Args:
        operands: (logits [N, V of this rank], coefficients), or (input, weight, bias, coefficients).
        loss_of: its gradients are computed ahead. None: the sum is empty.
    """
    needed = tuple(torch.is_grad_enabled() and each is not None and each.requires_grad for each in operands)
    total, *found = _TokenNumbers.apply(problem, loss_of, needed, *operands)  # type: ignore[no-untyped-call]
    return total, Numbers(*found[:4]), Statistics(*found[4:])


class _TokenNumbers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, loss_of: ChunkLoss | None, needed: Sequence[bool], *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.problem, ctx.needed = problem, needed
        with as_they_are(problem.target.device.type):
            if loss_of is None:
                whole, argmax = numbers_of_all(problem, operands)
                total, of_loss = whole.lse.new_empty(0), whole.lse.new_empty(0)
                ahead: list[Tensor] = []
            else:
                whole, total, of_loss, ahead = with_gradients(problem, operands, needed, loss_of)
                argmax = problem.target.new_empty(0)
            statistics = statistics_of_tokens(problem, operands, whole, argmax)
        gradients_ahead.let_wait(ahead)
        ctx.ahead = len(ahead)
        ctx.save_for_backward(whole.row_stats, of_loss, *ahead, *operands)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics, *([total] if loss_of is None else []))
        return total, *numbers_of_tokens(problem, whole, slice(0, len(problem.target))), *statistics

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *grads: Tensor | None) -> Any:
        row_stats, of_loss, *saved = ctx.saved_tensors
        ahead, operands = saved[: ctx.ahead], saved[ctx.ahead :]
        problem, needed, nothing = ctx.problem, ctx.needed, (None, None, None)
        upstream = Numbers(*grads[:4])  # type: ignore[arg-type]
        if grad_total is None and all(each is None for each in upstream):
            return (*nothing, *[None] * len(operands))
        with torch.no_grad(), as_they_are(row_stats.device.type):
            if ahead and all(each is None for each in upstream):
                assert grad_total is not None
                gradients = _scaled(problem, ahead, grad_total)
            else:
                if grad_total is not None and of_loss.numel() > 0:
                    upstream = _plus(upstream, of_loss * grad_total)
                gradients = gradients_of_numbers(problem, operands, needed, upstream=upstream, row_stats=row_stats)
            wanted = [operand for operand, need in zip(operands, needed, strict=True) if need]
            cast = _summed(problem, gradients, [each.dtype for each in wanted], needed)
        waiting = iter(gradients_ahead.differentiated_once(cast, wanted, "monosoftmax.distributed"))
        return (*nothing, *[next(waiting) if need else None for need in needed])


def _plus(upstream: Numbers, of_total: Tensor) -> Numbers:
    """``upstream`` with the gradients [4, N] that reach the numbers through the sum of the losses."""
    return Numbers(*(more if each is None else each + more for each, more in zip(upstream, of_total, strict=True)))


def _scaled(problem: Problem, ahead: list[Tensor], factor: Tensor) -> list[Tensor]:
    in_place = not keeps_graph()
    if in_place:
        gradients_ahead.let_go(ahead)
    kernels = problem.kernels()
    scaled = gradients_ahead.scaled(ahead, factor, rounded=False, in_place=in_place, kernels=kernels)
    assert scaled is not None  # which is for gradients that must not be rounded twice
    return list(scaled)


def _summed(
    problem: Problem, gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype], needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the operands that are needed, as the sums that their ranks want, in the operands' types."""
    names = ("logits", "coefficients") if len(needed) == 2 else ("input", "weight", "bias", "coefficients")
    ranks, sums, summed = problem.ranks, problem.sums, []
    wanted = [name for name, need in zip(names, needed, strict=True) if need]
    for name, gradient, dtype in zip(wanted, gradients, dtypes, strict=True):
        what = f"the gradient of {name}"
        if name == "coefficients" or (name == "input" and sums.input):
            gradient = ranks.sum_(gradient.contiguous(), what)
        for others in sums.tokens if name not in ("input", "logits") else ():
            gradient = others.sum_(gradient.contiguous(), what)
        summed.append(gradient.to(dtype))
    return summed
