"""The numbers of tokens whose logits are shared out among ranks by columns, and their derivatives: for every loss.

A rank's columns go through the row kernels that a single device has. For the numbers of rows they see its columns as if
there were no others, and for the gradients they get the row_stats of whole rows. A row whose target another rank has is
ignored by the kernel, which gives such a row the gradient of lse: with upstream gradients a of log p(target), h of lse,
e of the entropy and s of the spread,

    dL/dy_j = a (1[j = t] - p_j) + h p_j - e p_j (log p_j + H) + s (W p_j - w_j)

    kernel:   loss = -a, lse = h + s W       where the rank has the target
              loss =  0, lse = h + s W - a   where it has not

and -s w_j is the part of label smoothing of a call with label_smoothing = 1, where the column of the target is put in
afterwards. So no kernel knows about ranks, and every backend takes part.

Two ways through the rows: all gradients ahead, chunk by chunk, for which the ranks exchange the numbers of each chunk
(three products); or the numbers of all rows first, exchanged at once, and the logits again for the gradients (four).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gradients_ahead
from .._dispatch import keeps_graph
from ..float16 import float16_power
from ..groups import Head, HeadGradients, LossOptions, TokenStatistics, Transform, Upstream
from ..head_products import rows_in, sum_of_chunks
from ..row_kernels import row_kernels
from ..transforms import MonotonicTransform
from .collectives import Ranks
from .reference_rows import ReferenceRows
from .rows import GivenRows, Rows, rows_of_head
from .shards import ELSEWHERE, LocalNumbers, Shard, Weights, WholeNumbers, merged


class Numbers(NamedTuple):
    """What is differentiable of the tokens, [n] each; empty where nobody asks."""

    #: 0 where the target is ignored, NaN where it is no class.
    log_prob: Tensor
    lse: Tensor
    entropy: Tensor
    #: -sum_j w_j log p_j
    spread: Tensor


class Statistics(NamedTuple):
    """What is not differentiable of the tokens, [n] each; empty where nobody asks."""

    is_top1: Tensor
    argmax: Tensor
    rank: Tensor


class Asked(NamedTuple):
    """What a call asks of the tokens beside log p and lse."""

    entropy: bool = False
    spread: bool = False
    argmax: bool = False
    is_top1: bool = False
    rank: bool = False

    @property
    def statistics(self) -> bool:
        return self.entropy or self.argmax or self.is_top1 or self.rank


class Sums(NamedTuple):
    """The ranks over which gradients are summed, beside the gradient of the coefficients over the classes' ranks."""

    #: Whether the gradient of the input is summed over the ranks of the classes, or left as the part of this rank.
    input: bool = True
    #: The ranks that have other tokens, over which the gradients of weight, bias and coefficients are summed, too.
    tokens: Sequence[Ranks] = ()


class Problem(NamedTuple):
    """A call, checked, for rows [N, ...]."""

    ranks: Ranks
    shard: Shard
    #: [N], of all classes.
    target: Tensor
    f: MonotonicTransform
    temperature: Tensor | None
    #: As the kernels take f. Its coefficients have no gradient: those among the operands have.
    transform: Transform
    ignore_index: int
    #: [V], in the type of the arithmetic.
    weight: Tensor | None
    backend: str
    rows_in_chunk: int
    asked: Asked = Asked()
    sums: Sums = Sums()

    def kernels(self) -> Any:
        return ReferenceRows(self.f, self.temperature) if self.backend == "reference" else row_kernels(self.backend)

    def shard_weight(self) -> Tensor | None:
        return None if self.weight is None else self.weight[self.shard.start : self.shard.stop].contiguous()

    def weights(self) -> Weights:
        """The sums of the class weights, as tensors that nothing waits for."""
        own, every = self.shard_weight(), self.weight
        if own is None or every is None:
            count, like = self.shard.stop - self.shard.start, self.transform.coefficients
            return Weights(like.new_full((), count), like.new_full((), self.shard.classes))
        return Weights(own.sum(dtype=torch.float64).to(own.dtype), every.sum(dtype=torch.float64).to(every.dtype))


#: A loss of the tokens of a chunk of rows, 0-dim.
ChunkLoss = Callable[[Numbers, slice], Tensor]

_PLAIN = LossOptions(None, ELSEWHERE, 0.0, 0.0, True)

