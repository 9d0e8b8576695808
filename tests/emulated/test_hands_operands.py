"""Operands as they lie in memory: every public function and module, every operand, every layout, every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from hands import BACKENDS, check_table, on
from losses import disturbed
from torch import Tensor, nn
from torch.nn import functional as F

import monosoftmax as ms

ROWS, FEATURES, CLASSES = 5, 6, 11
OPERANDS: dict[str, tuple[int, ...]] = {
    "input": (ROWS, FEATURES),
    "logits": (ROWS, CLASSES),
    "linear_weight": (CLASSES, FEATURES),
    "linear_bias": (CLASSES,),
    "weight": (CLASSES,),
    "raw_slope": (8,),
    "upstream": (ROWS,),
    "upstream of all": (ROWS, CLASSES),
}


def _wider(tensor: Tensor, before: int, after: int) -> Tensor:
    """A tensor that holds numbers that must not be read around what ``tensor`` will be in its last dimension."""
    return torch.full((*tensor.shape[:-1], before + tensor.shape[-1] + after), 77, dtype=tensor.dtype)


def _within(tensor: Tensor, buffer: Tensor, place: Any) -> Tensor:
    """``tensor`` at ``place`` of ``buffer``, with its history."""
    buffer = buffer.index_put((torch.tensor([], dtype=torch.int64),), tensor.new_zeros(0, *buffer.shape[1:]))
    view = buffer[place]
    view.copy_(tensor)
    return buffer[place]


#: What a layout makes of a contiguous tensor: another one with the same numbers, or some of them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "strided": lambda tensor: _within(tensor, _wider(tensor, tensor.shape[-1], 0), (..., slice(0, None, 2))),
    "transposed": lambda tensor: (
        tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack([tensor] * 3, 1)[:, 1]
    ),
    "offset view": lambda tensor: torch.cat([tensor.new_full((3,), 77), tensor.flatten()])[3:].view(tensor.shape),
    "slice of a wider one": lambda tensor: _within(tensor, _wider(tensor, 1, 2), (..., slice(1, -2))),
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "every dimension expanded": lambda tensor: tensor.flatten()[0].expand(tensor.shape),
}


class Function(NamedTuple):
    """A public function or module: its operands, and the call of it, of operands by name, on a backend."""

    operands: tuple[str, ...]
    call: Callable[[Mapping[str, Tensor], Any, Any], Tensor]


def _head_of(named: Mapping[str, Tensor], f: Any, backend: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A layer, and the tensors to be used in place of its parameters."""
    layer = ms.MonotonicSoftmax(FEATURES, CLASSES, f, reduction="none", z_loss=0.1, backend=backend)
    return layer, {"weight": named["linear_weight"], "bias": named["linear_bias"]}


def _layer(named: Mapping[str, Tensor], f: Any, backend: Any) -> Tensor:
    layer, parameters = _head_of(named, f, backend)
    output = torch.func.functional_call(layer, parameters, (named["input"], named["target"]))
    result: Tensor = output.loss + output.output
    return result


def _linear(named: Mapping[str, Tensor], f: Any, backend: Any, **options: Any) -> Tensor:
    return ms.linear_cross_entropy(
        named["input"], named["linear_weight"], named["target"], f, linear_bias=named["linear_bias"],
        weight=named["weight"], label_smoothing=0.1, backend=backend, **options,
    )  # fmt: skip


def _statistics(named: Mapping[str, Tensor], f: Any, backend: Any) -> Tensor:
    found = ms.linear_token_statistics(
        named["input"], named["linear_weight"], named["target"], f, linear_bias=named["linear_bias"], backend=backend
    )
    return torch.stack([each.double() for each in found])


def _loss(named: Mapping[str, Tensor], f: Any, backend: Any, **options: Any) -> Tensor:
    return ms.cross_entropy(
        named["logits"], named["target"], f, weight=named["weight"], label_smoothing=0.1, backend=backend, **options
    )


_HEAD = ("input", "linear_weight", "linear_bias", "target")
FUNCTIONS = {
    "cross_entropy": Function(
        ("logits", "target", "weight", "raw_slope", "upstream"), lambda *a: _loss(*a, reduction="none")
    ),
    "cross_entropy, mean": Function(("logits", "target", "weight", "raw_slope"), _loss),
    "cross_entropy of probabilities": Function(
        ("logits", "probabilities", "weight", "raw_slope"),
        lambda named, f, backend: _loss({**named, "target": named["probabilities"]}, f, backend),
    ),
    "log_softmax": Function(
        ("logits", "raw_slope", "upstream of all"), lambda named, f, b: ms.log_softmax(named["logits"], f, backend=b)
    ),
    "linear_cross_entropy": Function(
        (*_HEAD, "weight", "raw_slope", "upstream"), lambda *a: _linear(*a, reduction="none")
    ),
    "linear_cross_entropy, mean": Function((*_HEAD, "weight", "raw_slope"), _linear),
    "linear_token_statistics": Function((*_HEAD, "raw_slope"), _statistics),
    "MonotonicSoftmax": Function((*_HEAD, "raw_slope", "upstream"), _layer),
}


