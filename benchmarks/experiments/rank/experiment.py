"""The experiment: each kind of unit is measured by a function of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from ..synthetic.settings import Training
from . import measures
from .settings import LANGUAGE_MODEL, LARGE, NOISE, RANDOM, SEEDS, SHOWN, SYNTHETIC, LanguageModelHead, Large, Noise

_QUICK = ("random-d16/plif-20/seed0", "random-d16/sigsoftmax/seed1", "noise/c1e-24", "synthetic/plif/seed0")


class Rank(Experiment):
    """Ranks before and after f."""

    name = "rank"
    title = "effective ranks and spectra of log-probability matrices"

    def units(self, results: Results) -> Iterator[Unit]:
        for name, settings in (RANDOM | NOISE | SYNTHETIC | LANGUAGE_MODEL | LARGE).items():
            yield Unit(name, settings)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        settings = unit.settings
        if isinstance(settings, Noise):
            return Measured(measures.noise(settings))
        if isinstance(settings, Large):
            return Measured(measures.large(settings))
        if isinstance(settings, Training):
            return Measured(measures.synthetic(settings))
        if isinstance(settings, LanguageModelHead):
            return Measured(measures.language_model(settings))
        shown = settings.transform in SHOWN and settings.seed == SEEDS[0]
        return Measured(measures.describe(measures.random_log_p(settings), shown))

    def to_verify(self, results: Results) -> list[str]:
        return [name for name in _QUICK if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        from .report import section

        return section(self, results, pictures)
