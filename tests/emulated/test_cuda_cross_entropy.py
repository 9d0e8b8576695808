"""The CUDA kernels in their host execution: accuracy, rows of every kind, memory traffic, one result in every order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_host import executing
from losses import (
    TRANSFORMS,
    ErrorsBesideThoseOfPyTorch,
    distance,
    disturbed,
    head_loss_and_gradients,
    loss_and_gradients,
)
from operator_calls import PLAIN, check_row_kernels, kernel_transform, opcheck
from torch import Tensor

import monosoftmax as ms
from monosoftmax import ops
from monosoftmax.groups import LossOptions, Upstream
from monosoftmax.row_kernels import row_kernels

#: How a row comes to its gradient: kept by a block, by a cluster, read again.
STRATEGIES = {"block": {}, "cluster": {"fewest_blocks": 4}, "reread": {"keeps_rows": False}}
SIZES = [1, 33, 1023, *(pytest.param(size, marks=pytest.mark.slow) for size in (31, 32, 4097))]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"weighted": True, "reduction": "sum"},
    {"weighted": True, "label_smoothing": 0.2},
]


@pytest.fixture(params=STRATEGIES)
def host(request: pytest.FixtureRequest) -> Iterator[Any]:
    with executing(**STRATEGIES[request.param]) as host:
        yield host


def logits_and_target(classes: int, seed: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Rows of small, ordinary and large logits; an ignored one, one with p next to 1."""
    generator = torch.Generator().manual_seed(seed)
    input = (0.1, 1.0, 20.0)[seed % 3] * torch.randn(rows, classes, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[0] = -100
    input[1, target[1]] += 25
    input[2] -= 30
    return input, target


def options_of(case: int, classes: int) -> dict[str, Any]:
    options = dict(OPTIONS[case % len(OPTIONS)])
    if options.pop("weighted", False):
        options["weight"] = torch.rand(classes, generator=torch.Generator().manual_seed(case)) + 0.1
    return options


def assert_close_to_the_truth(name: str, classes: int, seeds: int, rows: int = 6) -> None:
    """Within the bounds of the cpu backend."""
    errors = ErrorsBesideThoseOfPyTorch()
    for seed in range(seeds):
        input, target = logits_and_target(classes, seed, rows)
        arguments, options = (input, target, disturbed(name, seed)), options_of(seed // 3, classes)
        truth = loss_and_gradients(*arguments, "reference", torch.float64, **options)
        plain = loss_and_gradients(*arguments, "reference", **options)
        errors.add(loss_and_gradients(*arguments, "cuda", **options), plain, truth)
    errors.check()


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("classes", SIZES)
def test_is_as_close_to_the_truth_as_pytorch(host: Any, name: str, classes: int) -> None:
    assert_close_to_the_truth(name, classes, 24)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_long_rows_are_as_close_to_the_truth_as_pytorch(host: Any, name: str) -> None:
    assert_close_to_the_truth(name, 50257, 12, rows=3)


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [33, 1023, 4097])
def test_half_precision_is_rounded_once(host: Any, name: str, dtype: torch.dtype, classes: int) -> None:
    """Half precision logits give a float32 loss, and a gradient no further from the truth than its rounding is."""
    transform = disturbed(name)
    input, target = logits_and_target(classes, 1)
    input = input.to(dtype)
    for case in range(len(OPTIONS)):
        options = options_of(case, classes)
        half = loss_and_gradients(input, target, transform, "cuda", **options)
        truth = loss_and_gradients(input, target, transform, "reference", torch.float64, **options)
        plain = loss_and_gradients(input.float(), target, transform, "reference", **options)
        assert half["loss"].dtype == torch.float32 and half["input"].dtype == dtype
        rounding = distance(truth["input"].to(dtype), truth["input"])
        error = distance(plain["input"], truth["input"])
        assert distance(half["input"], truth["input"]) <= 1.02 * rounding + 2 * error + 1e-7 * truth["input"].norm()
        assert distance(half["loss"], truth["loss"]) <= 2 * distance(plain["loss"], truth["loss"]) + 1e-6 * (
            truth["loss"].norm()
        )


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("case", range(len(OPTIONS)))
def test_gradients_of_losses_and_lse(host: Any, name: str, case: int) -> None:
    """Random upstream gradients of every loss and lse: the gradient comes from row_stats, in a pass of its own."""
    torch.manual_seed(case)
    classes, transform = 517, disturbed(name)
    input, target = logits_and_target(classes, 1, 5)
    options = {**options_of(case, classes), "reduction": "none", "return_lse": True}
    upstream = (torch.randn(5), torch.randn(5))
    arguments = (input, target, transform)
    truth = loss_and_gradients(*arguments, "reference", torch.float64, upstream=upstream, **options)
    plain = loss_and_gradients(*arguments, "reference", upstream=upstream, **options)
    fused = loss_and_gradients(*arguments, "cuda", upstream=upstream, **options)
    for key, value in truth.items():
        bound = 3 * distance(plain[key], value) + 1e-6 * value.norm().item()
        assert distance(fused[key], value) <= bound, key


def test_rows_of_any_stride_and_alignment(host: Any) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        storage = torch.randn(9, 2101).to(dtype)
        target = torch.randint(0, 1041, (9,))
        transform = disturbed("plif")
        views = {f"columns from {begin}": storage[:, begin : begin + 1041] for begin in range(9)} | {
            "every second row": storage.repeat_interleave(2, 0)[::2, 3:1044],
            "one row, expanded": storage[:1, 3:1044].expand(9, -1),
            "transposed": storage[:, 3:1044].t().contiguous().t(),
        }
        before = storage.clone()
        for name, view in views.items():
            result = loss_and_gradients(view, target, transform, "cuda")
            wanted = loss_and_gradients(view.clone(), target, transform, "cpu")
            for key, value in wanted.items():
                assert distance(result[key], value) <= 1e-4 * value.float().norm() + 1e-7, (name, key)
        assert torch.equal(storage, before)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_one_result_in_every_order(name: str) -> None:
    """Whatever the order in which threads run: bit for bit the same."""
    transform = disturbed(name)
    for strategy, wishes in STRATEGIES.items():
        for dtype, classes in ((torch.float32, 1500), (torch.bfloat16, 2601)):
            input, target = logits_and_target(classes, 1)
            results = []
            for order in (("forward",), ("reverse",), ("random", 1), ("random", 2)):
                with executing(**wishes) as host:
                    host.set_order(*order)
                    results.append(loss_and_gradients(input.to(dtype), target, transform, "cuda", label_smoothing=0.1))
            for other in results[1:]:
                for key, value in results[0].items():
                    assert torch.equal(other[key], value), (strategy, dtype, key)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["plif", "spline"])
