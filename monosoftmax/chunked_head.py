"""The LM head fused with the loss: the ``linear_`` operators, made of matrix products and a backend's row kernels.

The logits of one chunk of rows at a time are formed in one buffer; the row kernel reads them while they are hot and,
where gradients are needed, overwrites them with the gradient dz, which two more products turn into the gradients of
input and linear_weight. The buffer is reused, so that memory beyond inputs and gradients does not grow with N. Nothing
here depends on the backend but its row kernels, and nothing waits for a device.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .float16 import float16_shift
from .groups import HeadGradients, HeadOptions, LossOptions, TokenStatistics, Upstream
from .head_products import HeadProducts, operands_of, rows_in, sum_of_chunks, without_autocast
from .reductions import reduced, scale_of
from .row_kernels import row_kernels


def _linear_cross_entropy(call: ops.LinearCrossEntropy) -> ops.LinearLosses:
    target, transform, options = call.target, call.transform, call.options
    plain = LossOptions(None, options.ignore_index, 0.0, 0.0, False)
    *head_mask, need_coefficients = call.output_mask
    scale = scale_of(call.reduction, target, options, call.head.linear_weight.shape[0], transform.coefficients.dtype)
    upstream = None if scale is None else Upstream(scale)
    if call.head_options.method == "recompute":
        _check_targets(call)
        recompute = functools.partial(_recompute_head(call.backend), operands_of(call.head), target, transform)
        *of_rows, gradients = recompute(options, upstream=upstream, output_mask=call.output_mask)
        # By a second product: this method has no logits to look at twice.
        log_prob = recompute(plain)[0].neg_() if call.return_log_prob else of_rows[0].new_empty(0)
        return ops.LinearLosses._make([*of_rows, *_statistics([log_prob]), *reduced(of_rows[0], scale), *gradients])
    head = HeadProducts(call.head, head_mask, call.head_options.chunk_rows)
    if head.rows < target.shape[0] or call.backend != "cpu":
        # A row kernel counts rows from the start of a chunk, and a kernel for GPUs does not tell.
        _check_targets(call)
    if scale is not None and any(call.output_mask) and head.input.dtype == torch.float16:
        upstream = Upstream(scale * float16_shift(scale, target, options.weight, options.ignore_index))
    kernels = row_kernels(call.backend)
    dtype, whole = transform.coefficients.dtype, torch.int64
    of_rows = head.gathered((dtype, 1), (dtype, 1), (dtype, 3 if target.is_floating_point() else 2))
    every = call.return_statistics
    tokens = head.gathered(*[(dtype, 1), (dtype, 1), (whole, 1), (dtype, 1), (whole, 1)][: 5 if every else 1])
    grad_coefficients: Tensor | None = None
    for chunk, logits in head:
        target_rows = rows_in(target, chunk)
        # Before the gradient is written over the logits.
        if call.return_statistics:
            found = kernels.token_statistics(logits, target_rows, transform, options.ignore_index)
            tokens.put(chunk, found[:5])
            del found
        elif call.return_log_prob:
            tokens.put(chunk, [kernels.cross_entropy(logits, target_rows, transform, plain)[0].neg_()])
        wanted = head.gradients(logits, need_coefficients)
        results = kernels.cross_entropy(logits, target_rows, transform, options, upstream=upstream, **wanted)
        of_rows.put(chunk, results[:3])
        grad_coefficients = sum_of_chunks(grad_coefficients, results[4])
        head.add_gradients(chunk, logits)
        del logits, wanted, results
    loss, gradients = of_rows.results[0], head.summed(grad_coefficients)
    asked = call.return_statistics or call.return_log_prob
    statistics = _statistics(tokens.results if asked else [loss.new_empty(0)])
    return ops.LinearLosses._make([*of_rows.results, *statistics, *reduced(loss, scale), *gradients])


def _statistics(found: Sequence[Tensor]) -> list[Tensor]:
    """log p, entropy, argmax and rank, of all statistics or of log p alone."""
    log_prob, *others = found
    if not others:
        return [log_prob, log_prob.new_empty(0), *(log_prob.new_empty(0, dtype=torch.int64) for _ in range(2))]
    entropy, argmax, _, rank = others
    return [log_prob, entropy, argmax, rank]


def _linear_cross_entropy_backward(call: ops.LinearCrossEntropyBackward) -> HeadGradients:
    return _gradients_of_rows(call, call.options, Upstream(call.grad_loss, call.grad_lse), call.head_options)


def _gradients_of_rows(
    call: ops.LinearCrossEntropyBackward | ops.LinearTokenStatisticsBackward,
    options: LossOptions,
    upstream: Upstream,
    head_options: HeadOptions,
) -> HeadGradients:
    """The gradients under ``upstream``, one number for each row, from the logits again and the row_stats of before."""
    *head_mask, need_coefficients = call.output_mask
    target = call.target
    if head_options.method == "recompute":
        *_, recomputed = _recompute_head(call.backend)(
            operands_of(call.head), target, call.transform, options, upstream=upstream, row_stats=call.row_stats,
            output_mask=call.output_mask, filter_eps=head_options.filter_eps,
        )  # fmt: skip
        return HeadGradients(*recomputed)
    head = HeadProducts(call.head, head_mask, head_options.chunk_rows)
    grad_coefficients: Tensor | None = None
    shift: Tensor | None = None
    if head.input.dtype == torch.float16 and target.numel() > 0:
        shift = float16_shift(_largest(upstream), target, options.weight, options.ignore_index)
        upstream = Upstream(*(None if each is None else each * shift for each in upstream))
    for chunk, logits in head:
        wanted = head.gradients(logits, need_coefficients)
        results = row_kernels(call.backend).cross_entropy(
            logits, rows_in(target, chunk), call.transform, options,
            upstream=Upstream(*(None if each is None else rows_in(each, chunk) for each in upstream)),
            row_stats=call.row_stats[:, chunk], **wanted,
        )  # fmt: skip
        grad_coefficients = sum_of_chunks(grad_coefficients, results[4])
        head.add_gradients(chunk, logits)
        del logits, wanted, results
    gradients = head.summed(grad_coefficients)
    return gradients if shift is None else HeadGradients(*(each.div_(shift) for each in gradients))


def of_statistics(ignore_index: int) -> LossOptions:
    """Of the loss -log p, whose kernel has the gradients of the statistics."""
    return LossOptions(None, ignore_index, 0.0, 0.0, False)


def upstream_of_statistics(call: ops.LinearTokenStatisticsBackward | ops.RowTokenStatisticsBackward) -> Upstream:
    loss = None if call.grad_log_prob is None else -call.grad_log_prob
    return Upstream(loss, call.grad_lse, None, call.grad_entropy)


def _linear_token_statistics(call: ops.LinearTokenStatistics) -> TokenStatistics:
    _check_targets(call)
    head, dtype, whole = HeadProducts(call.head), call.transform.coefficients.dtype, torch.int64
    of_stats = ((dtype, 1), (dtype, 1), (whole, 1), (dtype, 1), (whole, 1), (dtype, 3))
    tokens = head.gathered(*of_stats)
    kernel = row_kernels(call.backend).token_statistics
    for chunk, logits in head:
        tokens.put(chunk, kernel(logits, rows_in(call.target, chunk), call.transform, call.ignore_index))
        del logits
    return TokenStatistics(*tokens.results)


def _linear_token_statistics_backward(call: ops.LinearTokenStatisticsBackward) -> HeadGradients:
    return _gradients_of_rows(
        call, of_statistics(call.ignore_index), upstream_of_statistics(call), HeadOptions("chunked", 0, 0.0)
    )


def _largest(upstream: Sequence[Tensor | None]) -> Tensor:
    """The largest absolute value of upstream gradients, of which there is one at least."""
    return torch.stack([each.abs().amax() for each in upstream if each is not None]).amax()


def _recompute_head(backend: str) -> Callable[..., Any]:
    """The head of a backend whose kernels compute the logits of a tile where they are used, twice."""
    if backend != "triton":
        raise ValueError(f'monosoftmax: the {backend} backend has no method "recompute"')
    head: Callable[..., Any] = importlib.import_module(
        f"{__package__}.triton_kernels.recompute_head"
    ).linear_cross_entropy
    return head


def _check_targets(call: ops.LinearCrossEntropy | ops.LinearTokenStatistics) -> None:
    classes = call.head.linear_weight.shape[0]
    ignore_index = call.options.ignore_index if isinstance(call, ops.LinearCrossEntropy) else call.ignore_index
    target = call.target
    if target.is_floating_point():
        return
    outside = (target != ignore_index) & ((target < 0) | (target >= classes))
    reference.raise_if_any(outside, target, classes, ignore_index)


ops.linear_cross_entropy.computes(without_autocast(_linear_cross_entropy))
ops.linear_cross_entropy_backward.computes(without_autocast(_linear_cross_entropy_backward))
ops.linear_token_statistics.computes(without_autocast(_linear_token_statistics))
ops.linear_token_statistics_backward.computes(without_autocast(_linear_token_statistics_backward))
