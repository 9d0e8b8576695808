"""The recompute LM head's Triton kernels: interpreted, against the reference in float64.

Interpreted, tiles are small, so that a few rows and classes make several, the last ones not full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from losses import SOME_TRANSFORMS, TRANSFORMS, distance, disturbed
from operator_calls import kernel_transform
from tiers import mostly_slow
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton_interpreter import interpreting

from monosoftmax import groups, reference
from monosoftmax.groups import LossOptions, Upstream
from monosoftmax.triton_kernels.head_tiles import HeadTile
from monosoftmax.triton_kernels.launch import RowLoss
from monosoftmax.triton_kernels.linear_cross_entropy import recompute_forward
from monosoftmax.triton_kernels.linear_cross_entropy_backward import recompute_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = HeadTile(BN=16, BV=64, BD=16, PARTS=2, warps=4, stages=2)
SMALL_CAPS: dict[str, Any] = {"soft_cap": {"cap": 3.0}, "sigmoid_cap": {"a": 3.0}}
IGNORED = 3  # the row
OPTIONS: list[dict[str, Any]] = [
    {"weighted": True},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "weighted": True, "z_loss": 1e-3, "return_lse": True},
    {"z_loss": 1e-2},
    {"return_lse": True},
]


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreting() if DEVICE == "cpu" else nullcontext():
        yield


GRADIENTS = ("input", "linear_weight", "linear_bias", "coefficients")


class Losses(NamedTuple):
    loss: Tensor
    lse: Tensor
    row_stats: Tensor


class Head(SimpleNamespace):
    """A head, its rows and targets, and the options of the loss."""

    def __init__(
        self, name: str, rows: int = 20, classes: int = 150, features: int = 37, dtype: torch.dtype = torch.float32,
        bias: bool = False, weighted: bool = False, label_smoothing: float = 0.0, z_loss: float = 0.0,
        return_lse: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(classes)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        # Rows that are not next to each other, between columns that must not be read.
        wide = [torch.full((count, features + 3), torch.nan, device=DEVICE) for count in (rows, classes)]
        wide[0][:, :features], wide[1][:, :features] = (
            normal(rows, features),
            3 / features**0.5 * normal(classes, features),
        )
        target = torch.randint(0, classes, (rows,), generator=generator)
        target[IGNORED : IGNORED + 1] = -100
        super().__init__(
            transform=disturbed(name, **settings).to(DEVICE),
            input=wide[0].to(dtype)[:, :features],
            linear_weight=wide[1].to(dtype)[:, :features],
            linear_bias=normal(classes).to(dtype) if bias else None,
            target=target.to(DEVICE),
            weight=torch.rand(classes, generator=generator).to(DEVICE) + 0.1 if weighted else None,
            label_smoothing=label_smoothing, z_loss=z_loss, return_lse=return_lse,
            grad_loss=torch.rand(rows, generator=generator).to(DEVICE),
            grad_lse=torch.rand(rows, generator=generator).to(DEVICE) if return_lse else None,
        )  # fmt: skip

    def head(self) -> groups.Head:
        return groups.Head(self.input, self.linear_weight, self.linear_bias)

    def options(self) -> LossOptions:
        return LossOptions(self.weight, -100, self.label_smoothing, self.z_loss, self.return_lse)

    def loss(self) -> RowLoss:
        return RowLoss.of(self.target, kernel_transform(self.transform, device=DEVICE), self.options())

    def forward(self, **how: Any) -> Losses:
        return Losses(*recompute_forward(self.head(), self.loss(), **{"tile": TILE, "splits": 2} | how))

    def backward(self, row_stats: Tensor, asked: Sequence[str] = GRADIENTS, **how: Any) -> dict[str, Tensor]:
        mask = [each in asked and (each != "linear_bias" or self.linear_bias is not None) for each in GRADIENTS]
        upstream, how = Upstream(self.grad_loss, self.grad_lse), {"tile": TILE} | how
        results = recompute_backward(self.head(), self.loss(), upstream, row_stats, mask, **how)
        assert results._fields == GRADIENTS
        return results._asdict()

    def results(self, **how: Any) -> dict[str, Tensor]:
        rows = self.forward()
        named = {"loss": rows.loss} | ({"lse": rows.lse} if self.return_lse else {})
        return named | self.backward(rows.row_stats, **how)

    def truth(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """loss, lse and the gradients in plain PyTorch."""
        transform = self.transform.to(dtype)
        leaves = {name: getattr(self, name) for name in ("input", "linear_weight", "linear_bias")}
        leaves = {name: each.detach().to(dtype).requires_grad_() for name, each in leaves.items() if each is not None}
        leaves["coefficients"] = transform.coefficients().detach().requires_grad_()
        transform.coefficients = lambda: leaves["coefficients"]
        logits = torch.nn.functional.linear(leaves["input"], leaves["linear_weight"], leaves.get("linear_bias"))
        weight = None if self.weight is None else self.weight.to(dtype)
        loss, lse = reference.cross_entropy(logits, self.target, transform, self.options()._replace(weight=weight))
        del transform.coefficients
        transform.float()
        outputs = {"loss": loss} | ({"lse": lse} if self.return_lse else {})
        upstream = [each.to(dtype) for each in (self.grad_loss, self.grad_lse) if each is not None]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream, allow_unused=True)
        named = zip(leaves, gradients, strict=True)
        return {n: each.detach() for n, each in outputs.items()} | {n: each for n, each in named if each is not None}


def _assert_close(head: Head, results: dict[str, Tensor], of_dz: float = 0.0) -> None:
    """No further from the truth than 3 times float32 PyTorch, plus rounding, ``of_dz`` that of dL/dlogits."""
    truth, plain = head.truth(), head.truth(torch.float32)
    for key, wanted in truth.items():
        slack = 4e-7 * wanted.norm().item() + 2e-6
        if key not in ("loss", "lse", "coefficients"):
            slack += of_dz * wanted.norm().item()
        if key == "input":
            slack += torch.finfo(head.input.dtype).eps * wanted.norm().item()
        assert results[key].isfinite().all(), key
        assert distance(results[key], wanted) <= 3 * distance(plain[key], wanted) + slack, key


@pytest.mark.grid
@pytest.mark.parametrize(
    ("rows", "classes", "features", "bias"),
    [(20, 150, 37, False), (16, 128, 48, True), (1, 1, 1, True), (5, 65, 17, False)],
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_loss_and_gradients(name: str, rows: int, classes: int, features: int, bias: bool) -> None:
    head = Head(name, rows, classes, features, bias=bias)
    _assert_close(head, head.results())


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The logits are sums in float32; the gradients of the logits are rounded for the products, and nothing before."""
    head = Head(name, dtype=dtype, bias=True)
    results = head.results()
    assert results["input"].dtype == dtype and results["linear_weight"].dtype == torch.float32
    _assert_close(head, results, of_dz=torch.finfo(dtype).eps)


