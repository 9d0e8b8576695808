"""The units: hidden states, each transform alone, and some of them with the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from . import fit
from .measure import histogram
from .report import section
from .results import head_roles, head_runs, head_search
from .settings import CONTROL, TRANSFORMS, Alone, Data, States, Study, Together
from .states import HiddenStates, load

_STUDY = Study()


class Posthoc(Experiment):
    """Transforms put on the head of a trained language model."""

    name = "posthoc"
    title = "f, and then f and the head, fitted to the hidden states of a trained language model, SmolLM2-135M"

    def __init__(self, study: Study = _STUDY, load: Callable[[States], HiddenStates] = load) -> None:
        self.study, self.load = study, load

    def units(self, results: Results) -> Iterator[Unit]:
        study = self.study
        yield Unit("states", Data(study.alone.states, study.alone.evaluation))
        for name in TRANSFORMS:
            yield Unit(f"transforms/{name}", replace(study.alone, transform=name))
        names = list(head_roles(results).values())
        for name in names:
            for rate in study.rates:
                yield self._together(results, name, rate, study.seeds[0])
        # The other seeds of all methods after that: what there is can be compared early.
        for seed in study.seeds[1:]:
            for name in names:
                if set(study.rates) <= head_search(results, name).keys():
                    chosen = head_runs(results, name)[study.seeds[0]].settings["rate"]
                    yield self._together(results, name, chosen, seed)

    def _together(self, results: Results, name: str, rate: float, seed: int) -> Unit:
        start = results[f"transforms/{name}"].figures["parameters"]
        search = seed == self.study.seeds[0]
        settings = replace(self.study.together, transform=name, start=start, rate=rate, seed=seed, search=search)
        return Unit(f"head/{name}-lr{rate:g}/seed{seed}", settings)

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        settings, states = unit.settings, self.load(unit.settings.states)
        if isinstance(settings, Alone):
            figures = fit.alone(states, settings)
        elif isinstance(settings, Together):
            figures = fit.together(states, settings)
        else:
            figures = states.figures() | {"logits": histogram(states.splits["test"], states.head, settings.evaluation)}
        # Other machines round the states in other ways, so that their digest is no figure to compare.
        return Measured(figures, {"states": states.digest})

    def to_verify(self, results: Results) -> list[str]:
        last = list(head_runs(results, CONTROL).values())[-1:]
        return [name for name in ("states", f"transforms/{CONTROL}", *(run.unit for run in last)) if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        return section(self, self.study, results, pictures)
