"""Derivatives of the fused operators: what is saved, and what is differentiated.

Each operator owns its derivative at the dispatcher: its kernel for the Autograd key is an autograd function that
redispatches below autograd. That is what lets one operator work in eager mode, under ``torch.compile``, under
``torch.func.grad`` and under both at once; a ``torch.autograd.Function`` around an operator without a derivative of
its own gives silent zeros for ``torch.compile(torch.func.grad(...))`` (torch 2.13). ``torch.autograd.Function`` itself
cannot be applied inside a dispatcher kernel, so its single-level base class is: the two private names imported here
are tested on every supported version of torch by ``tests/test_operators.py``. Such a function switches gradients off
while its forward runs, where the levels of nested ``torch.func`` transforms below want them as the caller had them.

The losses compute the gradients of ``total``, their scaled sum, while the logits are at hand in the forward pass:
the backward pass scales them by total's upstream gradient and hands them out. It computes them from the logits again
where something else has a gradient too (the losses of the rows, lse), where they were handed out before, and where they
may be differentiated in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd.function import _SingleLevelFunction

from ._dispatch import has_values, tells_values, within_functorch
from .float16 import float16_shift
from .ops import FUSED_BACKENDS, library, operator
from .transforms.base import MonotonicTransform, arithmetic_dtype

_below_autograd = torch._C._AutoDispatchBelowAutograd
_HALF = (torch.float16, torch.bfloat16)


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
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N] and lse [N] of rows ``input`` [N, V], as :func:`monosoftmax.reference.cross_entropy`, and scale * sum.

    Without ``scale`` the last is empty. Where it is all that is differentiated, the forward pass computes the gradient.
    """
    loss, lse, _, total, *_ = operator("cross_entropy", backend)(
        input, target, weight, *_kernel_arguments(input, transform), ignore_index, label_smoothing, z_loss, return_lse,
        scale, False, False,
    )  # fmt: skip
    return loss, lse, total


