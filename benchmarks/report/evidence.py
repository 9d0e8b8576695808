"""The stored results of all commands, as the figures that the claims, the advice and the defaults rest on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..language_model.report import BASELINE, CONTROL
from ..language_model.study import load_study
from ..language_model.study_report import STUDIES
from ..language_model.study_report import command as study_command
from ..language_model.study_results import CellResults, Comparison, RowResults, compare, read_cell
from ..posthoc import records as posthoc_records
from ..posthoc.calibration import calibration_error
from ..posthoc.settings import HeadSettings
from ..rank import report as rank_report
from ..statistics import Difference, over_documents, over_seeds
from ..synthetic import records as synthetic_records
from ..synthetic.methods import METHODS
from ..synthetic.settings import GRID, MAIN, Cell, Unit

RESULTS = Path(__file__).parents[1] / "results"
STUDY = "main"
#: Methods of the synthetic experiment that are no learned f: what gains are measured against, mixtures, frozen f.
_NOT_LEARNED = (BASELINE, CONTROL, "published-sgd", "published-adam")


class NotRun(Exception):
    """A figure is not there; ``command`` makes it."""

    def __init__(self, command: str) -> None:
        super().__init__(command)
        self.command = command


class Evidence:
    """The results in a folder. Every method raises :class:`NotRun` where its figures are not there."""

    def __init__(self, results: Path = RESULTS) -> None:
        self.results = results

    # --- synthetic ---

    def synthetic(self, method: str, cell: Cell = MAIN) -> dict[str, Any]:
        """The record of a method, with at least one run that did not diverge."""
        unit = Unit(cell, method)
        name = "main" if cell == MAIN else cell.name
        missing = NotRun(f"python -m benchmarks.synthetic --cells {name} --methods {method}")
        # Without a file, reading would build the model to count its parameters.
        if not synthetic_records.path_of(unit, self.results / "synthetic").is_file():
            raise missing
        record = synthetic_records.read(unit, self.results / "synthetic")
        if not any(run["figures"] is not None for run in record["runs"]):
            raise missing
        return record

    def figure(self, method: str, name: str, cell: Cell = MAIN) -> float:
        """Mean over seeds of ``kl``, ``modes``, or ``top5``; those that diverged are left out."""
        runs = self.synthetic(method, cell)["runs"]
        return statistics.mean(run["figures"][name] for run in runs if run["figures"] is not None)

    def rank_of(self, method: str, tolerance: str = "0.0001") -> float:
        """Mean over seeds of the effective rank of log Q in the main cell."""
        runs = self.synthetic(method)["runs"]
        return statistics.mean(run["figures"]["ranks"][tolerance] for run in runs if run["figures"] is not None)

    def synthetic_range(self, method: str) -> tuple[float, float]:
        """Between which values 99.8 % of the trained logits of the main cell lie, in the first seed."""
        record = self.synthetic(method)
        kept = next((run["shape"] for run in record["runs"] if run.get("shape")), None)
        if kept is None:
            raise NotRun(f"python -m benchmarks.synthetic --cells main --methods {method}")
        quantiles = {share: value for share, value in kept["quantiles"]}
        return quantiles[0.001], quantiles[0.999]

    def synthetic_difference(self, one: str, other: str, cell: Cell = MAIN) -> Difference:
        """KL of ``one`` minus that of ``other``, paired by seeds."""
        first, second = (
            {run["seed"]: run["figures"]["kl"] for run in self.synthetic(m, cell)["runs"] if run["figures"] is not None}
            for m in (one, other)
        )
        seeds = sorted(first.keys() & second.keys())
        if len(seeds) < 2:
            name = "main" if cell == MAIN else cell.name
            raise NotRun(f"python -m benchmarks.synthetic --cells {name} --methods {one},{other}")
        return over_seeds([first[seed] for seed in seeds], [second[seed] for seed in seeds])

    def learned(self) -> list[str]:
        """The methods with a learned f that have run in the main cell."""
        there = []
        for name, method in METHODS.items():
            if name in _NOT_LEARNED or method.transform is None or method.frozen or name.startswith("linear"):
                continue
            if not any(True for _ in method.transform(torch.Generator().manual_seed(0)).parameters()):
                continue
            try:
                self.synthetic(name)
            except NotRun:
                continue
            there.append(name)
        if not there:
            raise NotRun("python -m benchmarks.synthetic --cells main")
        return there

    def best_learned(self) -> str:
        """The learned f with the lowest KL of its search, on a problem that no reported figure is from."""

        def searched(method: str) -> float:
            search = self.synthetic(method)["search"]
            return min(run["figures"]["kl"] for run in search if run["figures"] is not None)

        return min(self.learned(), key=searched)

    def grid(self, one: str, other: str) -> dict[Cell, Difference]:
        """:meth:`synthetic_difference` in each cell of the grid that has both; the main cell is one of them."""
        found = {}
        for cell in (*GRID, MAIN):
            try:
                found[cell] = self.synthetic_difference(one, other, cell)
            except NotRun:
                continue
        if not found:
            raise NotRun("python -m benchmarks.synthetic")
        return found

    # --- language models ---

    @property
    def study_command(self) -> str:
        """What runs the study."""
        return study_command(STUDIES / f"{STUDY}.json")

    @cached_property
    def cells(self) -> list[CellResults]:
        """The cells of the main study, run or not."""
        study = load_study(STUDIES / f"{STUDY}.json")
        return [read_cell(study, cell, self.results / "language_model" / study.name) for cell in study.cells]

    @cached_property
    def _against(self) -> dict[tuple[str, str], dict[str, Comparison]]:
        return {}

    def against(self, cell: CellResults, label: str) -> dict[str, Comparison]:
        """Every other row of a cell minus the row ``label``, with p adjusted by Holm for their number."""
        key = (cell.cell.name, label)
        if key not in self._against:
            self._against[key] = cell.against(label)
        return self._against[key]

    def best_of(self, cell: CellResults) -> RowResults:
        """The learned f of a cell with the lowest validation loss."""
        best = cell.best_transform()
        if best is None:
            raise NotRun(self.study_command)
        return best

    def gain(self, cell: CellResults, label: str, other: str) -> Comparison:
        """Test loss of ``label`` minus that of ``other``, adjusted, over seeds and over documents."""
        found = self.against(cell, other).get(label)
        if found is None or found.seeds is None:
            raise NotRun(self.study_command)
        return found

    def row_difference(self, cell: CellResults, one: str, other: str) -> Comparison:
        """As :meth:`gain`, of two rows alone: p is not adjusted."""
        first, second = cell.row(one), cell.row(other)
        if first is None or second is None or not first.runs or not second.runs:
            raise NotRun(self.study_command)
        found = compare(first, second)
        if found.seeds is None:
            raise NotRun(self.study_command)
        return found

    def perplexity(self, cell: CellResults, label: str) -> float:
        """Mean test perplexity over seeds."""
        row = cell.row(label)
        if row is None or not row.runs:
            raise NotRun(self.study_command)
        return statistics.mean(row.perplexities("test"))

    def language_model_rank(self, cell: CellResults, label: str, tolerance: str = "0.0001") -> int:
        """Effective rank of log P on validation contexts, seed 0."""
        row = cell.row(label)
        if row is None or row.first is None:
            raise NotRun(self.study_command)
        return int(row.first["spectrum"]["effective_ranks"][tolerance])

    # --- a trained model ---

    def posthoc(self, name: str) -> dict[str, Any]:
        """The record of a transform that was fitted alone."""
        record = posthoc_records.read(self.results / "posthoc", posthoc_records.transform_unit(name))
        if record is None:
            raise NotRun("python -m benchmarks.posthoc")
        return record

    def posthoc_names(self) -> list[str]:
        """The transforms that were fitted alone."""
        names = list(posthoc_records.stage_one(self.results / "posthoc"))
        if not names:
            raise NotRun("python -m benchmarks.posthoc")
        return names

    def posthoc_difference(self, one: str, other: str) -> Difference:
        """Test loss of a token of ``one`` minus that of ``other``, over documents."""
        first, second = (self.posthoc(name)["test"]["document_nll"] for name in (one, other))
        return over_documents(first, second, self._posthoc_tokens())

    def calibration(self, name: str) -> float:
        """Expected calibration error on the test split, f fitted alone."""
        return calibration_error(self.posthoc(name)["test"]["bins"])

    def head_roles(self) -> dict[str, str]:
        """The transforms of the second stage, by role: linear, temperature, best PLIF, best other."""
        methods = posthoc_records.head_methods(self.results / "posthoc")
        if not methods:
            raise NotRun("python -m benchmarks.posthoc")
        return methods

    def head_difference(self, one: str, other: str) -> tuple[Difference, int]:
        """As :meth:`posthoc_difference`, with the head trained too; losses are means over seeds. And how many seeds."""
        settings = HeadSettings()
        losses: list[dict[int, Sequence[float]]] = []
        for name in (one, other):
            there = posthoc_records.head_records(self.results / "posthoc", name, settings)
            rate = posthoc_records.chosen_rate(there, settings)
            losses.append({s: record["test"]["document_nll"] for (r, s), record in there.items() if r == rate})
        seeds = sorted(losses[0].keys() & losses[1].keys())
        if not seeds:
            raise NotRun("python -m benchmarks.posthoc")
        means = [[statistics.mean(values) for values in zip(*(of[s] for s in seeds), strict=True)] for of in losses]
        return over_documents(means[0], means[1], self._posthoc_tokens()), len(seeds)

    def _posthoc_tokens(self) -> list[int]:
        record = posthoc_records.read(self.results / "posthoc", "states")
        if record is None:
            raise NotRun("python -m benchmarks.posthoc")
        counts: list[int] = record["test_tokens"]
        return counts

    # --- ranks and cost ---

    def rank(self, group: str, name: str) -> list[dict[str, Any]]:
        """The runs of a unit of benchmarks.rank."""
        runs = rank_report.runs_of(group, name, self.results / "rank")
        if not runs:
            raise NotRun(f"python -m benchmarks.rank --groups {group}")
        return runs

    def overhead(self, folder: str, case: str, name: str, what: str = "median_ms") -> float:
        """A figure of a contestant in a case of a stored run of benchmarks.overhead."""
        path = self.results / "overhead" / folder / "results.json"
        missing = NotRun(f"python -m benchmarks.overhead (its results go to {path.parent.name}/)")
        if not path.is_file():
            raise missing
        cases = {each["name"]: each for each in json.loads(path.read_text())["cases"]}
        rows = {row["name"]: row for row in cases[case]["rows"]} if case in cases else {}
        if name not in rows or rows[name].get(what) is None:
            raise missing
        return float(rows[name][what])