@pytest.mark.grid
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["identity", "plif", "soft_cap", "monotonic_mlp"])
def test_options(name: str, options: dict[str, Any]) -> None:
    head = Head(name, bias=True, **options)
    _assert_close(head, head.results())


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["identity", "plif"])
def test_descriptors_load_the_same_tiles(name: str, dtype: torch.dtype) -> None:
    """Their rows begin at multiples of 16 bytes; what is beyond rows, classes and features is 0."""
    head = Head(name, features=37, dtype=dtype)
    for each in ("input", "linear_weight"):
        matrix = getattr(head, each)
        setattr(head, each, torch.nn.functional.pad(matrix, (0, 3))[:, :37])  # 40 apart
    by_pointers, by_descriptors = (head.forward(descriptors=each) for each in (False, True))
    assert torch.equal(by_pointers.loss, by_descriptors.loss)
    assert torch.equal(by_pointers.row_stats, by_descriptors.row_stats)
    wanted, results = (head.backward(by_pointers.row_stats, descriptors=each) for each in (False, True))
    for key in wanted:
        assert torch.equal(wanted[key], results[key]), key


@pytest.mark.grid
@pytest.mark.parametrize("splits", [1, 2, 3, 100])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_splits_and_parts(splits: int, parts: int) -> None:
    head = Head("plif", label_smoothing=0.1, weighted=True, z_loss=1e-2, bias=True)
    tile = TILE._replace(BV=32, PARTS=parts)
    rows = head.forward(splits=splits, tile=tile)
    _assert_close(head, {"loss": rows.loss} | head.backward(rows.row_stats, tile=tile))


def test_each_gradient_alone() -> None:
    head = Head("plif", bias=True)
    row_stats = head.forward().row_stats
    wanted = head.backward(row_stats)
    for key in GRADIENTS:
        results = head.backward(row_stats, asked=[key])
        torch.testing.assert_close(results.pop(key), wanted[key])
        assert all(each.numel() == 0 for each in results.values())


def test_one_upstream_gradient_for_all_rows() -> None:
    head = Head("soft_cap")
    row_stats = head.forward().row_stats
    head.grad_loss = torch.tensor(0.3, device=DEVICE)
    results = head.backward(row_stats)
    head.grad_loss = head.grad_loss.expand(20).contiguous()
    for key, wanted in head.backward(row_stats).items():
        torch.testing.assert_close(results[key], wanted)