#: Columns in a block that the rank of a target is counted in.
_BLOCK = 2048


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
        with torch.autocast(operands[0].device.type, enabled=False):  # type: ignore[union-attr]
            if loss_of is None:
                whole, argmax = _numbers_of_all(problem, operands)
                total, of_loss = whole.lse.new_empty(0), whole.lse.new_empty(0)
                ahead: list[Tensor] = []
            else:
                whole, total, of_loss, ahead = _with_gradients(problem, operands, needed, loss_of)
                argmax = problem.target.new_empty(0)
            statistics = _statistics(problem, operands, whole, argmax)
        gradients_ahead.let_wait(ahead)
        ctx.ahead = len(ahead)
        ctx.save_for_backward(whole.row_stats, of_loss, *ahead, *operands)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics, *([total] if loss_of is None else []))
        return total, *_of_tokens(problem, whole, slice(0, len(problem.target))), *statistics

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *grads: Tensor | None) -> Any:
        row_stats, of_loss, *saved = ctx.saved_tensors
        ahead, operands = saved[: ctx.ahead], saved[ctx.ahead :]
        problem, needed, nothing = ctx.problem, ctx.needed, (None, None, None)
        upstream = Numbers(*grads[:4])  # type: ignore[arg-type]
        if grad_total is None and all(each is None for each in upstream):
            return (*nothing, *[None] * len(operands))
        with torch.no_grad(), torch.autocast(row_stats.device.type, enabled=False):
            if ahead and all(each is None for each in upstream):
                assert grad_total is not None
                gradients = _scaled(problem, ahead, grad_total)
            else:
                if grad_total is not None and of_loss.numel() > 0:
                    upstream = _plus(upstream, of_loss * grad_total)
                gradients = _gradients(problem, operands, needed, upstream=upstream, row_stats=row_stats)
            wanted = [operand for operand, need in zip(operands, needed, strict=True) if need]
            cast = _summed(problem, gradients, [each.dtype for each in wanted], needed)
        waiting = iter(gradients_ahead.differentiated_once(cast, wanted, "monosoftmax.distributed"))
        return (*nothing, *[next(waiting) if need else None for need in needed])


def _rows(problem: Problem, operands: Sequence[Tensor | None], needed: Sequence[bool]) -> Rows:
    *parts, _ = operands
    if len(parts) == 1:
        assert parts[0] is not None
        return GivenRows(parts[0], needed[:1])
    input, weight, bias = parts
    assert input is not None and weight is not None
    return rows_of_head(Head(input, weight, bias), needed[:3], problem.rows_in_chunk)


# --- the numbers of rows ----------------------------------------------------------------------------------------------


def _numbers_of_all(problem: Problem, operands: Sequence[Tensor | None]) -> tuple[WholeNumbers, Tensor]:
    """The numbers of all rows, for which the ranks meet once; and the argmax."""
    rows, transform = _rows(problem, operands, (False,) * len(operands)), problem.transform
    kept: list[bool] = []
    gathered = None
    for chunk, logits in rows:
        local = _local_numbers(problem, transform, logits, chunk)
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
    return _merged(problem, local, problem.target)


def _merged(problem: Problem, local: LocalNumbers, target: Tensor) -> tuple[WholeNumbers, Tensor]:
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


def _local_numbers(problem: Problem, transform: Transform, logits: Tensor, chunk: slice) -> LocalNumbers:
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
        loss, _, row_stats, *_ = kernels.cross_entropy(logits, places, transform, _PLAIN)
        largest, total = row_stats.unbind(0)
        return LocalNumbers(largest, total, (total.log() - loss).clamp(max=0.0))
    options, of_spread = _of_spread(problem), _targets_of_spread(problem, target)
    loss, _, row_stats, *_ = kernels.cross_entropy(logits, of_spread, transform, options)
    largest, total = row_stats.unbind(0)
    # A sum of w_j (largest - y_j), from one of w_j (lse - y_j).
    own = problem.weights().of_shard
    without = torch.where(own == 0, 0.0, torch.inf)
    spread = torch.where(total == 0, without, loss * count - own * total.log())
    y = _target_y(kernels, transform, _target_logits(logits, places))
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
    return _asked_of(problem.asked, numbers, largest_logit, _target_logits(logits, places), best + problem.shard.start)


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


def _target_logits(logits: Tensor, places: Tensor) -> Tensor:
    """The logits of targets, in the type of the arithmetic; of ELSEWHERE, those of any column."""
    z = logits.gather(1, places.clamp(min=0).unsqueeze(1)).squeeze(1)
    return z if z.dtype == torch.float64 else z.float()


def _target_y(kernels: Any, transform: Transform, z: Tensor) -> Tensor:
    """y of the logits ``z`` [n], with the bits that the kernels give it in its row, from a row of its own for each.

    Where a target has the largest y of its row, p next to 1 needs a distance of 0.
    """
    column = z.new_zeros(len(z), dtype=torch.int64)
    return kernels.cross_entropy(z.unsqueeze(1), column, transform, _PLAIN)[2][0]  # type: ignore[no-any-return]


