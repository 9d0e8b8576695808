"""The public functions for DTensors: what their placements say is what :mod:`.functional` is told in words.

========================  ==============================  ==============================================================
on a mesh dimension       input (tokens) or logits        then its ranks
========================  ==============================  ==============================================================
weight ``Shard(0)``       ``Replicate``                   share out the classes; the gradient of input is summed
weight ``Shard(0)``       ``Shard`` of tokens, Partial    gather the tokens, and share out the classes; the gradient of
                                                          input is summed and scattered
weight ``Replicate``      ``Shard`` of tokens             have tokens of their own; gradients of weight and f are summed
weight ``Replicate``      ``Replicate``                   do the same
logits ``Shard(V)``                                       share out the classes
logits ``Shard`` else                                     have tokens of their own; the gradient of f is summed
========================  ==============================  ==============================================================

A result that all ranks have whole is a plain tensor. One of tokens that are shared out is a DTensor placed as they are,
and so is one that has the classes. A mean or sum is one of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends import BackendName
from ..checks import IGNORE_INDEX, Reduction, ZLossDivisor, check_temperature, check_transform
from ..functional import Losses, TokenStatistics
from ..groups import Head, LossOptions
from ..linear import HeadCall
from ..sampling import perturbed_argmax
from ..token_log_prob import OutputName, TokenLogProb
from ..transforms import MonotonicTransform
from . import checked
from .collectives import with_summed_gradient
from .losses import Layout
from .placements import (
    Placed,
    layout_of,
    local_head,
    local_logits,
    local_target,
    placed_head,
    placed_logits,
    replicated,
)


def _refused(others: dict[str, Any], function: str) -> None:
    """An error for an option that only a single device has, unless it is at its default."""
    for name, value in others.items():
        if isinstance(value, Tensor) or value not in (None, False, 0.0, "auto", "chunked"):
            raise NotImplementedError(f"{name} is not supported by {function} of DTensors, got {value!r}")


# --- the functions ----------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    linear_bias: Tensor | None = None,
    return_lse: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    temperature: float | Tensor = 1.0,
    z_loss_divisor: ZLossDivisor = "loss",
    backend: BackendName = "auto",
    chunk_rows: int | None = None,
    grad_in_forward: bool | None = None,
    **others: Any,
) -> Any:
    """As :func:`monosoftmax.linear_cross_entropy`."""
    _refused(others, "linear_cross_entropy")
    options = LossOptions(weight, ignore_index, label_smoothing, z_loss, return_lse)
    how = HeadCall(
        chunk_rows=chunk_rows or 0,
        grad_in_forward=grad_in_forward,
        temperature=temperature,
        z_loss_divisor=z_loss_divisor,
    )
    head = Head(input, linear_weight, linear_bias)
    return linear_losses(head, target, transform, options, how, reduction=reduction, backend=backend).result(return_lse)


def linear_losses(
    head: Head,
    target: Tensor,
    transform: MonotonicTransform | None,
    options: LossOptions,
    how: HeadCall,
    *,
    reduction: Reduction,
    backend: BackendName,
) -> Losses:
    """As :func:`monosoftmax.linear.linear_losses`."""
    if how.return_statistics or how.candidates is not None or how.method == "recompute":
        raise NotImplementedError("return_statistics, candidates and method are not supported for DTensors")
    placed = placed_head(head)
    local = local_head(head, placed)
    found = checked.head_losses(
        local,
        local_target(target, placed),
        transform,
        options._replace(weight=replicated(options.weight, placed)),
        how._replace(temperature=replicated(how.temperature, placed)),
        layout=layout_of(placed, local.input, head.linear_weight.shape[0], local.linear_weight.shape[0]),
        reduction=reduction,
        backend=backend,
    )
    return _whole_losses(found, placed, head.input.shape[:-1])


def _whole_losses(found: Losses, placed: Placed, shape: torch.Size) -> Losses:
    log_prob = None if found.log_prob is None else placed.whole(found.log_prob, shape)
    return found._replace(rows=placed.whole(found.rows, shape), lse=placed.whole(found.lse, shape), log_prob=log_prob)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    return_lse: bool = False,
    temperature: float | Tensor = 1.0,
    z_loss_divisor: ZLossDivisor = "loss",
    backend: BackendName = "auto",
    **others: Any,
) -> Any:
    """As :func:`monosoftmax.cross_entropy`."""
    _refused(others, "cross_entropy")
    class_dim = 0 if input.dim() == 1 else 1
    placed = placed_logits(input, class_dim)
    local = local_logits(input, placed, class_dim)
    found = checked.losses_of_logits(
        local,
        local_target(target, placed, class_dim=class_dim),
        transform,
        LossOptions(replicated(weight, placed), ignore_index, label_smoothing, z_loss, return_lse),
        HeadCall(temperature=replicated(temperature, placed), z_loss_divisor=z_loss_divisor),
        layout=layout_of(placed, local, input.shape[class_dim], local.shape[class_dim]),
        reduction=reduction,
        backend=backend,
    )
    of_tokens = placed._replace(tokens={each: dim - (dim > class_dim) for each, dim in placed.tokens.items()})
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    return _whole_losses(found, of_tokens, shape).result(return_lse)


def log_softmax(
    input: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    backend: BackendName = "auto",
) -> Tensor:
    """As :func:`monosoftmax.log_softmax`; placed as ``input``."""
    columns = input.dim() - 1
    placed = placed_logits(input, columns)
    local = local_logits(input, placed, columns)
    layout = layout_of(placed, local, input.shape[-1], local.shape[-1])
    log_p = checked.log_softmax(
        local, transform, dtype, replicated(temperature, placed), layout=layout, backend=backend
    )
    return placed.whole(log_p, input.shape, columns)


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    outputs: Sequence[OutputName] = ("log_prob", "entropy"),
    backend: BackendName = "auto",
    **others: Any,
) -> TokenLogProb:
    """As :func:`monosoftmax.linear_log_prob`."""
    _refused(others, "linear_log_prob")
    head = Head(input, linear_weight, linear_bias)
    placed = placed_head(head)
    local = local_head(head, placed)
    found = checked.log_probs(
        local,
        local_target(target, placed),
        transform,
        outputs,
        ignore_index=ignore_index,
        temperature=replicated(temperature, placed),
        layout=layout_of(placed, local.input, linear_weight.shape[0], local.linear_weight.shape[0]),
        backend=backend,
    )
    return _whole_numbers(found, placed, input.shape[:-1])


def linear_token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    **options: Any,
) -> TokenStatistics:
    """As :func:`monosoftmax.linear_token_statistics`."""
    names = TokenStatistics._fields
    with torch.no_grad():
        found = linear_log_prob(
            input, linear_weight, target, transform, outputs=cast("Sequence[OutputName]", names), **options
        )
    return TokenStatistics(*(getattr(found, name) for name in names))


def log_prob(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    outputs: Sequence[OutputName] = ("log_prob", "entropy"),
    backend: BackendName = "auto",
    **others: Any,
) -> TokenLogProb:
    """As :func:`monosoftmax.log_prob`."""
    _refused(others, "log_prob")
    columns = input.dim() - 1
    placed = placed_logits(input, columns)
    local = local_logits(input, placed, columns)
    found = checked.log_probs(
        local,
        local_target(target, placed),
        transform,
        outputs,
        ignore_index=ignore_index,
        temperature=replicated(temperature, placed),
        layout=layout_of(placed, local, input.shape[-1], local.shape[-1]),
        backend=backend,
    )
    return _whole_numbers(found, placed, input.shape[:-1])


def _whole_numbers(found: TokenLogProb, placed: Placed, shape: torch.Size) -> TokenLogProb:
    return TokenLogProb(*(None if each is None else placed.whole(each, shape) for each in found))


# --- what a layer does with all classes -------------------------------------------------------------------------------


def linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """The logits of a layer, (..., V), placed as the weight and the tokens are."""
    head = Head(input, linear_weight, linear_bias)
    placed = placed_head(head, ("weight", "bias"))
    x, weight, bias = local_head(head, placed)
    if not placed.scatters:
        x = with_summed_gradient(x, placed.vocabulary(), "the gradient of input")
    for others in placed.token_ranks():
        weight = with_summed_gradient(weight, others, "the gradient of weight")
        bias = None if bias is None else with_summed_gradient(bias, others, "the gradient of bias")
    shape = (*input.shape[:-1], linear_weight.shape[0])
    return placed.whole(F.linear(x, weight, bias), shape, len(shape) - 1)


def argmax(logits: Tensor) -> Tensor:
    """The first class with the largest logit, (...)."""
    placed = placed_logits(logits, logits.dim() - 1)
    local = local_logits(logits.detach(), placed, logits.dim() - 1)
    layout = layout_of(placed, local, logits.shape[-1], local.shape[-1])
    if local.shape[-1] == 0:
        largest = local.new_full(local.shape[:-1], -torch.inf)
        place = torch.zeros_like(largest, dtype=torch.int64)
    else:
        largest, place = local.max(-1)
    return placed.whole(_best(largest, place, layout), logits.shape[:-1])


def sample(
    logits: Tensor,
    transform: MonotonicTransform | None,
    temperature: float | Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """A class of each row, (...), with the distribution softmax(f(z) / temperature)."""
    transform, columns = check_transform(transform), logits.dim() - 1
    placed = placed_logits(logits, columns)
    local = local_logits(logits.detach(), placed, columns)
    layout = layout_of(placed, local, logits.shape[-1], local.shape[-1])
    # Ranks that have the same seed must not have the same noise, and ranks that do the same must have it.
    where = generator.device if generator is not None else torch.device("cpu")
    seed = int(torch.randint(2**62, (), generator=generator, device=where))
    for ranks in (layout.ranks, *layout.tokens):
        seed = (seed * 1_000_003 + ranks.rank + 1) % 2**62
    own = torch.Generator(local.device).manual_seed(seed)
    rows = local.reshape(-1, local.shape[-1])
    if rows.shape[1] == 0:
        largest = rows.new_full(rows.shape[:1], -torch.inf, dtype=torch.float64)
        place = torch.zeros_like(largest, dtype=torch.int64)
    else:
        tau = check_temperature(replicated(temperature, placed), rows)
        largest, place = perturbed_argmax(rows, transform, tau, own)
    shape = local.shape[:-1]
    return placed.whole(_best(largest.reshape(shape), place.reshape(shape), layout), logits.shape[:-1])


def _best(largest: Tensor, place: Tensor, layout: Layout) -> Tensor:
    """The class of the largest number of all ranks, the first of equals, by one collective."""
    if layout.ranks.size == 1:
        return place + layout.start
    # float64 has every class number, and every number of the other types.
    both = layout.ranks.gather(torch.stack([largest.double(), (place + layout.start).double()]), "the largest")
    found = both[:, 0].argmax(0, keepdim=True)
    return both[:, 1].gather(0, found).squeeze(0).long()
