"""The calls of this package, checked: for plain tensors and for the local parts of DTensors.

An error of one rank before the ranks have met is an error of all: see :mod:`.agreement`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import outside_of_graphs
from ..backends import BackendName, Operation
from ..checks import (
    FLOATING_DTYPES,
    IGNORE_INDEX,
    Reduction,
    check_device,
    check_floating,
    check_head,
    check_head_options,
    check_ignore_index,
    check_loss_options,
    check_target,
    check_transform,
    check_z_loss_divisor,
)
from ..functional import Losses, reshaped, rows_of
from ..groups import Head, LossOptions
from ..linear import HeadCall
from ..token_log_prob import OutputName, TokenLogProb, asked_outputs, check_outputs
from ..transforms import MonotonicTransform
from ..transforms.base import arithmetic_dtype
from . import losses as of_ranks
from .agreement import together
from .log_softmax import log_softmax as log_softmax_of_ranks
from .losses import Layout, Rule, Tokens
from .problem import Asked


@outside_of_graphs
def head_losses(
    head: Head,
    target: Tensor,
    transform: MonotonicTransform | None,
    options: LossOptions,
    how: HeadCall,
    *,
    layout: Layout,
    reduction: Reduction,
    backend: BackendName,
) -> Losses:
    """The losses of the tokens of a head, in the shape of the targets; ``options.weight`` is that of all classes."""
    with together(layout.ranks, layout.check):
        transform, target = check_transform(transform), check_head(head, target, may_be_empty=True)
        options = options._replace(ignore_index=check_ignore_index(options.ignore_index))
        layout = _check_loss(layout, options, transform, head.input, reduction=reduction)
        check_z_loss_divisor(how.z_loss_divisor)
        check_head_options("auto", how.chunk_rows or None, 0.0, how.grad_in_forward, reduction)
        rows = head._replace(input=rows_of(head.input))
        tokens = Tokens(rows, target.reshape(-1), transform, how.temperature)
        call = of_ranks.token_call(tokens, "linear_cross_entropy", backend)
    found = of_ranks.losses(
        call, layout, Rule(options, reduction, how.z_loss_divisor), rows_in_chunk=how.chunk_rows,
        grad_in_forward=how.grad_in_forward,
    )  # fmt: skip
    return reshaped(found, target.shape)


@outside_of_graphs
def losses_of_logits(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None,
    options: LossOptions,
    how: HeadCall,
    *,
    layout: Layout,
    reduction: Reduction,
    backend: BackendName,
) -> Losses:
    """The same for logits (V,), (N, V) or (N, V, d1, ...) of this rank's classes."""
    with together(layout.ranks, layout.check):
        transform = check_transform(transform)
        check_floating("input", input)
        if input.dim() == 0:
            raise ValueError("input must have at least 1 dimension, (V,) or (N, V, ...), got a scalar")
        class_dim = 0 if input.dim() == 1 else 1
        shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
        target = _check_target(target, input, shape)
        options = options._replace(ignore_index=check_ignore_index(options.ignore_index))
        layout = _check_loss(layout, options, transform, input, reduction=reduction)
        check_z_loss_divisor(how.z_loss_divisor)
        rows = rows_of(input.movedim(class_dim, -1))
        tokens = Tokens(rows, target.reshape(-1), transform, how.temperature)
        call = of_ranks.token_call(tokens, "cross_entropy", backend)
    return reshaped(of_ranks.losses(call, layout, Rule(options, reduction, how.z_loss_divisor)), shape)


@outside_of_graphs
def log_softmax(
    input: Tensor,
    transform: MonotonicTransform | None,
    dtype: torch.dtype | None,
    temperature: float | Tensor,
    *,
    layout: Layout,
    backend: BackendName,
) -> Tensor:
    """log p of this rank's classes, in the shape of ``input``."""
    with together(layout.ranks, layout.check):
        transform = check_transform(transform)
        check_floating("input", input)
        if input.dim() == 0:
            raise ValueError("input must have at least 1 dimension, (..., V), got a scalar")
        dtype = arithmetic_dtype(input.dtype) if dtype is None else dtype
        if dtype not in FLOATING_DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        check_device("transform", transform, input.device)
        rows = rows_of(input)
        nobody = torch.full((len(rows),), IGNORE_INDEX, device=rows.device)
        rule = Rule(LossOptions(None, IGNORE_INDEX, 0.0, 0.0, True))
        call = of_ranks.token_call(Tokens(rows, nobody, transform, temperature), "log_softmax", backend)
    problem, (of_kernels, coefficients) = of_ranks.problem_of(call, layout, rule, Asked())
    assert of_kernels is not None and coefficients is not None
    return log_softmax_of_ranks(problem, of_kernels, coefficients, dtype).reshape(input.shape)


@outside_of_graphs
def log_probs(
    rows: Head | Tensor,
    target: Tensor,
    transform: MonotonicTransform | None,
    outputs: Sequence[OutputName],
    *,
    ignore_index: int,
    temperature: float | Tensor,
    layout: Layout,
    backend: BackendName,
) -> TokenLogProb:
    """What ``outputs`` name of the tokens of a head or of logits (..., V of this rank), in the shape of the targets."""
    with together(layout.ranks, layout.check):
        check_outputs(outputs)
        transform, ignore_index = check_transform(transform), check_ignore_index(ignore_index)
        operation: Operation = "linear_log_prob" if isinstance(rows, Head) else "log_prob"
        if isinstance(rows, Head):
            target, shape = check_head(rows, target, may_be_empty=True), rows.input.shape[:-1]
            flat: Head | Tensor = rows._replace(input=rows_of(rows.input))
        else:
            check_floating("input", rows)
            if rows.dim() == 0:
                raise ValueError("input must have at least 1 dimension, (..., V), got a scalar")
            shape = rows.shape[:-1]
            target, flat = _check_target(target, rows, shape), rows_of(rows)
        tokens = Tokens(flat, target.reshape(-1), transform, temperature)
        check_device("transform", transform, tokens.input.device)
        call = of_ranks.token_call(tokens, operation, backend)
    asked = Asked(
        entropy="entropy" in outputs, argmax="argmax" in outputs, is_top1="is_top1" in outputs, rank="rank" in outputs
    )
    numbers, found = of_ranks.statistics(call, layout, ignore_index, asked)
    named = {**numbers._asdict(), **found._asdict()}
    return asked_outputs(named, outputs, target, ignore_index, shape=shape)


def _check_target(target: Tensor, input: Tensor, shape: torch.Size) -> Tensor:
    target = check_target(target, input.device, shape)
    if target.shape != shape:
        raise ValueError(
            f"target must have the shape of input without its class dimension, {tuple(shape)}, got "
            f"{tuple(target.shape)}"
        )
    return target


def _check_loss(
    layout: Layout, options: LossOptions, transform: MonotonicTransform, input: Tensor, *, reduction: Reduction
) -> Layout:
    """``layout``, with the number of classes where ``weight`` tells it."""
    weight, classes = options.weight, layout.classes
    if classes is None and weight is not None and isinstance(weight, Tensor) and weight.dim() == 1:
        classes = weight.shape[0]
    check_loss_options(options, classes or 1, input.device, reduction)
    check_device("transform", transform, input.device)
    return layout._replace(classes=classes)
