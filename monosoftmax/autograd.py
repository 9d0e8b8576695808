"""Derivatives of the fused operators: what is saved, and what is differentiated.

Each operator owns its derivative at the dispatcher: its kernel for the Autograd key is an autograd function that
redispatches below autograd. That is what lets one operator work in eager mode, under ``torch.compile``, under
``torch.func.grad`` and under both at once; a ``torch.autograd.Function`` around an operator without a derivative of
its own gives silent zeros for ``torch.compile(torch.func.grad(...))`` (torch 2.13). ``torch.autograd.Function`` itself
cannot be applied inside a dispatcher kernel, so its single-level base class is: the two private names imported here
are tested on every supported version of torch by ``tests/test_operators.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd.function import _SingleLevelFunction

from .ops import FUSED_BACKENDS, library, operator
from .transforms.base import MonotonicTransform, arithmetic_dtype

_below_autograd = torch._C._AutoDispatchBelowAutograd


def cross_entropy(
    backend: str,
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [N] and lse [N] of rows ``input`` [N, V]: :func:`monosoftmax.reference.cross_entropy`, fused."""
    loss, lse, _ = operator("cross_entropy", backend)(
        input, target, weight, *_kernel_arguments(input, transform), ignore_index, label_smoothing, z_loss, return_lse
    )
    return loss, lse


def log_softmax(backend: str, input: Tensor, transform: MonotonicTransform, dtype: torch.dtype) -> Tensor:
    """log p of rows ``input`` [N, V]: :func:`monosoftmax.reference.log_softmax`, fused."""
    output: Tensor = operator("log_softmax", backend)(input, *_kernel_arguments(input, transform), dtype)[0]
    return output


def _kernel_arguments(input: Tensor, transform: MonotonicTransform) -> tuple[Tensor, str, list[float]]:
    assert transform.kernel is not None  # backends.choose() has made sure
    coefficients = transform.coefficients().to(input.device, arithmetic_dtype(input.dtype))
    return coefficients, transform.kernel, list(transform.constants())


def _register(backend: str) -> None:
    """Give the operators of ``backend`` their derivatives."""
    forward_loss = operator("cross_entropy", backend)
    backward_loss = operator("cross_entropy_backward", backend)
    forward_log = operator("log_softmax", backend)
    backward_log = operator("log_softmax_backward", backend)

    class CrossEntropy(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with _below_autograd():
                loss, lse, row_stats = forward_loss(*arguments)
            input, target, weight, coefficients, *ctx.options, return_lse = arguments
            ctx.save_for_backward(input, target, weight, coefficients, row_stats)
            ctx.mark_non_differentiable(*((row_stats,) if return_lse else (lse, row_stats)))
            ctx.set_materialize_grads(False)
            return loss, lse, row_stats

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None) -> Any:
            *tensors, row_stats = ctx.saved_tensors
            transform, constants, *options = ctx.options
            need_input, _, _, need_coefficients, *_ = ctx.needs_input_grad
            if grad_loss is None and grad_lse is None:
                return (None,) * 10
            grad_input, grad_coefficients = backward_loss(
                grad_loss, grad_lse, *tensors, transform, constants, row_stats, *options, need_input, need_coefficients
            )
            return (
                grad_input if need_input else None,
                None,
                None,
                grad_coefficients if need_coefficients else None,
                *(None,) * 6,
            )

    class LogSoftmax(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with _below_autograd():
                output, row_stats = forward_log(*arguments)
            input, coefficients, *ctx.options, _ = arguments
            ctx.save_for_backward(input, coefficients, row_stats)
            ctx.mark_non_differentiable(row_stats)
            ctx.set_materialize_grads(False)
            return output, row_stats

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor | None, _: None) -> Any:
            input, coefficients, row_stats = ctx.saved_tensors
            need_input, need_coefficients, *_ = ctx.needs_input_grad
            if grad_output is None:
                return (None,) * 5
            grad_input, grad_coefficients = backward_log(
                grad_output, input, coefficients, *ctx.options, row_stats, need_input, need_coefficients
            )
            return grad_input if need_input else None, grad_coefficients if need_coefficients else None, *(None,) * 3

    def once(overload: torch._ops.OpOverload) -> type[_SingleLevelFunction]:
        class Once(_SingleLevelFunction):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                with _below_autograd():
                    return overload(*arguments)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                raise RuntimeError(
                    f"{overload} has no derivative: the {backend} backend does not support double backward; "
                    'use backend="reference"'
                )

        return Once

    for overload, function in (
        (forward_loss, CrossEntropy),
        (backward_loss, once(backward_loss)),
        (forward_log, LogSoftmax),
        (backward_log, once(backward_log)),
    ):
        library.impl(overload, _single_level(function), "Autograd")  # type: ignore[no-untyped-call]


def _single_level(function: type[_SingleLevelFunction]) -> Any:
    def kernel(*arguments: Any) -> Any:
        with enable_single_level_autograd_function():
            return function.apply(*arguments)  # type: ignore[attr-defined]

    return kernel


for _backend in FUSED_BACKENDS:
    _register(_backend)
