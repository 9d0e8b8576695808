"""ms.cross_entropy at the sizes of language models: production tiles, clusters, persistent grids, every alignment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import (
    DTYPES,
    TRANSFORMS,
    LossCase,
    check_case,
    check_log_prob,
    distance,
    disturbed,
    loss_and_gradients,
    loss_cases,
)
from operator_calls import PLAIN, kernel_transform

import monosoftmax as ms
from monosoftmax.groups import Upstream
from monosoftmax.row_kernels import row_kernels

BACKENDS = ["cuda", "triton"]


def poison(device: torch.device, *likes: torch.Tensor) -> None:
    """Leaves NaN in what torch's allocator hands out next: a result that nothing writes shows."""
    sizes = [64, 512, 4096, 2**15, 2**18, 2**20]
    taken = [torch.full((size,), torch.nan, device=device) for size in sizes for _ in range(3)]
    taken += [torch.full_like(each, torch.nan) for each in likes for _ in range(2)]
    del taken


@pytest.mark.emulated
@pytest.mark.parametrize("case", loss_cases(), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_close_to_the_truth_as_pytorch(backend: Any, case: LossCase, device: torch.device) -> None:
    case = case if device.type == "cuda" else case.small()
    rows, classes, *_ = case.shape
    check_case(case, backend, device, lambda: poison(device, torch.empty(rows, classes, dtype=case.dtype)))


@pytest.mark.emulated
@pytest.mark.parametrize("rows", [1, 2, 8, 17])
@pytest.mark.parametrize("backend", BACKENDS)
def test_few_rows_of_many_classes(backend: Any, rows: int, device: torch.device) -> None:
    """Rows that leave multiprocessors idle: a cluster of blocks shares one."""
    case = LossCase("plif", {}, (rows, 128256, 0, 0), torch.bfloat16, "scaled")
    check_case(case if device.type == "cuda" else case.small(), backend, device)


@pytest.mark.emulated
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_ahead_later_and_in_place(backend: Any, name: str, device: torch.device) -> None:
    """The gradient formed in the forward pass, from row_stats later, and over the logits: the same bits."""
    rows, classes = (40, 32003) if device.type == "cuda" else (3, 139)
    input, target = LossCase(name, {}, (rows, classes, 0, 0), torch.bfloat16, "plain").logits_and_target(device)
    f, over = kernel_transform(disturbed(name), device=device), input.clone()
    scale = torch.tensor(0.25, device=device)

    def call(logits: torch.Tensor, upstream: torch.Tensor, **how: Any) -> tuple[torch.Tensor, ...]:
        cross_entropy = row_kernels(backend).cross_entropy
        return cross_entropy(logits, target, f, PLAIN, upstream=Upstream(upstream), output_mask=(True, True), **how)

    loss, _, stats, ahead, sums = call(input, scale)
    _, _, _, later, later_sums = call(input, scale.expand(rows), row_stats=stats)
    loss_in_place, _, _, _, sums_in_place = call(over, scale, grad_rows=over)
    assert torch.equal(loss, loss_in_place)
    assert torch.equal(ahead, over)
    assert torch.equal(ahead, later)
    for each in (later_sums, sums_in_place):
        torch.testing.assert_close(sums, each, rtol=1e-5, atol=1e-6)


@pytest.mark.emulated
@pytest.mark.parametrize("outputs", [("log_prob",), ("log_prob", "entropy", "lse")])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob_and_entropy(backend: Any, name: str, outputs: Any, device: torch.device) -> None:
    shape = (40, 32003) if device.type == "cuda" else (3, 139)
    input, target = LossCase(name, {}, (*shape, 0, 0), torch.bfloat16, "plain").logits_and_target(device)
    check_log_prob(input, target, disturbed(name).to(device), outputs, backend)


@pytest.mark.emulated
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_out_of_range_and_nan_logits_poison_their_row(backend: Any, device: torch.device) -> None:
    input = torch.randn(6, 500, device=device)
    input[4] = torch.nan
    target = torch.tensor([3, 500, -1, 2**40, -100, 7], device=device)
    ones = torch.ones(6, device=device)
    got = loss_and_gradients(input, target, disturbed("plif").to(device), backend, reduction="none", upstream=(ones,))
    good, wrong = torch.tensor([0, 4, 5]), torch.tensor([1, 2, 3])
    assert got["loss"].cpu()[good].isfinite().all() and got["input"].cpu()[good].isfinite().all()
    assert got["loss"].cpu()[wrong].isnan().all() and got["input"].cpu()[wrong].isnan().all()


@pytest.mark.emulated
@pytest.mark.parametrize("backend", BACKENDS)
def test_class_probabilities_are_for_the_reference(backend: Any, device: torch.device) -> None:
    """A named backend says so, and "auto" takes the one that can."""
    input = torch.randn(5, 300, device=device)
    target = torch.rand(5, 300, device=device).softmax(1)
    transform = disturbed("gss").to(device)
    with pytest.raises(ValueError, match="takes class indices"):
        ms.cross_entropy(input, target, transform, backend=backend)
    got = loss_and_gradients(input, target, transform, "auto")
    wanted = loss_and_gradients(input, target.double(), transform, "reference", torch.float64)
    for key, value in wanted.items():
        assert distance(got[key], value) <= 1e-5 * value.norm().item() + 1e-6, key


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_logits(backend: Any) -> None:
    """Losses, gradients and sums of 8200 x 262144 logits are those of slices of them."""
    rows, classes = 8200, 262144
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of the GPU's memory are free")
    input = torch.empty(rows, classes, dtype=torch.bfloat16).normal_()
    target = torch.randint(classes, (rows,))
    f, upstream = kernel_transform(disturbed("plif"), device="cuda"), Upstream(torch.ones(()))

    def run(input: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cross_entropy = row_kernels(backend).cross_entropy
        return cross_entropy(input, target, f, PLAIN, upstream=upstream, output_mask=(True, True))

    loss, _, _, gradient, sums = run(input, target)
    total = torch.zeros_like(sums, dtype=torch.float64)
    for start in range(0, rows, 1025):
        chunk = slice(start, start + 1025)
        part = run(input[chunk].clone(), target[chunk])
        assert torch.equal(loss[chunk], part[0]) and torch.equal(gradient[chunk], part[3]), start
        total += part[4]
    assert distance(sums, total) <= 1e-4 * total.norm().item()


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["identity", "plif", "spline", "monotonic_mlp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_softmax(backend: Any, name: str, dtype: torch.dtype, device: torch.device) -> None:
    input = 3 * torch.randn((19, 50259) if device.type == "cuda" else (3, 259), device=device)
    upstream = torch.randn_like(input)
    results = []
    for of, wide in ((backend, torch.float32), ("reference", torch.float64)):
        transform = disturbed(name).to(device, wide)
        logits = input.to(dtype)
        logits = (logits if of == backend else logits.double()).requires_grad_()
        output = ms.log_softmax(logits, transform, dtype=wide, backend=of)
        gradients = torch.autograd.grad(output, (logits, *transform.parameters()), upstream.to(wide))
        results.append((output.detach(), *gradients))
    for i, (got, wanted) in enumerate(zip(*results, strict=True)):
        bound = torch.finfo(dtype).eps if i == 1 and dtype != torch.float32 else 2e-5
        assert distance(got, wanted) <= bound * wanted.norm().item(), i


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["identity", "plif", "spline", "monotonic_mlp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_statistics(backend: Any, name: str, device: torch.device) -> None:
    classes = 32003 if device.type == "cuda" else 130
    input, weight = torch.randn(37, 32, device=device), torch.randn(classes, 32, device=device)
    target = torch.randint(classes, (37,), device=device)
    transform = disturbed(name).to(device)
    got = ms.linear_token_statistics(input, weight, target, transform, backend=backend)
    wide = disturbed(name).to(device).double()
    wanted = ms.linear_token_statistics(input.double(), weight.double(), target, wide, backend="reference")
    for field in ("log_prob", "entropy", "lse"):
        a, b = getattr(got, field), getattr(wanted, field)
        assert distance(a, b) <= 2e-5 * b.norm().item(), field
    assert torch.equal(got.argmax, wanted.argmax)
    # Logits next to the target's may be rounded to either side of it.
    assert (got.rank - wanted.rank).abs().max() <= 1
