"""Log-probabilities of rows whose columns are shared out among ranks.

Forward, a rank has log p of its columns as if there were no others, and adds what the others take away from it:

    log p_j = (y_j - largest_s - log total_s) + (largest_s - largest) + log total_s - log total

Backward, dL/dy_j = g_j - p_j sum_k g_k is -1 times the gradient of a cross entropy with the class probabilities g,
whose kernel has the sum over all columns, of all ranks, as the third number of row_stats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import gradients_ahead
from ..functional import rows_for_kernel
from ..groups import LossOptions, Upstream
from .problem import Problem
from .shards import LocalNumbers, merged

_PLAIN = LossOptions(None, -100, 0.0, 0.0, True)


def log_softmax(problem: Problem, rows: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """log p of the columns of this rank, [N, V of this rank] of type ``dtype``."""
    log_p: Tensor = _LogSoftmax.apply(problem, dtype, rows, coefficients)  # type: ignore[no-untyped-call]
    return log_p


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, dtype: torch.dtype, rows: Tensor, coefficients: Tensor) -> Tensor:
        transform = problem.transform
        wide = coefficients.dtype
        if rows.shape[1] == 0:
            log_p, largest = (
                rows.new_empty(rows.shape, dtype=wide),
                rows.new_full(rows.shape[:1], -torch.inf, dtype=wide),
            )
            total = torch.zeros_like(largest)
        else:
            log_p, row_stats = problem.kernels().log_softmax(rows, transform, wide)
            largest, total = row_stats.unbind(0)
        nobody = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        whole = merged(LocalNumbers(largest, total, torch.zeros_like(total)), nobody, None, problem.ranks)
        others = (largest - whole.row_stats[0]) + (total.log() - whole.row_stats[1].log())
        # All y of this rank are -inf, or all of all ranks.
        without = torch.where(torch.isneginf(whole.lse), torch.nan, -torch.inf).unsqueeze(1)
        log_p = torch.where((total == 0).unsqueeze(1), without, log_p.add_(others.unsqueeze(1))).to(dtype)
        ctx.problem, ctx.needed = problem, (rows.requires_grad, coefficients.requires_grad)
        ctx.save_for_backward(rows, coefficients, whole.row_stats)
        return log_p

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        rows, coefficients, row_stats = ctx.saved_tensors
        problem, wide = ctx.problem, coefficients.dtype
        with torch.no_grad():
            mass = problem.ranks.sum_(grad_output.sum(1, dtype=wide), "sums of gradients")
            if rows.shape[1] == 0:
                gradients = [torch.zeros_like(rows), torch.zeros_like(coefficients)]
            else:
                results = problem.kernels().cross_entropy(
                    rows, rows_for_kernel(grad_output), problem.transform, _PLAIN,
                    upstream=Upstream(torch.full_like(mass, -1.0)), row_stats=torch.stack([*row_stats, mass]),
                    output_mask=ctx.needed,
                )  # fmt: skip
                gradients = [results[3], results[4]]
            if ctx.needed[1]:
                for ranks in (problem.ranks, *problem.sums.tokens):
                    gradients[1] = ranks.sum_(gradients[1].to(wide).contiguous(), "the gradient of coefficients")
        wanted = [each for each, need in zip(gradients, ctx.needed, strict=True) if need]
        operands = [each for each, need in zip((rows, coefficients), ctx.needed, strict=True) if need]
        waiting = iter(gradients_ahead.differentiated_once(wanted, operands, "monosoftmax.distributed"))
        return None, None, *[next(waiting) if need else None for need in ctx.needed]
