"""The triton backend's kernels against the contract of the row kernels (tests/row_contract.py), interpreted.

On a GPU the same checks run compiled. Beyond the contract: temperatures that are none, the head whose logits are in no
memory, ways of summing, and what the kernels refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import row_contract
import torch
from losses import TRANSFORMS, disturbed
from tiers import mostly_slow
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from triton_interpreter import interpreting

from monosoftmax.groups import Divergence, Head, LossOptions, RowResults, Upstream
from monosoftmax.row_kernels import row_kernels
from monosoftmax.triton_kernels import recompute_head

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = len(row_contract.COMPOSITIONS)
#: A cap before f and a temperature after it.
EVERYTHING = COUNT - 1
OPTIONS = LossOptions(None, -100, 0.0, 0.0, True)
BOTH = (True, True)
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
KERNELS = row_kernels("triton")
#: Each row takes its time in the interpreter. The checks of divergences read five of them.
_FEW = (3, 37)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreting() if DEVICE == "cpu" else nullcontext():
        yield


def _rows(dtype: torch.dtype = FLOAT32, shape: tuple[int, int] = (5, 37)) -> Tensor:
    return row_contract.logits(dtype, shape, device=DEVICE)


def _composition(name: str, number: int = EVERYTHING) -> row_contract.Composition:
    composition = row_contract.compositions(name)[number]
    return composition._replace(module=composition.module.to(DEVICE))


def _cases(usual: set[tuple[Any, ...]], *compositions: int) -> list[Any]:
    """Each transform with each of the compositions, most of them slow."""
    cases = [(name, number) for name in TRANSFORMS for number in compositions]
    assert usual <= set(cases)
    return mostly_slow(cases, usual)


@pytest.mark.parametrize(
    ("name", "number"),
    _cases({("gss", 2), ("plif", 4), ("temperature", 1)}, *range(COUNT)),
)
def test_composition(name: str, number: int) -> None:
    row_contract.check_composition(KERNELS, _rows(shape=_FEW), _composition(name, number))


@pytest.mark.parametrize(("name", "number"), _cases({("plif", 4)}, 0, EVERYTHING))
def test_entropy_gradient(name: str, number: int) -> None:
    row_contract.check_entropy_gradient(KERNELS, _rows(shape=_FEW), _composition(name, number))


@pytest.mark.parametrize(("name", "number"), _cases({("gss", 1)}, 0, 1, EVERYTHING))
def test_shards(name: str, number: int) -> None:
    row_contract.check_shards(KERNELS, _rows(), _composition(name, number))


@pytest.mark.parametrize(("name", "number"), _cases({("identity", 1)}, 1, EVERYTHING))
def test_smoothed_shards(name: str, number: int) -> None:
    row_contract.check_smoothed_shards(KERNELS, _rows(shape=_FEW), _composition(name, number))


@pytest.mark.parametrize("log_dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("name", "number"), _cases(set(), 0, EVERYTHING))
def test_divergence(name: str, number: int, log_dtype: torch.dtype) -> None:
    row_contract.check_divergence(KERNELS, _rows(), _composition(name, number), log_dtype=log_dtype)


@pytest.mark.parametrize(("name", "number"), _cases({("identity", 0)}, 0, EVERYTHING))
def test_probabilities(name: str, number: int) -> None:
    row_contract.check_probabilities(KERNELS, _rows(), _composition(name, number))


#: More than a tile of 256 lanes, which are 1024 columns of float32 and 2048 in half precision, and half of one.
_LONG = {FLOAT32: (5, 1301), BFLOAT16: (5, 2700), FLOAT16: (5, 2700)}
_ENTROPY, _DIVERGENCE = "check_entropy_gradient", "check_divergence"
_TYPES = [
    (check, name, dtype)
    for check in ("check_composition", _ENTROPY, _DIVERGENCE, "check_probabilities", "check_shards")
    for name in ("identity", "soft_cap", "plif", "monotonic_mlp")
    for dtype in _LONG
]


@pytest.mark.parametrize(
    ("check", "name", "dtype"),
    mostly_slow(_TYPES, {(_ENTROPY, "soft_cap", BFLOAT16), (_DIVERGENCE, "identity", FLOAT32)}),
)
def test_rows_of_several_tiles_of_any_type(check: str, name: str, dtype: torch.dtype) -> None:
    options = {"log_dtype": BFLOAT16} if check == _DIVERGENCE else {}
    getattr(row_contract, check)(KERNELS, _rows(dtype, _LONG[dtype]), _composition(name), **options)


@pytest.mark.parametrize("name", mostly_slow(["identity", "sigmoid_cap", "plif", "spline"], ["identity"]))
@pytest.mark.parametrize("temperature", mostly_slow([0.0, -1.0, torch.nan], [0.0]))
def test_a_temperature_that_is_none_makes_every_result_nan(name: str, temperature: float) -> None:
    rows, f = _rows(), _composition(name).kernel(_rows())
    f = f._replace(temperature=torch.tensor(temperature, device=DEVICE))
    target, one = torch.arange(len(rows), device=DEVICE), Upstream(torch.ones((), device=DEVICE))
    of_indices = KERNELS.cross_entropy(rows, target, f, OPTIONS, one, output_mask=BOTH)
    divergence = KERNELS.divergence(rows, rows.clone(), f, Divergence("jsd", 0.5), one, output_mask=BOTH)
    statistics = KERNELS.token_statistics(rows, target, f, -100)
    log_p, _ = KERNELS.log_softmax(rows, f, torch.float32)
    results = [each for found in (of_indices, divergence) for each in (found.loss, found.lse, found.grad_rows)]
    for each in (*results, statistics.log_prob, statistics.entropy, statistics.lse, log_p):
        assert each.isnan().all()
    for found in (of_indices, divergence):
        # No logit lies in some pieces of a table.
        assert f.coefficients.numel() == 0 or found.grad_coefficients.isnan().any()


@pytest.mark.parametrize(("name", "number"), _cases({("identity", 2), ("plif", 4)}, 2, 3, 4))
def test_the_recomputed_head_is_composed_too(name: str, number: int) -> None:
    generator = torch.Generator().manual_seed(0)
    input, weight = (torch.randn(n, 16, generator=generator).to(DEVICE) for n in (5, 37))
    composition, target = _composition(name, number), row_contract.targets(input.new_empty(5, 37))
    options = LossOptions(None, -100, 0.1, 1e-2, True)
    upstream, f = Upstream(torch.full((), 0.25, device=DEVICE)), composition.kernel(input)
    loss, lse, _, found = recompute_head.linear_cross_entropy(
        Head(input, weight, None), target, f, options, upstream, output_mask=(True, True, False, True)
    )
    leaves = [input.double(), weight.double(), f.coefficients.double()]
    leaves = [each.requires_grad_() for each in leaves]
    y = composition.of(leaves[0] @ leaves[1].t(), leaves[2])
    log_p, true_lse, kept = torch.log_softmax(y, 1), torch.logsumexp(y, 1), target != -100
    picked = log_p.gather(1, target.clamp_min(0)[:, None])[:, 0]
    truth = torch.where(kept, -0.9 * picked - 0.1 * log_p.mean(1) + 1e-2 * true_lse.square(), 0.0)
    gradients = torch.autograd.grad(0.25 * truth.sum(), leaves, allow_unused=True)
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse.detach(), rtol=1e-5, atol=1e-5)
    of_head = (found.input, found.linear_weight, found.coefficients)
    for got, true in zip(of_head, gradients, strict=True):
        wanted = torch.zeros_like(got, dtype=torch.float64) if true is None else true
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deterministic", mostly_slow([False, True], [True]))
@pytest.mark.parametrize("pieces", mostly_slow([1, 300], [300]))
def test_every_way_of_summing_in_place(pieces: int, deterministic: bool) -> None:
    """The contributions are those of the logits, also where the gradient takes the place of these."""
    module = disturbed("plif", num_pieces=pieces).to(DEVICE)
    f = row_contract.Composition(module, [0.5, 3.0], 1.6).kernel(_rows())
    target, log_q, one = row_contract.targets(_rows()), _rows().log_softmax(1), Upstream(torch.ones((), device=DEVICE))
    q = log_q.exp()

    def calls(into: bool, row_stats: Tensor | None) -> Iterator[RowResults]:
        for call in (
            lambda rows, **last: KERNELS.cross_entropy(rows, target, f, OPTIONS, one, row_stats, BOTH, **last),
            lambda rows, **last: KERNELS.cross_entropy(rows, q, f, OPTIONS, one, row_stats, BOTH, **last),
            lambda rows, **last: KERNELS.divergence(
                rows, log_q, f, Divergence("jsd", 0.3), one, row_stats, BOTH, **last
            ),
        ):
            rows = _rows()
            yield call(rows, grad_rows=rows) if into else call(rows)

    wanted = list(calls(False, None))
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = list(calls(True, None))
    finally:
        torch.use_deterministic_algorithms(False)
    for got, true in zip(found, wanted, strict=True):
        assert torch.equal(got.loss, true.loss) and torch.equal(got.grad_rows, true.grad_rows)
        torch.testing.assert_close(got.grad_coefficients, true.grad_coefficients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["probabilities", "jsd"])
def test_a_factor_of_the_loss(kind: str) -> None:
    """1 leaves the gradient alone; else it is computed again, for the product. A divergence does not read it."""
    rows, f = _rows(), _composition("gss").kernel(_rows())
    q = rows.roll(1, 0).softmax(1)

    def call(upstream: Upstream, **last: Any) -> RowResults:
        if kind == "jsd":
            return KERNELS.divergence(rows, q.log(), f, Divergence(kind, 0.5), upstream, **last)
        return KERNELS.cross_entropy(rows, q, f, OPTIONS, upstream, **last)

    ahead = call(Upstream(torch.full((), 0.3, device=DEVICE)), output_mask=(True, False))
    for factor in (1.0, 2.0):
        into = torch.full_like(rows, 5.0)
        upstream = Upstream(torch.full((), 0.3, device=DEVICE), factor=torch.full((), factor, device=DEVICE))
        call(upstream, row_stats=ahead.row_stats, output_mask=(True, False), grad_rows=into)
        if kind == "jsd":
            assert torch.equal(into, ahead.grad_rows)
        else:
            assert (into == 5.0).all() if factor == 1 else torch.equal(into, factor * ahead.grad_rows)


def test_an_ignored_row_without_a_gradient_is_not_read() -> None:
    rows, f = _rows().clone(), _composition("plif").kernel(_rows())
    target, e = row_contract.targets(rows), torch.ones(len(rows), device=DEVICE)
    row_stats = KERNELS.token_statistics(rows, target, f, -100).row_stats
    e[-1] = 0
    rows[-1], row_stats[:, -1] = torch.nan, torch.nan
    found = KERNELS.cross_entropy(rows, target, f, OPTIONS, Upstream(None, None, None, e), row_stats, BOTH)
    assert found.grad_rows.isfinite().all() and found.grad_coefficients.isfinite().all()
    assert not found.grad_rows[-1].any() and found.grad_rows[:-1].any()


def test_a_steep_f_leaves_a_logit_of_minus_infinity_without_entropy() -> None:
    """The gradient kernels raise it to -1e30, but the scale makes -inf of that again."""
    rows = _rows().clone()
    rows[:, ::2] = -torch.inf
    f = _composition("identity", 0).kernel(rows)._replace(inner=[1e9, 0.0])
    target, e = row_contract.targets(rows), torch.ones(len(rows), device=DEVICE)
    row_stats = KERNELS.token_statistics(rows / 1e9, target, f, -100).row_stats
    upstream = Upstream(None, None, None, e)
    found = KERNELS.cross_entropy(rows / 1e9, target, f, OPTIONS, upstream, row_stats, (True, False))
    assert found.grad_rows.isfinite().all() and found.grad_rows.any()


def test_what_is_refused() -> None:
    rows, f = _rows(), _composition("gss").kernel(_rows())
    target, e = row_contract.targets(rows), torch.ones(len(rows), device=DEVICE)
    two = KERNELS.cross_entropy(rows, target, f, OPTIONS).row_stats
    entropy = Upstream(e, None, None, e)
    for row_stats in (None, two):
        with pytest.raises(ValueError, match=r"monosoftmax: .* entropy needs the row_stats of token_statistics"):
            KERNELS.cross_entropy(rows, target, f, OPTIONS, entropy, row_stats, BOTH)
    with pytest.raises(ValueError, match=r"monosoftmax: .* entropy needs indices as the target"):
        KERNELS.cross_entropy(rows, rows.softmax(1), f, OPTIONS, entropy, torch.cat((two, two[:1])), BOTH)
    with pytest.raises(ValueError, match=r"monosoftmax: .* needs the row_stats \[3, N\]"):
        KERNELS.cross_entropy(rows, rows.softmax(1), f, OPTIONS, Upstream(e), two, BOTH)
    with pytest.raises(ValueError, match="monosoftmax: gradients need a scale"):
        KERNELS.divergence(rows, rows, f, Divergence("jsd", 0.5), output_mask=BOTH)
    with pytest.raises(ValueError, match="monosoftmax: kind='kl' is none of"):
        KERNELS.divergence(rows, rows, f, Divergence("kl", 0.5))
    head = Head(rows[:, :16], torch.ones(37, 16, device=DEVICE), None)
    with pytest.raises(ValueError, match=r"monosoftmax: .* entropy needs logits in memory"):
        recompute_head.linear_cross_entropy(
            head, target, f, OPTIONS, entropy, two, output_mask=(True, False, False, False)
        )


def test_no_rows() -> None:
    rows, f = _rows()[:0], _composition("plif").kernel(_rows())
    scale = Upstream(torch.ones((), device=DEVICE))
    statistics = KERNELS.token_statistics(rows, torch.empty(0, dtype=torch.int64, device=DEVICE), f, -100)
    assert statistics.row_stats.shape == (3, 0)
    found = KERNELS.divergence(rows, rows, f, Divergence("forward_kl", 0.5), scale, output_mask=BOTH)
    assert found.loss.shape == (0,) and found.row_stats.shape == (3, 0) and found.grad_rows.shape == rows.shape
    assert not found.grad_coefficients.any()
