"""The losses of tokens whose classes, or which themselves, are shared out among ranks; arguments are checked before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import BackendName, Call, Operation, choose
from ..checks import check_temperature
from ..functional import Losses, for_kernels, rows_for_kernel, typed
from ..groups import Head, LossOptions, Transform
from ..head_products import chunk_rows
from ..linear import autocast_input
from ..reductions import normalizer
from ..transforms import MonotonicTransform
from ..transforms.base import arithmetic_dtype, coefficients_of
from . import vocabulary
from .agreement import UNKNOWN, Facts, agree, checksum, checksum_of_tensor, even_shard
from .collectives import Ranks, is_debugging, summed
from .shards import Shard
from .vocabulary import Asked, ChunkLoss, Numbers, Problem, Statistics, Sums


class Layout(NamedTuple):
    """How a call is shared out."""

    ranks: Ranks
    start: int
    #: The number of all classes; None: the ranks tell each other.
    classes: int | None
    sums: Sums = Sums()
    #: The ranks that have other tokens, over which a loss is summed, and a mean is one of all.
    tokens: Ranks | None = None
    #: Whether the ranks compare their arguments. If not, ``classes`` must be given.
    check: bool = True


def checks_by_default(input: Tensor) -> bool:
    """Whether the ranks compare their arguments unless they are told not to: where nothing waits, and for debugging."""
    return not isinstance(input, Tensor) or input.device.type == "cpu" or is_debugging()


class Rule(NamedTuple):
    """A loss and its reduction, as :func:`monosoftmax.cross_entropy` defines them, with weights of all classes."""

    options: LossOptions
    reduction: str = "none"
    z_loss_divisor: str = "loss"


class Tokens(NamedTuple):
    """Rows and their targets: logits [N, V of this rank], or a head with the weight of these classes."""

    rows: Tensor | Head
    target: Tensor
    transform: MonotonicTransform
    temperature: float | Tensor = 1.0

    @property
    def input(self) -> Tensor:
        return self.rows.input if isinstance(self.rows, Head) else self.rows

    @property
    def columns(self) -> int:
        return self.rows.linear_weight.shape[0] if isinstance(self.rows, Head) else self.rows.shape[1]


def problem_of(
    tokens: Tokens,
    layout: Layout,
    operation: Operation,
    rule: Rule,
    asked: Asked,
    *,
    backend: BackendName,
    rows_in_chunk: int = 0,
) -> tuple[Problem, tuple[Tensor | None, ...]]:
    """The checked call, and its operands. Here the ranks compare their arguments."""
    input, transform = tokens.input, tokens.transform
    call = Call(operation, input.device.type, input.dtype, transform, classes=tokens.columns)
    chosen, tau = choose(call, backend), check_temperature(tokens.temperature, input)
    rows = autocast_input(input) if isinstance(tokens.rows, Head) else rows_for_kernel(input)
    if chosen == "reference":
        coefficients = coefficients_of(transform, rows.device, arithmetic_dtype(rows.dtype))
        of_kernels = Transform(coefficients, "", [], [], tau)
    else:
        of_kernels = for_kernels(transform, rows, tau)
    operands: tuple[Tensor | None, ...] = (rows, of_kernels.coefficients)
    if isinstance(tokens.rows, Head):
        operands = (rows, *tokens.rows[1:], of_kernels.coefficients)
    classes = layout.classes
    if layout.check:
        classes = agree(layout.ranks, _facts(tokens, layout, rule, asked, operands=operands, of_kernels=of_kernels))
    assert classes is not None
    shard = even_shard(layout.ranks, layout.start, tokens.columns, classes)
    most = -(-classes // layout.ranks.size)  # of an even share, so that all ranks have the same chunks
    return Problem(
        ranks=layout.ranks,
        shard=shard,
        target=tokens.target,
        f=transform,
        temperature=tau,
        transform=of_kernels,
        ignore_index=rule.options.ignore_index,
        weight=typed(rule.options, rows).weight if asked.spread else None,
        backend=chosen,
        rows_in_chunk=rows_in_chunk or chunk_rows(most, rows.dtype, rows.device.type),
        asked=asked,
        sums=layout.sums,
    ), operands


def _facts(
    tokens: Tokens,
    layout: Layout,
    rule: Rule,
    asked: Asked,
    *,
    operands: tuple[Tensor | None, ...],
    of_kernels: Transform,
) -> Facts:
    weight, f = rule.options.weight, of_kernels
    tau = 1.0 if f.temperature is None else float(f.temperature)
    options = (rule.options._replace(weight=None), rule.reduction, rule.z_loss_divisor, tuple(asked))
    weights = 0 if weight is None else checksum_of_tensor(weight)
    return Facts(
        start=layout.start,
        stop=layout.start + tokens.columns,
        classes=UNKNOWN if layout.classes is None else layout.classes,
        tokens=tokens.input.shape[0],
        features=tokens.input.shape[1] if isinstance(tokens.rows, Head) else 0,
        dtype=checksum(str(tokens.input.dtype)),
        target=checksum_of_tensor(tokens.target),
        transform=checksum(
            type(tokens.transform).__name__, f.name, f.constants, f.inner, tau, checksum_of_tensor(f.coefficients)
        ),
        options=checksum(options, weights),
        needed=checksum([torch.is_grad_enabled() and each is not None and each.requires_grad for each in operands]),
    )


def losses(
    tokens: Tokens,
    layout: Layout,
    rule: Rule,
    operation: Operation,
    *,
    backend: BackendName,
    rows_in_chunk: int = 0,
    grad_in_forward: bool | None = None,
) -> Losses:
    """The losses of the rows, lse, log p of the targets, and the mean or sum."""
    asked = Asked(spread=rule.options.label_smoothing > 0)
    problem, operands = problem_of(tokens, layout, operation, rule, asked, backend=backend, rows_in_chunk=rows_in_chunk)
    scales = _scales(rule, problem, layout)
    ahead: ChunkLoss | None = None
    if grad_in_forward is not False and scales is not None and _takes_gradients_ahead(operands):

        def ahead(numbers: Numbers, chunk: slice) -> Tensor:
            losses, z_losses = losses_of(numbers, problem.target[chunk], rule, problem.shard)
            return losses.sum() * scales[0] + z_losses.sum() * scales[1]

    total, numbers, _ = vocabulary.token_numbers(problem, operands, ahead)
    of_rows, z_losses = losses_of(numbers, problem.target, rule, problem.shard)
    reduced: Tensor | None = None
    if scales is not None:
        reduced = total if ahead is not None else of_rows.sum() * scales[0] + z_losses.sum() * scales[1]
        if layout.tokens is not None:
            reduced = summed(reduced, layout.tokens, "losses")
    return Losses(of_rows + z_losses, numbers.lse, reduced, numbers.log_prob)


def _takes_gradients_ahead(operands: tuple[Tensor | None, ...]) -> bool:
    """Whether there is a head whose products they save, in a type whose gradients need no scale of all tokens."""
    needs = torch.is_grad_enabled() and any([each is not None and each.requires_grad for each in operands])
    return needs and len(operands) > 2 and operands[0] is not None and operands[0].dtype != torch.float16


def losses_of(numbers: Numbers, target: Tensor, rule: Rule, shard: Shard) -> tuple[Tensor, Tensor]:
    """The losses of tokens without their z-losses, and the z-losses; both 0 where the target is ignored."""
    weight, ignore_index, label_smoothing, z_loss, _ = rule.options
    valid, loss = target != ignore_index, -numbers.log_prob
    if weight is not None:
        inside = (target >= 0) & (target < shard.classes)
        loss = loss * torch.where(valid, weight.to(loss.dtype)[torch.where(inside, target, 0)], 0.0)
    if label_smoothing > 0:
        spread = torch.where(valid, numbers.spread, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing / shard.classes * spread
    if z_loss == 0:
        return loss, torch.zeros_like(loss)
    return loss, z_loss * torch.where(valid, numbers.lse, 0.0).square()


def _scales(rule: Rule, problem: Problem, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """The factors of the sum of the losses and of the sum of the z-losses; None without a reduction."""
    if rule.reduction == "none":
        return None
    dtype, target = problem.transform.coefficients.dtype, problem.target
    options = rule.options
    if options.weight is not None:
        options = options._replace(weight=options.weight.to(dtype))
    divisor = normalizer(rule.reduction, target, options, problem.shard.classes, dtype)
    assert divisor is not None
    rows = divisor
    if rule.z_loss_divisor == "rows" and rule.reduction == "mean":
        rows = (target != options.ignore_index).sum().to(dtype)
    if rule.reduction == "mean" and layout.tokens is not None:
        divisor, rows = layout.tokens.sum_(torch.stack([divisor, rows]), "the count of tokens").unbind(0)
    return divisor.reciprocal(), rows.reciprocal()


def statistics(
    tokens: Tokens, layout: Layout, ignore_index: int, asked: Asked, *, operation: Operation, backend: BackendName
) -> tuple[Numbers, Statistics]:
    """log p, entropy and lse of tokens, with gradients, and what else is asked for."""
    rule = Rule(LossOptions(None, ignore_index, 0.0, 0.0, True))
    problem, operands = problem_of(tokens, layout, operation, rule, asked, backend=backend)
    _, numbers, found = vocabulary.token_numbers(problem, operands)
    return numbers, found
