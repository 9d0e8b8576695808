"""The Triton kernels over rows of logits against the reference in float64, interpreted, or on a GPU where one is.

The tests of ``ms.cross_entropy`` run on the triton backend, too (tests/unit/test_cross_entropy.py); here are the
dimensions that are these kernels' own: tiles, alignments, how sums are kept, programs, and what a launch is compiled
for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from losses import (
    SOME_TRANSFORMS,
    TRANSFORMS,
    check_log_prob,
    distance,
    disturbed,
    head_loss_and_gradients,
    loss_and_gradients,
)
from operator_calls import PLAIN, kernel_transform
from tiers import mostly_slow
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton_interpreter import interpreting

import monosoftmax as ms
from monosoftmax import gradients_ahead, ops, reference
from monosoftmax.groups import LossOptions, RowResults, Upstream
from monosoftmax.triton_kernels import coefficient_sums, launch, operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, IGNORED = 5, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 32 lanes, 128 or 256 logits; two programs keep sums."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    tiles = launch.tuned(lanes=32, lanes_with_tables=32, programs=2)
    with tiles, interpreting() if DEVICE == "cpu" else nullcontext():
        yield


def _rows(classes: int, dtype: torch.dtype, std: float = 3.0, begin: int = 0, padding: int = 3) -> Tensor:
    """Rows of logits between columns that must not be read, the first ``begin`` elements after 16 bytes."""
    generator = torch.Generator().manual_seed(classes)
    padded = torch.full((ROWS, begin + classes + padding), torch.nan, dtype=dtype)
    padded[:, begin : begin + classes] = std * torch.randn(ROWS, classes, generator=generator)
    return padded.to(DEVICE)[:, begin : begin + classes]


def _target(classes: int) -> Tensor:
    target = torch.randint(0, classes, (ROWS,), generator=torch.Generator().manual_seed(1))
    target[IGNORED] = -100
    return target.to(DEVICE)


def _assert_close(input: Tensor, target: Tensor, transform: Any, backend: str = "triton", **options: Any) -> None:
    """No further from the float64 truth than 3 times float32 PyTorch, plus rounding."""
    transform = transform.to(DEVICE)
    truth = loss_and_gradients(input, target, transform, "reference", torch.float64, **options)
    plain = loss_and_gradients(input.float(), target, transform, "reference", **options)
    result = loss_and_gradients(input, target, transform, backend, **options)
    for key, wanted in truth.items():
        slack = 4e-7 * wanted.norm().item() + 1e-7
        if key == "input" and input.dtype != torch.float32:
            slack += torch.finfo(input.dtype).eps * wanted.norm().item()
        if key not in ("loss", "lse", "input"):
            slack += 1e-6  # a sum that cancels: plain PyTorch's error may be small by luck
        assert result[key].isfinite().all(), key
        assert distance(result[key], wanted) <= 3 * distance(plain[key], wanted) + slack, key


@pytest.mark.grid
@pytest.mark.parametrize("classes", [1, 7, 31, 127, 128, 129, 256, 520])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_loss_and_gradients(name: str, classes: int) -> None:
    _assert_close(_rows(classes, torch.float32), _target(classes), disturbed(name))


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    _assert_close(_rows(1033, dtype), _target(1033), disturbed(name), reduction="sum")


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [9, 512, 1031])
@pytest.mark.parametrize(("begin", "padding"), [(0, 0), (0, 3), (5, 0), (1, 8)])
def test_rows_that_begin_anywhere(dtype: torch.dtype, classes: int, begin: int, padding: int) -> None:
    """Aligned or not, whole vectors or not: the same as rows that are."""
    input, target = _rows(classes, dtype, begin=begin, padding=padding), _target(classes)
    transform = disturbed("plif", num_pieces=10, bound=6.0).to(DEVICE)
    result = loss_and_gradients(input, target, transform, "triton", reduction="sum")
    aligned = _rows(classes, dtype, padding=-classes % 8 + 8)
    assert launch.tile_arguments(aligned)["ALIGNMENT"] == "aligned"
    wanted = loss_and_gradients(aligned, target, transform, "triton", reduction="sum")
    for key in wanted:
        torch.testing.assert_close(
            result[key], wanted[key], rtol=2 * torch.finfo(result[key].dtype).eps, atol=2e-6, msg=key
        )


OPTIONS: list[dict[str, Any]] = [
    {"weight": True},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "weight": True, "z_loss": 1e-3, "return_lse": True},
    {"z_loss": 1e-2},
    {"return_lse": True},
]


@pytest.mark.grid
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_options(name: str, reduction: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = dict(options)
    if given.pop("weight", False):
        given["weight"] = (torch.rand(300, generator=generator) + 0.1).to(DEVICE)
    shape = (ROWS,) if reduction == "none" else ()
    upstream = [torch.rand(shape, generator=generator), torch.rand(ROWS, generator=generator)]
    upstream = [each.to(DEVICE) for each in upstream[: 1 + given.get("return_lse", False)]]
    _assert_close(
        _rows(300, torch.float32), _target(300), disturbed(name), upstream=tuple(upstream), reduction=reduction, **given
    )


_SUMS = list(product((1, 4, 5, 64, 256, 257, 1000), (False, True)))
#: A number of pieces for each way of summing, with and without deterministic algorithms.
_USUAL_SUMS = ((1, False), (5, False), (256, True), (257, False), (257, True))


@pytest.mark.parametrize(("pieces", "deterministic"), mostly_slow(_SUMS, _USUAL_SUMS))
def test_every_way_of_summing(pieces: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_WRITTEN", 700)  # two rows at a time
    wanted = "registers" if pieces == 1 else "lanes" if pieces <= 256 else "written" if deterministic else "global"
    assert coefficient_sums.regime_of(2, pieces, deterministic) == wanted
    torch.use_deterministic_algorithms(deterministic)
    try:
        transform = disturbed("plif", num_pieces=pieces, bound=6.0)
        for options in ({"reduction": "sum"}, {"reduction": "none", "upstream": (torch.rand(ROWS, device=DEVICE),)}):
            _assert_close(_rows(300, torch.float32), _target(300), transform, **options)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", mostly_slow(("plif", "spline", "monotonic_mlp"), ("plif",)))
def test_sums_do_not_depend_on_the_programs_beyond_rounding(name: str) -> None:
    input, target, transform = _rows(300, torch.float32), _target(300), disturbed(name).to(DEVICE)
    results = []
    for programs in (1, 2, 5, 7):
        with launch.tuned(programs=programs):
            results.append(loss_and_gradients(input, target, transform, "triton"))
    for result in results[1:]:
        for key, wanted in results[0].items():
            torch.testing.assert_close(result[key], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [False, True])
def test_half_precision_is_rounded_once(dtype: torch.dtype, in_place: bool) -> None:
    transform = disturbed("plif").to(DEVICE)
    input, target = _rows(300, dtype), _target(300)
    exact = loss_and_gradients(input, target, transform, "reference", torch.float64, reduction="sum")["input"]
    upstream, before = Upstream(torch.ones((), device=DEVICE)), input.clone()
    results = operators.cross_entropy(
        input,
        target,
        kernel_transform(transform),
        PLAIN,
        upstream=upstream,
        output_mask=(True, True),
        grad_rows=input if in_place else None,
    )
    gradient = results.grad_rows
    assert gradient is input if in_place else torch.equal(input, before)
    assert gradient.dtype == dtype
    # Half an ulp, and what float32 arithmetic adds.
    ulp = torch.finfo(dtype).eps * exact.abs() + (2**-24 if dtype == torch.float16 else 0)
    assert ((gradient.double() - exact).abs() <= 0.502 * ulp + 2e-6 * exact.abs()).all()


@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
def test_in_place_and_later_are_the_same(name: str) -> None:
    """The gradient of the one kernel for both, of the backward one, and of those that overwrite the logits."""
    transform, target = kernel_transform(disturbed(name), device=DEVICE), _target(300)
    options, input, both = LossOptions(None, -100, 0.1, 0.01, True), _rows(300, torch.float32), (True, True)
    forward = ops.CrossEntropy("triton", input, target, transform, options, reduction="mean", output_mask=both)
    results = ops.cross_entropy(forward)
    scale = results.scale
    assert scale == 1 / (ROWS - 1)
    torch.testing.assert_close(results.total, results.loss.sum() / (ROWS - 1))

    def call(rows: Tensor, upstream: Tensor, row_stats: Tensor | None, into: Tensor | None = None) -> RowResults:
        return operators.cross_entropy(
            rows,
            target,
            transform,
            options,
            upstream=Upstream(upstream),
            row_stats=row_stats,
            output_mask=both,
            grad_rows=into,
        )

    later = call(input, scale.expand(ROWS), results.row_stats)
    over, again = _rows(300, torch.float32), _rows(300, torch.float32)
    in_place = call(over, scale, None, into=over)
    in_place_later = call(again, scale.expand(ROWS), results.row_stats, into=again)
    for each in (later.grad_rows, over, again):
        assert torch.equal(each, results.grad_input)
    for each in (later, in_place, in_place_later):
        torch.testing.assert_close(each.grad_coefficients, results.grad_coefficients, rtol=1e-6, atol=1e-7)
    assert torch.equal(in_place.loss, results.loss) and torch.equal(in_place.lse, results.lse)


@pytest.mark.grid
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_ahead_is_rounded_once_whatever_comes_later(
    factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values cannot be looked at, as on a GPU: the device decides whether the gradient is computed again."""
    monkeypatch.setattr(gradients_ahead, "tells_values", lambda tensor: False)
    calls: list[tuple[bool, bool]] = []
    launched = operators.launch_cross_entropy

    def launch_and_note(
        rows: Tensor, loss: launch.RowLoss, upstream: Upstream | None, results: RowResults, sums: launch.Sums
    ) -> None:
        calls.append((results.loss.numel() > 0, upstream is not None and upstream.factor is not None))
        launched(rows, loss, upstream, results, sums)

    monkeypatch.setattr(operators, "launch_cross_entropy", launch_and_note)
    transform = disturbed("plif").to(DEVICE)
    input, target = _rows(300, dtype), _target(300)
    upstream = (torch.tensor(factor, device=DEVICE),)
    result = loss_and_gradients(input, target, transform, "triton", upstream=upstream)
    assert calls == [(True, False), (False, True)]  # losses, and a factor
    exact = loss_and_gradients(input, target, transform, "reference", torch.float64, upstream=upstream)
    ulp = torch.finfo(dtype).eps * exact["input"].abs() + (2**-24 if dtype == torch.float16 else 0)
    assert ((result["input"].double() - exact["input"]).abs() <= 0.502 * ulp + 2e-6 * exact["input"].abs()).all()
    torch.testing.assert_close(result["raw_slope"].double(), exact["raw_slope"], rtol=1e-5, atol=1e-6)


