"""log_softmax and token_statistics of the CUDA kernels, in their host execution."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_host import executing
from losses import TRANSFORMS, check_log_prob, disturbed
from operator_calls import check_function, kernel_transform, opcheck
from torch import Tensor

import monosoftmax as ms
from monosoftmax import ops, reference
from monosoftmax.groups import Head, TokenStatistics
from monosoftmax.row_kernels import row_kernels

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _executing() -> Iterator[None]:
    with executing():
        yield


def rows(classes: int, dtype: torch.dtype, begin: int = 0) -> Tensor:
    torch.manual_seed(classes)
    return (3 * torch.randn(5, classes + 9)).to(dtype)[:, begin : begin + classes]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("classes", [1, 33, 1030, 4097])
def test_log_softmax_and_its_gradients(name: str, classes: int) -> None:
    """As close to the float64 truth as the reference in float32, times 2, in the median of the draws.

    The gradient of a parameter is a sum that cancels: the error of one of them is a draw of luck.
    """
    errors: dict[int, list[tuple[float, float]]] = {}
    for seed in range(15):
        transform = disturbed(name, seed)
        generator = torch.Generator().manual_seed(seed)
        input = 3 * torch.randn(5, classes + 1, generator=generator)[:, 1:]
        upstream = torch.randn(5, classes, generator=generator)
        fused, plain = (_outputs(input, transform, upstream, each) for each in ("cuda", "reference"))
        truth = _outputs(input.double(), transform.double(), upstream, "reference")
        for i, (got, beside, wanted) in enumerate(zip(fused, plain, truth, strict=True)):
            norm = max(wanted.norm().item(), 1.0)
            error = (got - wanted).norm().item() / norm, (beside - wanted).norm().item() / norm
            errors.setdefault(i, []).append(error)
    for i, found in errors.items():
        of_fused, of_plain = (statistics.median(column) for column in zip(*found, strict=True))
        assert of_fused <= 2 * of_plain + 6e-7, (i, of_fused, of_plain)


def _outputs(input: Tensor, transform: Any, upstream: Tensor, backend: Any) -> list[Tensor]:
    leaf = input.detach().requires_grad_()
    output = ms.log_softmax(leaf, transform, backend=backend)
    gradients = torch.autograd.grad(output, [leaf, *transform.parameters()], upstream.to(output.dtype))
    return [output.detach(), *gradients]


@pytest.mark.grid(2)
@pytest.mark.parametrize("out", [torch.float32, *HALF])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("begin", [0, 1, 4])
def test_types_and_alignments(dtype: torch.dtype, out: torch.dtype, begin: int) -> None:
    """Every type of logits with every type of log p and of its upstream gradient, each rounded once."""
    transform = disturbed("gss")
    leaf = rows(1027, dtype, begin).detach().requires_grad_()
    output = ms.log_softmax(leaf, transform, dtype=out, backend="cuda")
    assert output.dtype == out
    exact = reference.log_softmax(leaf.double(), transform, torch.float64)
    bound = 1.02 * (exact.to(out) - exact).norm() + 2e-6 * exact.norm()
    assert (output.detach() - exact).norm() <= bound
    upstream = torch.randn(output.shape).to(out)
    (gradient,) = torch.autograd.grad(output, leaf, upstream)
    wide = leaf.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.log_softmax(wide, transform, torch.float64), wide, upstream.double())
    assert (gradient - wanted).norm() <= 1.02 * (wanted.to(dtype) - wanted).norm() + 2e-6 * wanted.norm()


@pytest.mark.parametrize("name", ["plif", "spline"])
def test_log_softmax_with_a_large_table(name: str) -> None:
    transform = disturbed(name, **{"num_pieces" if name == "plif" else "num_bins": 3000})
    leaf = rows(1030, torch.float32).detach().requires_grad_()
    output = ms.log_softmax(leaf, transform, backend="cuda")
    wanted = reference.log_softmax(leaf, transform, torch.float32)
    upstream = torch.randn_like(output)
    got = torch.autograd.grad(output, [leaf, *transform.parameters()], upstream)
    for one, other in zip(got, torch.autograd.grad(wanted, [leaf, *transform.parameters()], upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-5)


def test_one_result_in_every_order() -> None:
    transform = disturbed("plif")
    input, target = rows(2601, torch.bfloat16), torch.tensor([0, 5, 2600, -100, 17])
    upstream = torch.randn(5, 2601)
    results = []
    for order in (("forward",), ("reverse",), ("random", 1)):
        with executing() as host:
            host.set_order(*order)
            leaf = input.detach().requires_grad_()
            output = ms.log_softmax(leaf, transform, backend="cuda")
            gradients = torch.autograd.grad(output, [leaf, *transform.parameters()], upstream)
            statistics = _statistics(input, target, transform)
            results.append([output, *gradients, *statistics])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def _statistics(input: Tensor, target: Tensor, transform: Any, backend: str = "cuda") -> tuple[Tensor, ...]:
    return row_kernels(backend).token_statistics(input, target, kernel_transform(transform), -100)


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("classes", [1, 33, 3001])
def test_token_statistics(name: str, dtype: torch.dtype, classes: int) -> None:
    input, transform = rows(classes, dtype, 1).clone(), disturbed(name)
    target = torch.tensor([0, classes - 1, classes // 2, -100, 0])
    input[4, classes // 3] = input[4].max()  # the largest one twice
    if classes > 1:
        input[2, 0] = -torch.inf
    got, wanted = _statistics(input, target, transform), _statistics(input, target, transform, "cpu")
    for place in (0, 1, 3):
        torch.testing.assert_close(got[place], wanted[place], rtol=3e-6, atol=3e-6)
    assert torch.equal(got[2], wanted[2]) and torch.equal(got[4], wanted[4])


def test_rows_of_no_number() -> None:
    """As on the CPU: a row with a NaN, or of -inf, has no distribution. Its argmax and rank mean nothing."""
    input = torch.randn(3, 700)
    input[0, 300], input[0, 500], input[1] = torch.nan, torch.nan, -torch.inf
    transform, target = ms.transforms.Identity(), torch.tensor([3, 3, 3])
    got, wanted = _statistics(input, target, transform), _statistics(input, target, transform, "cpu")
    for name, one, other in zip(TokenStatistics._fields[:5], got, wanted, strict=False):
        if one.is_floating_point():
            torch.testing.assert_close(one[:2], other[:2], equal_nan=True, msg=name)
        torch.testing.assert_close(one[2], other[2], rtol=1e-5, atol=1e-5)
    log_p = ms.log_softmax(input, backend="cuda")
    assert log_p[0].isnan().all() and log_p[1].isnan().all() and log_p[2].isfinite().all()


def test_no_rows() -> None:
    empty, transform = torch.zeros(0, 7, requires_grad=True), disturbed("plif")
    output = ms.log_softmax(empty, transform, backend="cuda")
    assert output.shape == (0, 7)
    output.sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 7)
    found = _statistics(empty.detach(), torch.zeros(0, dtype=torch.int64), transform)
    assert [each.shape for each in found] == [*[(0,)] * 5, (3, 0)]


def test_the_head() -> None:
    torch.manual_seed(0)
    head = torch.randn(7, 5), torch.randn(41, 5)
    target, transform = torch.randint(0, 41, (7,)), disturbed("plif")
    got = ms.linear_token_statistics(*head, target, transform, backend="cuda")
    for one, other in zip(got, ms.linear_token_statistics(*head, target, transform, backend="cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [("log_prob",), ("log_prob", "entropy", "lse")])
def test_gradients_of_log_prob_and_entropy(name: str, dtype: torch.dtype, outputs: Any) -> None:
    input, transform = rows(70, dtype), disturbed(name)
    check_log_prob(input, torch.tensor([0, 5, 69, -100, 17]), transform, outputs, "cuda")


def test_operators_check_out() -> None:
    input, target, transform = rows(70, torch.float32), torch.tensor([0, 5, 69, -100, 17]), disturbed("plif")
    f = kernel_transform(transform)
    opcheck(ops.LogSoftmax("cuda", input, f, torch.bfloat16))
    check_function(row_kernels("cuda").token_statistics, input, target, f, -100)
    row_stats = ops.log_softmax(ops.LogSoftmax("cuda", input, f, torch.float32)).row_stats
    opcheck(ops.LogSoftmaxBackward("cuda", torch.rand(5, 70), input, f, row_stats, output_mask=(True, True)))
    opcheck(ops.LinearTokenStatistics("cuda", Head(torch.randn(5, 3), torch.randn(70, 3), None), target, f, -100))
