"""Derivatives of the fused operators: what is saved, and what is differentiated.

Each operator owns its derivative at the dispatcher: its kernel for the Autograd key is an autograd function that
redispatches below autograd. That is what lets one operator work in eager mode, under ``torch.compile``, under
``torch.func.grad`` and under both at once; a ``torch.autograd.Function`` around an operator without a derivative of
its own gives silent zeros for ``torch.compile(torch.func.grad(...))`` (torch 2.13). ``torch.autograd.Function`` itself
cannot be applied inside a dispatcher kernel, so its single-level base class is: the two private names imported here
are tested on every supported version of torch by ``tests/test_operators.py``. Such a function switches gradients off
while its forward runs, where the levels of nested ``torch.func`` transforms below want them as the caller had them.

The losses compute the gradients of ``total``, their scaled sum, while the logits are at hand in the forward pass, as
far as :mod:`monosoftmax.gradients_ahead` lets them wait: each backward pass scales them by total's upstream gradient
and hands them out. It computes them from the logits again where something else has a gradient too (the losses of the
rows, lse), and where they may be differentiated in turn.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd.function import _SingleLevelFunction

from . import gradients_ahead
from ._dispatch import has_values, keeps_graph, tells_values, within_functorch
from .backends import head_method
from .float16 import float16_shift
from .ops import FUSED_BACKENDS, library, operator
from .transforms.base import MonotonicTransform, arithmetic_dtype, coefficients_of

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
    grad_in_forward: bool | None,
    return_log_prob: bool,
    return_lse: bool,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`cross_entropy` of the logits input @ linear_weight.T + linear_bias, which exist in chunks only.

    The third is log p of the target [N], whatever the options of the loss are; empty unless ``return_log_prob``.
    """
    of_transform = _kernel_arguments(input, transform)
    if method == "auto":
        operands = (input, linear_weight, linear_bias, of_transform[0])
        needs_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in operands)
        chunked = return_log_prob or chunk_rows > 0
        method = "chunked" if chunked else head_method(backend, input.shape[1], input.dtype, needs_gradient)
    loss, lse, _, log_prob, total, *_ = operator("linear_cross_entropy", backend)(
        input, linear_weight, linear_bias, target, weight, *of_transform, ignore_index, label_smoothing, z_loss,
        method, chunk_rows, filter_eps, grad_in_forward, return_log_prob, return_lse, scale,
        False, False, False, False,
    )  # fmt: skip
    return loss, lse, log_prob, total


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
    coefficients = coefficients_of(transform, input.device, arithmetic_dtype(input.dtype))
    return coefficients, transform.kernel, list(transform.constants())


class _Fused(_SingleLevelFunction):
    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[int, ...]:
        """What compiled autograd tells backward passes apart by: all that ctx holds beside saved tensors."""
        state = {name: value for name, value in vars(ctx).items() if not isinstance(value, Tensor)}
        return ctx._autograd_function_id, zlib.crc32(repr(sorted(state.items())).encode())

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "the fused backends have no forward-mode derivatives (jvp, jacfwd, hessian), and no second ones: use "
            'backend="reference"'
        )


class _Operator:
    """An operator that is called by the names of its schema."""

    def __init__(self, overload: torch._ops.OpOverload) -> None:
        self.overload = overload
        self.arguments = [each.name for each in overload._schema.arguments]
        self.tensors = [each.name for each in overload._schema.arguments if "Tensor" in str(each.type)]
        self.results = [each.name for each in overload._schema.returns]

    def __call__(self, named: Mapping[str, Any]) -> Any:
        return self.overload(*(named[name] for name in self.arguments))


