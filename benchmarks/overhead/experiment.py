"""The experiment ``overhead``: units are cases, ``PRESET/CASE``; the section is a table for each preset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..engine.checkpoint import Checkpoint
from ..engine.document import environments, render
from ..engine.experiment import Experiment, Measured, Results, Unit
from . import contestants, host, variants
from .presets import Timing, shrunk, timings
from .results import frame
from .timing import measure

#: The tables of the section: heading, units, contestants.
_TABLES = (
    ("Logits given", "logits/*float32*", "*"),
    ("The head", "head*/*", "*"),
    ("More shapes", "quick/*", "plif-64 fused"),
    ("On a GPU", "gpu/*", "*"),
)


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
        tables = [(heading, units, _table(frame(results, units, names))) for heading, units, names in _TABLES]
        narrow = frame(results, "logits/*float16*", "* fused")["to_wide"]
        calls = [
            {"call": name, **{key: f"{value:.0f}" for key, value in pair.items()}}
            for record in results.matching("host/*")
            for name, pair in record.times["microseconds"].items()
        ]
        machines = environments(list(results.values()))
        template = Path(__file__).with_name("report.md.jinja")
        return render(template, command=self.command, tables=tables, narrow=narrow, calls=calls, machines=machines)


def _table(found: pd.DataFrame) -> list[dict[str, str]]:
    rows = []
    for row in found.to_dict("records"):
        ms = row.get("median_ms", math.nan)
        cells = {"case": row["unit"].partition("/")[2], "contestant": row["contestant"], "ms": row["status"]}
        if row["status"] == "measured":
            cells["ms"] = f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
            ratios = {"without f": "identity", "eager": "eager", "compiled": "compiled", "floor": "floor"}
            cells |= {f"/ {head}": _cell(row[f"to_{key}"], ".2f") for head, key in ratios.items()}
            cells["peak MiB"] = _cell(row["peak_mib"], ",.1f")
        rows.append(cells)
    return rows


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
