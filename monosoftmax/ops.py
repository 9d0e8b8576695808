"""The operators of the fused backends: schemas and fake implementations, in one place.

Every operator has one overload for each fused backend, e.g. ``torch.ops.monosoftmax.cross_entropy.cpu``. An overload,
not a dispatch key, names the backend because two of them may serve one device. The kernels are registered by the
backends (``csrc/cpu/cross_entropy.cpp`` for ``cpu``, ``csrc/cuda/operators.cpp`` for ``cuda``; at the end of this file
``triton_kernels/operators.py`` for ``triton``; the ``linear_`` ones, which are made of the others, by
:mod:`monosoftmax.chunked_head`), the derivatives by :mod:`monosoftmax.autograd`.

Common arguments: ``input`` [N, V], rows with any stride and columns with stride 1; ``target`` [N] int64, or, for the
operators ``_of_probabilities``, class probabilities [N, V] of any floating type that ``input`` may have; ``weight`` [V]
in the arithmetic type (float64 for float64 input, else float32); ``transform``, ``coefficients`` (in the arithmetic
type) and ``constants`` as :class:`monosoftmax.transforms.MonotonicTransform` gives them; ``row_stats`` [2, N]: the
largest y of a row, and sum exp(y - largest). With them, and not with lse, the probabilities that the backward pass
forms add up to 1, and one next to 1 keeps its 1 - p. For the ``linear_`` operators ``input`` is [N, d],
``linear_weight`` [V, d] and ``linear_bias`` [V]: they are multiplied in the type of ``input``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .transforms.base import arithmetic_dtype

#: Backends with fused kernels. Each has an overload of its name.
FUSED_BACKENDS = ("cpu", "triton", "cuda")

_TRANSFORM = "Tensor coefficients, str transform, float[] constants"
_LOSS = f"Tensor input, Tensor target, Tensor? weight, {_TRANSFORM}"
_HEAD = "Tensor input, Tensor linear_weight, Tensor? linear_bias"
_LINEAR_LOSS = f"{_HEAD}, Tensor target, Tensor? weight, {_TRANSFORM}"
_LINEAR_NEEDS = "bool need_input, bool need_linear_weight, bool need_linear_bias, bool need_coefficients"
_LINEAR_GRADIENTS = "Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias, Tensor grad_coefficients"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss"
#: method is "chunked" or "recompute"; chunk_rows 0 leaves the size of a chunk to the backend.
_LINEAR_OPTIONS = f"{_OPTIONS}, str method, int chunk_rows, float filter_eps"

#: Of every fused backend.
SCHEMAS = {
    # -> loss [N], lse [N] (unless return_lse: 0 in ignored rows, and not differentiable), row_stats; and, where a scale
    # is given, total = scale * sum of losses with those of its gradients that are needed. Empty is what is not.
    "cross_entropy": (
        f"({_LOSS}, {_OPTIONS}, bool return_lse, Tensor? scale, bool need_input, bool need_coefficients) -> "
        "(Tensor loss, Tensor lse, Tensor row_stats, Tensor total, Tensor grad_input, Tensor grad_coefficients)"
    ),
    # -> gradients of input and coefficients, each empty where it is not needed. An absent upstream gradient is zero.
    "cross_entropy_backward": (
        f"(Tensor? grad_loss, Tensor? grad_lse, {_LOSS}, Tensor row_stats, {_OPTIONS}, "
        "bool need_input, bool need_coefficients) -> (Tensor grad_input, Tensor grad_coefficients)"
    ),
    # The two above, with the gradient of input written over it; for the chunks of linear_cross_entropy.
    "cross_entropy_": (
        f"({_LOSS}, {_OPTIONS}, bool return_lse, Tensor scale, bool need_coefficients) -> "
        "(Tensor loss, Tensor lse, Tensor row_stats, Tensor grad_coefficients)"
    ).replace("Tensor input", "Tensor(a!) input"),
    "cross_entropy_backward_": (
        f"(Tensor? grad_loss, Tensor? grad_lse, {_LOSS}, Tensor row_stats, {_OPTIONS}, bool need_coefficients) -> "
        "Tensor grad_coefficients"
    ).replace("Tensor input", "Tensor(a!) input"),
    # -> log p(target), entropy, argmax, lse, rank of the target (how many logits are larger), each [N]. In ignored rows
    # log p is 0 and the rank -1.
    "token_statistics": (
        f"(Tensor input, Tensor target, {_TRANSFORM}, int ignore_index) -> "
        "(Tensor log_prob, Tensor entropy, Tensor argmax, Tensor lse, Tensor rank)"
    ),
    # The same of the logits input @ linear_weight.T + linear_bias, which exist for one chunk of rows at a time. The
    # gradients of linear_weight and linear_bias are sums over the chunks, in the arithmetic type. grad_in_forward says
    # whether the derivative computes them ahead; None leaves it to monosoftmax.gradients_ahead. log_prob is log p of
    # the target, 0 in ignored rows, whatever weight, label_smoothing and z_loss are; empty unless return_log_prob.
    "linear_cross_entropy": (
        f"({_LINEAR_LOSS}, {_LINEAR_OPTIONS}, bool? grad_in_forward, bool return_log_prob, bool return_lse, "
        f"Tensor? scale, {_LINEAR_NEEDS}) -> "
        f"(Tensor loss, Tensor lse, Tensor row_stats, Tensor log_prob, Tensor total, {_LINEAR_GRADIENTS})"
    ),
    "linear_cross_entropy_backward": (
        f"(Tensor? grad_loss, Tensor? grad_lse, {_LINEAR_LOSS}, Tensor row_stats, {_LINEAR_OPTIONS}, "
        f"{_LINEAR_NEEDS}) -> "
        f"({_LINEAR_GRADIENTS})"
    ),
    "linear_token_statistics": (
        f"({_HEAD}, Tensor target, {_TRANSFORM}, int ignore_index) -> "
        "(Tensor log_prob, Tensor entropy, Tensor argmax, Tensor lse, Tensor rank)"
    ),
    # -> log p [N, V] of type dtype, row_stats
    "log_softmax": f"(Tensor input, {_TRANSFORM}, ScalarType dtype) -> (Tensor output, Tensor row_stats)",
    "log_softmax_backward": (
        f"(Tensor grad_output, Tensor input, {_TRANSFORM}, Tensor row_stats, "
        "bool need_input, bool need_coefficients) -> (Tensor grad_input, Tensor grad_coefficients)"
    ),
}

#: Of the cpu backend: the loss and its backward above, of class probabilities, of which no rows are ignored: return_lse
#: is whether lse is differentiated. row_stats is [3, N], with the sum of the target distribution q in its last row.
OF_PROBABILITIES = {
    "cross_entropy_of_probabilities": SCHEMAS["cross_entropy"].replace("int ignore_index, ", ""),
    "cross_entropy_of_probabilities_backward": SCHEMAS["cross_entropy_backward"].replace("int ignore_index, ", ""),
}

#: Of backends whose device does not tell a number without being waited for. Unless factor is 1, grad_input, computed
#: ahead for a scale, is computed again for factor * scale, and a contiguous input multiplied by factor.
ON_DEVICE = {
    "scale_": "(Tensor(a!) input, Tensor factor) -> ()",
    "cross_entropy_rescale_": (
        f"(Tensor(a!) grad_input, Tensor factor, Tensor scale, {_LOSS}, Tensor row_stats, {_OPTIONS}) -> ()"
    ),
}


class _Library:
    """The operators of this process. A second import, after ``sys.modules`` was cleared, finds those of the first.

    torch lets nobody define an operator twice. The operators know only tensors, numbers and names, so that it does not
    matter which import's code runs.
    """

    def __init__(self) -> None:
        self._torch: torch.library.Library | None = None
        if "monosoftmax" not in _LIBRARIES:
            self._torch = _LIBRARIES["monosoftmax"] = torch.library.Library("monosoftmax", "DEF")  # type: ignore[no-untyped-call]

    def define(self, schema: str, *tags: torch.Tag) -> None:
        if self._torch is not None:
            self._torch.define(schema, tags=tags)  # type: ignore[no-untyped-call]

    def impl(self, name: str | torch._ops.OpOverload, function: Callable[..., Any], key: str) -> None:
        if self._torch is not None:
            self._torch.impl(name, function, key)  # type: ignore[no-untyped-call]

    def fake(self, name: str, function: Callable[..., Any]) -> None:
        if self._torch is not None:
            torch.library.register_fake(f"monosoftmax::{name}", function, lib=self._torch)


#: Outlives the modules of this package.
_LIBRARIES: dict[str, torch.library.Library] = torch.ops.__dict__.setdefault("_monosoftmax_libraries", {})

library = _Library()


def _row_results(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = input.shape[0], arithmetic_dtype(input.dtype)
    return (
        input.new_empty(rows, dtype=dtype),
        input.new_empty(rows, dtype=dtype),
        input.new_empty((2, rows), dtype=dtype),
    )


def _statistics(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    log_prob, entropy, _ = _row_results(input)
    return log_prob, entropy, torch.empty_like(target), torch.empty_like(log_prob), torch.empty_like(target)


def _total(scale: Tensor | None, input: Tensor) -> Tensor:
    return input.new_empty((0,) if scale is None else (), dtype=arithmetic_dtype(input.dtype))


def _gradients(input: Tensor, coefficients: Tensor, need_input: bool, need_coefficients: bool) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if need_input else (0,)),
        coefficients.new_empty(coefficients.shape if need_coefficients else (0,)),
    )


def _fake_cross_entropy(  # type: ignore[no-untyped-def]
    input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss, return_lse,
    scale, need_input, need_coefficients,
):  # fmt: skip
    loss, lse, row_stats = _row_results(input)
    return loss, lse, row_stats, _total(scale, input), *_gradients(input, coefficients, need_input, need_coefficients)


def _fake_cross_entropy_backward(  # type: ignore[no-untyped-def]
    grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats,
    ignore_index, label_smoothing, z_loss, need_input, need_coefficients,
):  # fmt: skip
    return _gradients(input, coefficients, need_input, need_coefficients)


def _fake_cross_entropy_of_probabilities(  # type: ignore[no-untyped-def]
    input, target, weight, coefficients, transform, constants, label_smoothing, z_loss, return_lse,
    scale, need_input, need_coefficients,
):  # fmt: skip
    loss, lse, row_stats = _row_results(input)
    row_stats = row_stats.new_empty((3, input.shape[0]))
    return loss, lse, row_stats, _total(scale, input), *_gradients(input, coefficients, need_input, need_coefficients)


def _fake_cross_entropy_of_probabilities_backward(  # type: ignore[no-untyped-def]
    grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats,
    label_smoothing, z_loss, need_input, need_coefficients,
):  # fmt: skip
    return _gradients(input, coefficients, need_input, need_coefficients)


def _fake_cross_entropy_(  # type: ignore[no-untyped-def]
    input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss, return_lse,
    scale, need_coefficients,
):  # fmt: skip
    return *_row_results(input), _gradients(input, coefficients, False, need_coefficients)[1]


def _fake_cross_entropy_backward_(  # type: ignore[no-untyped-def]
    grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats,
    ignore_index, label_smoothing, z_loss, need_coefficients,
):  # fmt: skip
    return _gradients(input, coefficients, False, need_coefficients)[1]


def _fake_in_place(*_: Any) -> None:
    return None


def _fake_token_statistics(  # type: ignore[no-untyped-def]
    input, target, coefficients, transform, constants, ignore_index
):
    return _statistics(input, target)


def _linear_gradients(
    input: Tensor, linear_weight: Tensor, coefficients: Tensor,
    need_input: bool, need_linear_weight: bool, need_linear_bias: bool, need_coefficients: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = arithmetic_dtype(input.dtype)
    grad_input, grad_coefficients = _gradients(input, coefficients, need_input, need_coefficients)
    return (
        grad_input,
        input.new_empty(linear_weight.shape if need_linear_weight else (0,), dtype=dtype),
        input.new_empty(linear_weight.shape[:1] if need_linear_bias else (0,), dtype=dtype),
        grad_coefficients,
    )


def _fake_linear_cross_entropy(  # type: ignore[no-untyped-def]
    input, linear_weight, linear_bias, target, weight, coefficients, transform, constants,
    ignore_index, label_smoothing, z_loss, method, chunk_rows, filter_eps, grad_in_forward, return_log_prob,
    return_lse, scale, *needs,
):  # fmt: skip
    loss, lse, row_stats = _row_results(input)
    log_prob = loss.new_empty(loss.shape if return_log_prob else (0,))
    gradients = _linear_gradients(input, linear_weight, coefficients, *needs)
    return loss, lse, row_stats, log_prob, _total(scale, input), *gradients


def _fake_linear_cross_entropy_backward(  # type: ignore[no-untyped-def]
    grad_loss, grad_lse, input, linear_weight, linear_bias, target, weight, coefficients, transform, constants,
    row_stats, ignore_index, label_smoothing, z_loss, method, chunk_rows, filter_eps, *needs,
):  # fmt: skip
    return _linear_gradients(input, linear_weight, coefficients, *needs)


def _fake_linear_token_statistics(  # type: ignore[no-untyped-def]
    input, linear_weight, linear_bias, target, coefficients, transform, constants, ignore_index
):
    return _statistics(input, target)


def _fake_log_softmax(input, coefficients, transform, constants, dtype):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape, dtype=dtype), _row_results(input)[2]


def _fake_log_softmax_backward(  # type: ignore[no-untyped-def]
    grad_output, input, coefficients, transform, constants, row_stats, need_input, need_coefficients
):
    return _gradients(input, coefficients, need_input, need_coefficients)


_FAKES: dict[str, Callable[..., Any]] = {
    "cross_entropy": _fake_cross_entropy,
    "cross_entropy_backward": _fake_cross_entropy_backward,
    "cross_entropy_of_probabilities": _fake_cross_entropy_of_probabilities,
    "cross_entropy_of_probabilities_backward": _fake_cross_entropy_of_probabilities_backward,
    "cross_entropy_": _fake_cross_entropy_,
    "cross_entropy_backward_": _fake_cross_entropy_backward_,
    "cross_entropy_rescale_": _fake_in_place,
    "scale_": _fake_in_place,
    "token_statistics": _fake_token_statistics,
    "linear_cross_entropy": _fake_linear_cross_entropy,
    "linear_cross_entropy_backward": _fake_linear_cross_entropy_backward,
    "linear_token_statistics": _fake_linear_token_statistics,
    "log_softmax": _fake_log_softmax,
    "log_softmax_backward": _fake_log_softmax_backward,
}

for _backend in FUSED_BACKENDS:
    for _name, _schema in (SCHEMAS | (OF_PROBABILITIES if _backend == "cpu" else ON_DEVICE)).items():
        library.define(f"{_name}.{_backend}{_schema}", torch.Tag.pt2_compliant_tag)
        library.fake(f"{_name}.{_backend}", _FAKES[_name])


# How the kernels of csrc/cuda compute a call, in words: it depends on the GPU.
library.define("describe_plan.cuda(Tensor input, str transform, int size, bool gradient, bool coefficients) -> str")

library.define("no_derivative(Tensor like, Tensor[] upstream, str reason) -> Tensor")


def _no_derivative(like: Tensor, upstream: list[Tensor], reason: str) -> Tensor:
    raise RuntimeError(reason)


# What stands in the place of a derivative that does not exist: an error when it runs, not when it is traced, because
# torch.compile traces the backward pass of everything whether it will be run or not. It takes the upstream gradients so
# that a compiler does not move it to the forward pass.
library.impl("no_derivative", _no_derivative, "CompositeExplicitAutograd")
library.fake("no_derivative", lambda like, *_: torch.empty_like(like))


def operator(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of operator ``name`` for ``backend``."""
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops.monosoftmax, name), backend)
    return overload


@functools.cache
def _triton_operators() -> ModuleType:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(f"monosoftmax: triton does not load ({error}): pip install triton") from error
    return importlib.import_module(f"{__package__}.triton_kernels.operators")


def _triton_kernel(name: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        return getattr(_triton_operators(), name)(*arguments)

    return kernel


# The row operators of Triton, which is imported when one is called. CPU tensors are for its interpreter.
for _name in SCHEMAS | ON_DEVICE:
    if not _name.startswith("linear_"):
        for _key in ("CUDA", "CPU"):
            library.impl(operator(_name, "triton"), _triton_kernel(_name), _key)
