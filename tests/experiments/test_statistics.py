"""Paired comparisons: against closed forms, enumerations and known coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.engine.statistics import Difference, holm, mean_and_spread, over_documents, over_seeds


def test_over_seeds_is_students_interval_and_paired_test() -> None:
    one, other = [1.0, 2.0, 4.0, 3.0, 5.0], [0.5, 2.5, 3.0, 2.0, 4.5]
    differences = np.subtract(one, other)
    found = over_seeds(one, other)
    half = stats.t.ppf(0.975, 4) * differences.std(ddof=1) / math.sqrt(5)
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    # An interval that holds 0 is one whose test does not reject, and the other way round.
    assert found.significant == (not found.low <= 0 <= found.high)


def test_over_seeds_is_paired() -> None:
    rng = np.random.default_rng(0)
    other = rng.normal(size=5) * 100
    one = other + 0.1 + rng.normal(size=5) * 0.01
    assert over_seeds(one.tolist(), other.tolist()).significant


@pytest.mark.parametrize(("difference", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_over_seeds_without_spread(difference: float, p: float) -> None:
    found = over_seeds([1.0 + difference, 2.0 + difference], [1.0, 2.0])
    assert (found.mean, found.low, found.high, found.p) == (difference, difference, difference, p)


def test_over_documents_weighs_by_tokens() -> None:
    found = over_documents([10.0, 300.0, 21.0], [11.0, 290.0, 20.0], [10, 100, 20])
    assert found.mean == pytest.approx((-1 + 10 + 1) / 130)
    # Of the 8 choices of signs of (-1, 10, 1), 6 have a sum of absolute value >= 10.
    assert found.p == pytest.approx(0.75)
    # The extremes that resampling can reach: one document three times.
    assert -0.1 <= found.low <= found.mean <= found.high <= 0.1
    assert found == over_documents([10.0, 300.0, 21.0], [11.0, 290.0, 20.0], [10, 100, 20])


def test_over_documents_has_the_coverage_that_it_says() -> None:
    rng = np.random.default_rng(1)
    trials, held, rejected = 60, 0, 0
    for _ in range(trials):
        tokens = rng.integers(20, 60, size=60)
        other = rng.normal(4 * tokens, 10)
        one = other + rng.normal(0, 3, size=60)
        found = over_documents(one.tolist(), other.tolist(), tokens.tolist())
        held += found.low <= 0 <= found.high
        rejected += found.significant
    assert held >= 0.85 * trials
    assert rejected <= 0.15 * trials


def test_describe_says_whether_it_is_significant() -> None:
    lower = Difference(-0.01, -0.02, -0.004, 0.0002, 5)
    assert lower.describe() == "-0.0100 nats [-0.0200, -0.0040], p < 0.001, significant"
    assert (-lower).describe("") == "+0.0100 [+0.0040, +0.0200], p < 0.001, significant"
    assert Difference(0.01, -0.02, 0.04, 0.31, 5).describe().endswith("p = 0.310, not significant")


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_spread([1.25]) == "1.250"


def test_holm() -> None:
    # Holm 1979: the least p times 4, the next times 3, ..., never less than the one before.
    for found, adjusted in (([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]), ([0.9, 0.8], [1.0, 1.0])):
        differences = holm({p: Difference(p, 0, 1, p, 5) for p in found})
        assert [*differences] == [each.mean for each in differences.values()] == found
        assert [each.p for each in differences.values()] == pytest.approx(adjusted)


@pytest.mark.parametrize("function", [lambda a, b: over_seeds(a, b), lambda a, b: over_documents(a, b, [1] * len(a))])
@pytest.mark.parametrize(("one", "other", "message"), [([1.0], [2.0], "two pairs"), ([1.0, 2.0], [1.0], "as many")])
def test_errors(function, one: list[float], other: list[float], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        function(one, other)
    with pytest.raises(ValueError, match="each of the 2 documents, got 1"):
        over_documents([1.0, 2.0], [1.0, 3.0], [5])
