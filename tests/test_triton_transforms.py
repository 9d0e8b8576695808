"""The Triton device functions of the transforms, executed on the CPU by Triton's interpreter and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from losses import TRANSFORMS, disturbed
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from triton_compiler import TARGETS, compiled_without_spills  # noqa: E402
from triton_interpreter import interpreted  # noqa: E402

from monosoftmax.triton_kernels.transforms import REGISTRY  # noqa: E402


@triton.jit
def evaluate(
    Z, WEIGHT, VALUE, POINT, SUMS, coefficients, n, c0, c1, c2,
    value: tl.constexpr, point: tl.constexpr, contribution: tl.constexpr,
    size: tl.constexpr, contributions: tl.constexpr, is_table: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f, its point, and for each logit its contributions: SUMS [contributions, n], then for a table its pieces."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    z = tl.load(Z + i, mask=inside, other=0.0)
    weight = tl.load(WEIGHT + i, mask=inside, other=0.0)
    tl.store(VALUE + i, value(z, coefficients, size, c0, c1, c2), mask=inside)
    at = point(z, coefficients, size, c0, c1, c2)
    tl.store(POINT + i, at[0], mask=inside)
    tl.store(POINT + n + i, at[1], mask=inside)
    for index in tl.static_range(contributions):
        tl.store(SUMS + index * n + i, contribution(index, at, z, weight, coefficients, size), mask=inside)
    if is_table:
        tl.store(SUMS + contributions * n + i, at[2].to(tl.float32), mask=inside)


def _arguments(name: str, coefficients: Tensor) -> dict[str, Any]:
    functions = REGISTRY[name]
    rows = functions.table_rows
    return {
        "value": functions.value,
        "point": functions.point,
        "contribution": functions.contribution,
        "size": coefficients.shape[-1],
        "contributions": rows or coefficients.shape[0],
        "is_table": rows > 0,
        "BLOCK": 128,
    }


def _run(transform: Any, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, f', and the gradient of the coefficients; value and point apart."""
    coefficients = transform.coefficients().detach().contiguous()
    arguments = _arguments(transform.kernel, coefficients)
    n, contributions = z.numel(), arguments["contributions"]
    value, point = z.new_full((n,), torch.nan), z.new_full((2, n), torch.nan)
    sums = z.new_full((contributions + arguments["is_table"], n), torch.nan)
    c0, c1, c2 = (float(each) for each in (*transform.constants(), 0.0, 0.0, 0.0)[:3])
    with interpreted(evaluate) as kernel:
        kernel[(triton.cdiv(n, 128),)](
            z, weight, value, point, sums, coefficients, n, c0, c1, c2,
            **arguments,
        )  # fmt: skip
    if arguments["is_table"]:
        gradient = torch.zeros(coefficients.shape, dtype=torch.float64)
        gradient.index_add_(1, sums[-1].long(), sums[:-1].double())
    else:
        gradient = sums.double().sum(1)
    return value, point[0], point[1], gradient


def _truth(transform: Any, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The coefficients as float32 has them, so that only the arithmetic differs.
    coefficients = transform.coefficients().detach().double().requires_grad_()
    y = transform.evaluate(z.double(), coefficients)
    gradient = torch.zeros_like(coefficients)
    if coefficients.numel():
        (gradient,) = torch.autograd.grad(y, coefficients, weight.double(), allow_unused=False)
    return y.detach(), transform.evaluate_derivative(z.double(), coefficients).detach(), gradient


def _logits(std: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    z = std * torch.randn(300, generator=generator)
    return z, torch.randn(300, generator=generator)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("std", [0.1, 1.0, 20.0])
def test_value_derivative_and_gradient(name: str, std: float) -> None:
    transform = disturbed(name)
    z, weight = _logits(std)
    value, at_value, derivative, gradient = _run(transform, z, weight)
    truth = _truth(transform, z, weight)
    assert torch.equal(value, at_value)
    scale = 1 + z.abs().max().double() + truth[0].abs().max()
    assert (value.double() - truth[0]).abs().max() <= 1e-6 * scale
    torch.testing.assert_close(derivative.double(), truth[1], rtol=3e-6, atol=1e-7)
    sizes = _truth(transform, z, weight.abs())[2].abs().amax() if gradient.numel() else 0.0
    torch.testing.assert_close(gradient, truth[2], rtol=1e-5, atol=1e-6 * float(sizes) + 1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_ends(name: str) -> None:
    """At infinity f is what the plain arithmetic says, NaN stays NaN, and no gradient is made of inf - inf."""
    transform = disturbed(name)
    z = torch.tensor([-torch.inf, -1e30, -1e4, 1e4, 1e30, torch.inf, torch.nan])
    value, _, derivative, _ = _run(transform, z, torch.zeros(7))
    coefficients = transform.coefficients().detach()
    torch.testing.assert_close(value, transform.evaluate(z, coefficients), equal_nan=True, rtol=1e-5, atol=1e-5)
    assert derivative[1:5].isfinite().all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiles_without_spills(name: str, target: str, tmp_path: Path) -> None:
    """The same functions go through Triton's compiler for a GPU that is not there."""
    arguments = _arguments(name, disturbed(name).coefficients())
    types = {each: "*fp32" for each in ("Z", "WEIGHT", "VALUE", "POINT", "SUMS", "coefficients")}
    types |= {"n": "i32", "c0": "fp32", "c1": "fp32", "c2": "fp32"}
    compiled_without_spills(evaluate, types, arguments, target, tmp_path)
