"""The experiment: each kind of unit is measured by a function of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from ..synthetic.settings import Training
from . import measures
from .settings import LANGUAGE_MODEL, LARGE, NOISE, RANDOM, SYNTHETIC, LanguageModelHead, Large, Noise, Random

_MEASURES: dict[type, Callable[[Any], dict[str, Any]]] = {
    Random: measures.random_factors,
    Large: measures.large,
    Noise: measures.noise,
    Training: measures.synthetic,
    LanguageModelHead: measures.language_model,
}
_QUICK = ("random-d16/plif-20/seed0", "random-d16/sigsoftmax/seed1", "noise/c1e-24", "synthetic/plif/seed0")


class Rank(Experiment):
    """Ranks before and after f."""

    name = "rank"
    title = "effective ranks and spectra of log-probability matrices"

    def units(self, results: Results) -> Iterator[Unit]:
        for name, settings in (RANDOM | NOISE | SYNTHETIC | LANGUAGE_MODEL | LARGE).items():
            yield Unit(name, settings)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        return Measured(_MEASURES[type(unit.settings)](unit.settings))

    def to_verify(self, results: Results) -> list[str]:
        return [name for name in _QUICK if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        from .report import section

        return section(self, results, pictures)
