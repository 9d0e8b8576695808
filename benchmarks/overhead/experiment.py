"""The experiment ``overhead``: units are cases, ``PRESET/CASE``; the section is a table for each preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..engine.checkpoint import Checkpoint
from ..engine.document import environments, render
from ..engine.experiment import Experiment, Measured, NotRun, Results, Unit
from . import contestants, host, variants
from .presets import Timing, shrunk, timings
from .results import ratio
from .timing import measure

#: The tables of the section: heading, units, contestants.
_TABLES = (
    ("Logits given", "logits/*float32*", "*"),
    ("The head", "head*/*", "*"),
    ("Tokens and distillation", "tokens*/*", "*"),
    ("More shapes", "quick/*", "plif-64 fused"),
    ("On a GPU", "gpu/*", "*"),
)
#: Columns: what a time is relative to.
_OTHERS = {"without f": "identity fused", "eager": "plain eager", "compiled": "plain compiled", "floor": "floor"}


@dataclass(frozen=True)
class HostTiming:
    """The settings of the unit that times calls beside their arithmetic."""

    rounds: int = 15
    calls: int = 200


class Overhead(Experiment):
    """Everything is a time: nothing is the same twice, so that there is nothing to verify."""

    name = "overhead"
    title = "Time and memory of the losses and heads beside what there is otherwise"
    default = "quick/*"
    threads = torch.get_num_threads()
    deterministic = False

    def units(self, results: Results) -> Iterator[Unit]:
        for name, timing in timings():
            yield Unit(name, timing)
        yield Unit("host/6 x 40", HostTiming())
        for operator in variants.operators():
            yield Unit(f"variants/{operator}", Timing(operator.case, operator.variants, 3, "cuda"))
            yield Unit(f"dry-variants/{operator}", Timing(shrunk(operator.case), operator.variants, 1, "emulated"))

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        timing = unit.settings
        if isinstance(timing, HostTiming):
            return Measured({}, {"microseconds": host.measure(timing.rounds, timing.calls)})
        preset, _, name = unit.name.partition("/")
        prepare: Any = contestants.prepare
        if preset.endswith("variants"):
            prepare = partial(variants.prepare, next(each for each in variants.operators() if str(each) == name))
        return Measured({}, measure(timing, prepare))

    def section(self, results: Results, pictures: Path) -> str:
        wide = (_ratio(*row, f"{row[-1]} float32") for row in _rows(results, "logits/*float16*", "* fused"))
        calls = (record.times["microseconds"].items() for record in results.matching("host/*"))
        return render(
            Path(__file__).with_name("report.md.jinja"),
            command=self.command,
            tables=[(*table, [_cells(*row) for row in _rows(results, *table[1:])]) for table in _TABLES],
            narrow=[each for each in wide if each is not None],
            calls=[{"call": name} | {key: f"{pair[key]:.0f}" for key in pair} for each in calls for name, pair in each],
            machines=environments(list(results.values())),
        )


def _rows(results: Results, units: str, names: str) -> Iterator[tuple[Results, str, str]]:
    """The results, the unit and the contestant of all that match."""
    for record in results.matching(units):
        yield from ((results, record.unit, name) for name in record.times["contestants"] if fnmatchcase(name, names))


def _cells(results: Results, unit: str, name: str) -> dict[str, str]:
    row, cells = results[unit].times["contestants"][name], {"case": unit.partition("/")[2], "contestant": name}
    if "status" in row:
        return cells | {"ms": row["status"]}
    ms, peak = row["median_ms"], row.get("peak_bytes")
    cells["ms"] = f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
    ratios = {head: _ratio(results, unit, name, other) for head, other in _OTHERS.items()}
    cells |= {f"/ {head}": "-" if each is None else f"{each:.2f}" for head, each in ratios.items()}
    if (four := _ratio(results, unit, name, "four_products")) is not None:
        cells["/ 4 products"] = f"{four:.2f}"
    return cells | {"peak MiB": "-" if peak is None else f"{peak / 2**20:,.1f}"}


def _ratio(*given: Any) -> float | None:
    try:
        return ratio(*given)
    except NotRun:
        return None
