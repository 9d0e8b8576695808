"""The classes that a rank has, and what the ranks of a group tell each other of the rows of their logits.

A rank that has the columns s of a row finds

    largest_s = max_j y_j,   total_s = sum_j exp(y_j - largest_s)

and with ``largest``, the largest of all ranks, the numbers of the whole row are sums over the ranks:

    total         = sum_s total_s exp(largest_s - largest)                      lse = largest + log total
    log p(target) = sum_s [s has the target] (y_t - largest) - log total
    moment        = sum_s total_s exp(largest_s - largest) (moment_s + largest - largest_s) / total
                  = sum_j p_j (largest - y_j)                                   entropy = log total + moment
    spread        = sum_s sum_j w_j (largest - y_j) + W log total               = -sum_j w_j log p_j, W = sum_j w_j

All terms of a sum have one sign, so that p next to 1 keeps its log p, and an entropy next to 0 its digits. Two
all-reduces exchange everything: one takes the largest, one the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .collectives import Ranks

#: Stands for a target that another rank has, or that is ignored. The kernels ignore it.
ELSEWHERE = -100


class Shard(NamedTuple):
    """The classes from ``start`` to ``stop`` - 1, of ``classes`` that the ranks of a group share out."""

    start: int
    stop: int
    classes: int

    def has(self, target: Tensor) -> Tensor:
        """Whether each target is among these classes."""
        return (target >= self.start) & (target < self.stop)

    def places(self, target: Tensor, ignore_index: int) -> Tensor:
        """``target`` as places among these classes, and ELSEWHERE."""
        here = self.has(target) & (target != ignore_index)
        return torch.where(here, target - self.start, ELSEWHERE)


class LocalNumbers(NamedTuple):
    """What the columns of one rank say of its rows, [n] each; None where nobody asks."""

    largest: Tensor
    #: 0 where all y are -inf, and without columns. ``largest`` is any small number then, and where all are NaN.
    total: Tensor
    #: y of the target minus ``largest``, where this rank has the target.
    target_gap: Tensor
    #: sum_j p_j (largest - y_j), with p and the sum over these columns.
    moment: Tensor | None = None
    #: sum_j w_j (largest - y_j)
    spread: Tensor | None = None
    largest_logit: Tensor | None = None
    target_logit: Tensor | None = None
    #: The class of the largest logit among all classes, int64.
    argmax: Tensor | None = None


class WholeNumbers(NamedTuple):
    """The numbers of whole rows, [n] each, the same bits on all ranks; None where nobody asks."""

    #: As ``RowKernels`` takes them: [2, n], or with the moment [3, n].
    row_stats: Tensor
    #: It means nothing where no rank has the target.
    log_prob: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    spread: Tensor | None = None
    largest_logit: Tensor | None = None
    target_logit: Tensor | None = None


class Weights(NamedTuple):
    """The class weights of a spread: sums over the columns of this rank, and over all columns, 0-dim."""

    of_shard: Tensor
    of_all: Tensor


def merged(local: LocalNumbers, here: Tensor, weights: Weights | None, ranks: Ranks) -> WholeNumbers:
    """The numbers of whole rows, by two all-reduces. ``here`` says whether this rank has the target of each row."""
    # A collective that takes the largest may lose a NaN. The sums carry it.
    maxima = [each for each in (local.largest, local.largest_logit) if each is not None]
    greatest = ranks.max_(
        torch.stack([torch.where(each.isnan(), torch.inf, each) for each in maxima]), "largest logits"
    )
    largest = greatest[0]
    # A rank whose y are all -inf adds nothing, also where all ranks say so, and inf - inf would be NaN.
    empty = local.total == 0
    below = torch.where(empty, torch.inf, largest - local.largest)
    mass = torch.where(empty, 0.0, local.total * (-below).exp())
    parts = [mass, torch.where(here, torch.where(empty, -torch.inf, local.target_gap - below), 0.0)]
    if local.moment is not None:
        parts.append(torch.where(mass == 0, 0.0, mass * (local.moment + below)))
    if local.spread is not None:
        assert weights is not None
        parts.append(_seen_from(local.spread, weights.of_shard, below))
    if local.target_logit is not None:
        parts.append(torch.where(here, local.target_logit, 0.0))
    total, target_gap, *more = ranks.sum_(torch.stack(parts), "sums of rows").unbind(0)
    # A row of -inf alone has no distribution.
    log_total = torch.where(total == 0, torch.nan, total.log())
    stats, entropy, spread = [largest, total], None, None
    if local.moment is not None:
        moment = more.pop(0) / total
        stats.append(moment)
        entropy = log_total + moment
    if local.spread is not None:
        assert weights is not None
        spread = _seen_from(more.pop(0), weights.of_all, log_total)
    return WholeNumbers(
        row_stats=torch.stack(stats),
        log_prob=target_gap - log_total,
        lse=torch.where(total == 0, -torch.inf, largest + log_total),
        entropy=entropy,
        spread=spread,
        largest_logit=greatest[1] if local.largest_logit is not None else None,
        target_logit=more.pop(0) if local.target_logit is not None else None,
    )


def _seen_from(spread: Tensor, weight: Tensor, distance: Tensor) -> Tensor:
    """``spread`` from a number that is larger by ``distance``. Columns without weight add 0, also over infinity."""
    return spread + torch.where(weight == 0, 0.0, weight * distance)
