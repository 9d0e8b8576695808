"""Doing the units of an experiment: by any number of processes together, stopped and taken up again anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from tqdm import tqdm

from .environment import environment, machine_changes
from .experiment import Experiment, ExperimentError, Results, Unit
from .store import Store

#: Relative difference from stored figures that another machine may have.
TOLERANCE = 0.02
_SECONDS_BETWEEN_POLLS = 2.0


@dataclass(frozen=True)
class Selection:
    """Which units to do: names that match ``only`` (else the default), of these share ``shard`` of ``shards``."""

    only: str = ""
    shard: int = 0
    shards: int = 1
    limit_minutes: float = math.inf

    def of(self, experiment: Experiment, results: Results) -> list[Unit]:
        """The selected units that are known by now, done or not."""
        pattern = self.only or experiment.default
        units = [unit for unit in experiment.units(results) if fnmatchcase(unit.name, pattern)]
        return units[self.shard :: self.shards]


def run(experiment: Experiment, store: Store, selection: Selection) -> list[Unit]:
    """Do what is missing; returns the units that are missing still, all of which other processes or a limit kept.

    Raises:
        StoreError: a stored result was made with other settings.
        ExperimentError: no unit is selected.
    """
    started = time.monotonic()
    if not selection.of(experiment, store.results()):
        raise ExperimentError(f"no unit of {experiment.name} matches {selection.only or experiment.default!r}")
    with deterministic(experiment.threads, experiment.deterministic), tqdm(unit="unit") as bar:
        while True:
            done_before = len(store.results())
            for unit in _missing(experiment, store, selection, bar):
                if (time.monotonic() - started) / 60 > selection.limit_minutes:
                    return _missing(experiment, store, selection, bar)
                with store.claimed(unit) as mine:
                    if mine and unit.name not in store.results():
                        bar.set_description(unit.name)
                        checkpoint, before = store.checkpoint(unit), time.monotonic()
                        store.append(unit, experiment.run(unit, checkpoint), time.monotonic() - before)
                        checkpoint.remove()
            left = _missing(experiment, store, selection, bar)
            if not left:
                return []
            # If nothing was done, other processes are at all that is left. More may appear when they have done it.
            if len(store.results()) == done_before:
                time.sleep(_SECONDS_BETWEEN_POLLS)


def _missing(experiment: Experiment, store: Store, selection: Selection, bar: Any) -> list[Unit]:
    results = store.results()
    units = selection.of(experiment, results)
    for unit in units:
        store.require_settings(unit, results)
    missing = [unit for unit in units if unit.name not in results]
    bar.total, bar.n = len(units), len(units) - len(missing)
    bar.refresh()
    return missing


def verify(experiment: Experiment, store: Store, names: Sequence[str], keep: bool = False) -> Iterator[tuple[str, str]]:
    """Repeat units; gives the name of each and how its figures differ from the stored ones, which is empty if not.

    On a kind of machine that there are results of no bit may differ; on another one numbers may by ``TOLERANCE``, and
    ``keep`` adds its results to the stored ones.
    """
    results = store.results()
    units = {unit.name: unit for unit in experiment.units(results)}
    for name in names:
        store.require_settings(units[name], results)
        scratch, started = store.checkpoint(Unit(f"verify-{name}", units[name].settings)), time.monotonic()
        with deterministic(experiment.threads, experiment.deterministic):
            found = experiment.run(units[name], scratch)
            here = environment()
            kept = [(machine_changes(record.environment, here), record.figures) for record in results.every(name)]
            changes, figures = min(kept, key=lambda each: len(each[0]))
            if keep and changes:
                store.append(units[name], found, time.monotonic() - started)
        scratch.remove()
        differences = compare(figures, dict(found.figures), TOLERANCE if changes else 0.0)
        if differences and changes:
            differences.insert(0, f"on another machine ({', '.join(changes)})")
        yield name, "; ".join(differences)


def compare(stored: Any, found: Any, tolerance: float, where: str = "figures") -> list[str]:
    """What differs between two JSON values by more than a relative ``tolerance``, as ``where: stored -> found``."""
    if isinstance(stored, dict) and isinstance(found, dict):
        keys = list(dict.fromkeys([*stored, *map(str, found)]))
        found = {str(key): value for key, value in found.items()}
        return [each for key in keys for each in compare(stored.get(key), found.get(key), tolerance, f"{where}.{key}")]
    if isinstance(stored, (list, tuple)) and isinstance(found, (list, tuple)) and len(stored) == len(found):
        pairs = enumerate(zip(stored, found, strict=True))
        return [each for i, (a, b) in pairs for each in compare(a, b, tolerance, f"{where}[{i}]")]
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (stored, found))
    same = math.isclose(stored, found, rel_tol=tolerance) if numbers else stored == found
    return [] if same else [f"{where}: {stored!r} -> {found!r}"]


@contextmanager
def deterministic(threads: int, algorithms: bool = True) -> Iterator[None]:
    """Within the block torch has so many threads, and computes the same each time if ``algorithms`` are to."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(algorithms)
    # Nothing here reads memory that nothing has written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]
