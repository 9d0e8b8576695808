"""The operators of the fused backends: schemas and fake implementations, in one place.

Every operator has one overload for each fused backend, e.g. ``torch.ops.monosoftmax.cross_entropy.cpu``. An overload,
not a dispatch key, names the backend because two of them may serve one device. The kernels are registered by the
backends (``csrc/bindings.cpp`` for ``cpu``), the derivatives by :mod:`monosoftmax.autograd`.

Common arguments: ``input`` [N, V], rows with any stride and columns with stride 1; ``target`` [N] int64; ``weight``
[V] in the arithmetic type (float64 for float64 input, else float32); ``transform``, ``coefficients`` (in the
arithmetic type) and ``constants`` as :class:`monosoftmax.transforms.MonotonicTransform` gives them; ``row_stats``
[2, N]: the largest y of a row, and sum exp(y - largest). With them, and not with lse, the probabilities that the
backward pass forms add up to 1, and one next to 1 keeps its 1 - p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .transforms.base import arithmetic_dtype

#: Backends with fused kernels. Each has an overload of its name.
FUSED_BACKENDS = ("cpu",)

_TRANSFORM = "Tensor coefficients, str transform, float[] constants"
_LOSS = f"Tensor input, Tensor target, Tensor? weight, {_TRANSFORM}"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss"

SCHEMAS = {
    # -> loss [N], lse [N] (unless return_lse: 0 in ignored rows, and not differentiable), row_stats
    "cross_entropy": f"({_LOSS}, {_OPTIONS}, bool return_lse) -> (Tensor loss, Tensor lse, Tensor row_stats)",
    # -> gradients of input and coefficients, each empty where it is not needed. An absent upstream gradient is zero.
    "cross_entropy_backward": (
        f"(Tensor? grad_loss, Tensor? grad_lse, {_LOSS}, Tensor row_stats, {_OPTIONS}, "
        "bool need_input, bool need_coefficients) -> (Tensor grad_input, Tensor grad_coefficients)"
    ),
    # -> log p [N, V] of type dtype, row_stats
    "log_softmax": f"(Tensor input, {_TRANSFORM}, ScalarType dtype) -> (Tensor output, Tensor row_stats)",
    "log_softmax_backward": (
        f"(Tensor grad_output, Tensor input, {_TRANSFORM}, Tensor row_stats, "
        "bool need_input, bool need_coefficients) -> (Tensor grad_input, Tensor grad_coefficients)"
    ),
}

library = torch.library.Library("monosoftmax", "DEF")  # type: ignore[no-untyped-call]


def _row_results(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = input.shape[0], arithmetic_dtype(input.dtype)
    return (
        input.new_empty(rows, dtype=dtype),
        input.new_empty(rows, dtype=dtype),
        input.new_empty((2, rows), dtype=dtype),
    )


def _gradients(input: Tensor, coefficients: Tensor, need_input: bool, need_coefficients: bool) -> tuple[Tensor, Tensor]:
    return (
        input.new_empty(input.shape if need_input else (0,)),
        coefficients.new_empty(coefficients.shape if need_coefficients else (0,)),
    )


def _fake_cross_entropy(  # type: ignore[no-untyped-def]
    input, target, weight, coefficients, transform, constants, ignore_index, label_smoothing, z_loss, return_lse
):
    return _row_results(input)


def _fake_cross_entropy_backward(  # type: ignore[no-untyped-def]
    grad_loss, grad_lse, input, target, weight, coefficients, transform, constants, row_stats,
    ignore_index, label_smoothing, z_loss, need_input, need_coefficients,
):  # fmt: skip
    return _gradients(input, coefficients, need_input, need_coefficients)


def _fake_log_softmax(input, coefficients, transform, constants, dtype):  # type: ignore[no-untyped-def]
    return input.new_empty(input.shape, dtype=dtype), _row_results(input)[2]


def _fake_log_softmax_backward(  # type: ignore[no-untyped-def]
    grad_output, input, coefficients, transform, constants, row_stats, need_input, need_coefficients
):
    return _gradients(input, coefficients, need_input, need_coefficients)


_FAKES: dict[str, Callable[..., Any]] = {
    "cross_entropy": _fake_cross_entropy,
    "cross_entropy_backward": _fake_cross_entropy_backward,
    "log_softmax": _fake_log_softmax,
    "log_softmax_backward": _fake_log_softmax_backward,
}

for _backend in FUSED_BACKENDS:
    for _name, _schema in SCHEMAS.items():
        library.define(  # type: ignore[no-untyped-call]
            f"{_name}.{_backend}{_schema}", tags=(torch.Tag.pt2_compliant_tag,)
        )
        torch.library.register_fake(f"monosoftmax::{_name}.{_backend}", _FAKES[_name], lib=library)


def operator(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of operator ``name`` for ``backend``."""
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops.monosoftmax, name), backend)
    return overload
