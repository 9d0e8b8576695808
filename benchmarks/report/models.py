"""What the language models say about the claims."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

from ..engine.experiment import ExperimentError, Results
from ..engine.statistics import Difference
from ..experiments.language_model.results import CellResults, Comparison, compare, read_cells
from ..experiments.language_model.studies import BASELINE, CONTROL
from .words import better

_Found = TypeVar("_Found")


class ModelEvidence:
    """Figures of the main study, which is complete."""

    def __init__(self, results: Results) -> None:
        self.cells = read_cells(results)
        #: The largest cell.
        self.first = self.cells[0]
        #: The cells of which a transform can be compared with both controls.
        self.ran = [cell for cell in self.cells if _is_comparable(cell)]

    def best(self, cell: CellResults) -> str:
        """The learned f with the lowest validation loss."""
        return _there(cell.best_transform()).row.label

    def gain(self, cell: CellResults, label: str, other: str) -> Comparison:
        """Test loss of ``label`` minus that of ``other``, p adjusted by Holm, over seeds and over documents."""
        found = _there(cell.against(other).get(label))
        _there(found.seeds)
        return found

    def pair(self, cell: CellResults, one: str, other: str) -> Comparison:
        """As :meth:`gain`, of two rows alone: p is not adjusted."""
        found = compare(_there(cell.row(one)), _there(cell.row(other)))
        _there(found.seeds)
        return found

    def seeds_of(self, label: str, other: str) -> dict[str, Difference]:
        """:meth:`gain` over seeds, by the names of the cells; ``label`` may be ``best``."""
        labels = [self.best(cell) if label == "best" else label for cell in self.ran]
        found = [self.gain(cell, each, other).seeds for cell, each in zip(self.ran, labels, strict=True)]
        return {cell.cell.name: _there(each) for cell, each in zip(self.ran, found, strict=True)}

    def better_than_both(self) -> list[str]:
        """The cells whose best transform is significantly better than both controls."""
        over = [self.seeds_of("best", other) for other in (BASELINE, CONTROL)]
        return [cell.cell.name for cell in self.ran if all(better(each[cell.cell.name]) for each in over)]

    def most_often_best(self) -> tuple[str, int]:
        """The transform that is the best in most cells, and in how many."""
        return Counter(self.best(cell) for cell in self.ran).most_common(1)[0]

    def tries(self) -> list[int]:
        """How many learning rates the searches tried for a row."""
        return sorted({cell.cell.search.tries for cell in self.ran})

    def perplexity(self, cell: CellResults, label: str) -> float:
        """Mean test perplexity over seeds."""
        return statistics.mean(_there(cell.row(label)).perplexities("test"))

    def ranks(self) -> Iterator[tuple[str, int]]:
        """Effective ranks of log P on validation contexts in the first cell, of seed 0, by label."""
        for row in self.first.rows:
            rank = row.effective_rank(1e-4)
            if rank is not None:
                yield row.row.label, rank

    def with_mixture(self) -> CellResults:
        """The first cell with a Mixture of Softmaxes."""
        return next(cell for cell in self.cells if cell.row("mos") is not None)

    def transform_rates(self) -> dict[str, int]:
        """The rates of f that the searches chose, and for how many rows."""
        rows = [row for cell in self.cells for row in cell.rows if row.row.learns_transform]
        return dict(sorted(Counter(f"{_there(row.chosen).transform_lr:g}" for row in rows).items()))


def _is_comparable(cell: CellResults) -> bool:
    best = cell.best_transform()
    controls = [cell.row(label) for label in (BASELINE, CONTROL)]
    return best is not None and all(row is not None and len(row.runs.keys() & best.runs) > 1 for row in controls)


def _there(found: _Found | None) -> _Found:
    """What every complete study has, unless its trainings diverged."""
    if found is None:
        raise ExperimentError("the report cannot be written: a row of the main study diverged under all seeds but one")
    return found