def _loss_function(
    forward_operator: _Operator,
    backward_operator: _Operator,
    rescale_operator: _Operator | None,
    scale_operator: torch._ops.OpOverload | None,
) -> type[_SingleLevelFunction]:
    """The derivative of a loss, with respect to the arguments that its schema has a ``need_`` for.

    The last two operators (:data:`.ops.ON_DEVICE`) are those of backends for devices that do not tell values.
    """
    at = {name: place for place, name in enumerate(forward_operator.arguments)}
    result_at = {name: place for place, name in enumerate(forward_operator.results)}
    differentiable = [name.removeprefix("need_") for name in at if name.startswith("need_")]
    linear = "linear_weight" in differentiable
    # What the backward pass is given once more, tensors and others.
    kept = [name for name in at if name in backward_operator.arguments and not name.startswith("need_")]
    tensors = [name for name in kept if name in forward_operator.tensors]
    others = [name for name in kept if name not in tensors]

    def needed_later(ctx: Any, named: Mapping[str, Any], **changes: Any) -> list[Tensor]:
        """The gradients that are needed, computed now."""
        wanted = {f"need_{name}": name in ctx.needed for name in differentiable}
        gradients = backward_operator({"grad_loss": None, "grad_lse": None} | dict(named) | wanted | changes)
        return [each for each, name in zip(gradients, differentiable, strict=True) if name in ctx.needed]

    class Loss(_Fused):
        @staticmethod
        def forward(ctx: Any, grad_enabled: bool, *arguments: Any) -> Any:
            differentiated = ctx.needs_input_grad
            if grad_enabled and differentiated[1 + at["target"]]:
                raise ValueError(f"target must not require a gradient: {forward_operator.overload} has none for it")
            needed = [name for name in differentiable if grad_enabled and differentiated[1 + at[name]]]
            given, scale, shift = list(arguments), arguments[at["scale"]], None
            # Gradients that the caller asks for stay his own.
            asked = any(arguments[place] for name, place in at.items() if name.startswith("need_"))
            ahead = scale is not None and not asked
            ahead = ahead and _may_compute_ahead(dict(zip(at, arguments, strict=True)), needed, rescale_operator)
            if ahead:
                for name in needed:
                    given[at[f"need_{name}"]] = True
                if linear and given[at["input"]].dtype == torch.float16:
                    shift = float16_shift(scale, *(given[at[name]] for name in ("target", "weight", "ignore_index")))
                    given[at["scale"]] = scale * shift
            with _below_autograd(), torch.set_grad_enabled(grad_enabled):
                results = list(forward_operator.overload(*given))
                if shift is not None:
                    results[result_at["total"]] = results[result_at["total"]] / shift
            gradients = []
            if ahead:
                gradients = [results[result_at[f"grad_{name}"]] for name in needed]
                for name, each in zip(needed, gradients, strict=True):
                    results[result_at[f"grad_{name}"]] = each.new_empty(0)
                # What is computed ahead in a trace waits when the program runs, if it does: nobody counts it.
                if has_values(given[at["input"]]):
                    gradients_ahead.let_wait(gradients)
            ctx.needed, ctx.dtypes = needed, [arguments[at[name]].dtype for name in needed]
            ctx.others = [arguments[at[name]] for name in others]
            # All of them here and none on ctx, so that checkpoints, saved-tensor hooks and compiled autograd see them.
            kept_tensors = (arguments[at[name]] for name in tensors)
            ctx.save_for_backward(*kept_tensors, results[result_at["row_stats"]], scale, shift, *gradients)
            asked_for = {"loss"}
            if arguments[at["return_lse"]]:
                asked_for.add("lse")
            if scale is not None:
                asked_for.add("total")
            if "return_log_prob" in at and arguments[at["return_log_prob"]]:
                asked_for.add("log_prob")
            ctx.mark_non_differentiable(*(results[place] for name, place in result_at.items() if name not in asked_for))
            ctx.set_materialize_grads(False)
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> Any:
            grads = dict(zip(result_at, upstream, strict=True))
            loss, lse, total, log_prob = (grads.get(name) for name in ("loss", "lse", "total", "log_prob"))
            places: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            if loss is None and lse is None and total is None and log_prob is None:
                return tuple(places)
            saved = ctx.saved_tensors
            row_stats, scale, shift, *ahead = saved[len(tensors) :]

            def kept_by_name() -> dict[str, Any]:
                named = dict(zip(tensors, saved, strict=False)) | dict(zip(others, ctx.others, strict=True))
                return named | {"row_stats": row_stats, "scale": scale}

            parts: list[Sequence[Tensor]] = []
            # With gradients enabled, these may be differentiated: that must end in an error, not in zeros.
            if ahead and total is not None and loss is None and lse is None and not torch.is_grad_enabled():
                in_place = not keeps_graph()
                if in_place:
                    gradients_ahead.let_go(ahead)
                part = gradients_ahead.scaled(
                    ahead,
                    total if shift is None else total / shift,
                    rounded=not linear and saved[0].dtype in _HALF,  # of the input
                    in_place=in_place,
                    scale_operator=scale_operator,
                )
                if part is None and rescale_operator and not within_functorch() and has_values(total):
                    own = ahead if in_place else [each.clone() for each in ahead]
                    part = _rescaled(own, total, rescale_operator, kept_by_name())
                if part is not None:
                    parts, total = [part], None
            if total is not None:
                of_rows = (total * scale).expand(row_stats.shape[1:])
                loss = of_rows if loss is None else loss + of_rows
            if loss is not None or lse is not None:
                parts.append(needed_later(ctx, kept_by_name(), grad_loss=loss, grad_lse=lse))
            if log_prob is not None:
                plain = {"weight": None, "label_smoothing": 0.0, "z_loss": 0.0}
                parts.append(needed_later(ctx, kept_by_name(), grad_loss=-log_prob, **plain))
            for name, dtype, *gradients in zip(ctx.needed, ctx.dtypes, *parts, strict=True):
                first, *more = gradients
                gradient = first + more[0] if more else first
                places[1 + at[name]] = gradient.to(dtype)
            return tuple(places)

    return Loss


