"""The contract of the row kernels (tests/row_contract.py) on the cpu backend: its values, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import row_contract
import torch
from losses import SOME_TRANSFORMS, TRANSFORMS
from row_contract import COMPOSITIONS, DIVERGENCES, compositions, logits, targets
from tiers import mostly_slow

from monosoftmax.groups import Divergence, LossOptions, RowResults, TokenStatistics, Transform, Upstream
from monosoftmax.row_kernels import row_kernels

CHECKS: dict[str, Callable[..., None]] = {
    "composition": row_contract.check_composition,
    "entropy": row_contract.check_entropy_gradient,
    "probabilities": row_contract.check_probabilities,
    "shards": row_contract.check_shards,
    "smoothed shards": row_contract.check_smoothed_shards,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
#: Less than a tile of columns, and several of them.
SHAPES = [(5, 77), (5, 2500)]
#: Of COMPOSITIONS. The usual ones are a scale without a cap, and everything together.
NUMBERS = mostly_slow(range(len(COMPOSITIONS)), [2, 4])
PLAIN = LossOptions(None, -100, 0.0, 0.0, True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_values(name: str, number: int, dtype: torch.dtype, shape: tuple[int, int], check: str) -> None:
    CHECKS[check](row_kernels("cpu"), logits(dtype, shape), compositions(name)[number])


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("log_dtype", DTYPES)
def test_divergence(name: str, number: int, dtype: torch.dtype, shape: tuple[int, int], log_dtype: torch.dtype) -> None:
    row_contract.check_divergence(
        row_kernels("cpu"), logits(dtype, shape), compositions(name)[number], log_dtype=log_dtype
    )


@pytest.mark.parametrize("name", mostly_slow(TRANSFORMS, SOME_TRANSFORMS))
@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, [torch.float64]))
def test_columns_are_shared(name: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Five rows among six threads: the columns of each are shared."""
    threads(6)
    kernels, composition = row_kernels("cpu"), compositions(name)[-1]
    rows = logits(dtype, (5, 8200))
    for check in CHECKS.values():
        check(kernels, rows, composition)
    row_contract.check_divergence(kernels, rows, composition, log_dtype=dtype)


def _transform(rows: torch.Tensor, inner: list[float] | None = None, temperature: Any = None) -> Transform:
    return Transform(rows.new_empty(0, dtype=torch.float32), "identity", [], inner or [], temperature)


def _divergence(*args: Any, **kwargs: Any) -> RowResults:
    return RowResults(*row_kernels("cpu").divergence(*args, **kwargs))


@pytest.mark.parametrize("temperature", [0.0, -0.0, -1.0, float("nan"), float("-inf")])
def test_a_temperature_that_is_not_positive_makes_all_results_nan(temperature: float) -> None:
    kernels, rows = row_kernels("cpu"), logits(torch.float32)
    target = targets(rows).clamp_min(0)
    f = _transform(rows, temperature=torch.tensor(temperature))
    one = torch.tensor(1.0)
    by_index = kernels.cross_entropy(rows, target, f, PLAIN, Upstream(one), output_mask=(True, False))
    of_all = kernels.cross_entropy(rows, rows.softmax(1), f, PLAIN, Upstream(one), output_mask=(True, False))
    found = TokenStatistics(*kernels.token_statistics(rows, target, f, -100))
    results = [by_index, of_all]
    for kind, beta in DIVERGENCES:
        results.append(
            kernels.divergence(
                rows, rows.log_softmax(1), f, Divergence(kind, beta), Upstream(one), output_mask=(True, False)
            )
        )
    log_p, _ = kernels.log_softmax(rows, f, torch.float32)
    for each in (*(r for loss, lse, _, grad, _ in results for r in (loss, lse, grad)), log_p):
        assert bool(each.isnan().all())
    for each in (found.log_prob, found.entropy, found.lse):
        assert bool(each.isnan().all())


@pytest.mark.parametrize(("kind", "beta"), DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [[], [0.5, 0.0], [0.5, 3.0]])
def test_divergence_of_masked_logits(kind: str, beta: float, dtype: torch.dtype, inner: list[float]) -> None:
    """A logit of -inf where q is 0 adds nothing; where p and q are the same, the divergence is 0."""
    kernels, rows = row_kernels("cpu"), logits(dtype, (5, 1100))
    rows[:, 1::2] = -torch.inf
    coefficients = rows.new_empty(0)
    f = Transform(coefficients, "identity", [], inner, rows.new_tensor(0.5))
    log_p, _ = kernels.log_softmax(rows, f, dtype)
    g = torch.ones(5, dtype=dtype)
    same = _divergence(rows, log_p, f, Divergence(kind, beta), Upstream(g), output_mask=(True, False))
    eps = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(same.loss, torch.zeros_like(g), rtol=0, atol=eps)
    torch.testing.assert_close(same.grad_rows, torch.zeros_like(rows), rtol=0, atol=eps)
    other = log_p.roll(2, 1)
    found = _divergence(rows, other, f, Divergence(kind, beta), Upstream(g), output_mask=(True, False))
    assert bool(found.loss.isfinite().all() and found.grad_rows.isfinite().all())
    true = row_contract.divergence_of(kind, beta, log_p.double(), other.double())
    torch.testing.assert_close(found.loss.double(), true, rtol=20 * eps, atol=eps)
    if inner[1:] != [3.0]:
        assert not found.grad_rows[:, 1::2].any()