def test_batched_upstream_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_ahead, "tells_values", lambda tensor: False)
    upstream = torch.tensor([1.0, -2.0], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float32):
        leaf = _rows(9, dtype).clone().requires_grad_()
        loss = ms.cross_entropy(leaf, _target(9), backend="triton")
        (gradients,) = torch.autograd.grad(loss, leaf, upstream, is_grads_batched=True)
        for each, factor in zip(gradients, upstream, strict=True):
            alone = ms.cross_entropy(leaf, _target(9), backend="triton")
            torch.testing.assert_close(each, torch.autograd.grad(alone, leaf, factor)[0])


@pytest.mark.grid
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("head", [False, True])
def test_gradients_ahead_are_scaled_on_the_device(factor: float, head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients_ahead, "tells_values", lambda tensor: False)
    scaled = []
    scale = operators.launch_scale
    monkeypatch.setattr(operators, "launch_scale", lambda *a: (scaled.append(a[0].shape), scale(*a)))
    transform = disturbed("plif").to(DEVICE)
    upstream = (torch.tensor(factor, device=DEVICE),)
    if head:
        leaves = {"input": _rows(5, torch.float32), "linear_weight": torch.randn(300, 5).to(DEVICE)}
        results = [
            head_loss_and_gradients(leaves, _target(300), transform, backend, upstream=upstream)
            for backend in ("triton", "reference")
        ]
        assert scaled == [(ROWS, 5), (300, 5), (2, 50)]
    else:
        results = [
            loss_and_gradients(_rows(300, torch.float32), _target(300), transform, backend, upstream=upstream)
            for backend in ("triton", "reference")
        ]
        assert scaled == [(ROWS, 300), (2, 50)]
    for key, wanted in results[1].items():
        torch.testing.assert_close(results[0][key], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 4096, 10_000])
