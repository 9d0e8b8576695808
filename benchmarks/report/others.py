"""What ranks, the trained model and the measured costs say about the claims."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, ClassVar

from scipy import stats

from ..engine.experiment import Results
from ..engine.statistics import SIGNIFICANCE, Difference, p_value
from ..experiments.posthoc import results as fitted
from ..experiments.rank.report import of_seeds
from ..experiments.rank.settings import METHODS
from ..overhead import results as measured

_TOLERANCE = "0.0001"


class RankEvidence:
    """Effective ranks at 0.0001: see :mod:`benchmarks.experiments.rank`, which is complete."""

    DIMS = (16, 64)
    RANDOM = ("linear", "sigsoftmax", "sigmoidcap", "plif-20", "plif-50", "plif-1000", "plif-100000")

    def __init__(self, results: Results) -> None:
        self._results = results

    def random(self, dim: int, name: str) -> list[int]:
        """Of random factors of ``dim`` features, by seed."""
        return [run["ranks"][_TOLERANCE] for run in of_seeds(self._results, f"random-d{dim}", name)]

    def press(self, name: str) -> list[int]:
        """The numerical rank that published tables have, of random factors of the first of ``DIMS``."""
        return [run["press"]["float64"] for run in of_seeds(self._results, f"random-d{self.DIMS[0]}", name)]

    def trained(self) -> Iterator[tuple[str, list[int], list[int]]]:
        """Trained heads of the synthetic experiment: the method, ranks before and after f by seed. Not of mixtures."""
        for name in METHODS:
            runs = of_seeds(self._results, "synthetic", name)
            if runs[0]["before"] is not None:
                before, after = ([run[when]["ranks"][_TOLERANCE] for run in runs] for when in ("before", "after"))
                yield name, before, after


class PosthocEvidence:
    """f put on a trained model: see :mod:`benchmarks.experiments.posthoc.results`, of all results."""

    def __init__(self, results: Results) -> None:
        self._results = results
        #: Test loss of a token of one transform minus that of another, over documents.
        self.difference = cache(partial(fitted.alone_difference, results))

    def figures(self, name: str) -> dict[str, Any]:
        """Of a transform that was fitted alone."""
        return fitted.fitted_alone(self._results)[name].figures

    def best(self) -> str:
        """The transform with the lowest validation loss that is neither the identity nor a temperature."""
        return fitted.best_alone(self._results)

    def heads(self) -> Iterator[tuple[str, Difference, int]]:
        """Of f and head trained together: the transform, its loss minus that of the head alone, and how many seeds."""
        roles = fitted.head_roles(self._results)
        for role in ("temperature", "best PLIF", "best other"):
            difference, seeds = fitted.head_difference(self._results, roles[role], roles["linear"])
            yield roles[role], difference, len(seeds)


def correlation(measured: dict[str, tuple[float, float]]) -> str:
    """How ranks go with KL, by layer: (rank, KL) of each."""
    statistic, p = spearman(measured)
    by_rank, best = sorted(measured, key=lambda name: measured[name][0]), min(measured, key=lambda n: measured[n][1])
    highest = next(name for name in measured if measured[name][0] == measured[by_rank[-1]][0])
    return (
        f"Rank and KL over these {len(measured)} layers: Spearman's correlation of the effective rank at {_TOLERANCE} "
        f"with KL is {statistic:+.2f} ({p_value(p)}, {'significant' if p < SIGNIFICANCE else 'not significant'}; "
        "negative: higher rank goes with lower KL; p takes the layers for independent). Lowest KL: "
        f"{best} (rank {measured[best][0]:.0f}); highest rank: {highest} ({measured[highest][0]:.0f}); lowest rank: "
        f"{by_rank[0]} ({measured[by_rank[0]][0]:.0f})."
    )


def spearman(measured: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Spearman's correlation of ranks with losses, and its p."""
    ranks, losses = zip(*measured.values(), strict=True)
    found = stats.spearmanr(ranks, losses)
    return float(found.statistic), float(found.pvalue)


class CostEvidence:
    """Times of the fused loss and head on a CPU: see :mod:`benchmarks.overhead.results`."""

    HEAD, LOSS, MIXTURE = (unit.partition("/")[2] for unit in (measured.HEAD, measured.LOGITS, measured.MIXTURES))
    #: Contestants, and the names that the report has for them.
    LOSSES: ClassVar = {
        "temperature": "temperature",
        "plif-64": "plif",
        "gss": "gss",
        "soft_cap": "softcap",
        "sigmoid_cap": "sigmoidcap",
        "monotonic_mlp": "mlp",
        "spline": "spline",
    }

    def __init__(self, results: Results) -> None:
        self._results = results

    def head(self, other: str = "identity fused") -> float:
        """Time of the head with PLIF over that of ``other``, by default the head without f."""
        return measured.ratio(self._results, measured.HEAD, "plif-64 fused", other)

    def loss(self, name: str, other: str = "identity fused") -> float:
        """Time of the fused loss with f over that of ``other``, by default the loss without f."""
        return measured.ratio(self._results, measured.LOGITS, f"{name} fused", other)

    def mixture(self, form: str) -> float:
        """Time of a head with 15 softmaxes, ``fair`` or ``published``, over that of one with PLIF."""
        return measured.ratio(self._results, measured.MIXTURES, f"mos-15 {form}", "plif-64 fused")
