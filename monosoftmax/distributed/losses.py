"""The losses of tokens whose classes, or which themselves, are shared out among ranks; arguments are checked before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
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
from .agreement import UNKNOWN, Facts, agree, checksum, checksum_of_tensor, shard_of
from .collectives import Ranks, is_debugging, summed
from .problem import Asked, ChunkLoss, Numbers, Problem, Statistics, Sums
from .shards import Shard


class Layout(NamedTuple):
    """How a call is shared out."""

    ranks: Ranks
    start: int
    #: The number of all classes; None: the ranks tell each other.
    classes: int | None
    sums: Sums = Sums()
    #: The ranks that have other tokens, over which a loss is summed, and a mean is one of all.
    tokens: Sequence[Ranks] = ()
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


class TokenCall(NamedTuple):
    """Tokens and what computes on them: the backend, and the operands of its kernels."""

    tokens: Tokens
    backend: str
    #: As the kernels take f. Its coefficients are the last operand.
    transform: Transform
    temperature: Tensor | None
    #: (logits, coefficients), or (input, weight, bias, coefficients).
    operands: tuple[Tensor | None, ...]


def token_call(tokens: Tokens, operation: Operation, backend: BackendName) -> TokenCall:
    """The call of a backend that can take it."""
    input, f = tokens.input, tokens.transform
    call = Call(operation, input.device.type, input.dtype, f, classes=tokens.columns)
    chosen, tau = choose(call, backend), check_temperature(tokens.temperature, input)
    rows = autocast_input(input) if isinstance(tokens.rows, Head) else rows_for_kernel(input)
    if chosen == "reference":
        transform = Transform(coefficients_of(f, rows.device, arithmetic_dtype(rows.dtype)), "", [], [], tau)
    else:
        transform = for_kernels(f, rows, tau)
    of_head = tokens.rows[1:] if isinstance(tokens.rows, Head) else ()
    return TokenCall(tokens, chosen, transform, tau, (rows, *of_head, transform.coefficients))


def problem_of(
    call: TokenCall,
    layout: Layout,
    rule: Rule,
    asked: Asked,
    *,
    rows_in_chunk: int = 0,
    grad_in_forward: bool | None = None,
) -> tuple[Problem, tuple[Tensor | None, ...]]:
    """The problem and its operands. Here the ranks compare their arguments."""
    tokens, rows = call.tokens, call.operands[0]
    assert rows is not None
    classes = layout.classes
    if layout.check:
        classes = agree(layout.ranks, _facts(call, layout, rule, asked, way=(rows_in_chunk, grad_in_forward)))
    assert classes is not None
    target, ignored = tokens.target, rule.options.ignore_index
    reference.raise_if_any((target != ignored) & ((target < 0) | (target >= classes)), target, classes, ignored)
    most = -(-classes // layout.ranks.size)  # of an even share, so that all ranks have the same chunks
    return Problem(
        ranks=layout.ranks,
        shard=shard_of(layout.start, tokens.columns, classes),
        target=tokens.target,
        f=tokens.transform,
        temperature=call.temperature,
        transform=call.transform._replace(coefficients=call.transform.coefficients.detach()),
        ignore_index=rule.options.ignore_index,
        weight=typed(rule.options, rows).weight if asked.spread else None,
        backend=call.backend,
        rows_in_chunk=rows_in_chunk or chunk_rows(most, rows.dtype, rows.device.type),
        asked=asked,
        sums=layout.sums,
    ), call.operands


def _facts(call: TokenCall, layout: Layout, rule: Rule, asked: Asked, *, way: tuple[Any, ...]) -> Facts:
    """``way``: on what the number and the order of the collectives depend, too."""
    tokens, f, weight = call.tokens, call.transform, rule.options.weight
    tau = 1.0 if f.temperature is None else float(f.temperature)
    of_rule = (rule.options._replace(weight=None), 0 if weight is None else checksum_of_tensor(weight), *rule[1:])
    of_f = (type(tokens.transform).__name__, f.name, f.constants, f.inner, tau, checksum_of_tensor(f.coefficients))
    needed = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in call.operands]
    return Facts(
        start=layout.start,
        stop=layout.start + tokens.columns,
        classes=UNKNOWN if layout.classes is None else layout.classes,
        tokens=tokens.input.shape[0],
        features=tokens.input.shape[1] if isinstance(tokens.rows, Head) else 0,
        dtype=checksum(str(tokens.input.dtype)),
        target=checksum_of_tensor(tokens.target),
        transform=checksum(of_f),
        options=checksum(of_rule, tuple(asked), way, layout.sums.input, len(layout.tokens)),
        needed=checksum(needed),
    )


def losses(
    call: TokenCall,
    layout: Layout,
    rule: Rule,
    *,
    rows_in_chunk: int = 0,
    grad_in_forward: bool | None = None,
) -> Losses:
    """The losses of the rows, lse, log p of the targets, and the mean or sum."""
    asked = Asked(spread=rule.options.label_smoothing > 0)
    problem, operands = problem_of(
        call, layout, rule, asked, rows_in_chunk=rows_in_chunk, grad_in_forward=grad_in_forward
    )
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
        for others in layout.tokens:
            reduced = summed(reduced, others, "losses")
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
    if rule.reduction == "mean" and layout.tokens:
        counts = torch.stack([divisor, rows])
        for others in layout.tokens:
            counts = others.sum_(counts, "the count of tokens")
        divisor, rows = counts.unbind(0)
    return divisor.reciprocal(), rows.reciprocal()


def statistics(call: TokenCall, layout: Layout, ignore_index: int, asked: Asked) -> tuple[Numbers, Statistics]:
    """log p, entropy and lse of tokens, with gradients, and what else is asked for."""
    problem, operands = problem_of(call, layout, Rule(LossOptions(None, ignore_index, 0.0, 0.0, True)), asked)
    _, numbers, found = vocabulary.token_numbers(problem, operands)
    return numbers, found
