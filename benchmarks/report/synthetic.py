"""What the synthetic experiment says about the claims."""

from __future__ import annotations

import math
import statistics
from functools import cache
from typing import Any

import torch

from ..engine.experiment import ExperimentError, Results
from ..engine.statistics import Difference, holm
from ..experiments.synthetic.methods import METHODS
from ..experiments.synthetic.report import Found
from ..experiments.synthetic.settings import GRID, MAIN, Cell
from .words import better, count_better

#: Methods that are no learned f: what gains are measured against, and published settings.
_NOT_LEARNED = ("linear", "temperature", "published-sgd", "published-adam")


class SyntheticEvidence:
    """Figures of the synthetic experiment, which is complete; those of a method without a cell are of the main one."""

    FIXED = ("sigsoftmax", "gss-published", "softcap", "sigmoidcap")
    IN_GRID = ("plif", "sigmoidcap-learned", "mlp")
    #: What the paper's experiment promises for f, and what is held against it.
    WANTED_KL, WANTED_MODES = 1.05, 0.9

    def __init__(self, results: Results) -> None:
        self._results = results
        self.difference = cache(self._difference)

    def values(self, method: str, figure: str, cell: Cell = MAIN) -> list[Any]:
        """A figure of the trainings that did not diverge, by seed."""
        return Found(self._results, cell, METHODS).values(method, figure)

    def mean(self, method: str, figure: str, cell: Cell = MAIN) -> float:
        """Mean over seeds of ``kl``, ``modes`` or ``top5``."""
        return statistics.mean(self.values(method, figure, cell))

    def rank(self, method: str) -> float:
        """Mean over seeds of the effective rank of log Q at 0.0001."""
        return statistics.mean(ranks["0.0001"] for ranks in self.values(method, "ranks"))

    def _difference(self, one: str, other: str, cell: Cell = MAIN) -> Difference:
        """KL of ``one`` minus that of ``other``, paired by seeds."""
        found = Found(self._results, cell, METHODS).difference(one, other)
        if found is None:
            raise ExperimentError(f"{one} or {other} diverged in {cell.name} under all seeds but one")
        return found

    def learned(self) -> list[str]:
        """The methods with a learned f."""
        return [
            name
            for name, method in METHODS.items()
            if name not in _NOT_LEARNED and method.transform is not None and not method.frozen
            if any(True for _ in method.transform(torch.Generator().manual_seed(0)).parameters())
        ]

    def best_learned(self) -> str:
        """The learned f with the lowest KL of its search, on a problem that no reported figure is from."""
        tried = {name: self._results.matching(f"{MAIN.name}/{name}/search-*") for name in self.learned()}
        return min(tried, key=lambda name: min(each.figures.get("kl", math.inf) for each in tried[name]))

    def by_kl(self) -> list[str]:
        """The learned functions, the lowest KL first."""
        return sorted(self.learned(), key=lambda name: self.mean(name, "kl"))

    def level_with_best(self) -> list[str]:
        """Those of :meth:`by_kl` that do not differ significantly from the first."""
        best, *others = self.by_kl()
        return [name for name in others if not self.difference(best, name).significant]

    def useful_fixed(self) -> list[str]:
        """The functions without parameters that are significantly better than none."""
        return [name for name in self.FIXED if better(self.difference(name, "linear"))]

    def reached(self) -> list[str]:
        """The learned functions with the wanted KL and share of modes."""
        return [
            name
            for name in self.learned()
            if self.mean(name, "kl") <= self.WANTED_KL and self.mean(name, "modes") >= self.WANTED_MODES
        ]

    def grid(self, method: str) -> dict[Cell, Difference]:
        """KL minus that of Linear-Softmax by cell, of d and alpha; p adjusted by Holm over the cells."""
        return holm({cell: self.difference(method, "linear", cell) for cell in (*GRID, MAIN)})

    def grid_counts(self, method: str) -> tuple[int, int, int]:
        """In how many cells the KL is significantly lower, neither, and higher."""
        grid = self.grid(method)
        lower, higher = count_better(grid), sum(better(-difference) for difference in grid.values())
        return lower, len(grid) - lower - higher, higher

    def cells_without_gain(self, method: str) -> list[str]:
        """The cells in which the KL is not significantly lower."""
        return [
            f"d = {cell.dim}, alpha = {cell.alpha:g} ({-difference.mean:+.3f})"
            for cell, difference in self.grid(method).items()
            if not better(difference)
        ]

    def share(self, method: str, mixture: str) -> float:
        """The share of a mixture's gain in KL over Linear-Softmax that ``method`` has."""
        linear = self.mean("linear", "kl")
        return (linear - self.mean(method, "kl")) / (linear - self.mean(mixture, "kl"))

    def logit_range(self, method: str) -> tuple[float, float]:
        """Between which values 99.8 % of the trained logits lie, in the first seed."""
        quantiles = dict(self.values(method, "shape")[0]["quantiles"])
        return quantiles[0.001], quantiles[0.999]
