"""The triton backend's table of row kernels, called as the operators call it; interpreted, or on a GPU where one is.

Against the reference they are tested through the public functions (tests/emulated/test_triton_cross_entropy.py); here
is what :class:`monosoftmax.row_kernels.RowKernels` promises beyond that, and PLIF's coefficients.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from losses import disturbed
from tiers import mostly_slow
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton_interpreter import interpreting

import monosoftmax as ms
from monosoftmax import transforms
from monosoftmax.groups import Head, LossOptions, RowResults, Transform, Upstream
from monosoftmax.row_kernels import RowKernels
from monosoftmax.triton_kernels import operators, recompute_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, CLASSES = 4, 300
NO_OPTIONS = LossOptions(None, -100, 0.0, 0.0, False)
ALL_OPTIONS = LossOptions(torch.linspace(0.5, 1.5, CLASSES, device=DEVICE), -100, 0.1, 1e-2, True)
BOTH, NEITHER = (True, True), (False, False)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreting() if DEVICE == "cpu" else nullcontext():
        yield


def _of(transform: transforms.MonotonicTransform) -> Transform:
    assert transform.kernel is not None
    coefficients = transform.to(DEVICE).coefficients().detach()
    return Transform(coefficients, transform.kernel, list(transform.constants()))


def _rows(dtype: torch.dtype = torch.float32, classes: int = CLASSES) -> Tensor:
    return (3 * torch.randn(ROWS, classes, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)


def _target() -> Tensor:
    return torch.tensor([7, -100, 0, CLASSES - 1], device=DEVICE)


def _number(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def _call(
    upstream: Upstream | None,
    row_stats: Tensor | None = None,
    mask: tuple[bool, bool] = BOTH,
    into: Tensor | None = None,
    rows: Tensor | None = None,
    options: LossOptions = ALL_OPTIONS,
) -> RowResults:
    f = _of(disturbed("plif"))
    rows = _rows() if rows is None else rows
    return operators.cross_entropy(rows, _target(), f, options, upstream, row_stats, mask, into)


def test_it_has_every_function_of_the_table() -> None:
    for name, function in inspect.getmembers(RowKernels, inspect.isfunction):
        if not name.startswith("_"):
            promised, found = (
                list(inspect.signature(each).parameters) for each in (function, getattr(operators, name))
            )
            assert promised == ["self", *found], name


@pytest.mark.parametrize("options", [NO_OPTIONS, ALL_OPTIONS], ids=["no options", "all options"])
def test_gradients_at_once_and_from_row_stats_are_the_same(options: LossOptions) -> None:
    scale = _number(0.3)
    at_once = _call(Upstream(scale), options=options)
    losses = _call(None, mask=NEITHER, options=options)
    assert losses.grad_rows.numel() == losses.grad_coefficients.numel() == 0
    for name in ("loss", "lse", "row_stats"):
        assert torch.equal(getattr(losses, name), getattr(at_once, name)), name
    for upstream in (scale, scale.expand(ROWS), scale.repeat(ROWS)):
        later = _call(Upstream(upstream), losses.row_stats, options=options)
        assert later.loss.numel() == later.lse.numel() == 0
        assert torch.equal(later.grad_rows, at_once.grad_rows)
        torch.testing.assert_close(later.grad_coefficients, at_once.grad_coefficients, rtol=1e-6, atol=1e-7)


def test_only_what_the_mask_asks_for() -> None:
    both = _call(Upstream(_number(1.0)))
    for row_stats in (None, both.row_stats):
        rows_only = _call(Upstream(_number(1.0)), row_stats, (True, False))
        coefficients_only = _call(Upstream(_number(1.0)), row_stats, (False, True))
        assert rows_only.grad_coefficients.numel() == coefficients_only.grad_rows.numel() == 0
        assert torch.equal(rows_only.grad_rows, both.grad_rows)
        torch.testing.assert_close(coefficients_only.grad_coefficients, both.grad_coefficients)


@pytest.mark.parametrize("dtype", mostly_slow([torch.float32, torch.bfloat16], [torch.bfloat16]))
def test_the_gradient_is_written_where_it_is_told(dtype: torch.dtype) -> None:
    wanted = _call(Upstream(_number(1.0)), rows=_rows(dtype))
    padded = torch.full((ROWS, CLASSES + 5), torch.nan, dtype=dtype, device=DEVICE)
    elsewhere, over, again = padded[:, 2 : CLASSES + 2], _rows(dtype), _rows(dtype)
    results = [
        _call(Upstream(_number(1.0)), into=elsewhere, rows=_rows(dtype)),
        _call(Upstream(_number(1.0)), into=over, rows=over),
        _call(Upstream(_number(1.0)), wanted.row_stats, into=again, rows=again),
    ]
    for result, place in zip(results, (elsewhere, over, again), strict=True):
        assert result.grad_rows is place and torch.equal(place, wanted.grad_rows)
    assert padded.isnan().sum() == 5 * ROWS


def test_an_upstream_gradient_that_is_absent_is_zero() -> None:
    row_stats = _call(None, mask=NEITHER).row_stats
    lse = torch.linspace(-1, 1, ROWS, device=DEVICE)
    absent, zero = (
        _call(Upstream(None, lse), row_stats),
        _call(Upstream(torch.zeros(ROWS, device=DEVICE), lse), row_stats),
    )
    assert torch.equal(absent.grad_rows, zero.grad_rows) and absent.grad_rows.any()
    assert not _call(Upstream(None), row_stats).grad_rows.any()


def test_gradients_need_a_scale() -> None:
    for upstream in (None, Upstream(None)):
        with pytest.raises(ValueError, match="monosoftmax: gradients need a scale"):
            _call(upstream)
    row_stats = _call(None, mask=NEITHER).row_stats
    with pytest.raises(ValueError, match="monosoftmax: gradients need a scale"):
        _call(None, row_stats)
    with pytest.raises(ValueError, match="a factor is for the gradient of rows only"):
        _call(Upstream(_number(1.0), factor=_number(2.0)), row_stats)


def test_factor() -> None:
    """1 leaves the gradient alone; else it is computed again, for the product."""
    ahead = _call(Upstream(_number(0.3)))
    for factor, mark in ((1.0, 5.0), (2.0, 5.0)):
        into = torch.full_like(ahead.grad_rows, mark)
        upstream = Upstream(_number(0.3), factor=_number(factor))
        _call(upstream, ahead.row_stats, (True, False), into)
        assert (into == mark).all() if factor == 1 else torch.equal(into, factor * ahead.grad_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_head(dtype: torch.dtype) -> None:
    """Gradients at once are never filtered; in float16 they are right where dz is below its smallest number."""
    input, weight = _rows(dtype, 16), _rows(dtype, 16 * CLASSES // ROWS).reshape(-1, 16) / 4
    head, target, transform = Head(input, weight, None), _target() % 60, disturbed("gss")
    options, mask, scale = NO_OPTIONS._replace(return_lse=True), (True, True, False, True), Upstream(_number(1e-7))

    def call(upstream: Upstream | None, row_stats: Tensor | None, mask: tuple[bool, ...], filter_eps: float) -> tuple:
        f = _of(transform)
        return recompute_head.linear_cross_entropy(head, target, f, options, upstream, row_stats, mask, filter_eps)

    loss, lse, row_stats, at_once = call(scale, None, mask, 0.999)
    *of_rows, none = call(None, None, (False,) * 4, 0.0)
    for each, wanted in zip(of_rows, (loss, lse, row_stats), strict=True):
        assert torch.equal(each, wanted)
    assert all(each.numel() == 0 for each in none)
    *of_rows, later = call(scale, row_stats, mask, 0.0)
    assert of_rows[0].numel() == of_rows[1].numel() == 0
    leaves = [each.double().requires_grad_() for each in (input, weight)]
    logits = leaves[0] @ leaves[1].t()
    total = ms.cross_entropy(logits, target, transform, reduction="sum", backend="reference")
    truth = torch.autograd.grad(1e-7 * total, leaves)
    for found in (at_once, later):
        # In float16 the gradient of input is a multiple of 6e-8; that of linear_weight is float32.
        torch.testing.assert_close(found.input.double(), truth[0], rtol=1e-2, atol=6e-8)
        torch.testing.assert_close(found.linear_weight.double(), truth[1], rtol=1e-2, atol=1e-10)
        assert found.linear_bias.numel() == 0
    filtered = call(scale, row_stats, mask, 0.999)[3]
    assert (filtered.linear_weight == 0).all(1).sum() > (later.linear_weight == 0).all(1).sum()
    with pytest.raises(ValueError, match="monosoftmax: gradients need a scale"):
        call(None, row_stats, mask, 0.0)


@pytest.mark.grid
# 128 and 2048 pieces fill a block.
@pytest.mark.parametrize("pieces", [1, 2, 7, 64, 128, 129, 1000, 4096, 13001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plif_coefficients(pieces: int, dtype: torch.dtype) -> None:
    """Against the PyTorch formula in float64, with slopes beyond their limit and raw values of any size."""
    plif = transforms.PLIF(pieces, 7.3, min_slope=0.013, init="random", dtype=torch.float64)
    raw = plif.raw_slope.detach()
    raw[: pieces // 3 : 5] = 2e4  # beyond the limit of the slopes
    raw[pieces // 2 :: 7] = -40.0
    raw.copy_(raw.to(dtype))
    f = plif.coefficients()
    upstream = torch.randn(f.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    upstream[:, : pieces // 4] = 0
    upstream[:, pieces - pieces // 4 :] = 0
    (wanted,) = torch.autograd.grad(f, plif.raw_slope, upstream.double())
    given = raw.to(DEVICE, dtype)
    result = operators.plif_coefficients(given, 7.3, 0.013)
    gradient = operators.plif_coefficients_backward(upstream.to(DEVICE), given, 7.3, 0.013)
    assert result.dtype == gradient.dtype == dtype
    # Both sum in float64, in different orders.
    tolerance = max(8 * torch.finfo(dtype).eps, 1e-13)
    for each, truth in ((result[0], f[0].detach()), (result[1], f[1].detach()), (gradient, wanted)):
        slack = tolerance * truth.abs().max().item()
        torch.testing.assert_close(each.cpu().double(), truth, rtol=tolerance, atol=slack)
    torch.testing.assert_close(result[0].cpu().double(), f[0].detach(), rtol=tolerance, atol=0)
    assert torch.equal(gradient.cpu() == 0, wanted == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_passes_where_a_slope_is_the_limit_itself(dtype: torch.dtype) -> None:
    plif = transforms.PLIF(3, 1.0, min_slope=0.5, dtype=dtype)
    raw = plif.raw_slope.detach()
    raw.copy_(torch.tensor([19999.0, 19999.01, 1.0]))
    f, upstream = plif.coefficients(), torch.ones(2, 3, dtype=dtype)
    assert (f[0, :2] == 1e4).all()
    (wanted,) = torch.autograd.grad(f, plif.raw_slope, upstream)
    gradient = operators.plif_coefficients_backward(upstream.to(DEVICE), raw.to(DEVICE), 1.0, 0.5)
    assert gradient[0] != 0 and gradient[1] == 0
    torch.testing.assert_close(gradient.cpu(), wanted)


def test_numbers_of_plif_are_not_rounded_to_float32() -> None:
    """The width of a piece has all bits of a float64: f at the last knot tells."""
    plif = transforms.PLIF(1000, 0.1, min_slope=0.3, dtype=torch.float64)
    result = operators.plif_coefficients(plif.raw_slope.detach().to(DEVICE), 0.1, 0.3)
    torch.testing.assert_close(result.cpu(), plif.coefficients().detach(), rtol=1e-14, atol=1e-16)
