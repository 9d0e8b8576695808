"""The results of a study, read from its files, and the comparisons between its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..statistics import Difference, holm, over_documents, over_seeds
from .models import transform_of
from .report import BASELINE, CONTROL
from .study import Cell, Row, Study, StudyError, Unit, choose, read_result

#: Rows that no gain is looked for in: what gains are measured against, and functions that are not learned.
_NOT_CANDIDATES = (BASELINE, CONTROL, "plif-frozen", "plif-frozen-published")


@dataclass(frozen=True)
class RowResults:
    """A row with its runs by seed (those that did not diverge), and the seeds that diverged or were not run."""

    row: Row
    chosen: dict[str, Any] | None
    runs: dict[int, dict[str, Any]]
    diverged: tuple[int, ...]
    missing: tuple[int, ...]

    def perplexities(self, split: str) -> list[float]:
        """One for each seed that ran."""
        return [run["perplexity"][split] for run in self.runs.values()]

    @property
    def first(self) -> dict[str, Any] | None:
        """The run that has a spectrum and quantiles of the logits."""
        return self.runs.get(0)


@dataclass(frozen=True)
class Comparison:
    """Mean difference of the test losses, in nats per token, over seeds and over documents; None where it takes more
    runs than there are."""

    seeds: Difference | None
    documents: Difference | None


@dataclass(frozen=True)
class CellResults:
    """A cell with what is there of its results."""

    cell: Cell
    rows: tuple[RowResults, ...]

    def row(self, label: str) -> RowResults | None:
        """The row of that label; None where the cell has none."""
        return next((each for each in self.rows if each.row.label == label), None)

    def against(self, label: str) -> dict[str, Comparison]:
        """Every other row minus the row ``label``; p values are adjusted by Holm's method for their number."""
        other = self.row(label)
        if other is None or not other.runs:
            return {}
        found = {each.row.label: compare(each, other) for each in self.rows if each.row.label != label and each.runs}
        return dict(zip(found, _adjusted(list(found.values())), strict=True))

    def best_transform(self) -> RowResults | None:
        """The learned function with the lowest validation loss; None where no candidate has run."""
        candidates = [
            each
            for each in self.rows
            if each.runs and each.row.output not in _NOT_CANDIDATES and transform_of(each.row.output) is not None
        ]
        return min(
            candidates,
            key=lambda each: statistics.mean(math.log(value) for value in each.perplexities("valid")),
            default=None,
        )


def read_cell(study: Study, cell: Cell, folder: Path) -> CellResults:
    """What ``folder`` has of ``cell``.

    Raises:
        StudyError: a result was made with other settings.
    """
    units: dict[str, list[Unit]] = {}
    for unit in study.main_units(cell, folder):
        units.setdefault(unit.row.label, []).append(unit)
    rows = []
    for row in cell.rows:
        results = {unit.seed: read_result(folder, unit) for unit in units[row.label]}
        rows.append(
            RowResults(
                row,
                choose(cell, row, folder),
                {seed: result for seed, result in results.items() if result is not None and not result["diverged"]},
                tuple(seed for seed, result in results.items() if result is not None and result["diverged"]),
                tuple(seed for seed, result in results.items() if result is None),
            )
        )
    return CellResults(cell, tuple(rows))


def compare(one: RowResults, other: RowResults) -> Comparison:
    """The test losses of ``one`` minus those of ``other``, over the seeds that both have.

    Over documents, the loss of each document is the mean over these seeds.

    Raises:
        StudyError: the documents are not the same.
    """
    seeds = sorted(set(one.runs) & set(other.runs))
    if not seeds:
        return Comparison(None, None)
    first, second = ([math.log(each.runs[s]["perplexity"]["test"]) for s in seeds] for each in (one, other))
    tokens = one.runs[seeds[0]]["documents"]["test"]["tokens"]
    if any(each.runs[seed]["documents"]["test"]["tokens"] != tokens for each in (one, other) for seed in seeds):
        raise StudyError(f"{one.row.label} and {other.row.label} were evaluated on different documents")
    return Comparison(
        over_seeds(first, second) if len(seeds) > 1 else None,
        over_documents(_mean_losses(one, seeds), _mean_losses(other, seeds), tokens) if len(tokens) > 1 else None,
    )


def _mean_losses(row: RowResults, seeds: Sequence[int]) -> list[float]:
    each = zip(*(row.runs[seed]["documents"]["test"]["losses"] for seed in seeds), strict=True)
    return [math.fsum(losses) / len(losses) for losses in each]


def _adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    seeds = _adjust([each.seeds for each in comparisons])
    documents = _adjust([each.documents for each in comparisons])
    return [Comparison(one, other) for one, other in zip(seeds, documents, strict=True)]


def _adjust(differences: Sequence[Difference | None]) -> list[Difference | None]:
    adjusted = iter(holm([each.p for each in differences if each is not None]))
    return [None if each is None else replace(each, p=next(adjusted)) for each in differences]
