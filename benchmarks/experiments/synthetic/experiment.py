"""The experiment: a search of the learning rate for every method and cell, then trainings at the rate it found.

Units, with cells like ``n400-m300-d10-alpha0.1`` (N contexts, M words, dimension d, alpha):

- ``CELL/METHOD/search-lr0.03``: a training on the problem of a seed of its own, one for each learning rate;
- ``CELL/METHOD/seed0``: at the rate with the lowest KL of the search, one for each seed;
- ``timing/CELL``: the losses and the steps of all methods in turn. It has ``times`` only.

Figures of a training are those of ``training.figures``, or ``diverged_at`` alone, the step whose loss was no number.
Searches have ``kl`` only; the first seed of the main cell has ``shape``, its learned f. Times: ``step_seconds`` (median
processor time of a step) and ``backend``, that of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from .settings import GRID, LEARNING_RATES, MAIN, SEARCH_SEED, SEEDS, STUDY, TIMINGS, Cell, Timing, Training
from .training import time_steps, train


class Synthetic(Experiment):
    """KL, modes and ranks of output layers over free context vectors."""

    name = "synthetic"
    title = "random distributions, matched by output layers of small dimension"

    def units(self, results: Results) -> Iterator[Unit]:
        for cell, (methods, seeds) in STUDY.items():
            for method in methods:
                yield from (Unit(name, training) for name, training in _searches(cell, method).items())
                best = best_rate(results, cell, method)
                for seed in seeds if best is not None else ():
                    yield Unit(f"{cell.name}/{method}/seed{seed}", Training(cell, method, seed, best))
        for each in TIMINGS:
            yield Unit(f"timing/{each.cell.name}", each)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        settings = unit.settings
        if isinstance(settings, Timing):
            return time_steps(settings)
        found = train(settings, keep_shape=settings.cell == MAIN and settings.seed == SEEDS[0])
        if settings.seed == SEARCH_SEED:
            # The choice needs no more, and the file has hundreds of them.
            return Measured({k: v for k, v in found.figures.items() if k in ("kl", "diverged_at")}, found.times)
        return found

    def to_verify(self, results: Results) -> list[str]:
        main = [f"{MAIN.name}/{unit}" for unit in ("linear/search-lr0.3", "plif/seed0", "published-sgd/seed0")]
        return [name for name in (*main, f"{GRID[0].name}/mos4/seed0") if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        from .report import section

        return section(self, results, pictures)


def _searches(cell: Cell, method: str) -> dict[str, Training]:
    return {f"{cell.name}/{method}/search-lr{lr:g}": Training(cell, method, SEARCH_SEED, lr) for lr in LEARNING_RATES}


def best_rate(results: Results, cell: Cell, method: str) -> float | None:
    """The learning rate with the lowest KL; None until all were tried, and where the loss diverged at all of them."""
    searches = _searches(cell, method)
    if not results.keys() >= searches.keys():
        return None
    found = [(results[name].figures["kl"], at.lr) for name, at in searches.items() if "kl" in results[name].figures]
    return min(found)[1] if found else None
