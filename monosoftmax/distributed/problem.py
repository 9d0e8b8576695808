"""A call that is shared out among ranks, checked: what :mod:`.row_numbers` and :mod:`.row_gradients` work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..groups import Head, LossOptions, Transform
from ..row_kernels import row_kernels
from ..transforms import MonotonicTransform
from .collectives import Ranks
from .reference_rows import ReferenceRows
from .rows import GivenRows, Rows, rows_of_head
from .shards import ELSEWHERE, Shard, Weights


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

PLAIN = LossOptions(None, ELSEWHERE, 0.0, 0.0, True)


def rows_of_operands(problem: Problem, operands: Sequence[Tensor | None], needed: Sequence[bool]) -> Rows:
    *parts, _ = operands
    if len(parts) == 1:
        assert parts[0] is not None
        return GivenRows(parts[0], needed[:1])
    input, weight, bias = parts
    assert input is not None and weight is not None
    return rows_of_head(Head(input, weight, bias), needed[:3], problem.rows_in_chunk)


def target_logits(logits: Tensor, places: Tensor) -> Tensor:
    """The logits of targets, in the type of the arithmetic; of ELSEWHERE, those of any column."""
    z = logits.gather(1, places.clamp(min=0).unsqueeze(1)).squeeze(1)
    return z if z.dtype == torch.float64 else z.float()


def target_y(kernels: Any, transform: Transform, z: Tensor) -> Tensor:
    """y of the logits ``z`` [n], with the bits that the kernels give it in its row, from a row of its own for each.

    Where a target has the largest y of its row, p next to 1 needs a distance of 0.
    """
    column = z.new_zeros(len(z), dtype=torch.int64)
    return kernels.cross_entropy(z.unsqueeze(1), column, transform, PLAIN)[2][0]  # type: ignore[no-any-return]


def options_of_spread(problem: Problem) -> LossOptions:
    return LossOptions(problem.shard_weight(), ELSEWHERE, 1.0, 0.0, True)


def targets_of_spread(problem: Problem, target: Tensor) -> Tensor:
    """Any column for all rows that are not ignored: with label_smoothing = 1 the target has no share of its own."""
    return torch.where(target == problem.ignore_index, ELSEWHERE, torch.zeros_like(target))
