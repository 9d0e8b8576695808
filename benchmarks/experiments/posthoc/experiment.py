"""The units: hidden states, each transform alone, and some of them with the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from . import fit
from .measure import histogram
from .report import section
from .results import chosen_rate, head_roles, head_runs
from .settings import CONTROL, TRANSFORMS, AloneUnit, States, StatesUnit, Study, TogetherUnit
from .states import HiddenStates, load


class Posthoc(Experiment):
    """Transforms put on the head of a trained language model."""

    name = "posthoc"
    title = "f, and then f and the head, fitted to the hidden states of a trained language model, SmolLM2-135M"

    def __init__(self, study: Study = Study(), load: Callable[[States], HiddenStates] = load) -> None:
        self.study, self.load = study, load

    def units(self, results: Results) -> Iterator[Unit]:
        study = self.study
        yield Unit("states", StatesUnit(study.states, study.evaluation))
        for name in TRANSFORMS:
            yield Unit(f"transforms/{name}", AloneUnit(name, study.states, study.evaluation, study.alone))
        names = list(head_roles(results).values())
        # The rates under the first seed for all methods, then the other seeds: what there is can be compared early.
        for name in names:
            for rate in study.head_rates:
                yield self._together(results, name, rate, study.seeds[0])
        for seed in study.seeds[1:]:
            for name in names:
                chosen = chosen_rate(head_runs(results, name), study.head_rates, study.seeds[0])
                if chosen is not None:
                    yield self._together(results, name, chosen, seed)

    def _together(self, results: Results, name: str, rate: float, seed: int) -> Unit:
        study, start = self.study, results[f"transforms/{name}"].figures["parameters"]
        settings = TogetherUnit(
            name, start, rate, seed, seed == study.seeds[0], study.states, study.evaluation, study.together
        )
        return Unit(f"head/{name}-lr{rate:g}/seed{seed}", settings)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        settings = unit.settings
        states = self.load(settings.states)
        figures: dict[str, Any]
        if isinstance(settings, StatesUnit):
            logits = histogram(states.splits["test"], states.head, settings.evaluation)
            figures = {**states.figures(), "logits": logits}
        elif isinstance(settings, AloneUnit):
            figures = fit.alone(states, settings, checkpoint)
        else:
            figures = fit.together(states, settings)
        # Other machines round the states in other ways, so that their digest is no figure to compare.
        return Measured(figures, {"states": states.digest})

    def to_verify(self, results: Results) -> list[str]:
        rate = chosen_rate(head_runs(results, CONTROL), self.study.head_rates, self.study.seeds[0])
        names = ["states", f"transforms/{CONTROL}", f"head/{CONTROL}-lr{rate or 0:g}/seed{self.study.seeds[-1]}"]
        return [name for name in names if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        return section(results, pictures, self.study)