def test_scale(dtype: torch.dtype, elements: int) -> None:
    values = torch.randn(elements).to(DEVICE, dtype)
    for factor in (1.0, 0.3, torch.nan):
        result = values.clone()
        operators.scale_(result, torch.tensor(factor, device=DEVICE))
        wanted = (values.float() * factor).to(dtype)
        assert torch.equal(result, wanted) or (result.isnan().all() and math.isnan(factor))


@pytest.mark.parametrize("name", ["identity", "soft_cap", "plif", "gss"])
@pytest.mark.parametrize("needs_coefficients", [False, True])
def test_extreme_rows(name: str, needs_coefficients: bool) -> None:
    """-inf is allowed, a row of -inf only or with NaN or +inf is NaN, and the rows beside it are not touched."""
    transform = disturbed(name).to(DEVICE).requires_grad_(needs_coefficients)
    input, target = _rows(129, torch.float32, 1.0), torch.tensor([0, 1, -100, 3, 4], device=DEVICE)
    clean = input.clone()
    input[0, 5] = -torch.inf
    input[1] = -torch.inf
    input[3, 128] = torch.nan
    leaf = input.requires_grad_()
    losses = ms.cross_entropy(leaf, target, transform, reduction="none", backend="triton")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    fine = [0, 2, 4] if not transform.bounded_below else [0, 1, 2, 4]
    assert losses[fine].isfinite().all() and gradient[fine].isfinite().all()
    assert losses[3].isnan() and gradient[3].isnan().all()
    if not transform.bounded_below:
        assert losses[1].isnan() and gradient[1].isnan().all()
        assert gradient[0, 5] == 0
    alone = ms.cross_entropy(clean, target, transform, reduction="none", backend="triton")
    assert torch.equal(alone[[2, 4]], losses[[2, 4]])


