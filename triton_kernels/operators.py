"""The row operators of the ``triton`` backend (:data:`monosoftmax.ops.SCHEMAS`), imported at the first call of one.

They take CUDA tensors (ROCm's are called so, too), and CPU tensors while Triton's interpreter stands in for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import (
    Call,
    LossOptions,
    RowResults,
    Sums,
    Upstream,
    launch_cross_entropy,
    launch_log_softmax,
    launch_log_softmax_backward,
    launch_token_statistics,
)
from .scaling import launch_scale


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, coefficients: Tensor, transform: str, constants: list[float],
    ignore_index: int, label_smoothing: float, z_loss: float, return_lse: bool, scale: Tensor | None,
    need_input: bool, need_coefficients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Losses and, where a scale is given, their scaled sum and its gradients."""
    if scale is None and (need_input or need_coefficients):
        raise ValueError("monosoftmax: gradients need a scale")
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device) if need_input else None
    results, sums = _cross_entropy(
        input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss, return_lse,
        scale, grad_input, need_coefficients,
    )  # fmt: skip
    total = results.loss.new_empty(0) if scale is None else results.loss.sum() * scale
    absent = input.new_empty(0) if grad_input is None else grad_input
    return results.loss, results.lse, results.row_stats, total, absent, sums.total()


def cross_entropy_(
    input: Tensor, target: Tensor, weight: Tensor | None, coefficients: Tensor, transform: str, constants: list[float],
    ignore_index: int, label_smoothing: float, z_loss: float, return_lse: bool, scale: Tensor, need_coefficients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """:func:`cross_entropy`, with the gradient of input written over it."""
    results, sums = _cross_entropy(
        input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss, return_lse,
        scale, input, need_coefficients,
    )  # fmt: skip
    return results.loss, results.lse, results.row_stats, sums.total()


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, coefficients: Tensor, transform: str, constants: list[float],
    ignore_index: int, label_smoothing: float, z_loss: float, return_lse: bool, scale: Tensor | None,
    grad_input: Tensor | None, need_coefficients: bool,
) -> tuple[RowResults, Sums]:  # fmt: skip
    call = Call.of(transform, coefficients, constants)
    options = LossOptions(_contiguous(weight), ignore_index, label_smoothing, z_loss)
    results, sums = RowResults.empty(input), Sums(call, input, need_coefficients)
    gradients = grad_input is not None or sums.regime != "none"
    upstream = Upstream(scale) if gradients and scale is not None else None
    launch_cross_entropy(
        call, input, target.contiguous(), options, results, upstream, grad_input, sums, losses=True,
        return_lse=return_lse,
    )  # fmt: skip
    return results, sums


def cross_entropy_backward(
    grad_loss: Tensor | None, grad_lse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
    coefficients: Tensor, transform: str, constants: list[float], row_stats: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, need_input: bool, need_coefficients: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients from the row_stats of an earlier :func:`cross_entropy`."""
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device) if need_input else None
    grad_coefficients = _cross_entropy_backward(
        grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats, ignore_index,
        label_smoothing, z_loss, grad_input, need_coefficients,
    )  # fmt: skip
    return input.new_empty(0) if grad_input is None else grad_input, grad_coefficients


def cross_entropy_backward_(
    grad_loss: Tensor | None, grad_lse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
    coefficients: Tensor, transform: str, constants: list[float], row_stats: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, need_coefficients: bool,
) -> Tensor:  # fmt: skip
    """:func:`cross_entropy_backward`, with the gradient of input written over it."""
    return _cross_entropy_backward(
        grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats, ignore_index,
        label_smoothing, z_loss, input, need_coefficients,
    )  # fmt: skip


def _cross_entropy_backward(
    grad_loss: Tensor | None, grad_lse: Tensor | None, input: Tensor, target: Tensor, weight: Tensor | None,
    coefficients: Tensor, transform: str, constants: list[float], row_stats: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, grad_input: Tensor | None, need_coefficients: bool,
) -> Tensor:  # fmt: skip
    call = Call.of(transform, coefficients, constants)
    options = LossOptions(_contiguous(weight), ignore_index, label_smoothing, z_loss)
    sums = Sums(call, input, need_coefficients)
    if grad_input is None and sums.regime == "none":
        return sums.total()
    if grad_loss is None:
        grad_loss = input.new_zeros((), dtype=torch.float32)
    results = RowResults.empty(input[:0])._replace(row_stats=row_stats.contiguous())
    # An expanded number stays one number.
    grad_loss = grad_loss[0] if grad_loss.dim() > 0 and grad_loss.stride(0) == 0 and len(grad_loss) else grad_loss
    upstream = Upstream(grad_loss.contiguous(), _contiguous(grad_lse))
    launch_cross_entropy(call, input, target.contiguous(), options, results, upstream, grad_input, sums, losses=False)
    return sums.total()


def cross_entropy_rescale_(
    grad_input: Tensor, factor: Tensor, scale: Tensor, input: Tensor, target: Tensor, weight: Tensor | None,
    coefficients: Tensor, transform: str, constants: list[float], row_stats: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """grad_input, which is that of scale * sum of losses, becomes that of factor * scale * sum, rounded once."""
    call = Call.of(transform, coefficients, constants)
    options = LossOptions(_contiguous(weight), ignore_index, label_smoothing, z_loss)
    results = RowResults.empty(input[:0])._replace(row_stats=row_stats)
    upstream = Upstream(scale, factor=factor)
    launch_cross_entropy(call, input, target.contiguous(), options, results, upstream, grad_input, losses=False)


def scale_(input: Tensor, factor: Tensor) -> None:
    """input *= factor."""
    launch_scale(input, factor)


def token_statistics(
    input: Tensor, target: Tensor, coefficients: Tensor, transform: str, constants: list[float], ignore_index: int
) -> tuple[Tensor, ...]:
    """log p of the target, entropy, argmax, lse and rank."""
    numbers = [input.new_empty(input.shape[0], dtype=torch.float32) for _ in range(3)]
    places = [target.new_empty(input.shape[0]) for _ in range(2)]
    results = (numbers[0], numbers[1], places[0], numbers[2], places[1])
    call = Call.of(transform, coefficients, constants)
    launch_token_statistics(call, input, target.contiguous(), ignore_index, results)
    return results


def log_softmax(
    input: Tensor, coefficients: Tensor, transform: str, constants: list[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """log p and row_stats."""
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    row_stats = input.new_empty((2, input.shape[0]), dtype=torch.float32)
    launch_log_softmax(Call.of(transform, coefficients, constants), input, output, row_stats)
    return output, row_stats


def log_softmax_backward(
    grad_output: Tensor, input: Tensor, coefficients: Tensor, transform: str, constants: list[float],
    row_stats: Tensor, need_input: bool, need_coefficients: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of log p."""
    call = Call.of(transform, coefficients, constants)
    sums = Sums(call, input, need_coefficients)
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device) if need_input else None
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    if grad_input is not None or sums.regime != "none":
        launch_log_softmax_backward(call, grad_output, input, row_stats.contiguous(), grad_input, sums)
    return input.new_empty(0) if grad_input is None else grad_input, sums.total()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
