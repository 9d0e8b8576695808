"""Implements the operators over rows of logits, each by one kernel of the backend."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from . import chunked_head, ops, reference
from .groups import Upstream
from .reductions import reduced, scale_of
from .row_kernels import row_kernels
from .token_gradients import TokenUpstream, token_gradients


def _cross_entropy(call: ops.CrossEntropy) -> ops.Losses:
    classes, dtype = call.input.shape[1], call.transform.coefficients.dtype
    scale = scale_of(call.reduction, call.target, call.options, classes, dtype)
    loss, lse, row_stats, *gradients = row_kernels(call.backend).cross_entropy(
        call.input,
        call.target,
        call.transform,
        call.options,
        upstream=None if scale is None else Upstream(scale),
        output_mask=tuple(call.output_mask),
    )
    return ops.Losses(loss, lse, row_stats, *reduced(loss, scale), *gradients)


def _cross_entropy_backward(call: ops.CrossEntropyBackward) -> ops.Gradients:
    results = row_kernels(call.backend).cross_entropy(
        call.input,
        call.target,
        call.transform,
        call.options,
        upstream=Upstream(call.grad_loss, call.grad_lse),
        row_stats=call.row_stats,
        output_mask=tuple(call.output_mask),
    )
    return ops.Gradients(*results[-2:])


def _log_softmax(call: ops.LogSoftmax) -> ops.LogProbabilities:
    return ops.LogProbabilities(*row_kernels(call.backend).log_softmax(call.input, call.transform, call.dtype))


def _log_softmax_backward(call: ops.LogSoftmaxBackward) -> ops.Gradients:
    backward = row_kernels(call.backend).log_softmax_backward
    return ops.Gradients(
        *backward(call.grad_output, call.input, call.transform, call.row_stats, tuple(call.output_mask))
    )


def _token_statistics(call: ops.RowTokenStatistics) -> ops.TokenStatistics:
    classes, target = call.input.shape[1], call.target
    outside = (target != call.ignore_index) & ((target < 0) | (target >= classes))
    reference.raise_if_any(outside, target, classes, call.ignore_index)
    kernel = row_kernels(call.backend).token_statistics
    return ops.TokenStatistics(*kernel(call.input, target, call.transform, call.ignore_index))


def _token_statistics_backward(call: ops.RowTokenStatisticsBackward) -> ops.Gradients:
    """In one call; in chunks of rows, where :func:`.token_gradients` would need memory of the size of the logits."""
    input, coefficients = call.input, call.transform.coefficients
    count, classes = input.shape
    step = chunked_head.chunk_rows(classes, coefficients.dtype, input.device.type)

    def of(chunk: slice) -> tuple[Tensor, Tensor]:
        upstream = TokenUpstream(call.grad_log_prob, call.grad_entropy, call.grad_lse)
        return token_gradients(
            row_kernels(call.backend), input[chunk], call.target[chunk], call.transform, ignore_index=call.ignore_index,
            upstream=upstream.map(operator.itemgetter(chunk)), output_mask=call.output_mask, in_place=False,
        )  # fmt: skip

    if call.grad_entropy is None or count <= step:
        return ops.Gradients(*of(slice(None)))
    need_input, need_coefficients = call.output_mask
    grad_input = torch.empty(input.shape if need_input else 0, dtype=input.dtype, device=input.device)
    total = coefficients.new_zeros(coefficients.shape if need_coefficients else 0, dtype=torch.float64)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        dz, part = of(chunk)
        if need_input:
            grad_input[chunk] = dz
        total += part
    return ops.Gradients(grad_input, total.to(coefficients.dtype))


ops.cross_entropy.computes(_cross_entropy)
ops.cross_entropy_backward.computes(_cross_entropy_backward)
ops.token_statistics.computes(_token_statistics)
ops.token_statistics_backward.computes(_token_statistics_backward)
ops.log_softmax.computes(_log_softmax)
ops.log_softmax_backward.computes(_log_softmax_backward)
