"""The experiment: a search of the learning rate for every method and cell, then trainings at the rate it found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from . import timing
from .settings import GRID, LEARNING_RATES, MAIN, SEARCH_SEED, SEEDS, TIMINGS, Cell, Timing, Training, seeds_of, study
from .training import train


class Synthetic(Experiment):
    """KL, modes and ranks of output layers over free context vectors."""

    name = "synthetic"
    title = "random distributions, matched by output layers of small dimension"

    def units(self, results: Results) -> Iterator[Unit]:
        for cell, method in study():
            for lr in LEARNING_RATES:
                yield Unit(search_name(cell, method, lr), Training(cell, method, SEARCH_SEED, lr))
            best = best_rate(results, cell, method)
            if best is not None:
                for seed in seeds_of(cell):
                    yield Unit(f"{cell.name}/{method}/seed{seed}", Training(cell, method, seed, best))
        for each in TIMINGS:
            yield Unit(f"timing/{each.cell.name}", each)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        settings = unit.settings
        if isinstance(settings, Timing):
            return timing.measure(settings)
        if settings.seed == SEARCH_SEED:
            # The choice needs no more, and the file has hundreds of them.
            found = train(settings)
            return Measured({k: v for k, v in found.figures.items() if k in ("kl", "diverged_at")}, found.times)
        return train(settings, keep_shape=settings.cell == MAIN and settings.seed == SEEDS[0])

    def to_verify(self, results: Results) -> list[str]:
        main, mixture = MAIN.name, f"{GRID[0].name}/mos4/seed0"
        wanted = [f"{main}/linear/search-lr0.3", f"{main}/plif/seed0", f"{main}/published-sgd/seed0", mixture]
        return [name for name in wanted if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        from .report import section

        return section(self, results, pictures)


def search_name(cell: Cell, method: str, lr: float) -> str:
    """The unit that tries a learning rate."""
    return f"{cell.name}/{method}/search-lr{lr:g}"


def best_rate(results: Results, cell: Cell, method: str) -> float | None:
    """The learning rate with the lowest KL; None until all were tried, and where the loss diverged at all of them."""
    tried = [results.get(search_name(cell, method, lr)) for lr in LEARNING_RATES]
    if None in tried:
        return None
    found = [(each.figures["kl"], each.settings["lr"]) for each in tried if each is not None and "kl" in each.figures]
    return float(min(found)[1]) if found else None