@pytest.mark.parametrize("outside", [-1, 150, 2**40])
def test_target_out_of_range_poisons_its_row_only(outside: int) -> None:
    head = Head("plif", weighted=True)
    clean = head.results()
    head.target[1] = outside
    results = head.results(asked=["input", "coefficients"])
    others = [row for row in range(20) if row != 1]
    for key in ("loss", "input"):
        assert results[key][1].isnan().all()
        torch.testing.assert_close(results[key][others], clean[key][others])


@pytest.mark.parametrize("return_lse", [False, True])
def test_ignored_rows(return_lse: bool) -> None:
    """All of a block of rows, whose products are left out, and some of another one."""
    head = Head("sigsoftmax", return_lse=return_lse)
    head.target[2:] = -100
    results = head.results()
    assert (results["loss"][2:] == 0).all()
    _assert_close(head, results)
    if not return_lse:
        assert (head.forward().lse[2:] == 0).all() and (results["input"][2:] == 0).all()


@pytest.mark.parametrize("name", ["identity", "soft_cap", "gss"])
def test_a_bias_of_minus_infinity_takes_a_class_out(name: str) -> None:
    head = Head(name, bias=True)
    head.target[:] = torch.where(head.target == 70, 71, head.target)
    head.linear_bias[70] = -torch.inf
    results = head.results()
    for key in ("loss", "input", "linear_weight", "linear_bias", "coefficients"):
        assert results[key].isfinite().all(), key
    if not head.transform.bounded_below:
        assert (results["linear_weight"][70] == 0).all() and results["linear_bias"][70] == 0
    torch.testing.assert_close(results["loss"].double(), head.truth()["loss"], rtol=1e-5, atol=1e-5)


def test_a_certain_row_keeps_its_small_gradient() -> None:
    """p of the target next to 1: the loss and 1 - p are not lost."""
    head = Head("identity", bias=True)
    head.input *= 0.1
    head.target[0] = 40
    head.linear_bias[40] += 16.0
    results, truth = head.results(), head.truth()
    assert truth["loss"][0] < 1e-4
    torch.testing.assert_close(results["loss"][0].double(), truth["loss"][0], rtol=2e-3, atol=0)
    torch.testing.assert_close(results["input"][0].double(), truth["input"][0], rtol=5e-3, atol=1e-9)


@pytest.mark.parametrize("filter_eps", mostly_slow([1e-4, 1e-2], [1e-2]))
def test_filtering_drops_no_more_than_it_says(filter_eps: float) -> None:
    """The gradient of a logit that is left out is at most filter_eps |g|; biases and coefficients are not filtered."""
    head = Head("plif", rows=32, classes=512, features=32, bias=True)
    head.target[:] = head.target % 64
    head.linear_bias[64:] -= torch.arange(448, device=DEVICE) / 32  # p from tile to tile smaller, and no targets
    head.grad_loss *= 0.01
    row_stats = head.forward().row_stats
    exact, results = head.backward(row_stats), head.backward(row_stats, filter_eps=filter_eps)
    for key in ("linear_bias", "coefficients"):
        torch.testing.assert_close(results[key], exact[key])
    dropped = (exact["linear_weight"] - results["linear_weight"]).abs()
    left_out = filter_eps * head.grad_loss.abs()
    assert dropped.amax() > 0
    assert (dropped <= 1.001 * left_out @ head.input.abs() + 1e-8).all()
    dropped = (exact["input"] - results["input"]).abs()
    assert (dropped <= 1.001 * left_out[:, None] * head.linear_weight.abs().sum(0) + 1e-8).all()


@pytest.mark.parametrize("name", ["soft_cap", "sigmoid_cap"])
def test_what_is_beyond_the_classes_is_left_out_after_f(name: str) -> None:
    """f(-inf) is not -inf there: were it taken in, 63 columns would be a part of the sum that no rounding hides."""
    head = Head(name, classes=65, **SMALL_CAPS[name])
    _assert_close(head, head.results())


def test_no_rows() -> None:
    head = Head("plif", rows=0, bias=True)
    results = head.results()
    assert results["loss"].shape == (0,) and results["input"].shape == (0, 37)
    assert results["linear_weight"].shape == (150, 37) and not results["linear_weight"].any()
    assert results["coefficients"].shape == head.transform.coefficients().shape and not results["coefficients"].any()


def test_rows_further_apart_than_an_int32_counts() -> None:
    """Row 2 of linear_weight begins at element 2^31. The memory between is never touched, and so never there."""
    head = Head("plif", classes=3, dtype=torch.bfloat16)
    wanted = head.results()
    far = torch.empty(2**31 + 37, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 37), (2**30, 1))
    head.linear_weight = far.copy_(head.linear_weight)
    for key, each in head.results().items():
        torch.testing.assert_close(each, wanted[key])
