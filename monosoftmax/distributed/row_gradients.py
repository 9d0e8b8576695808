"""The gradients of the numbers of rows, for the columns of this rank: from the logits again, or ahead.

A row whose target another rank has is ignored by the kernel, which gives such a row the gradient of lse. With upstream
gradients a of log p(target), h of lse, e of the entropy and s of the spread,

    dL/dy_j = a (1[j = t] - p_j) + h p_j - e p_j (log p_j + H) + s (W p_j - w_j)

    kernel:   loss = -a, lse = h + s W       where the rank has the target
              loss =  0, lse = h + s W - a   where it has not

and -s w_j is the part of label smoothing of a call with label_smoothing = 1, where the column of the target is put in
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..float16 import float16_power
from ..groups import HeadGradients, Transform, Upstream
from ..head_products import rows_in, sum_of_chunks
from .problem import (
    PLAIN,
    ChunkLoss,
    Numbers,
    Problem,
    options_of_spread,
    rows_of_operands,
    target_logits,
    target_y,
    targets_of_spread,
)
from .row_numbers import local_numbers, merged_numbers, numbers_of_tokens
from .rows import Rows
from .shards import ELSEWHERE, WholeNumbers


def with_gradients(
    problem: Problem, operands: Sequence[Tensor | None], needed: Sequence[bool], loss_of: ChunkLoss
) -> tuple[WholeNumbers, Tensor, Tensor, list[Tensor]]:
    """The numbers of all rows, the sum of ``loss_of``, its gradients for the numbers [4, N], and for the operands."""
    rows, transform = rows_of_operands(problem, operands, needed), problem.transform
    dtype, kept = transform.coefficients.dtype, 5 if problem.asked.spread else 4
    gathered = rows.gathered((dtype, kept), (dtype, 4))
    total, grad_coefficients = transform.coefficients.new_zeros(()), None
    for chunk, logits in rows:
        local = local_numbers(problem, transform, logits, chunk)
        whole, _ = merged_numbers(problem, local, rows_in(problem.target, chunk))
        with torch.enable_grad():
            leaves = Numbers(*(each.detach().requires_grad_() for each in numbers_of_tokens(problem, whole, chunk)))
            loss = loss_of(leaves, chunk)
        total += loss.detach()
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        upstream = Numbers(*found)
        numbers = [*whole.row_stats, whole.log_prob, whole.lse, *([] if whole.spread is None else [whole.spread])]
        zeros = torch.zeros_like(whole.lse)
        of_loss = [zeros if each is None or each.shape != zeros.shape else each for each in upstream]
        gathered.put(chunk, [torch.stack(numbers), torch.stack(of_loss)])
        part = _add_gradients(
            problem, rows, transform, chunk=chunk, logits=logits, upstream=upstream, row_stats=whole.row_stats,
            need_coefficients=needed[-1],
        )  # fmt: skip
        grad_coefficients = sum_of_chunks(grad_coefficients, part)
        del logits, local, part
    gradients = rows.summed(grad_coefficients)
    of_rows, of_loss_of_all = gathered.results
    spread = of_rows[4] if problem.asked.spread else None
    whole = WholeNumbers(of_rows[:2], of_rows[2], of_rows[3], spread=spread)
    return whole, total, of_loss_of_all, _wanted(gradients, needed)


def gradients_of_numbers(
    problem: Problem,
    operands: Sequence[Tensor | None],
    needed: Sequence[bool],
    *,
    upstream: Numbers,
    row_stats: Tensor,
) -> list[Tensor]:
    """The gradients for the operands, of this rank's columns, from the logits again."""
    rows, transform = rows_of_operands(problem, operands, needed), problem.transform
    shift: Tensor | None = None
    given = [each for each in upstream if each is not None]
    assert operands[0] is not None
    if len(operands) > 2 and operands[0].dtype == torch.float16 and problem.target.numel() > 0:
        shift = float16_power(torch.stack([each.abs().amax() for each in given]).amax())
        upstream = Numbers(*(None if each is None else each * shift for each in upstream))
    grad_coefficients: Tensor | None = None
    for chunk, logits in rows:
        of_chunk = Numbers(*(None if each is None else rows_in(each, chunk) for each in upstream))
        part = _add_gradients(
            problem, rows, transform, chunk=chunk, logits=logits, upstream=of_chunk, row_stats=row_stats[:, chunk],
            need_coefficients=needed[-1],
        )  # fmt: skip
        grad_coefficients = sum_of_chunks(grad_coefficients, part)
        del logits, part
    gradients = _wanted(rows.summed(grad_coefficients), needed)
    return gradients if shift is None else [each.div_(shift) for each in gradients]