@pytest.mark.parametrize("outside", [-1, 129, 2**40])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_target_out_of_range_poisons_its_row_only(outside: int, z_loss: float) -> None:
    transform = disturbed("plif").to(DEVICE)
    input, target = _rows(129, torch.float32, 1.0).requires_grad_(), _target(129)
    target[1] = outside
    weight = torch.rand(129).to(DEVICE)
    losses = ms.cross_entropy(
        input, target, transform, weight=weight, z_loss=z_loss, reduction="none", backend="triton"
    )
    (gradient,) = torch.autograd.grad(losses.sum(), input)
    others = [0, 2, 3, 4]
    assert losses[1].isnan() and gradient[1].isnan().all()
    assert losses[others].isfinite().all() and gradient[others].isfinite().all()


@pytest.mark.parametrize("classes", [1, 130, 300])
def test_columns_beyond_the_row_do_not_exist(classes: int) -> None:
    """f(-inf) is -1 here: a lane beyond the row counts as much as a logit, unless it is masked after f."""
    transform = ms.transforms.SoftCap(1.0, learnable=True)
    for begin in (0, 1):
        _assert_close(_rows(classes, torch.float32, begin=begin), _target(classes), transform)
        log_p = ms.log_softmax(_rows(classes, torch.float32, begin=begin), transform, backend="triton")
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(ROWS, device=DEVICE))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_rows_may_hold_anything(value: float) -> None:
    transform = disturbed("gss").to(DEVICE)
    input, target = _rows(129, torch.bfloat16), _target(129)
    wanted = loss_and_gradients(input, target, transform, "triton", z_loss=0.1, reduction="sum")
    input[IGNORED] = value
    result = loss_and_gradients(input, target, transform, "triton", z_loss=0.1, reduction="sum")
    for key in wanted:
        assert torch.equal(result[key], wanted[key]), key


