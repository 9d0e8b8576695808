"""The Triton device functions of the transforms, executed on the CPU by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import TRANSFORMS, disturbed
from operator_calls import kernel_transform
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")

from triton_interpreter import interpreting  # noqa: E402

from monosoftmax.triton_kernels.launch import Call  # noqa: E402


@triton.jit
def evaluate(
    Z, WEIGHT, VALUE, POINT, TERMS, coefficients, n, c0, c1, c2,
    functions: tl.constexpr, size: tl.constexpr, groups: tl.constexpr, is_table: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f, its point, and for each logit its contributions: TERMS [contributions, n], then for a table its pieces."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    z = tl.load(Z + i, mask=inside, other=0.0)
    weight = tl.load(WEIGHT + i, mask=inside, other=0.0)
    parameters = functions[0](coefficients, size, c0, c1, c2)
    tl.store(VALUE + i, functions[1](z, parameters, size), mask=inside)
    at_z = functions[2](z, parameters, size)
    tl.store(POINT + i, at_z[0], mask=inside)
    tl.store(POINT + n + i, at_z[1], mask=inside)
    terms = ()
    for group in tl.static_range(groups):
        terms = terms + functions[3](group, at_z, z, weight, parameters, size)
    for index in tl.static_range(len(terms)):
        tl.store(TERMS + index * n + i, terms[index], mask=inside)
    if is_table:
        tl.store(TERMS + len(terms) * n + i, at_z[2].to(tl.float32), mask=inside)


def _constants(call: Call, dtype: torch.dtype) -> dict[str, Any]:
    functions = call.functions
    return {
        "functions": functions.for_logits(dtype),
        "size": call.size,
        "groups": functions.groups(call.size) if call.size else 0,
        "is_table": functions.table_rows > 0,
        "BLOCK": 128,
    }


def _call(transform: Any) -> Call:
    return Call.of(kernel_transform(transform))


def _run(
    transform: Any, z: Tensor, weight: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, f', and the gradient of the coefficients; value and point apart; by the functions for logits of ``dtype``."""
    call, n = _call(transform), z.numel()
    value, point = z.new_full((n,), torch.nan), z.new_full((2, n), torch.nan)
    rows = call.functions.table_rows
    terms = z.new_full((rows + 1 if rows else call.size, n), torch.nan)
    with interpreting(evaluate):
        evaluate[(triton.cdiv(n, 128),)](
            z, weight, value, point, terms, call.packed, n, *call.constants, **_constants(call, dtype)
        )
    if rows:
        gradient = torch.zeros(call.coefficients.shape, dtype=torch.float64)
        gradient.index_add_(1, terms[-1].long(), terms[:-1].double())
    else:
        gradient = call.functions.unpack(terms.double().sum(1))
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


@pytest.mark.grid
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


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_of_logits_of_minus_infinity(name: str) -> None:
    """A weight of 0 there leaves nothing, as the kernels clamp such logits."""
    z = torch.tensor([-1e30, 0.5, 1.0])
    *_, gradient = _run(disturbed(name), z, torch.tensor([0.0, 1.0, 1.0]))
    *_, wanted = _run(disturbed(name), z[1:], torch.ones(2))
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=0)


def test_plif_changes_its_piece_where_the_reference_does() -> None:
    """Half precision logits lie on knots: at each of them, and next to it, the slope is the same."""
    transform = disturbed("plif", num_pieces=64, bound=20.0)
    knots = -20 + 0.625 * torch.arange(65.0)
    z = torch.cat([knots, knots.nextafter(torch.tensor(-99.0)), knots.nextafter(torch.tensor(99.0))])
    _, _, derivative, _ = _run(transform, z, torch.ones(len(z)))
    assert torch.equal(derivative, transform.evaluate_derivative(z, transform.coefficients().detach()))


@pytest.mark.parametrize("name", ["soft_cap", "monotonic_mlp"])
def test_functions_of_half_precision_logits(name: str) -> None:
    transform = disturbed(name)
    z, weight = _logits(20.0)
    value, at_value, derivative, _ = _run(transform, z, weight, torch.bfloat16)
    truth = _truth(transform, z, weight)
    assert torch.equal(value, at_value)
    largest = transform.coefficients().abs().sum().item()
    assert (value.double() - truth[0]).abs().max() <= 2e-7 * (largest + z.abs().max())
    torch.testing.assert_close(derivative.double(), truth[1], rtol=3e-6, atol=1e-6)


def test_thousands_of_pieces() -> None:
    transform = disturbed("plif", num_pieces=100_000, bound=20.0, min_slope=1e-6)
    z, weight = _logits(8.0)
    value, _, derivative, _ = _run(transform, z, weight)
    truth = _truth(transform, z, weight)
    assert (value.double() - truth[0]).abs().max() <= 4e-6 * (1 + z.abs().max())
    torch.testing.assert_close(derivative.double(), truth[1])
