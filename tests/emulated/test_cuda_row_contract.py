"""The CUDA kernels in their host execution, against the contract of the row kernels (``tests/row_contract.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import row_contract
import torch
from cuda_host import executing
from losses import DTYPES, SOME_TRANSFORMS, TRANSFORMS
from row_contract import COMPOSITIONS, DIVERGENCES, compositions, logits, targets
from torch import Tensor

from monosoftmax.groups import Divergence, LossOptions, RowResults, TokenStatistics, Transform, Upstream
from monosoftmax.row_kernels import RowKernels, row_kernels

OPTIONS = LossOptions(None, -100, 0.0, 0.0, True)
BOTH = (True, True)
#: A temperature alone, and all there is, of row_contract.COMPOSITIONS.
COOLED, CAPPED_AND_COOLED = 1, 4
ONE = torch.tensor(1.0)


@pytest.fixture
def kernels() -> Iterator[RowKernels]:
    with executing():
        yield row_kernels("cuda")


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", range(len(COMPOSITIONS)))
def test_composition(kernels: RowKernels, name: str, which: int) -> None:
    row_contract.check_composition(kernels, logits(torch.float32), compositions(name)[which])


@pytest.mark.parametrize("wishes", [{"fewest_blocks": 4}, {"keeps_rows": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOME_TRANSFORMS)
def test_composition_of_long_rows(name: str, dtype: torch.dtype, wishes: dict[str, Any]) -> None:
    """Of several chunks for each thread, kept by a cluster or read again."""
    with executing(**wishes):
        for composition in compositions(name):
            row_contract.check_composition(row_kernels("cuda"), logits(dtype, (3, 1030)), composition)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", [0, CAPPED_AND_COOLED])
def test_gradient_of_the_entropy(kernels: RowKernels, name: str, which: int) -> None:
    row_contract.check_entropy_gradient(kernels, logits(torch.float32), compositions(name)[which])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", [COOLED, CAPPED_AND_COOLED])
def test_shards(kernels: RowKernels, name: str, which: int) -> None:
    row_contract.check_shards(kernels, logits(torch.float32), compositions(name)[which])
    row_contract.check_smoothed_shards(kernels, logits(torch.float32), compositions(name)[which])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", [COOLED, CAPPED_AND_COOLED])
def test_probabilities(kernels: RowKernels, name: str, which: int) -> None:
    row_contract.check_probabilities(kernels, logits(torch.float32), compositions(name)[which])


@pytest.mark.parametrize("log_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("which", [0, CAPPED_AND_COOLED])
def test_divergence(kernels: RowKernels, name: str, which: int, log_dtype: torch.dtype) -> None:
    row_contract.check_divergence(kernels, logits(torch.float32), compositions(name)[which], log_dtype=log_dtype)


@pytest.mark.grid(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(5, 77), (3, 1030)])
@pytest.mark.parametrize("name", SOME_TRANSFORMS)
def test_targets_of_all_classes_of_every_type(
    kernels: RowKernels, name: str, shape: tuple[int, int], dtype: torch.dtype, log_dtype: torch.dtype
) -> None:
    rows, composition = logits(dtype, shape), compositions(name)[CAPPED_AND_COOLED]
    row_contract.check_entropy_gradient(kernels, rows, composition)
    row_contract.check_probabilities(kernels, rows, composition)
    if shape[0] > 4:
        row_contract.check_divergence(kernels, rows, composition, log_dtype=log_dtype)
        row_contract.check_shards(kernels, rows, composition)


def test_large_tables(kernels: RowKernels) -> None:
    """Tables in global memory, whose sums need whole warps."""
    pieces = 600
    generator = torch.Generator().manual_seed(0)
    slopes = 0.5 + torch.rand(pieces, generator=generator, dtype=torch.float64)
    values = torch.cat([torch.zeros(1), slopes.cumsum(0)[:-1]]) * 0.05 - 16

    class Large:
        kernel = "plif"

        def coefficients(self) -> Tensor:
            return torch.stack([slopes, values])

        def constants(self) -> list[float]:
            return [-15.0, 0.05, 20.0]

        def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
            piece = ((z.detach() + 15) * 20).floor().clamp(0, pieces - 1).long()
            slope, value = coefficients[0][piece], coefficients[1][piece]
            return value + slope * (z - (piece * 0.05 - 15))

    large: Any = Large()
    for inner, temperature in (([], 0.7), ([0.5, 3.0], 1.6)):
        composition = row_contract.Composition(large, inner, temperature)
        rows = logits(torch.float32)
        row_contract.check_entropy_gradient(kernels, rows, composition)
        row_contract.check_probabilities(kernels, rows, composition)
        row_contract.check_divergence(kernels, rows, composition, log_dtype=torch.float32)


@pytest.mark.parametrize("name", SOME_TRANSFORMS)
def test_entropy_beside_the_options_of_the_loss(kernels: RowKernels, name: str) -> None:
    """The kernel with the gradient of the entropy has all options of the one without it, and the same results."""
    rows, target, f = (
        logits(torch.float32),
        targets(logits(torch.float32)),
        compositions(name)[4].kernel(logits(torch.float32)),
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(77, generator=generator) + 0.5
    g, h = torch.randn(2, 5, generator=generator)
    row_stats = TokenStatistics(*kernels.token_statistics(rows, target, f, -100)).row_stats
    for options in (
        LossOptions(weight, -100, 0.1, 0.01, False), LossOptions(weight, -100, 0.0, 0.0, False),
        LossOptions(None, -100, 0.2, 0.0, False),
    ):  # fmt: skip
        plain, beside = (
            RowResults(*kernels.cross_entropy(rows, target, f, options, upstream, row_stats, BOTH))
            for upstream in (Upstream(g, h), Upstream(g, h, None, torch.zeros(5)))
        )
        torch.testing.assert_close(beside.grad_rows, plain.grad_rows, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(beside.grad_coefficients, plain.grad_coefficients, rtol=2e-5, atol=1e-5)


def test_ignored_rows_without_gradients_are_not_read(kernels: RowKernels) -> None:
    rows, target = torch.randn(3, 40), torch.tensor([1, -100, 2])
    f = compositions("gss")[0].kernel(rows)
    row_stats = TokenStatistics(*kernels.token_statistics(rows, target, f, -100)).row_stats
    rows[1], row_stats[:, 1] = torch.nan, torch.nan
    entropy = torch.tensor([0.5, 0.0, 1.0])
    results = kernels.cross_entropy(rows, target, f, OPTIONS, Upstream(None, None, None, entropy), row_stats, BOTH)
    grad_rows, grad_coefficients = RowResults(*results)[3:]
    assert (grad_rows[1] == 0).all() and grad_rows.isfinite().all() and grad_coefficients.isfinite().all()
    target[0] = 40  # no class
    results = kernels.cross_entropy(rows, target, f, OPTIONS, Upstream(ONE, None, None, entropy), row_stats, BOTH)
    assert RowResults(*results).grad_rows[0].isnan().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, torch.nan])
@pytest.mark.parametrize("inner", [[], [0.5, 3.0]], ids=str)
def test_a_temperature_that_is_not_positive_makes_nan(
    kernels: RowKernels, inner: list[float], temperature: float
) -> None:
    rows, target = logits(torch.float32), torch.arange(5)
    f = compositions("gss")[0].kernel(rows)._replace(inner=inner, temperature=torch.tensor(temperature))
    log_q = torch.log_softmax(rows, 1)
    found: list[Tensor] = []
    for given in (target, log_q.exp()):
        found += RowResults(*kernels.cross_entropy(rows, given, f, OPTIONS, Upstream(ONE), output_mask=BOTH))
    for kind, beta in DIVERGENCES:
        found += RowResults(
            *kernels.divergence(rows, log_q, f, Divergence(kind, beta), Upstream(ONE), output_mask=BOTH)
        )
    statistics = TokenStatistics(*kernels.token_statistics(rows, target, f, -100))
    found += [statistics.log_prob, statistics.entropy, statistics.lse]
    log_p, row_stats = kernels.log_softmax(rows, f, torch.float32)
    found += [log_p, *kernels.log_softmax_backward(log_q, rows, f, row_stats, BOTH)]
    of_entropy = Upstream(None, None, None, torch.ones(5))
    found += RowResults(*kernels.cross_entropy(rows, target, f, OPTIONS, of_entropy, statistics.row_stats, BOTH))[3:]
    for each in found:
        if each.shape != (2, 5) and each.shape != (3, 5):  # the kernel's own row_stats
            assert each.isnan().all()


def test_classes_without_a_finite_logit(kernels: RowKernels) -> None:
    """A row of -inf has no p, and +inf or NaN among the logits leaves no result a number."""
    rows = torch.randn(4, 33)
    rows[0], rows[1, 5], rows[2, 7] = -torch.inf, torch.inf, torch.nan
    f = compositions("identity")[COOLED].kernel(rows)
    log_q = torch.log_softmax(torch.randn(4, 33), 1)
    calls = [kernels.cross_entropy(rows, log_q.exp(), f, OPTIONS, Upstream(ONE), output_mask=BOTH)]
    for kind, beta in DIVERGENCES:
        calls.append(
            kernels.divergence(rows, log_q, f, Divergence(kind, beta), upstream=Upstream(ONE), output_mask=BOTH)
        )
    for call in calls:
        results = RowResults(*call)
        assert results.loss[:3].isnan().all() and results.loss[3].isfinite()
        assert results.grad_rows[:3].isnan().all(1).all() and results.grad_rows[3].isfinite().all()


@pytest.mark.parametrize("masked_in_target", [False, True])
def test_masked_classes(kernels: RowKernels, masked_in_target: bool) -> None:
    """p = 0 at logits of -inf adds nothing, whatever log q is there."""
    rows, f = torch.randn(4, 33), compositions("identity")[COOLED].kernel(torch.empty(4, 33))
    log_q = torch.log_softmax(torch.randn(4, 33), 1)
    rows[:, ::2] = -torch.inf
    if masked_in_target:
        log_q[:, ::2] = -torch.inf
    log_p = torch.log_softmax(rows.double() / COMPOSITIONS[COOLED][1], 1)
    for kind, beta in DIVERGENCES:
        results = RowResults(
            *kernels.divergence(rows, log_q, f, Divergence(kind, beta), upstream=Upstream(ONE), output_mask=BOTH)
        )
        true = row_contract.divergence_of(kind, beta, log_p, log_q.double())
        torch.testing.assert_close(results.loss.double(), true, rtol=1e-5, atol=1e-6)
        if kind != "forward_kl" or masked_in_target:
            assert (results.grad_rows[:, ::2] == 0).all() and results.grad_rows.isfinite().all()


def test_inner_of_far_logits(kernels: RowKernels) -> None:
    """The largest f is that of the largest inner(z), also where z itself is far from it."""
    rows, target = 3e4 * torch.randn(3, 400), torch.arange(3)
    f = compositions("identity")[0].kernel(rows)._replace(inner=[1e-4, 0.0])
    results = RowResults(*kernels.cross_entropy(rows, target, f, OPTIONS, upstream=Upstream(ONE), output_mask=BOTH))
    z = rows.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(1e-4 * z, target, reduction="none")
    torch.testing.assert_close(results.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
    (grad_rows,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(results.grad_rows.double(), grad_rows, rtol=1e-4, atol=1e-9)


def test_no_rows(kernels: RowKernels) -> None:
    rows, f = torch.empty(0, 9), compositions("gss")[CAPPED_AND_COOLED].kernel(torch.empty(0, 9))
    for target in (torch.empty(0, 9), torch.empty(0, dtype=torch.int64)):
        results = RowResults(*kernels.cross_entropy(rows, target, f, OPTIONS, Upstream(ONE), output_mask=BOTH))
        assert results.loss.shape == (0,) and results.grad_rows.shape == (0, 9)
        assert (results.grad_coefficients == 0).all()
    results = RowResults(
        *kernels.divergence(rows, torch.empty(0, 9), f, Divergence("jsd", 0.5), Upstream(ONE), output_mask=BOTH)
    )
    assert results.row_stats.shape == (3, 0)


def test_errors(kernels: RowKernels) -> None:
    rows, target = torch.randn(4, 9), torch.arange(4)
    log_q = torch.log_softmax(torch.randn(4, 9), 1)
    f = compositions("gss")[CAPPED_AND_COOLED].kernel(rows)
    entropy = Upstream(None, None, None, torch.ones(4))
    two, three = torch.ones(2, 4), torch.ones(3, 4)

    def gradients(target: Tensor, upstream: Upstream, row_stats: Tensor | None, f: Transform = f) -> Any:
        return kernels.cross_entropy(rows, target, f, OPTIONS, upstream, row_stats, BOTH)

    for row_stats in (two, None, torch.ones(3, 3)):
        with pytest.raises(ValueError, match="row_stats"):
            gradients(target, entropy, row_stats)
    with pytest.raises(ValueError, match="entropy needs indices"):
        gradients(log_q.exp(), entropy, three)
    with pytest.raises(ValueError, match="grad_entropy must have shape"):
        gradients(target, Upstream(None, None, None, torch.ones(3)), three)
    with pytest.raises(ValueError, match="factor"):
        kernels.cross_entropy(
            rows, target, f, OPTIONS, Upstream(ONE, None, ONE, torch.ones(4)), three, (True, False), torch.empty(4, 9)
        )
    with pytest.raises(ValueError, match="row_stats"):
        gradients(log_q.exp(), Upstream(ONE), two)
    with pytest.raises(ValueError, match="inner must be"):
        gradients(target, Upstream(ONE), None, f._replace(inner=[-1.0, 0.0]))
    with pytest.raises(ValueError, match="temperature must have shape"):
        gradients(target, Upstream(ONE), None, f._replace(temperature=torch.ones(1)))
    with pytest.raises(TypeError, match="temperature must be"):
        gradients(target, Upstream(ONE), None, f._replace(temperature=ONE.double()))
    with pytest.raises(ValueError, match="target must have shape"):
        gradients(log_q[:, :8].exp(), Upstream(ONE), None)
    with pytest.raises(ValueError, match="kind must be"):
        kernels.divergence(rows, log_q, f, Divergence("kl", 0.5))
    with pytest.raises(ValueError, match="beta must be"):
        kernels.divergence(rows, log_q, f, Divergence("jsd", 1.0))
    with pytest.raises(TypeError, match="takes float32"):
        kernels.divergence(rows, torch.ones(4, 9, dtype=torch.int64), f, Divergence("forward_kl", 0.5))