def _of_single_logits(
    kernels: Any, transform: Transform, z: Tensor, dy: Tensor, *, here: Tensor, output_mask: tuple[bool, bool]
) -> Tensor:
    """dL/dz of the logits ``z`` [n], or the gradient of the coefficients, from dL/dy: as rows of which p is 0.

    What is not ``here`` is not read, since it may be anything.
    """
    column = torch.where(here, 0, ELSEWHERE)
    far = torch.stack([torch.full_like(dy, torch.finfo(dy.dtype).max), torch.ones_like(dy)])
    results = kernels.cross_entropy(
        z.unsqueeze(1), column, transform, _PLAIN, upstream=Upstream(-dy), row_stats=far, output_mask=output_mask
    )
    found: Tensor = results[3].squeeze(1) if output_mask[0] else results[4]
    return found


def _of_spread(problem: Problem) -> LossOptions:
    return LossOptions(problem.shard_weight(), ELSEWHERE, 1.0, 0.0, True)


def _targets_of_spread(problem: Problem, target: Tensor) -> Tensor:
    """Any column for all rows that are not ignored: with label_smoothing = 1 the target has no share of its own."""
    return torch.where(target == problem.ignore_index, ELSEWHERE, torch.zeros_like(target))


def _of_tokens(problem: Problem, whole: WholeNumbers, chunk: slice) -> Numbers:
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


def _statistics(problem: Problem, operands: Sequence[Tensor | None], whole: WholeNumbers, argmax: Tensor) -> Statistics:
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
        rows = _rows(problem, operands, (False,) * len(operands))
        larger = torch.empty_like(target)
        for chunk, logits in rows:
            # In blocks of columns, since on the CPU a sum converts all of its terms to int64 before.
            of_target = rows_in(whole.target_logit, chunk).unsqueeze(1)
            larger[chunk] = sum((block > of_target).sum(1) for block in torch.split(logits, _BLOCK, 1))
            del logits
        rank = torch.where(found, problem.ranks.sum_(larger, "ranks of targets"), -1)
    return Statistics(top1, argmax, rank)


# --- gradients --------------------------------------------------------------------------------------------------------


def _with_gradients(
    problem: Problem, operands: Sequence[Tensor | None], needed: Sequence[bool], loss_of: ChunkLoss
) -> tuple[WholeNumbers, Tensor, Tensor, list[Tensor]]:
    """The numbers of all rows, the sum of ``loss_of``, its gradients for the numbers [4, N], and for the operands."""
    rows, transform = _rows(problem, operands, needed), problem.transform
    dtype, kept = transform.coefficients.dtype, 5 if problem.asked.spread else 4
    gathered = rows.gathered((dtype, kept), (dtype, 4))
    total, grad_coefficients = transform.coefficients.new_zeros(()), None
    for chunk, logits in rows:
        local = _local_numbers(problem, transform, logits, chunk)
        whole, _ = _merged(problem, local, rows_in(problem.target, chunk))
        with torch.enable_grad():
            leaves = Numbers(*(each.detach().requires_grad_() for each in _of_tokens(problem, whole, chunk)))
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


def _gradients(
    problem: Problem,
    operands: Sequence[Tensor | None],
    needed: Sequence[bool],
    *,
    upstream: Numbers,
    row_stats: Tensor,
) -> list[Tensor]:
    """The gradients for the operands, of this rank's columns, from the logits again."""
    rows, transform = _rows(problem, operands, needed), problem.transform
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
            logits, places, transform, _PLAIN, upstream=of_kernel, row_stats=row_stats, **wanted
        )
        if rows.needs_logit_gradient:
            rows.add_gradients(chunk, results[3])
        return results[4] if need_coefficients else zeros.new_empty(0)
    weights = problem.weights()
    z = _target_logits(logits, places)
    lse = h - a + s * (weights.of_all - weights.of_shard)
    results = kernels.cross_entropy(
        logits, _targets_of_spread(problem, target), transform, _of_spread(problem),
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
    p = (_target_y(kernels, transform, z) - row_stats[0]).exp() / row_stats[1]
    w = 1.0 if own is None else own[places.clamp(min=0)]
    dy = a * (1.0 - p) + h * p + s * (problem.weights().of_all * p - w)
    dz = _of_single_logits(kernels, transform, z, dy, here=here, output_mask=(True, False))
    of_target = _of_single_logits(kernels, transform, z, a, here=here, output_mask=(False, True))
    return dz, of_target


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