def _wanted(gradients: HeadGradients, needed: Sequence[bool]) -> list[Tensor]:
    every = [gradients.input, gradients.coefficients] if len(needed) == 2 else list(gradients)
    return [each for each, need in zip(every, needed, strict=True) if need]


def _add_gradients(
    problem: Problem,
    rows: Rows,
    transform: Transform,
    *,
    chunk: slice,
    logits: Tensor,
    upstream: Numbers,
    row_stats: Tensor,
    need_coefficients: bool,
) -> Tensor:
    """Adds what the columns ``logits`` of a chunk contribute; returns the gradient of the coefficients, or nothing."""
    wanted = rows.gradients(logits, need_coefficients)
    if logits.shape[1] == 0 or not any(wanted["output_mask"]):
        return torch.zeros_like(transform.coefficients)
    target = rows_in(problem.target, chunk)
    places = problem.shard.places(target, problem.ignore_index)
    here, zeros = places != ELSEWHERE, torch.zeros_like(row_stats[0])
    a, h, e, s = (zeros if each is None or each.shape != zeros.shape else each for each in upstream)
    outside = (target < 0) | (target >= problem.shard.classes)
    # An ignored row has no log p; the gradients of a row without a class poison it.
    a = torch.where(target == problem.ignore_index, 0.0, torch.where(outside, torch.nan, a))
    kernels = problem.kernels()
    if not problem.asked.spread:
        entropy = e if problem.asked.entropy else None
        of_kernel = Upstream(torch.where(here, -a, 0.0), torch.where(here, h, h - a), None, entropy)
        results = kernels.cross_entropy(
            logits, places, transform, PLAIN, upstream=of_kernel, row_stats=row_stats, **wanted
        )
        if rows.needs_logit_gradient:
            rows.add_gradients(chunk, results[3])
        return results[4] if need_coefficients else zeros.new_empty(0)
    weights = problem.weights()
    z = target_logits(logits, places)
    lse = h - a + s * (weights.of_all - weights.of_shard)
    results = kernels.cross_entropy(
        logits, targets_of_spread(problem, target), transform, options_of_spread(problem),
        upstream=Upstream(s * logits.shape[1], lse), row_stats=row_stats, **wanted,
    )  # fmt: skip
    dy, of_target = _of_target_columns(problem, z, transform, Numbers(a, h, e, s), places=places, row_stats=row_stats)
    if rows.needs_logit_gradient:
        column = places.clamp(min=0).unsqueeze(1)
        others = results[3].gather(1, column)
        results[3].scatter_(1, column, torch.where(here.unsqueeze(1), dy.unsqueeze(1).to(others.dtype), others))
        rows.add_gradients(chunk, results[3])
    return results[4] + of_target if need_coefficients else zeros.new_empty(0)


def _of_target_columns(
    problem: Problem, z: Tensor, transform: Transform, upstream: Numbers, *, places: Tensor, row_stats: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/dz of the targets that are here, formed from all parts before it is rounded; and what the coefficients get
    from log p of the targets, the part that the kernel has left out.
    """
    a, h, _, s = upstream
    here, own, kernels = places != ELSEWHERE, problem.shard_weight(), problem.kernels()
    p = (target_y(kernels, transform, z) - row_stats[0]).exp() / row_stats[1]
    w = 1.0 if own is None else own[places.clamp(min=0)]
    dy = a * (1.0 - p) + h * p + s * (problem.weights().of_all * p - w)
    dz = _of_single_logits(kernels, transform, z, dy, here=here, output_mask=(True, False))
    of_target = _of_single_logits(kernels, transform, z, a, here=here, output_mask=(False, True))
    return dz, of_target


def _of_single_logits(
    kernels: Any, transform: Transform, z: Tensor, dy: Tensor, *, here: Tensor, output_mask: tuple[bool, bool]
) -> Tensor:
    """dL/dz of the logits ``z`` [n], or the gradient of the coefficients, from dL/dy: as rows of which p is 0.

    What is not ``here`` is not read, since it may be anything.
    """
    column = torch.where(here, 0, ELSEWHERE)
    far = torch.stack([torch.full_like(dy, torch.finfo(dy.dtype).max), torch.ones_like(dy)])
    results = kernels.cross_entropy(
        z.unsqueeze(1), column, transform, PLAIN, upstream=Upstream(-dy), row_stats=far, output_mask=output_mask
    )
    found: Tensor = results[3].squeeze(1) if output_mask[0] else results[4]
    return found
