"""Transforms put on the output layer of a trained language model, SmolLM2-135M: ``python -m benchmarks run posthoc``.

Units, and of their figures what the names do not say (losses in nats; those of documents are sums over their tokens):

- ``states``: hidden states of text, computed once into a cache outside of git (about 5 minutes, 310 MB).
- ``transforms/NAME``: f fitted alone with each rate; ``rate`` is the chosen one (0: nothing to learn). ``bins`` of the
  confidence are sums over tokens. ``singular_values`` are those of log P at the places ``measure.kept(1000)``.
- ``head/NAME-lrRATE/seedSEED``: f and the head fitted together, by the transforms of ``results.head_roles``, each rate
  under seed 0, the chosen rate under all. ``step`` is that of the best validation; spectra are those of seed 0 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from . import fit, report, states
from .measure import histogram
from .results import best_rate, head_roles, head_runs, head_search
from .settings import CONTROL, TRANSFORMS, Alone, Data, Together


class Posthoc(Experiment):
    """Transforms put on the head of a trained language model."""

    name = "posthoc"
    title = "f, and then f and the head, fitted to the hidden states of a trained language model, SmolLM2-135M"
    alone, together = Alone(), Together()
    #: Rates of the head, compared under the first seed. At 1e-3 the loss rose.
    rates = (3e-5, 1e-4, 3e-4)
    seeds = (0, 1, 2)
    load = staticmethod(states.load)

    def units(self, results: Results) -> Iterator[Unit]:
        yield Unit("states", Data(self.alone.states, self.alone.evaluation))
        for name in TRANSFORMS:
            yield Unit(f"transforms/{name}", replace(self.alone, transform=name))
        for seed, name in product(self.seeds, head_roles(results).values()):
            start, found = results[f"transforms/{name}"].figures["parameters"], head_search(results, name)
            settings = replace(self.together, transform=name, start=start, seed=seed, search=seed == self.seeds[0])
            # Under the other seeds the best of all rates alone: they wait for the search.
            chosen = [best_rate(found)] if set(self.rates) <= found.keys() else []
            for rate in self.rates if settings.search else chosen:
                yield Unit(f"head/{name}-lr{rate:g}/seed{seed}", replace(settings, rate=rate))

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        settings, found = unit.settings, self.load(unit.settings.states)
        if isinstance(settings, Alone):
            return Measured(fit.alone(found, settings))
        if isinstance(settings, Together):
            return Measured(fit.together(found, settings))
        return Measured(found.figures() | {"logits": histogram(found.splits["test"], found.head, settings.evaluation)})

    def to_verify(self, results: Results) -> list[str]:
        last = list(head_runs(results, CONTROL).values())[-1:]
        return [name for name in ("states", f"transforms/{CONTROL}", *(run.unit for run in last)) if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        return report.section(self, results, pictures)