def test_tables_too_large_for_shared_memory(name: str, deterministic: bool) -> None:
    """A table of each warp, or of all: one result in every order where there are no atomics."""
    transform = disturbed(name, **{"num_pieces" if name == "plif" else "num_bins": 3000})
    input, target = logits_and_target(2000, 1)
    truth = loss_and_gradients(input, target, transform, "reference", torch.float64)
    results = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for order in (("forward",), ("reverse",), ("random", 1)):
            # With as many multiprocessors, a table for each warp would take too much memory.
            with executing(multiprocessors=2 if deterministic else 4000) as host:
                plan = host.plan(transform.kernel, 3000, rows=6, classes=2000, element_bytes=4)
                assert plan["sums"] == "warps"
                host.set_order(*order)
                results.append(loss_and_gradients(input, target, transform, "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results:
        for key, value in truth.items():
            assert distance(result[key], value) <= 1e-5 * value.norm() + 1e-7, key
            assert torch.equal(result[key], results[0][key]), key


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("strategy", ["block", "cluster"])
def test_a_row_is_read_and_written_once(strategy: str, offset: int) -> None:
    """Loss, d logits and d coefficients of bf16 rows, 64 pieces: no byte of a row crosses twice."""
    rows, classes = 4, 4099
    transform = disturbed("plif", num_pieces=64)
    storage = torch.randn(rows, 4112).bfloat16()
    input = storage[:, offset : offset + classes]
    target = torch.tensor([0, classes - 1, 17, 2048])
    with executing(**STRATEGIES[strategy]) as host:
        host.reset_traffic()
        loss_and_gradients(input, target, transform, "cuda")
        assert host.traffic() == (2 * rows * classes, 2 * rows * classes)


def test_traffic_of_the_other_ways() -> None:
    rows, classes = 4, 4099
    input, target = torch.randn(rows, classes).bfloat16(), torch.tensor([0, classes - 1, 17, -100])
    transform, size = disturbed("plif", num_pieces=64), 2 * classes
    with executing() as host:
        ms.cross_entropy(input, target, transform.requires_grad_(False), backend="cuda")
        # Each thread that has to know the target's logit reads it.
        read, written = host.traffic()
        host.reset_traffic()
        ms.cross_entropy(input, target, transform, backend="cuda")
        read, written = host.traffic()
        assert 3 * size <= read <= 3 * size + 3 * 2 * 256 and written == 0
    with executing(keeps_rows=False) as host:
        host.reset_traffic()
        loss_and_gradients(input, target, transform.requires_grad_(), "cuda")
        read, written = host.traffic()
        assert 6 * size <= read <= 6 * size + 3 * 2 * 256 and written == 4 * size


def test_targets_that_are_no_class_poison_their_row(host: Any) -> None:
    input = torch.randn(4, 50)
    transform = disturbed("plif")
    target = torch.tensor([3, 50, -1, 2**40])
    result = loss_and_gradients(input, target, transform, "cuda", reduction="none", upstream=(torch.ones(4),))
    assert result["loss"][0].isfinite() and result["input"][0].isfinite().all()
    assert result["loss"][1:].isnan().all() and result["input"][1:].isnan().all()
    whole = loss_and_gradients(input, target, transform, "cuda")
    assert whole["loss"].isnan() and whole["input"][1:].isnan().all() and whole["input"][0].isfinite().all()


def test_rows_beyond_two_billion_elements(host: Any) -> None:
    stride = 2**31 + 8
    torch.manual_seed(0)
    storage = torch.empty(stride + 40, dtype=torch.bfloat16)  # pages that nobody touches take no memory
    input = storage.as_strided((2, 33), (stride, 1))
    values = torch.randn(2, 33).bfloat16()
    input.copy_(values)
    target = torch.tensor([3, 32])
    transform = disturbed("gss")
    result = loss_and_gradients(input, target, transform, "cuda")
    wanted = loss_and_gradients(values, target, transform, "cuda")
    for key, value in wanted.items():
        torch.testing.assert_close(result[key], value, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_upstream_gradient_of_the_total(host: Any, dtype: torch.dtype, factor: float) -> None:
    """The gradient that the forward pass computed is right for a factor of 1, and becomes right for others."""
    transform = disturbed("plif")
    input, target = logits_and_target(517, 1)
    input = input.to(dtype)
    result = loss_and_gradients(input, target, transform, "cuda", upstream=(torch.tensor(factor),))
    truth = loss_and_gradients(input, target, transform, "reference", torch.float64, upstream=(torch.tensor(factor),))
    rounding = distance(truth["input"].to(dtype), truth["input"])
    assert distance(result["input"], truth["input"]) <= 1.02 * rounding + 2e-6 * truth["input"].norm()
    assert distance(result["raw_slope"], truth["raw_slope"]) <= 1e-5 * truth["raw_slope"].norm()


@pytest.mark.grid(2)
@pytest.mark.parametrize("case", range(len(OPTIONS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_in_chunks(host: Any, dtype: torch.dtype, case: int) -> None:
    torch.manual_seed(0)
    head = {"input": torch.randn(11, 16), "linear_weight": torch.randn(70, 16), "linear_bias": torch.randn(70)}
    head = {name: each.to(dtype) for name, each in head.items()}
    target = torch.randint(0, 70, (11,))
    target[3] = -100
    transform, options = disturbed("plif"), options_of(case, 70)
    result = head_loss_and_gradients(head, target, transform, "cuda", chunk_rows=4, **options)
    wanted = head_loss_and_gradients(head, target, transform, "cpu", chunk_rows=4, **options)
    for key, value in wanted.items():
        assert distance(result[key], value) <= (1e-5 if dtype == torch.float32 else 2e-2) * value.float().norm(), key


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_is_waited_for(reduction: str) -> None:
    """No number is brought to the host: calls can be captured in CUDA graphs."""
    input, target = torch.randn(4, 70), torch.randint(0, 70, (4,))
    transform, options = kernel_transform(disturbed("plif")), LossOptions(torch.rand(70), -100, 0.1, 0.1, True)
    call = ops.CrossEntropy("cuda", input, target, transform, options, reduction=reduction, output_mask=(True, True))
    with executing(), torch.profiler.profile() as profile:
        row_stats = ops.cross_entropy(call).row_stats
        kernels, scale = row_kernels("cuda"), torch.tensor(0.5)
        kernels.scale_(input.clone(), scale)
        kernels.cross_entropy(
            input,
            target,
            transform,
            options,
            upstream=Upstream(scale, None, scale),
            row_stats=row_stats,
            output_mask=(True, False),
            grad_rows=torch.empty_like(input),
        )
    names = {event.name for event in profile.events()}
    assert "monosoftmax::cross_entropy" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


def test_operators_check_out() -> None:
    input, target = torch.randn(4, 70), torch.randint(0, 70, (4,))
    options = LossOptions(torch.rand(70), -100, 0.1, 0.1, True)
    with executing():
        for name in ("identity", "plif", "monotonic_mlp"):
            transform = kernel_transform(disturbed(name))
            call = ops.CrossEntropy(
                "cuda", input, target, transform, options, reduction="mean", output_mask=(True, True)
            )
            opcheck(call)
            row_stats = ops.cross_entropy(call).row_stats
            for grad_lse in (None, torch.rand(4)):
                backward = ops.CrossEntropyBackward(
                    backend="cuda",
                    grad_loss=torch.rand(4),
                    grad_lse=grad_lse,
                    input=input,
                    target=target,
                    transform=transform,
                    options=options,
                    row_stats=row_stats,
                    output_mask=(True, True),
                )
                opcheck(backward)
            for each in (PLAIN, options):
                check_row_kernels("cuda", input, target, transform, each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_of_the_upstream_gradient(host: Any, dtype: torch.dtype) -> None:
    """1 leaves the gradient where it is alone; for another number it is computed again, for the product."""
    input, target = logits_and_target(517, 1)
    input, transform, scale = input.to(dtype), kernel_transform(disturbed("plif")), torch.tensor(0.3)
    cross_entropy = row_kernels("cuda").cross_entropy
    ahead = cross_entropy(input, target, transform, PLAIN, upstream=Upstream(scale), output_mask=(True, False))
    for factor in (1.0, 2.0):
        into = torch.full_like(input, 5.0)
        again = {"row_stats": ahead[2], "output_mask": (True, False), "grad_rows": into}
        cross_entropy(input, target, transform, PLAIN, upstream=Upstream(scale, None, torch.tensor(factor)), **again)
        assert (into == 5).all() if factor == 1 else torch.equal(into, factor * ahead[3])
    for factor in (1.0, 0.5, torch.nan):
        scaled = input.clone()
        row_kernels("cuda").scale_(scaled, torch.tensor(factor))
        torch.testing.assert_close(scaled, (input.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)
