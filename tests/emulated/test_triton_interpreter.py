"""The interpreter that Triton kernels are tested in: it sees what a GPU would suffer from, and rounds as one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from triton.runtime.errors import InterpreterError  # noqa: E402
from triton_interpreter import interpreting  # noqa: E402


@triton.jit
def copy(source, result, n, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + i, mask=i < n) if MASK_LOAD else tl.load(source + i)
    if MASK_STORE:
        tl.store(result + i, x, mask=i < n)
    else:
        tl.store(result + i, x)


@triton.jit
def store_to(result, PROGRAMS: tl.constexpr, LANES: tl.constexpr):
    """Programs, or lanes, store to one address: the same value or different ones."""
    lane = tl.arange(0, 4)
    tl.store(result + tl.program_id(0) * PROGRAMS * 4 + lane * 0, lane * LANES)


@triton.jit
def pass_on(values):
    """Each program loads what the one before it stored."""
    program = tl.program_id(0)
    tl.store(values + program + 1, tl.load(values + program) + 1.0)


@triton.jit
def add(result, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(result, 1.0)
    else:
        tl.store(result, tl.load(result) + 1.0)


@triton.jit
def arithmetic(source, result, scalar):
    x = tl.load(source + tl.arange(0, 16))
    tl.store(result + tl.arange(0, 16), (x.to(tl.float32) * scalar).to(result.dtype.element_ty))


@triton.jit
def multiply(a, b, result):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(result + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def larger(source, result, KEEP_NAN: tl.constexpr):
    x = tl.load(source + tl.arange(0, 2))
    y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) if KEEP_NAN else tl.maximum(x, 0.0)
    tl.store(result + tl.arange(0, 2), y)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    # Looked up by its name: the interpreter stands in its place there.
    with interpreting(kernel):
        globals()[kernel.fn.__name__][(programs,)](*arguments, **constants)


def test_clean_code_is_silent() -> None:
    source, result = torch.randn(10), torch.zeros(10)
    _launch(copy, 3, source, result, 10, MASK_LOAD=True, MASK_STORE=True, BLOCK=4)
    assert torch.equal(source, result)
    counts = torch.zeros(8)
    _launch(store_to, 2, counts, PROGRAMS=1, LANES=0)
    _launch(add, 5, counts, ATOMIC=True)
    assert counts[0] == 5


@pytest.mark.parametrize("masked", ["MASK_LOAD", "MASK_STORE"])
def test_out_of_bounds(masked: str) -> None:
    masks = {"MASK_LOAD": True, "MASK_STORE": True} | {masked: False}
    with pytest.raises(InterpreterError, match=r"out of the bounds of every tensor: 2 of 4 lanes"):
        _launch(copy, 3, torch.randn(10), torch.zeros(10), 10, **masks, BLOCK=4)


def test_races() -> None:
    with pytest.raises(InterpreterError, match="two programs store to one address"):
        _launch(store_to, 2, torch.zeros(8), PROGRAMS=0, LANES=0)
    with pytest.raises(InterpreterError, match="two lanes store different values to one address"):
        _launch(store_to, 2, torch.zeros(8), PROGRAMS=1, LANES=1)
    with pytest.raises(InterpreterError, match="a program loads what another one stores"):
        _launch(pass_on, 2, torch.zeros(3))
    with pytest.raises(InterpreterError, match="race"):
        _launch(add, 2, torch.zeros(1), ATOMIC=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding(dtype: torch.dtype) -> None:
    source, result = torch.randn(16), torch.zeros(16, dtype=dtype)
    _launch(arithmetic, 1, source, result, 1.1)
    assert torch.equal(result, (source * torch.tensor(1.1)).to(dtype))
    half = torch.randn(16).to(dtype)
    _launch(arithmetic, 1, half, result, 0.7)
    assert torch.equal(result, (half.float() * torch.tensor(0.7)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(dtype: torch.dtype) -> None:
    a, b, result = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.zeros(16, 16)
    _launch(multiply, 1, a, b, result)
    torch.testing.assert_close(result, a.float() @ b.float())


def test_nan_in_a_maximum() -> None:
    source, result = torch.tensor([torch.nan, 2.0]), torch.zeros(2)
    _launch(larger, 1, source, result, KEEP_NAN=False)
    assert result.tolist() == [0.0, 2.0]
    _launch(larger, 1, source, result, KEEP_NAN=True)
    assert result[0].isnan()


def test_kernels_are_compiled_ones_again_afterwards() -> None:
    before = copy
    with interpreting(copy):
        assert copy is not before
    assert copy is before and not triton.knobs.runtime.interpret
