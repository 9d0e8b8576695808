"""The results of a study, read from the stored records, and the comparisons between its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from ...engine.experiment import Record, Results
from ...engine.statistics import Difference, holm, over_documents, over_seeds
from .models import transform_of
from .search import Chosen, choose, corpus_unit
from .studies import BASELINE, CONTROL, MAIN, Cell, Row, Study

#: Rows that no gain is looked for in: what gains are measured against, and functions that are not learned.
_NOT_CANDIDATES = (BASELINE, CONTROL, "plif-frozen", "plif-frozen-published")


@dataclass(frozen=True)
class RowResults:
    """A row with what is there of its results.

    Attributes:
        row: what it is.
        chosen: its learning rates; None as long as the search is not done.
        runs: the records by seed of the trainings that did not diverge. ``figures["perplexity"]`` has ``valid`` and
            ``test``, ``figures["losses"]`` the sum of -log p of each test document.
        diverged, missing: the seeds that diverged, or were not run.
        document_tokens: predicted words of each test document.
    """

    row: Row
    chosen: Chosen | None
    runs: dict[int, Record]
    diverged: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    document_tokens: tuple[int, ...] = ()

    def perplexities(self, split: str) -> list[float]:
        """One for each seed that ran."""
        return [run.figures["perplexity"][split] for run in self.runs.values()]

    def effective_rank(self, tolerance: float) -> int | None:
        """Of log P in validation contexts, of seed 0; None where that has not run."""
        return None if 0 not in self.runs else self.runs[0].figures["effective_ranks"][f"{tolerance:g}"]


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
    _against: dict[str, dict[str, Comparison]] = field(default_factory=dict, repr=False)

    def row(self, label: str) -> RowResults | None:
        """The row of that label; None where the cell has none."""
        return next((each for each in self.rows if each.row.label == label), None)

    def against(self, label: str) -> dict[str, Comparison]:
        """By label, every other row minus the row ``label``; p values are adjusted by Holm's method for their number.

        Empty where the row has not run.
        """
        if label not in self._against:
            other = self.row(label)
            ran = [each for each in self.rows if each.row.label != label and each.runs]
            found = [compare(each, other) for each in ran] if other is not None and other.runs else []
            labels = [each.row.label for each in ran][: len(found)]
            self._against[label] = dict(zip(labels, _adjusted(found), strict=True))
        return self._against[label]

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


def read_cells(results: Results, study: Study = MAIN) -> list[CellResults]:
    """What there is of every cell of ``study``, run or not."""
    return [_read_cell(study, cell, results) for cell in study.cells]


def _read_cell(study: Study, cell: Cell, results: Results) -> CellResults:
    corpus = results.get(corpus_unit(study, cell).name)
    tokens = () if corpus is None else tuple(corpus.figures["document_tokens"])
    rows = []
    for row in cell.rows:
        found = {seed: results.get(f"{study.name}/{cell.name}/{row.slug}/seed{seed}") for seed in cell.seeds}
        runs = {seed: run for seed, run in found.items() if run is not None and "diverged" not in run.figures}
        diverged = tuple(seed for seed, run in found.items() if run is not None and seed not in runs)
        missing = tuple(seed for seed, run in found.items() if run is None)
        rows.append(RowResults(row, choose(study, cell, row, results), runs, diverged, missing, tokens))
    return CellResults(cell, tuple(rows))


def compare(one: RowResults, other: RowResults) -> Comparison:
    """The test losses of ``one`` minus those of ``other``, over the seeds that both have.

    Over documents, the loss of each document is the mean over these seeds.
    """
    seeds = sorted(set(one.runs) & set(other.runs))
    if not seeds:
        return Comparison(None, None)
    first, second = ([math.log(each.runs[s].figures["perplexity"]["test"]) for s in seeds] for each in (one, other))
    tokens = one.document_tokens
    return Comparison(
        over_seeds(first, second) if len(seeds) > 1 else None,
        _over_documents(_mean_losses(one, seeds), _mean_losses(other, seeds), tokens) if len(tokens) > 1 else None,
    )


@lru_cache(maxsize=512)
def _over_documents(one: tuple[float, ...], other: tuple[float, ...], tokens: tuple[int, ...]) -> Difference:
    """Kept: the resampling takes a second, and a report has several sections with the same comparison."""
    return over_documents(one, other, tokens)


def _mean_losses(row: RowResults, seeds: Sequence[int]) -> tuple[float, ...]:
    each = zip(*(row.runs[seed].figures["losses"] for seed in seeds), strict=True)
    return tuple(math.fsum(losses) / len(losses) for losses in each)


def _adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    seeds = _adjust([each.seeds for each in comparisons])
    documents = _adjust([each.documents for each in comparisons])
    return [Comparison(one, other) for one, other in zip(seeds, documents, strict=True)]


def _adjust(differences: Sequence[Difference | None]) -> list[Difference | None]:
    adjusted = iter(holm([each.p for each in differences if each is not None]))
    return [None if each is None else replace(each, p=next(adjusted)) for each in differences]