def test_rows_further_apart_than_an_int32_counts() -> None:
    """Row 2 begins at element 2^31. The memory between the rows is never touched, and so never there."""
    transform = disturbed("plif").to(DEVICE)
    near, target = _rows(129, torch.bfloat16)[:3].contiguous(), torch.tensor([3, 1, 2], device=DEVICE)
    far = torch.empty(2**31 + 129, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 129), (2**30, 1))
    far.copy_(near)
    results = [
        operators.cross_entropy(
            each,
            target,
            kernel_transform(transform),
            PLAIN,
            upstream=Upstream(torch.ones((), device=DEVICE)),
            output_mask=(True, True),
            grad_rows=each,
        )
        for each in (near, far)
    ]
    assert torch.equal(near, far)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("begin", [0, 1])
def test_log_softmax(dtype: torch.dtype, out: torch.dtype, begin: int) -> None:
    for name in ("identity", "plif", "soft_cap"):
        transform = disturbed(name).to(DEVICE)
        leaf = _rows(525, dtype, begin=begin).detach().requires_grad_()
        log_p = ms.log_softmax(leaf, transform, dtype=out, backend="triton")
        assert log_p.dtype == out
        exact = reference.log_softmax(leaf.double(), transform, torch.float64)
        eps = torch.finfo(out).eps
        torch.testing.assert_close(log_p.double(), exact, rtol=0.51 * eps, atol=1e-5)
        parameters = list(transform.parameters())
        upstream = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, out)
        gradients = torch.autograd.grad(log_p, [leaf, *parameters], upstream)
        wanted = torch.autograd.grad(exact, [leaf, *parameters], upstream.double())
        for got, truth in zip(gradients, wanted, strict=True):
            tolerance = 2 * torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 2e-5
            torch.testing.assert_close(
                got.double(), truth.double(), rtol=tolerance, atol=2e-5 * max(1.0, truth.abs().max().item())
            )


@pytest.mark.grid
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_statistics(name: str, dtype: torch.dtype) -> None:
    transform = disturbed(name).to(DEVICE)
    input, target = _rows(525, dtype), _target(525)
    input[0, 300:] = input[0, 100]  # ties
    input[1, target[1]] = -torch.inf
    f = kernel_transform(transform, device=DEVICE)
    log_prob, entropy, argmax, lse, rank, _ = operators.token_statistics(input, target, f, ignore_index=-100)
    log_p = reference.log_softmax(input.double(), transform, torch.float64)
    valid = target != -100
    at = torch.where(valid, target, 0)
    wanted = log_p.gather(1, at[:, None]).squeeze(1)
    torch.testing.assert_close(log_prob[valid].double(), wanted[valid], rtol=1e-5, atol=2e-5)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p)
    torch.testing.assert_close(entropy.double(), -terms.sum(1), rtol=1e-5, atol=1e-5)
    exact_lse = transform.to(torch.float64)(input.double()).logsumexp(1)
    torch.testing.assert_close(lse.double(), exact_lse.detach(), rtol=1e-5, atol=2e-5)
    largest = input.amax(1, keepdim=True)
    assert torch.equal(argmax, (input == largest).int().argmax(1))
    assert torch.equal(rank[valid], (input > input.gather(1, at[:, None])).sum(1)[valid])
    assert log_prob[IGNORED] == 0 and rank[IGNORED] == -1


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [("log_prob",), ("log_prob", "entropy", "lse")])
def test_gradients_of_log_prob_and_entropy(name: str, dtype: torch.dtype, outputs: Any) -> None:
    transform = disturbed(name).to(DEVICE)
    check_log_prob(_rows(70, dtype), _target(70), transform, outputs, "triton")


def test_no_rows() -> None:
    transform = disturbed("plif").to(DEVICE)
    empty = torch.empty(0, 7, device=DEVICE, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    result = loss_and_gradients(empty, none, transform, "triton", reduction="sum")
    assert result["loss"] == 0 and result["input"].shape == (0, 7) and (result["raw_slope"] == 0).all()
    assert ms.log_softmax(empty, transform, backend="triton").shape == (0, 7)
