"""The ``linear_`` operators with the method "recompute", for :mod:`monosoftmax.chunked_head`, which chooses.

The losses come from :mod:`.linear_cross_entropy`, the gradients from :mod:`.linear_cross_entropy_backward`: no logits
in memory. Under ``torch.use_deterministic_algorithms`` the gradients are refused, as their sums are atomic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monosoftmax.float16 import float16_shift

from .launch import Call, LossOptions, Upstream
from .linear_cross_entropy import recompute_forward
from .linear_cross_entropy_backward import recompute_backward


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, weight: Tensor | None,
    coefficients: Tensor, transform: str, constants: list[float], ignore_index: int, label_smoothing: float,
    z_loss: float, return_lse: bool, scale: Tensor | None,
    need_input: bool, need_linear_weight: bool, need_linear_bias: bool, need_coefficients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Losses, lse and row_stats; and of scale times the sum of the losses, the gradients that are asked for."""
    call = Call.of(transform, coefficients, constants)
    options = LossOptions(None if weight is None else weight.contiguous(), ignore_index, label_smoothing, z_loss)
    results = recompute_forward(call, input, linear_weight, linear_bias, target, options, return_lse=return_lse)
    needs = need_input, need_linear_weight, need_linear_bias, need_coefficients
    gradients: tuple[Tensor, ...] = (
        input.new_empty(0), *(input.new_empty(0, dtype=torch.float32) for _ in range(2)), coefficients.new_empty(0)
    )  # fmt: skip
    if any(needs):
        if scale is None:
            raise ValueError("monosoftmax: gradients need a scale")
        gradients = linear_cross_entropy_backward(
            scale.expand(target.shape), None, input, linear_weight, linear_bias, target, weight, coefficients,
            transform, constants, results.row_stats, ignore_index, label_smoothing, z_loss, 0.0, *needs,
        )  # fmt: skip
    total = results.loss.new_empty(0) if scale is None else results.loss.sum() * scale
    return results.loss, results.lse, results.row_stats, total, *gradients


def linear_cross_entropy_backward(
    grad_loss: Tensor | None, grad_lse: Tensor | None, input: Tensor, linear_weight: Tensor,
    linear_bias: Tensor | None, target: Tensor, weight: Tensor | None, coefficients: Tensor, transform: str,
    constants: list[float], row_stats: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    filter_eps: float,
    need_input: bool, need_linear_weight: bool, need_linear_bias: bool, need_coefficients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of input, linear_weight, linear_bias and f's coefficients; empty those that are not needed."""
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            'method="recompute" sums gradients by atomics, in an order that changes from run to run, and '
            'torch.use_deterministic_algorithms(True) was called: use method="chunked"'
        )
    call = Call.of(transform, coefficients, constants)
    options = LossOptions(None if weight is None else weight.contiguous(), ignore_index, label_smoothing, z_loss)
    grad_loss = torch.zeros_like(row_stats[0]) if grad_loss is None else grad_loss
    shift = None
    if input.dtype == torch.float16 and target.numel() > 0:
        upstream = [each.abs().amax() for each in (grad_loss, grad_lse) if each is not None]
        shift = float16_shift(torch.stack(upstream).amax(), target, weight, ignore_index)
        grad_loss, grad_lse = grad_loss * shift, None if grad_lse is None else grad_lse * shift
    gradients = recompute_backward(
        call, Upstream(grad_loss.contiguous(), None if grad_lse is None else grad_lse.contiguous()), input,
        linear_weight, linear_bias, target, options, row_stats, need_input=need_input, need_weight=need_linear_weight,
        need_bias=need_linear_bias, need_coefficients=need_coefficients, filter_eps=filter_eps,
    )  # fmt: skip
    return gradients if shift is None else tuple(each.div_(shift) for each in gradients)
