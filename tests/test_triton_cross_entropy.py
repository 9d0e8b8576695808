"""The Triton kernels over rows of logits: in the interpreter against float64, and compiled for GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from losses import TRANSFORMS, disturbed
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton_compiler import TARGETS, compiled_without_spills
from triton_interpreter import interpreted

from monosoftmax import reference
from monosoftmax.triton_kernels.cross_entropy import (
    Loss,
    block_of,
    cross_entropy_backward_kernel,
    cross_entropy_kernel,
)
from monosoftmax.triton_kernels.transforms import REGISTRY

ROWS, BLOCK = 5, 128
IGNORED = 2  # the row
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weighted": True},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "weighted": True, "z_loss": 1e-3, "return_lse": True},
    {"z_loss": 1e-2},
]


def _run(input: Tensor, target: Tensor, loss: Loss, upstream: tuple[Tensor, Tensor | None], **how: Any) -> Any:
    with interpreted(cross_entropy_kernel):
        results = loss.forward(input, target)
    with interpreted(cross_entropy_backward_kernel):
        gradient = loss.backward(upstream[0], upstream[1], input, target, results[2], **how)
    return (*results, gradient)


def _case(classes: int, dtype: torch.dtype, std: float, weighted: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(classes)
    # Rows that are not next to each other, between columns that must not be read.
    padded = torch.full((ROWS, classes + 3), torch.nan, dtype=dtype)
    padded[:, :classes] = std * torch.randn(ROWS, classes, generator=generator)
    target = torch.randint(0, classes, (ROWS,), generator=generator)
    target[IGNORED] = -100
    return padded[:, :classes], target, torch.rand(classes, generator=generator) if weighted else None


def _loss(transform: Any, weight: Tensor | None = None, **options: Any) -> Loss:
    coefficients = transform.coefficients().detach().contiguous()
    return Loss(transform.kernel, coefficients, transform.constants(), weight, block=BLOCK, **options)


def _truth(
    input: Tensor,
    target: Tensor,
    transform: Any,
    loss: Loss,
    upstream: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    z = input.double().requires_grad_()
    weight = None if loss.weight is None else loss.weight.double()
    options = (loss.ignore_index, loss.label_smoothing, loss.z_loss, loss.return_lse)
    losses, lse = reference.cross_entropy(z, target, transform.double(), weight, *options)
    outputs, gradients = [losses], [upstream[0].double()]
    if upstream[1] is not None:
        outputs, gradients = [losses, lse], [upstream[0].double(), upstream[1].double()]
    (gradient,) = torch.autograd.grad(outputs, z, gradients)
    transform.float()
    return losses.detach(), lse.detach(), gradient


@pytest.mark.parametrize("classes", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_loss_and_gradient(name: str, classes: int) -> None:
    transform = disturbed(name)
    input, target, _ = _case(classes, torch.float32, 3.0)
    loss, upstream = _loss(transform), (torch.rand(ROWS), None)
    losses, _, _, gradient = _run(input, target, loss, upstream)
    truth = _truth(input, target, transform, loss, upstream)
    torch.testing.assert_close(losses.double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), truth[2], rtol=1e-5, atol=2e-6)
    assert (gradient[IGNORED] == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["identity", "plif", "soft_cap"])
def test_options(name: str, options: dict[str, Any]) -> None:
    transform = disturbed(name)
    given = dict(options)
    input, target, weight = _case(300, torch.float32, 3.0, given.pop("weighted", False))
    loss = _loss(transform, weight, **given)
    upstream = torch.rand(ROWS), torch.rand(ROWS) if loss.return_lse else None
    losses, lse, _, gradient = _run(input, target, loss, upstream)
    truth = _truth(input, target, transform, loss, upstream)
    torch.testing.assert_close(losses.double(), truth[0], rtol=1e-5, atol=1e-5)
    if loss.return_lse:
        torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), truth[2], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_half_precision_is_rounded_once(dtype: torch.dtype, in_place: bool) -> None:
    transform = disturbed("plif")
    input, target, _ = _case(300, dtype, 3.0)
    loss, upstream = _loss(transform), (torch.rand(ROWS), None)
    exact = _truth(input, target, transform, loss, upstream)[2]
    *_, gradient = _run(input, target, loss, upstream, out=input if in_place else None)
    assert gradient.dtype == dtype
    assert (gradient.data_ptr() == input.data_ptr()) == in_place
    # Half an ulp, and what float32 arithmetic adds.
    ulp = torch.finfo(dtype).eps * exact.abs() + (2**-24 if dtype == torch.float16 else 0)
    assert ((gradient.double() - exact).abs() <= 0.502 * ulp + 2e-6 * exact.abs()).all()


def test_certain_row_keeps_its_small_gradient() -> None:
    """p of the target next to 1: the loss and 1 - p are not lost. The sum is float32, as plain PyTorch's."""
    transform = disturbed("identity")
    input, target, _ = _case(300, torch.float32, 1.0)
    input[0, target[0]] = 14.0
    loss, upstream = _loss(transform), (torch.ones(ROWS), None)
    losses, _, _, gradient = _run(input, target, loss, upstream)
    truth = _truth(input, target, transform, loss, upstream)
    assert losses[0].item() == pytest.approx(truth[0][0].item(), rel=1e-3)
    torch.testing.assert_close(gradient[0].double(), truth[2][0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["identity", "soft_cap", "plif"])
def test_extreme_rows(name: str) -> None:
    """-inf is allowed, a row of -inf only or with NaN or +inf is NaN, and the rows beside it are not touched."""
    transform = disturbed(name)
    input, target, _ = _case(129, torch.float32, 1.0)
    clean = input.clone()
    target[:] = torch.tensor([0, 1, -100, 3, 4])
    input[0, 5] = -torch.inf
    input[1] = -torch.inf
    input[3, 128] = torch.nan
    loss, upstream = _loss(transform), (torch.ones(ROWS), None)
    losses, _, _, gradient = _run(input, target, loss, upstream)
    fine = [0, 2, 4] if not transform.bounded_below else [0, 1, 2, 4]
    assert losses[fine].isfinite().all() and gradient[fine].isfinite().all()
    assert losses[3].isnan() and gradient[3].isnan().all()
    if not transform.bounded_below:
        assert losses[1].isnan() and gradient[1].isnan().all()
        assert gradient[0, 5] == 0
    alone, _, _, gradient_alone = _run(clean, target, loss, upstream)
    assert alone[4] == losses[4] and torch.equal(gradient_alone[4], gradient[4])


@pytest.mark.parametrize("outside", [-1, 129, 2**40])
def test_target_out_of_range_poisons_its_row_only(outside: int) -> None:
    transform = disturbed("plif")
    input, target, weight = _case(129, torch.float32, 1.0, weighted=True)
    target[1] = outside
    losses, _, _, gradient = _run(input, target, _loss(transform, weight), (torch.ones(ROWS), None))
    others = [0, 2, 3, 4]
    assert losses[1].isnan() and gradient[1].isnan().all()
    assert losses[others].isfinite().all() and gradient[others].isfinite().all()


def test_rows_further_apart_than_an_int32_counts() -> None:
    """Row 2 begins at element 2^31. The memory between the rows is never touched, and so never there."""
    transform = disturbed("plif")
    near, target, _ = _case(129, torch.bfloat16, 1.0)
    near, target = near[:3].contiguous(), torch.tensor([3, 1, 2])
    far = torch.empty(2**31 + 129, dtype=torch.bfloat16).as_strided((3, 129), (2**30, 1))
    far.copy_(near)
    loss, upstream = _loss(transform), (torch.ones(3), None)
    for one, other in zip(_run(near, target, loss, upstream), _run(far, target, loss, upstream, out=far), strict=True):
        assert torch.equal(one, other)


def test_no_rows() -> None:
    transform = disturbed("plif")
    empty = torch.empty(0, 7)
    losses, _, stats, gradient = _run(
        empty, torch.empty(0, dtype=torch.int64), _loss(transform), (torch.empty(0), None)
    )
    assert losses.shape == (0,) and stats.shape == (2, 0) and gradient.shape == (0, 7)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiles_without_spills(name: str, target: str, tmp_path: Path) -> None:
    """bfloat16 logits in rows that begin and end at multiples of 16 elements."""
    functions = REGISTRY[name]
    types = dict.fromkeys(("weight", "weight_sum", "coefficients", "loss", "lse", "row_stats"), "*fp32")
    types |= {"grad_loss": "*fp32", "grad_lse": "*fp32", "input": "*bf16", "grad_input": "*bf16", "target": "*i64"}
    types |= dict.fromkeys(("rows", "classes", "stride", "grad_stride", "ignore_index"), "i32")
    types |= dict.fromkeys(("c0", "c1", "c2", "target_share", "smooth_share", "z_loss"), "fp32")
    aligned = ("input", "grad_input", "classes", "stride", "grad_stride")
    size = disturbed(name).coefficients().shape[-1]
    common = {"size": size, "weighted": False, "smooths": False, "BLOCK": block_of(50304)}
    for kernel, constants in (
        (cross_entropy_kernel, {"value": functions.value, "return_lse": False}),
        (cross_entropy_backward_kernel, {"point": functions.point, "of_lse": False}),
    ):
        assembly = compiled_without_spills(kernel, types, common | constants, target, tmp_path, 8, aligned)
        if target != "gfx942":
            assert "ld.global.v4.b32" in assembly  # 16 bytes at once