def cross_entropy_of_probabilities(
    input: Tensor,
    target: Tensor,
    transform: MonotonicTransform,
    weight: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    return_lse: bool,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cross_entropy` of the cpu backend for class probabilities ``target`` [N, V], which get no gradient."""
    loss, lse, _, total, *_ = operator("cross_entropy_of_probabilities", "cpu")(
        input, target, weight, *_kernel_arguments(input, transform), label_smoothing, z_loss, return_lse,
        scale, False, False,
    )  # fmt: skip
    return loss, lse, total


def linear_cross_entropy(
    backend: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    transform: MonotonicTransform,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    method: str,
    chunk_rows: int,
    filter_eps: float,
    return_lse: bool,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cross_entropy` of the logits input @ linear_weight.T + linear_bias, which exist in chunks only."""
    loss, lse, _, total, *_ = operator("linear_cross_entropy", backend)(
        input, linear_weight, linear_bias, target, weight, *_kernel_arguments(input, transform),
        ignore_index, label_smoothing, z_loss, method, chunk_rows, filter_eps, return_lse, scale,
        False, False, False, False,
    )  # fmt: skip
    return loss, lse, total


def linear_token_statistics(
    backend: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    transform: MonotonicTransform,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """:func:`monosoftmax.reference.linear_token_statistics`, fused. It has no derivative."""
    statistics: tuple[Tensor, ...] = operator("linear_token_statistics", backend)(
        input, linear_weight, linear_bias, target, *_kernel_arguments(input, transform), ignore_index
    )
    return statistics


def log_softmax(backend: str, input: Tensor, transform: MonotonicTransform, dtype: torch.dtype) -> Tensor:
    """log p of rows ``input`` [N, V]: :func:`monosoftmax.reference.log_softmax`, fused."""
    output: Tensor = operator("log_softmax", backend)(input, *_kernel_arguments(input, transform), dtype)[0]
    return output


def _kernel_arguments(input: Tensor, transform: MonotonicTransform) -> tuple[Tensor, str, list[float]]:
    assert transform.kernel is not None  # backends.choose() has made sure
    coefficients = transform.coefficients().to(input.device, arithmetic_dtype(input.dtype))
    return coefficients, transform.kernel, list(transform.constants())


class _Ahead:
    """The gradients of total that the forward pass computed, until the backward pass takes them."""

    def __init__(
        self,
        gradients: Sequence[Tensor],
        shift: Tensor | None,
        scalable: bool,
        scale_operator: torch._ops.OpOverload | None,
    ) -> None:
        self.gradients, self._shift, self._scalable, self._scale_operator = gradients, shift, scalable, scale_operator

    def times(self, grad_total: Tensor) -> Sequence[Tensor] | None:
        """The gradients times ``grad_total``, in place: what autograd gets it can keep, without a copy.

        None where that would round a result for the second time.
        """
        factor = grad_total if self._shift is None else grad_total / self._shift
        if within_functorch() or not has_values(factor):
            if not self._scalable:
                return None
            return [(each.to(factor.dtype) * factor).to(each.dtype) for each in self.gradients]
        if tells_values(factor) and factor.item() == 1:
            return self.gradients
        if not self._scalable:
            return None
        if self._scale_operator is None or tells_values(factor):
            return [each.mul_(factor) for each in self.gradients]
        for each in self.gradients:
            self._scale_operator(each, factor)
        return self.gradients


def _loss_function(
    forward_operator: torch._ops.OpOverload,
    backward_operator: torch._ops.OpOverload,
    rescale_operator: torch._ops.OpOverload | None,
    scale_operator: torch._ops.OpOverload | None,
    tensor_names: Sequence[str],
) -> type[_SingleLevelFunction]:
    """The derivative of a loss whose first arguments are the tensors ``tensor_names``.

    The last two operators (:data:`.ops.ON_DEVICE`) are those of backends for devices that do not tell values.
    """
    count = len(tensor_names)
    differentiable = [i for i, name in enumerate(tensor_names) if name not in ("target", "weight")]
    target_at, weight_at = tensor_names.index("target"), tensor_names.index("weight")
    linear = "linear_weight" in tensor_names

    class Loss(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, grad_enabled: bool, *arguments: Any) -> Any:
            tensors, (transform, constants, *options, return_lse, scale) = (
                arguments[:count],
                arguments[count : -len(differentiable)],
            )
            if grad_enabled and ctx.needs_input_grad[1 + target_at]:
                raise ValueError(f"target must not require a gradient: {forward_operator} has none for it")
            asked = arguments[-len(differentiable) :]
            needs = [grad_enabled and ctx.needs_input_grad[1 + place] for place in differentiable]
            input, shift = tensors[0], None
            # Gradients that the caller asks for stay his own.
            ahead = (
                scale is not None
                and any(needs)
                and not any(asked)
                and _may_compute_ahead(input, linear, rescale_operator)
            )
            ahead = ahead and "recompute" not in options
            with _below_autograd(), torch.set_grad_enabled(grad_enabled):
                scale_of_gradients = scale
                if ahead and linear and input.dtype == torch.float16:
                    shift = float16_shift(scale, tensors[target_at], tensors[weight_at], options[0])
                    scale_of_gradients = scale * shift
                loss, lse, row_stats, total, *gradients = forward_operator(
                    *arguments[: -len(asked) - 1], scale_of_gradients, *(needs if ahead else asked)
                )
                if shift is not None:
                    total = total / shift
            ctx.ahead = None
            if ahead:
                needed = [each for each, need in zip(gradients, needs, strict=True) if need]
                ctx.ahead = _Ahead(needed, shift, linear or input.dtype not in _HALF, scale_operator)
                gradients = [each.new_empty(0) for each in gradients]
            ctx.needs, ctx.arguments = needs, (transform, constants, options)
            ctx.dtypes = [tensors[place].dtype for place, need in zip(differentiable, needs, strict=True) if need]
            ctx.save_for_backward(*tensors, row_stats, scale)
            ctx.mark_non_differentiable(
                row_stats, *gradients, *(() if return_lse else (lse,)), *(() if scale is not None else (total,))
            )
            ctx.set_materialize_grads(False)
            return loss, lse, row_stats, total, *gradients

        @staticmethod
        def backward(
            ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None, _: None, grad_total: Tensor | None, *__: None
        ) -> Any:
            ahead, ctx.ahead = ctx.ahead, None
            results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            if grad_loss is None and grad_lse is None and grad_total is None:
                return tuple(results)
            gradients: Sequence[Tensor] | None = None
            # With gradients enabled, these may be differentiated: that must end in an error, not in zeros.
            if ahead is not None and grad_loss is None and grad_lse is None and not torch.is_grad_enabled():
                assert grad_total is not None  # what else would there be a gradient of
                gradients = ahead.times(grad_total)
                if gradients is None and rescale_operator and not within_functorch() and has_values(grad_total):
                    gradients = _rescaled(ctx, ahead.gradients, grad_total, rescale_operator)
            del ahead
            if gradients is None:
                *tensors, row_stats, scale = ctx.saved_tensors
                if grad_total is not None:
                    of_rows = (grad_total * scale).expand(row_stats.shape[1:])
                    grad_loss = of_rows if grad_loss is None else grad_loss + of_rows
                transform, constants, options = ctx.arguments
                computed = backward_operator(
                    grad_loss, grad_lse, *tensors, transform, constants, row_stats, *options, *ctx.needs
                )
                gradients = [each for each, need in zip(computed, ctx.needs, strict=True) if need]
            places = [place for place, need in zip(differentiable, ctx.needs, strict=True) if need]
            for place, gradient, dtype in zip(places, gradients, ctx.dtypes, strict=True):
                results[1 + place] = gradient.to(dtype)
            return tuple(results)

    return Loss


def _rescaled(
    ctx: Any, gradients: Sequence[Tensor], grad_total: Tensor, rescale_operator: torch._ops.OpOverload
) -> list[Tensor]:
    """The gradients of a half precision input and of coefficients times ``grad_total``, decided on the device."""
    *tensors, row_stats, scale = ctx.saved_tensors
    transform, constants, options = ctx.arguments
    rescaled = list(gradients)
    for i, each in enumerate(rescaled):
        if each.dtype in _HALF:
            rescale_operator(each, grad_total, scale, *tensors, transform, constants, row_stats, *options)
        else:
            rescaled[i] = each.mul_(grad_total)
    return rescaled


def _may_compute_ahead(input: Tensor, linear: bool, rescale_operator: torch._ops.OpOverload | None) -> bool:
    if within_functorch():
        return False  # func.grad asks for gradients that it can differentiate
    if linear or input.dtype not in _HALF:
        return True
    # A gradient in half precision is scaled by 1 or computed again, so as not to be rounded twice. The CPU says which
    # without waiting; elsewhere an operator decides on the device.
    return tells_values(input) or (rescale_operator is not None and has_values(input))


def _register(backend: str) -> None:
    """Give the operators of ``backend`` their derivatives."""
    forward_log = operator("log_softmax", backend)
    backward_log = operator("log_softmax_backward", backend)

    class LogSoftmax(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, grad_enabled: bool, *arguments: Any) -> Any:
            with _below_autograd(), torch.set_grad_enabled(grad_enabled):
                output, row_stats = forward_log(*arguments)
            input, coefficients, *ctx.options, _ = arguments
            ctx.save_for_backward(input, coefficients, row_stats)
            ctx.mark_non_differentiable(row_stats)
            ctx.set_materialize_grads(False)
            return output, row_stats

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor | None, _: None) -> Any:
            input, coefficients, row_stats = ctx.saved_tensors
            _, need_input, need_coefficients, *_ = ctx.needs_input_grad
            if grad_output is None:
                return (None,) * 6
            grad_input, grad_coefficients = backward_log(
                grad_output, input, coefficients, *ctx.options, row_stats, need_input, need_coefficients
            )
            gradients = grad_input if need_input else None, grad_coefficients if need_coefficients else None
            return None, *gradients, *(None,) * 3

    def without_derivative(name: str, reason: str) -> None:
        overload = operator(name, backend)

        class Once(_SingleLevelFunction):
            @staticmethod
            def forward(ctx: Any, grad_enabled: bool, *arguments: Any) -> Any:
                ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in arguments))
                with _below_autograd(), torch.set_grad_enabled(grad_enabled):
                    return overload(*arguments)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                message = f"{overload} has no derivative: {reason}"
                return None, *(
                    torch.ops.monosoftmax.no_derivative(each, gradients, message) if needed else None
                    for each, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
                )

        _implement(overload, Once)

    losses: dict[str, tuple[str, ...]] = {
        "cross_entropy": ("input", "target", "weight", "coefficients"),
        "linear_cross_entropy": ("input", "linear_weight", "linear_bias", "target", "weight", "coefficients"),
    }
    if backend == "cpu":
        losses["cross_entropy_of_probabilities"] = losses["cross_entropy"]
    for name, tensors in losses.items():
        overload = operator(name, backend)
        scale = None if backend == "cpu" else operator("scale_", backend)
        rescale = operator("cross_entropy_rescale_", backend) if scale and name == "cross_entropy" else None
        function = _loss_function(overload, operator(f"{name}_backward", backend), rescale, scale, tensors)
        _implement(overload, function)
    _implement(forward_log, LogSoftmax)
    for name in (*(f"{each}_backward" for each in losses), "log_softmax_backward"):
        without_derivative(name, f'the {backend} backend does not support double backward; use backend="reference"')
    for name in ("token_statistics", "linear_token_statistics"):
        without_derivative(name, "the log-probability of a target has one as -linear_cross_entropy")


def _implement(overload: torch._ops.OpOverload, function: type[_SingleLevelFunction]) -> None:
    def kernel(*arguments: Any) -> Any:
        with enable_single_level_autograd_function():
            return function.apply(torch.is_grad_enabled(), *arguments)  # type: ignore[attr-defined]

    library.impl(overload, kernel, "Autograd")  # type: ignore[no-untyped-call]


for _backend in FUSED_BACKENDS:
    _register(_backend)
