"""The runs: what is missing of a study, how long that will take, and doing it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..claims import claimed, lock_of
from . import records
from .problem import dirichlet, training_targets
from .settings import LEARNING_RATES, SEARCH_SEED, Command, Unit
from .training import Trainer, train


def prepare(threads: int) -> None:
    """Make results the same each time: this many threads, and no operator whose sums come in any order."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that nothing has written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]


def estimated_seconds(units: Sequence[Unit], folder: Path) -> dict[Unit, float]:
    """About how long the missing trainings of each unit take, from a few steps of each."""
    found: dict[Unit, float] = {}
    per_step: dict[tuple[int, int, int, str], float] = {}
    for unit in units:
        count = records.missing_runs(records.read(unit, folder), unit)
        if count == 0:
            found[unit] = 0.0
            continue
        cell = unit.cell
        key = (cell.contexts, cell.words, cell.dim, unit.method)
        if key not in per_step:
            per_step[key] = _step_seconds(unit)
        found[unit] = count * cell.steps * per_step[key]
    return found


def _step_seconds(unit: Unit) -> float:
    # alpha does not matter for the time, and a large one is quick to draw.
    cell = replace(unit.cell, alpha=1.0)
    targets = training_targets(dirichlet(cell.contexts, cell.words, cell.alpha, SEARCH_SEED))
    trainer = Trainer(cell, unit.method, SEARCH_SEED, LEARNING_RATES[0], targets)
    seconds = []
    for _ in range(4):
        started = time.process_time()
        trainer.train_step()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:])


class Runner:
    """Does the missing trainings of units, one after the other, and leaves out units that another process has."""

    def __init__(self, command: Command) -> None:
        self.command, self.folder = command, command.folder
        self._started = time.monotonic()

    def execute(self) -> bool:
        """Run; returns whether nothing is missing any more (what other processes are at counts as missing)."""
        units = self.command.units
        with tqdm(units, unit="unit") as bar:
            for unit in bar:
                bar.set_description(unit.name)
                if self._out_of_time():
                    break
                with claimed(lock_of(self.folder, unit.name)) as mine:
                    if mine:
                        self._run(unit)
        return not any(records.missing_runs(records.read(unit, self.folder), unit) for unit in units)

    def _run(self, unit: Unit) -> None:
        # Read only now: another process may have finished it since this one started.
        record = records.read(unit, self.folder)
        for lr in records.missing_searches(record):
            if self._out_of_time():
                return
            index = records.environment_index(record)
            record["search"].append({**train(unit.cell, unit.method, SEARCH_SEED, lr, False), "environment": index})
            if not records.missing_searches(record):
                record["lr"] = records.best_rate(record["search"])
            records.write(record, unit, self.folder)
        for seed in records.missing_seeds(record, unit):
            if self._out_of_time():
                return
            index = records.environment_index(record)
            result = train(unit.cell, unit.method, seed, record["lr"], keep_shape=seed == unit.cell.seeds[0])
            record["runs"].append({**result, "environment": index})
            records.write(record, unit, self.folder)

    def _out_of_time(self) -> bool:
        limit = self.command.limit_minutes
        return limit is not None and time.monotonic() - self._started > limit * 60
