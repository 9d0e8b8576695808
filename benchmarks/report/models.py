"""What the language models say about the claims."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from ..engine.experiment import Results
from ..engine.statistics import Difference
from ..experiments.language_model.results import CellResults, Comparison, RowResults, compare, read_cells
from ..experiments.language_model.studies import BASELINE, CONTROL
from .missing import NotRun, better

_COMMAND = "python -m benchmarks run language_model"


class ModelEvidence:
    """Figures of the main study. Every method raises :class:`NotRun` where its results are not there."""

    def __init__(self, results: Results) -> None:
        self.cells = read_cells(results)

    @cached_property
    def ran(self) -> list[CellResults]:
        """The cells of which a transform can be compared with both controls."""

        def complete(cell: CellResults) -> bool:
            best = cell.best_transform()
            controls = [cell.row(label) for label in (BASELINE, CONTROL)]
            return best is not None and all(
                row is not None and len(row.runs.keys() & best.runs) > 1 for row in controls
            )

        ran = [cell for cell in self.cells if complete(cell)]
        if not ran:
            raise NotRun(_COMMAND)
        return ran

    @property
    def first(self) -> CellResults:
        """The largest cell."""
        return self.cells[0]

    def best(self, cell: CellResults) -> str:
        """The learned f with the lowest validation loss."""
        found = cell.best_transform()
        if found is None:
            raise NotRun(_COMMAND)
        return found.row.label

    def gain(self, cell: CellResults, label: str, other: str) -> Comparison:
        """Test loss of ``label`` minus that of ``other``, p adjusted by Holm, over seeds and over documents."""
        found = cell.against(other).get(label)
        if found is None or found.seeds is None:
            raise NotRun(_COMMAND)
        return found

    def pair(self, cell: CellResults, one: str, other: str) -> Comparison:
        """As :meth:`gain`, of two rows alone: p is not adjusted."""
        found = compare(self._row(cell, one), self._row(cell, other))
        if found.seeds is None:
            raise NotRun(_COMMAND)
        return found

    def seeds_of(self, label: str, other: str) -> dict[str, Difference]:
        """:meth:`gain` over seeds, by the names of the cells; ``label`` may be ``best``."""
        found = {}
        for cell in self.ran:
            seeds = self.gain(cell, self.best(cell) if label == "best" else label, other).seeds
            assert seeds is not None  # gain() has seen to it
            found[cell.cell.name] = seeds
        return found

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
        return statistics.mean(self._row(cell, label).perplexities("test"))

    def ranks(self) -> Iterator[tuple[str, int]]:
        """Effective ranks of log P on validation contexts in the first cell, of seed 0, by label."""
        for row in self.first.rows:
            rank = row.effective_rank(1e-4)
            if rank is not None:
                yield row.row.label, rank

    def with_mixture(self) -> CellResults:
        """The first cell with a Mixture of Softmaxes."""
        for cell in self.cells:
            row = cell.row("mos")
            if row is not None and len(row.runs) > 1:
                return cell
        raise NotRun(_COMMAND)

    def transform_rates(self) -> dict[str, int]:
        """The rates of f that the searches chose, and for how many rows."""
        rows = [row for cell in self.cells for row in cell.rows]
        chosen = [row.chosen for row in rows if row.row.learns_transform]
        counts = Counter(f"{each.transform_lr:g}" for each in chosen if each is not None)
        if not counts:
            raise NotRun(_COMMAND)
        return dict(sorted(counts.items()))

    @staticmethod
    def _row(cell: CellResults, label: str) -> RowResults:
        row = cell.row(label)
        if row is None or not row.runs:
            raise NotRun(_COMMAND)
        return row
