"""The numbers of rows whose columns are shared out: of the columns of this rank, and of whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..groups import TokenStatistics, Transform
from ..head_products import rows_in
from .problem import (
    PLAIN,
    Asked,
    Numbers,
    Problem,
    Statistics,
    options_of_spread,
    rows_of_operands,
    target_logits,
    target_y,
    targets_of_spread,
)
from .shards import ELSEWHERE, LocalNumbers, WholeNumbers, merged

#: Columns in a block that the rank of a target is counted in.
_BLOCK = 2048


def numbers_of_all(problem: Problem, operands: Sequence[Tensor | None]) -> tuple[WholeNumbers, Tensor]:
    """The numbers of all rows, for which the ranks meet once; and the argmax."""
    rows, transform = rows_of_operands(problem, operands, (False,) * len(operands)), problem.transform
    kept: list[bool] = []
    gathered = None
    for chunk, logits in rows:
        local = local_numbers(problem, transform, logits, chunk)
        kept = [each is not None for each in local]
        given = [each for each in local[:-1] if each is not None]
        if gathered is None:
            kinds = [(given[0].dtype, len(given)), (torch.int64, 1)]
            gathered = rows.gathered(*kinds[: 1 + kept[-1]])
        gathered.put(chunk, [torch.stack(given), *([local.argmax] if local.argmax is not None else [])])
        del logits
    assert gathered is not None  # there is one chunk at least
    numbers = [*gathered.results[0].unbind(0), *gathered.results[1:]]
    waiting = iter(numbers)
    local = LocalNumbers(*[next(waiting) if each else None for each in kept])  # type: ignore[arg-type]
    return merged_numbers(problem, local, problem.target)


def merged_numbers(problem: Problem, local: LocalNumbers, target: Tensor) -> tuple[WholeNumbers, Tensor]:
    """The numbers of whole rows, and the argmax [n] or [0]."""
    here = problem.shard.has(target) & (target != problem.ignore_index)
    whole = merged(local, here, problem.weights() if local.spread is not None else None, problem.ranks)
    if not problem.asked.argmax:
        return whole, target.new_empty(0)
    assert local.argmax is not None and local.largest_logit is not None and whole.largest_logit is not None
    # The first of equals.
    last = problem.shard.classes - 1
    place = torch.where(local.largest_logit == whole.largest_logit, local.argmax, last)
    return whole, problem.ranks.min_(place, "argmax")


def local_numbers(problem: Problem, transform: Transform, logits: Tensor, chunk: slice) -> LocalNumbers:
    """What the columns ``logits`` of this rank say of the rows of ``chunk``."""
    asked, target = problem.asked, rows_in(problem.target, chunk)
    places, count = problem.shard.places(target, problem.ignore_index), logits.shape[1]
    if count == 0:
        zeros = transform.coefficients.new_zeros(len(target))
        lowest = torch.full_like(zeros, -torch.inf)
        numbers = LocalNumbers(lowest, zeros, zeros)
        if asked.statistics:
            numbers = _asked_of(asked, numbers._replace(moment=zeros), lowest, zeros, torch.zeros_like(target))
        return numbers._replace(spread=zeros) if asked.spread else numbers
    kernels = problem.kernels()
    if asked.statistics:
        return _local_statistics(problem, kernels, transform, logits=logits, places=places)
    if not asked.spread:
        loss, _, row_stats, *_ = kernels.cross_entropy(logits, places, transform, PLAIN)
        largest, total = row_stats.unbind(0)
        return LocalNumbers(largest, total, (total.log() - loss).clamp(max=0.0))
    options, of_spread = options_of_spread(problem), targets_of_spread(problem, target)
    loss, _, row_stats, *_ = kernels.cross_entropy(logits, of_spread, transform, options)
    largest, total = row_stats.unbind(0)
    # A sum of w_j (largest - y_j), from one of w_j (lse - y_j).
    own = problem.weights().of_shard
    without = torch.where(own == 0, 0.0, torch.inf)
    spread = torch.where(total == 0, without, loss * count - own * total.log())
    y = target_y(kernels, transform, target_logits(logits, places))
    return LocalNumbers(largest, total, (y - largest).clamp(max=0.0), spread=spread)


def _local_statistics(
    problem: Problem, kernels: Any, transform: Transform, *, logits: Tensor, places: Tensor
) -> LocalNumbers:
    found = TokenStatistics(*kernels.token_statistics(logits, places, transform, ELSEWHERE))
    largest, total, moment = found.row_stats.unbind(0)
    # What says nothing must not be an index.
    best = found.argmax.clamp(0, logits.shape[1] - 1)
    numbers = LocalNumbers(largest, total, (total.log() + found.log_prob).clamp(max=0.0), moment=moment)
    largest_logit = logits.gather(1, best.unsqueeze(1)).squeeze(1).to(largest.dtype)
    return _asked_of(problem.asked, numbers, largest_logit, target_logits(logits, places), best + problem.shard.start)


def _asked_of(
    asked: Asked, numbers: LocalNumbers, largest_logit: Tensor, target_logit: Tensor, argmax: Tensor
) -> LocalNumbers:
    """``numbers`` with what the statistics that are asked for need, and nothing else to exchange."""
    ranked = asked.is_top1 or asked.rank
    return numbers._replace(
        largest_logit=largest_logit if ranked or asked.argmax else None,
        target_logit=target_logit if ranked else None,
        argmax=argmax if asked.argmax else None,
    )


def numbers_of_tokens(problem: Problem, whole: WholeNumbers, chunk: slice) -> Numbers:
    """The numbers of the tokens of ``chunk``, from the numbers of their rows."""
    target, nothing = rows_in(problem.target, chunk), whole.lse.new_empty(0)
    ignored = target == problem.ignore_index
    inside = (target >= 0) & (target < problem.shard.classes)
    return Numbers(
        torch.where(ignored, 0.0, torch.where(inside, whole.log_prob, torch.nan)),
        whole.lse,
        nothing if whole.entropy is None else whole.entropy,
        nothing if whole.spread is None else whole.spread,
    )


def statistics_of_tokens(
    problem: Problem, operands: Sequence[Tensor | None], whole: WholeNumbers, argmax: Tensor
) -> Statistics:
    top1, rank = argmax.new_empty(0, dtype=torch.bool), argmax.new_empty(0)
    if not (problem.asked.is_top1 or problem.asked.rank):
        return Statistics(top1, argmax, rank)
    assert whole.target_logit is not None and whole.largest_logit is not None
    target = problem.target
    found = (target != problem.ignore_index) & (target >= 0) & (target < problem.shard.classes)
    if problem.asked.is_top1:
        top1 = found & (whole.target_logit >= whole.largest_logit)
    if problem.asked.rank:
        # Only now is it known what the logits are compared with.
        rows = rows_of_operands(problem, operands, (False,) * len(operands))
        larger = torch.empty_like(target)
        for chunk, logits in rows:
            # In blocks of columns, since on the CPU a sum converts all of its terms to int64 before.
            of_target = rows_in(whole.target_logit, chunk).unsqueeze(1)
            larger[chunk] = sum((block > of_target).sum(1) for block in torch.split(logits, _BLOCK, 1))
            del logits
        rank = torch.where(found, problem.ranks.sum_(larger, "ranks of targets"), -1)
    return Statistics(top1, argmax, rank)
