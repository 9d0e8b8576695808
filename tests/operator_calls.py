"""Calls of the operators, and of the tables of row kernels below them, with what is promised of every such call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monosoftmax import ops
from monosoftmax.groups import LossOptions, Transform, Upstream
from monosoftmax.row_kernels import row_kernels
from monosoftmax.transforms import MonotonicTransform

PLAIN = LossOptions(None, -100, 0.0, 0.0, False)


def kernel_transform(
    transform: MonotonicTransform, requires_grad: bool = False, device: torch.device | str | None = None
) -> Transform:
    """``transform`` as kernels take it; the coefficients are a leaf, on ``device`` also where f has no parameters."""
    assert transform.kernel is not None
    coefficients = transform.coefficients().detach().to(device).requires_grad_(requires_grad)
    return Transform(coefficients, transform.kernel, list(transform.constants()))


def operator_of(call: Any) -> ops.Operator[Any, Any]:
    """The operator that takes the arguments ``call``."""
    (operator,) = (each for each in ops.OPERATORS.values() if each.arguments is type(call))
    return operator


def flattened(call: Any) -> tuple[Any, ...]:
    """The arguments one by one, as torch's dispatcher takes them."""
    return tuple(each for field in call for each in (field if hasattr(field, "_fields") else [field]))


def opcheck(call: Any) -> None:
    """torch's checks of an operator, called with ``call``."""
    torch.library.opcheck(operator_of(call).overload, flattened(call))


def check_function(function: Any, *arguments: Any, **options: Any) -> Any:
    """What ``function`` of a table returns: new memory, but for row_stats. None of its arguments is changed."""
    groups = [*arguments, *options.values()]
    given = [each for value in groups for each in (value if isinstance(value, tuple) else [value])]
    before = [each.clone() if isinstance(each, Tensor) else each for each in given]
    results = function(*arguments, **options)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then
    returned = [each for each in results if each.numel() > 0 and each is not options.get("row_stats")]
    assert not _storages(given) & _storages(returned) and len(_storages(returned)) == len(returned)
    assert not any(each.requires_grad for each in returned)
    return results


def _storages(values: Sequence[Any]) -> set[int]:
    return {each.untyped_storage().data_ptr() for each in values if isinstance(each, Tensor) and each.numel() > 0}


def check_row_kernels(backend: str, rows: Tensor, target: Tensor, transform: Transform, options: LossOptions) -> None:
    """What opcheck asks of operators, of the functions that chunks of a head are given to: they are no operators.

    They change nothing, hand out new memory, and their results have the shapes and types that they should have.
    """
    kernels, count = row_kernels(backend), rows.shape[0]
    cross_entropy, arguments = kernels.cross_entropy, (rows, target, transform, options)
    losses = check_function(cross_entropy, *arguments)
    assert losses[0].shape == losses[1].shape == (count,) and losses[2].shape == (3 if target.dim() == 2 else 2, count)
    assert losses[3].numel() == losses[4].numel() == 0
    scale = torch.full((), 0.3, dtype=transform.coefficients.dtype, device=rows.device)
    for mask in [(True, True), (True, False), (False, True)]:
        for how in ({"upstream": Upstream(scale)}, {"upstream": Upstream(scale.expand(count)), "row_stats": losses[2]}):
            results = check_function(cross_entropy, *arguments, **how, output_mask=mask)
            # Kernels with gradients may sum in another order.
            for each, wanted in zip(results[:2], losses[:2], strict=True):
                torch.testing.assert_close(each, wanted[:0] if "row_stats" in how else wanted)
            if "row_stats" not in how:
                torch.testing.assert_close(results[2], losses[2])
            for each, like, needed in zip(results[3:], (rows, transform.coefficients), mask, strict=True):
                assert each.shape == (like.shape if needed else (0,)) and each.dtype == like.dtype
    if target.dim() == 1:
        statistics = check_function(kernels.token_statistics, rows, target, transform, options.ignore_index)
        wide, whole = scale.dtype, torch.int64
        assert [each.dtype for each in statistics] == [wide, wide, whole, wide, whole, wide]
        assert [each.shape for each in statistics] == [*[(count,)] * 5, (3, count)]