def operands_of(function: Function, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in OPERANDS.items()}
    tensors["weight"] = tensors["weight"].abs() + 0.5
    tensors["probabilities"] = tensors["logits"].roll(1, 0).softmax(1)
    tensors = {name: each.to(dtype) for name, each in tensors.items()}
    for name in ("raw_slope", "upstream", "upstream of all", "weight"):
        tensors[name] = tensors[name].float()
    tensors["target"] = torch.tensor([3, 0, 10, -100, 7])
    return {name: each for name, each in tensors.items() if name in (*function.operands, "weight", "target")}


def results(function: Function, leaves: Mapping[str, Tensor], layouts: Mapping[str, Any], backend: Any) -> list[Tensor]:
    """What the call returns and the gradients of the leaves, whose layouts are part of what is differentiated."""
    leaves = {
        name: each.clone().requires_grad_(each.is_floating_point() and name not in ("weight", "probabilities"))
        for name, each in leaves.items()
    }
    named = {name: layouts.get(name, lambda tensor: tensor)(each) for name, each in leaves.items()}
    f = disturbed("plif", num_pieces=8, bound=3.0)
    del f.raw_slope
    f.raw_slope = named["raw_slope"] if "raw_slope" in named else torch.linspace(-1, 1, 8)
    result = function.call(named, f, backend)
    if not result.requires_grad:
        return [result]
    upstream = next((named[name] for name in named if name.startswith("upstream")), torch.ones(()))
    inputs = [each for name, each in leaves.items() if each.requires_grad and not name.startswith("upstream")]
    gradients = torch.autograd.grad(result, inputs, upstream.detach().to(result.dtype).expand(result.shape))
    return [result.detach(), *gradients]


def check_cell(column: str, layout: str, backend: str, dtype: torch.dtype, one_by_one: bool) -> None:
    """Of each operand by itself, or of all of them at once, which takes an emulator less time."""
    function = FUNCTIONS[column]
    leaves = operands_of(function, dtype)
    wide = {name: each.double() if each.is_floating_point() else each for name, each in leaves.items()}
    laid_out = LAYOUTS[layout]
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for operands in [(name,) for name in function.operands] if one_by_one else [function.operands]:
        contiguous = dict.fromkeys(operands, lambda each: laid_out(each).clone(memory_format=torch.contiguous_format))
        wanted = results(function, wide, contiguous, "reference")
        got = results(function, leaves, dict.fromkeys(operands, laid_out), backend)
        where = f"{operands} of {column} on {backend}, {layout}, {dtype}"
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, **close, msg=lambda text, where=where: f"{where}: {text}")


@pytest.mark.slow
def test_table() -> None:
    cells: dict[str, dict[str, str]] = {layout: {} for layout in LAYOUTS}
    for backend in BACKENDS:
        with on(backend):
            for column in FUNCTIONS:
                if column.endswith("probabilities") and backend in ("triton", "cuda"):
                    continue  # which the backends do not take, whatever lies where
                for layout, row in cells.items():
                    emulated = backend in ("triton", "cuda")
                    check_cell(column, layout, backend, torch.float32, one_by_one=not emulated)
                    if not emulated:
                        check_cell(column, layout, backend, torch.bfloat16, one_by_one=True)
                    row[f"{column} {backend}"] = "right"
    check_table("Operands as raw memory", cells)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_right_too(backend: str) -> None:
    """No rows: losses without elements, a mean of NaN, and gradients of 0, as in PyTorch."""
    with on(backend):
        for reduction in ("none", "mean", "sum"):
            for rows, features in ((0, FEATURES), (ROWS, 0), (0, 0)):
                input = torch.randn(rows, features).requires_grad_()
                weight, bias = torch.randn(CLASSES, features).requires_grad_(), torch.randn(CLASSES).requires_grad_()
                target = torch.arange(rows)
                call: dict[str, Any] = {"reduction": reduction}
                loss = ms.linear_cross_entropy(input, weight, target, linear_bias=bias, backend=backend, **call)  # type: ignore[call-overload]
                wanted = F.cross_entropy(F.linear(input, weight, bias), target, **call)
                torch.testing.assert_close(loss, wanted, equal_nan=True)
                got = torch.autograd.grad(loss.sum(), (input, weight, bias))
                for a, b in zip(got, torch.autograd.grad(wanted.sum(), (input, weight, bias)), strict=True):
                    torch.testing.assert_close(a, torch.nan_to_num(b))
                statistics = ms.linear_token_statistics(input, weight, target, linear_bias=bias, backend=backend)
                assert statistics.rank.shape == (rows,)
            logits, none = torch.randn(0, CLASSES).requires_grad_(), torch.zeros(0, dtype=torch.int64)
            loss = ms.cross_entropy(logits, none, backend=backend, reduction=reduction)  # type: ignore[call-overload]
            torch.testing.assert_close(loss, F.cross_entropy(logits, none, reduction=reduction), equal_nan=True)
            assert ms.log_softmax(logits, backend=backend).shape == (0, CLASSES)