def _rescaled(
    gradients: Sequence[Tensor], grad_total: Tensor, rescale_operator: _Operator, named: Mapping[str, Any]
) -> list[Tensor]:
    """The gradients of a half precision input and of coefficients times ``grad_total``, decided on the device."""
    for each in gradients:
        if each.dtype in _HALF:
            rescale_operator({"grad_input": each, "factor": grad_total, **named})
        else:
            each.mul_(grad_total)
    return list(gradients)


def _may_compute_ahead(named: Mapping[str, Any], needed: Sequence[str], rescale_operator: _Operator | None) -> bool:
    input, wish = named["input"], named.get("grad_in_forward")
    # func.grad asks for gradients that it can differentiate.
    if not needed or wish is False or within_functorch() or named.get("method") == "recompute":
        return False
    # A gradient in half precision is scaled by 1 or computed again, so as not to be rounded twice. The CPU says which
    # without waiting; elsewhere an operator decides on the device.
    rounded_once = "linear_weight" in named or input.dtype not in _HALF or tells_values(input)
    if not rounded_once and (rescale_operator is None or not has_values(input)):
        return False
    if wish or not has_values(input):
        return True
    return gradients_ahead.may_wait([named[name] for name in needed])


def _register(backend: str) -> None:
    """Give the operators of ``backend`` their derivatives."""
    forward_log = operator("log_softmax", backend)
    backward_log = operator("log_softmax_backward", backend)

    class LogSoftmax(_Fused):
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

        class Once(_Fused):
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

    losses = [
        "cross_entropy",
        "linear_cross_entropy",
        *(["cross_entropy_of_probabilities"] if backend == "cpu" else []),
    ]
    for name in losses:
        forward, backward = _Operator(operator(name, backend)), _Operator(operator(f"{name}_backward", backend))
        scale = None if backend == "cpu" else operator("scale_", backend)
        rescale = None
        if scale and name == "cross_entropy":
            rescale = _Operator(operator("cross_entropy_rescale_", backend))
        _implement(forward.overload, _loss_function(forward, backward, rescale, scale))
    _implement(forward_log, LogSoftmax)
    for name in (*(f"{each}_backward" for each in losses), "log_softmax_backward"):
        without_derivative(name, f'the {backend} backend does not support double backward; use backend="reference"')
    for name in ("token_statistics", "linear_token_statistics"):
        without_derivative(name, "the log-probability of a target has one as -linear_cross_entropy")


def _implement(overload: torch._ops.OpOverload, function: type[_SingleLevelFunction]) -> None:
    def kernel(*arguments: Any) -> Any:
        with enable_single_level_autograd_function():
            return function.apply(torch.is_grad_enabled(), *arguments)  # type: ignore[attr-defined]

    library.impl(overload, kernel, "Autograd")


for _backend in FUSED_BACKENDS:
    _register(_backend)
