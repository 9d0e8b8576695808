"""The ``triton`` backend's :class:`monosoftmax.row_kernels.RowKernels`: this module, imported at the first call.

The functions take CUDA tensors (PyTorch calls those of ROCm so, too), and CPU tensors while Triton's interpreter stands
in for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monosoftmax.groups import Divergence, LossOptions, RowResults, TokenStatistics, Transform, Upstream

from .dense_targets import DenseLoss, launch_dense_target
from .launch import (
    Call,
    RowLoss,
    Sums,
    launch_cross_entropy,
    launch_options,
    on_device,
    registers_of,
    tile_arguments,
)
from .log_softmax import log_softmax_backward_kernel, log_softmax_kernel
from .plif_coefficients import launch_plif_coefficients, launch_plif_coefficients_backward
from .scaling import launch_scale
from .tiles import as_aligned
from .token_statistics import token_statistics_kernel


def cross_entropy(
    rows: Tensor,
    target: Tensor,
    transform: Transform,
    options: LossOptions,
    upstream: Upstream | None = None,
    row_stats: Tensor | None = None,
    output_mask: Sequence[bool] = (False, False),
    grad_rows: Tensor | None = None,
) -> RowResults:
    """Losses of rows, from their logits, and gradients; a floating ``target`` [N, V] is that of all classes.

    Where the losses are computed, too, ``upstream.loss`` is needed for gradients. An ``upstream.factor`` is for the
    gradient of rows only.
    """
    if target.is_floating_point():
        if upstream is not None and upstream.entropy is not None:
            raise ValueError("monosoftmax: the gradient of the entropy needs indices as the target")
        dense = DenseLoss.of_probabilities(target, transform, options)
        return _of_rows(rows, dense, upstream, row_stats=row_stats, output_mask=output_mask, grad_rows=grad_rows)
    if upstream is not None and upstream.entropy is not None and (row_stats is None or row_stats.shape[0] != 3):
        raise ValueError("monosoftmax: the gradient of the entropy needs the row_stats of token_statistics")
    return _of_rows(
        rows,
        RowLoss.of(target, transform, options),
        upstream,
        row_stats=row_stats,
        output_mask=output_mask,
        grad_rows=grad_rows,
    )


def divergence(
    rows: Tensor,
    log_target: Tensor,
    transform: Transform,
    divergence: Divergence,
    upstream: Upstream | None = None,
    row_stats: Tensor | None = None,
    output_mask: Sequence[bool] = (False, False),
    grad_rows: Tensor | None = None,
) -> RowResults:
    """The divergence of each row from exp(log_target), and gradients, as :func:`cross_entropy` gives them."""
    loss = DenseLoss.divergence(log_target, transform, *divergence)
    upstream = None if upstream is None else Upstream(upstream.loss)
    return _of_rows(rows, loss, upstream, row_stats=row_stats, output_mask=output_mask, grad_rows=grad_rows)


def _of_rows(
    rows: Tensor,
    loss: RowLoss | DenseLoss,
    upstream: Upstream | None,
    *,
    row_stats: Tensor | None,
    output_mask: Sequence[bool],
    grad_rows: Tensor | None,
) -> RowResults:
    """A loss of rows, whatever its target is."""
    need_rows, need_coefficients = output_mask
    losses, count, dense = row_stats is None, rows.shape[0], isinstance(loss, DenseLoss)
    if any(output_mask) and (upstream is None or (losses and upstream.loss is None)):
        raise ValueError("monosoftmax: gradients need a scale")
    if dense and row_stats is not None and row_stats.shape[0] != 3:
        raise ValueError("monosoftmax: a target of all classes needs the row_stats [3, N] of its losses")
    sums = Sums(loss.call, rows, need_coefficients)
    gradients = need_rows or sums.regime != "none"
    if upstream is not None and upstream.factor is not None and sums.regime != "none":
        raise ValueError("monosoftmax: a factor is for the gradient of rows only")
    if not need_rows:
        grad_rows = rows.new_empty(0)
    elif grad_rows is None:
        grad_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    of_rows, lse = (rows.new_empty(count if losses else 0, dtype=torch.float32) for _ in range(2))
    if row_stats is None:
        row_stats = of_rows.new_empty((3 if dense else 2, count))
    results = RowResults(of_rows, lse, row_stats.contiguous(), grad_rows, sums.totals)
    if losses or gradients:
        upstream = upstream if gradients else None
        if isinstance(loss, DenseLoss):
            launch_dense_target(rows, loss, upstream, results, sums)
        else:
            launch_cross_entropy(rows, loss, upstream, results, sums)
    return results._replace(grad_coefficients=sums.total())


def token_statistics(rows: Tensor, target: Tensor, transform: Transform, ignore_index: int) -> TokenStatistics:
    """The statistics of rows, and their row_stats [3, N]."""
    count, classes = rows.shape
    log_prob, entropy, lse = (rows.new_empty(count, dtype=torch.float32) for _ in range(3))
    argmax, rank = target.new_empty(count), target.new_empty(count)
    row_stats = lse.new_empty((3, count))
    if count > 0:
        call, tile = Call.of(transform), tile_arguments(rows)
        registers = registers_of(call.functions.table_rows, False)
        with on_device(rows):
            token_statistics_kernel[(count,)](
                input=rows, target=target.contiguous(), log_prob=log_prob, entropy=entropy, argmax=argmax, lse=lse,
                rank=rank, row_stats=row_stats, rows=count, classes=classes, stride=rows.stride(0),
                ignore_index=ignore_index, **call.arguments(rows.dtype), **tile,
                **launch_options(tile["LANES"], registers, rows.device),
            )  # fmt: skip
    return TokenStatistics(log_prob, entropy, argmax, lse=lse, rank=rank, row_stats=row_stats)


def log_softmax(
    rows: Tensor, transform: Transform, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p and row_stats."""
    count, classes = rows.shape
    output = torch.empty(rows.shape, dtype=dtype, device=rows.device) if out is None else out
    row_stats = rows.new_empty((2, count), dtype=torch.float32)
    if count > 0:
        call, tile = Call.of(transform), tile_arguments(rows, output)
        registers = registers_of(call.functions.table_rows, False)
        with on_device(rows):
            log_softmax_kernel[(count,)](
                input=rows, output=output, row_stats=row_stats, rows=count, classes=classes, stride=rows.stride(0),
                out_stride=output.stride(0), **call.arguments(rows.dtype), **tile,
                **launch_options(tile["LANES"], registers, rows.device),
            )  # fmt: skip
    return output, row_stats