@pytest.mark.parametrize(("kind", "beta"), DIVERGENCES)
def test_nan_and_infinity_reach_the_divergence(kind: str, beta: float) -> None:
    rows = logits(torch.float32)
    f, log_q = _transform(rows), logits(torch.float32, seed=3).log_softmax(1)
    rows[0, 5] = torch.nan
    log_q[1, 6] = torch.nan
    rows[2] = -torch.inf
    rows[3, 7] = -torch.inf  # q > 0 = p
    loss = _divergence(rows, log_q, f, Divergence(kind, beta)).loss
    assert bool(loss[:3].isnan().all())
    assert loss[3].isinf() if kind == "forward_kl" else loss[3].isfinite()


def test_refusals() -> None:
    kernels, rows = row_kernels("cpu"), logits(torch.float32)
    target, log_q = targets(rows), rows.log_softmax(1)
    f, e = _transform(rows), torch.ones(len(rows))
    stats = TokenStatistics(*kernels.token_statistics(rows, target, f, -100)).row_stats

    def loss(transform: Transform = f, target: torch.Tensor = target, upstream: Any = None, **more: Any) -> None:
        kernels.cross_entropy(rows, target, transform, PLAIN, upstream, **more)

    entropy = Upstream(None, None, None, e)
    wanted = {"output_mask": (True, False)}
    for error, message, call in (
        (ValueError, "temperature must have shape", lambda: loss(_transform(rows, temperature=torch.ones(1)))),
        (TypeError, "temperature must be", lambda: loss(_transform(rows, temperature=torch.tensor(1.0).double()))),
        (ValueError, "inner must be empty", lambda: loss(_transform(rows, [0.0, 1.0]))),
        (ValueError, "inner must be empty", lambda: loss(_transform(rows, [1.0, -1.0]))),
        (ValueError, "inner must be empty", lambda: loss(_transform(rows, [1.0]))),
        (ValueError, "needs the row_stats", lambda: loss(upstream=entropy, **wanted)),
        (ValueError, "needs the row_stats", lambda: loss(upstream=entropy, row_stats=stats[:2], **wanted)),
        (ValueError, "needs a target of class indices",
         lambda: loss(target=rows.softmax(1), upstream=entropy, row_stats=stats, **wanted)),
        (ValueError, "grad_entropy must have shape",
         lambda: loss(upstream=Upstream(None, None, None, e[:1]), row_stats=stats, **wanted)),
        (ValueError, "row_stats must have shape", lambda: loss(upstream=Upstream(e), row_stats=stats[:1], **wanted)),
        (ValueError, "kind must be", lambda: kernels.divergence(rows, log_q, f, Divergence("kl", 0.5))),
        (ValueError, "beta must be", lambda: kernels.divergence(rows, log_q, f, Divergence("jsd", 0.0))),
        (ValueError, "beta must be", lambda: kernels.divergence(rows, log_q, f, Divergence("jsd", 1.0))),
        (ValueError, "beta must be", lambda: kernels.divergence(rows, log_q, f, Divergence("jsd", float("nan")))),
        (ValueError, "log_target must have shape",
         lambda: kernels.divergence(rows, log_q[:2], f, Divergence("jsd", 0.5))),
        (TypeError, "not supported", lambda: kernels.divergence(rows, log_q.int(), f, Divergence("jsd", 0.5))),
        (ValueError, "need a scale",
         lambda: kernels.divergence(rows, log_q, f, Divergence("jsd", 0.5), None, None, (True, False))),
        (ValueError, "row_stats must have shape",
         lambda: kernels.divergence(rows, log_q, f, Divergence("jsd", 0.5), Upstream(e), stats[:2], (True, False))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_beta_is_not_read_for_a_kl() -> None:
    rows = logits(torch.float32)
    f, log_q = _transform(rows), logits(torch.float32, seed=3).log_softmax(1)
    for kind in ("forward_kl", "reverse_kl"):
        one, other = (_divergence(rows, log_q, f, Divergence(kind, beta)).loss for beta in (0.5, 7.0))
        assert torch.equal(one, other)


def test_no_rows() -> None:
    kernels, rows = row_kernels("cpu"), torch.empty(0, 7)
    f = _transform(rows)
    results = kernels.divergence(rows, rows, f, Divergence("jsd", 0.5), Upstream(torch.tensor(1.0)), None, (True, True))
    assert [list(each.shape) for each in results] == [[0], [0], [3, 0], [0, 7], [0]]
    assert TokenStatistics(
        *kernels.token_statistics(rows, torch.empty(0, dtype=torch.int64), f, -100)
    ).row_stats.shape == (3, 0)


def test_argmax_and_rank_are_by_logits() -> None:
    """Also where inner maps different logits to one value."""
    kernels, rows = row_kernels("cpu"), torch.tensor([[50.0, 60.0, 70.0, 65.0]])
    f = _transform(rows, [1.0, 2.0], torch.tensor(0.5))
    found = TokenStatistics(*kernels.token_statistics(rows, torch.tensor([3]), f, -100))
    assert (found.argmax.item(), found.rank.item()) == (2, 1)
