"""Paired comparisons: what one method gains over another on the same seeds, or on the same documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

#: Share of the intervals that would hold the true value, and the largest p that is called significant.
CONFIDENCE = 0.95
SIGNIFICANCE = 1 - CONFIDENCE
_RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """A mean difference with its interval (``CONFIDENCE``), p of no difference, and the number of pairs."""

    mean: float
    low: float
    high: float
    p: float
    pairs: int

    @property
    def significant(self) -> bool:
        return self.p < SIGNIFICANCE

    def __neg__(self) -> Difference:
        """The other way round: a gain for a difference of losses."""
        return replace(self, mean=-self.mean, low=-self.high, high=-self.low)

    def describe(self, unit: str = " nats") -> str:
        """Like ``-0.0120 nats [-0.0200, -0.0040], p = 0.003, significant``."""
        verdict = "significant" if self.significant else "not significant"
        return f"{self.mean:+.4f}{unit} [{self.low:+.4f}, {self.high:+.4f}], {p_value(self.p)}, {verdict}"


def p_value(p: float) -> str:
    """``p = 0.012``, or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def over_seeds(one: Sequence[float], other: Sequence[float]) -> Difference:
    """``one`` minus ``other``, both by the same seeds: Student's interval and the paired t test.

    Where all differences are equal there is nothing to test with: p is 1 for 0, else 0.
    """
    differences = _differences(one, other)
    mean, error = float(differences.mean()), float(stats.sem(differences))
    if error == 0:
        return Difference(mean, mean, mean, float(mean == 0), len(differences))
    low, high = stats.t.interval(CONFIDENCE, len(differences) - 1, loc=mean, scale=error)
    p = stats.ttest_rel(one, other).pvalue
    return Difference(mean, float(low), float(high), float(p), len(differences))


def over_documents(one: Sequence[float], other: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Difference:
    """Mean difference per token of two methods' losses on the same documents: percentile bootstrap and sign flips.

    ``one`` and ``other`` are sums of the losses of each document, ``seed`` is that of the resamples. Documents, not
    tokens, are drawn: the tokens of a document are not independent of each other.
    """
    differences = _differences(one, other)
    counts = np.asarray(tokens, dtype=np.float64)
    if len(counts) != len(differences):
        raise ValueError(f"tokens must have a number for each of the {len(differences)} documents, got {len(counts)}")
    mean = float(differences.sum() / counts.sum())

    def per_token(difference: np.ndarray, count: np.ndarray, axis: int = -1) -> np.ndarray:
        return difference.sum(axis) / count.sum(axis)

    interval = stats.bootstrap(
        (differences, counts),
        per_token,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    test = stats.permutation_test(
        (differences,),
        lambda flipped, axis=-1: flipped.sum(axis) / counts.sum(),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(differences))


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """``1.234 ± 0.012``: mean and standard deviation; the value alone where there is only one."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {float(np.std(values, ddof=1)):.{digits}f}"


def holm(differences: Mapping[Any, Difference]) -> dict[Any, Difference]:
    """The same with every p adjusted for as many comparisons, by Holm's method."""
    p_values = [each.p for each in differences.values()]
    order = np.argsort(p_values)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return {name: replace(each, p=p) for (name, each), p in zip(differences.items(), adjusted, strict=True)}


def _differences(one: Sequence[float], other: Sequence[float]) -> np.ndarray:
    if len(one) != len(other):
        raise ValueError(f"both methods must have as many values, got {len(one)} and {len(other)}")
    if len(one) < 2:
        raise ValueError(f"a paired comparison needs at least two pairs, got {len(one)}")
    return np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