def log_softmax_backward(
    grad_output: Tensor, rows: Tensor, transform: Transform, row_stats: Tensor, output_mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of rows and of the coefficients, from the gradient of log p."""
    need_rows, need_coefficients = output_mask
    sums = Sums(Call.of(transform), rows, need_coefficients)
    grad_rows = torch.empty(rows.shape if need_rows else 0, dtype=rows.dtype, device=rows.device)
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    if rows.shape[0] > 0 and (need_rows or sums.regime != "none"):
        row_stats = row_stats.contiguous()
        for chunk, part in sums.launches():
            if chunk is None:
                _launch_log_softmax_backward(grad_output, rows, row_stats, grad_rows, part)
            else:
                stats = row_stats[:, chunk].contiguous()
                _launch_log_softmax_backward(grad_output[chunk], rows[chunk], stats, rows.new_empty(0), part)
    return grad_rows, sums.total()


def _launch_log_softmax_backward(
    grad_output: Tensor, rows: Tensor, row_stats: Tensor, grad_rows: Tensor, sums: Sums
) -> None:
    (count, classes), functions = rows.shape, sums.call.functions
    gradient = grad_rows.numel() > 0
    grad_rows = grad_rows if gradient else rows
    tile = tile_arguments(rows, grad_rows, sums.most_lanes)
    registers = registers_of(functions.table_rows, True)
    with on_device(rows):
        log_softmax_backward_kernel[(sums.programs,)](
            grad_output=grad_output, input=rows, row_stats=row_stats, grad_input=grad_rows, rows=count, classes=classes,
            stride=rows.stride(0), grad_stride=grad_output.stride(0), out_stride=grad_rows.stride(0), gradient=gradient,
            groups=functions.groups(sums.call.size), table_rows=functions.table_rows,
            GRAD_ALIGNED=as_aligned(grad_output, rows), **sums.call.arguments(rows.dtype), **sums.arguments(), **tile,
            **launch_options(tile["LANES"], registers, rows.device),
        )  # fmt: skip


def plif_coefficients(raw_slope: Tensor, bound: float, min_slope: float) -> Tensor:
    """PLIF's table of coefficients."""
    coefficients = raw_slope.new_empty((2, raw_slope.shape[0]))
    launch_plif_coefficients(raw_slope.contiguous(), coefficients, bound, min_slope)
    return coefficients


def plif_coefficients_backward(grad_coefficients: Tensor, raw_slope: Tensor, bound: float, min_slope: float) -> Tensor:
    """The gradient of raw_slope, from the gradient of the table."""
    raw_slope = raw_slope.contiguous()
    grad_raw_slope = torch.empty_like(raw_slope)
    launch_plif_coefficients_backward(grad_coefficients.contiguous(), raw_slope, grad_raw_slope, bound, min_slope)
    return grad_raw_slope


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor."""
    launch_scale(tensor, factor)
