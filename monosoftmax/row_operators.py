"""Implements the operators over rows of logits, each by one kernel of the backend."""

from __future__ import annotations

from . import ops, reference
from .chunked_head import of_statistics, upstream_of_statistics
from .groups import TokenStatistics, Upstream
from .reductions import reduced, scale_of
from .row_kernels import row_kernels


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


def _token_statistics(call: ops.RowTokenStatistics) -> TokenStatistics:
    classes, target = call.input.shape[1], call.target
    outside = (target != call.ignore_index) & ((target < 0) | (target >= classes))
    reference.raise_if_any(outside, target, classes, call.ignore_index)
    kernel = row_kernels(call.backend).token_statistics
    return TokenStatistics(*kernel(call.input, target, call.transform, call.ignore_index))


def _token_statistics_backward(call: ops.RowTokenStatisticsBackward) -> ops.Gradients:
    results = row_kernels(call.backend).cross_entropy(
        call.input,
        call.target,
        call.transform,
        of_statistics(call.ignore_index),
        upstream=upstream_of_statistics(call),
        row_stats=call.row_stats,
        output_mask=tuple(call.output_mask),
    )
    return ops.Gradients(*results[-2:])


ops.cross_entropy.computes(_cross_entropy)
ops.cross_entropy_backward.computes(_cross_entropy_backward)
ops.token_statistics.computes(_token_statistics)
ops.token_statistics_backward.computes(_token_statistics_backward)
ops.log_softmax.computes(_log_softmax)
ops.log_softmax_backward.computes(_log_softmax_backward)
