"""The results of a study, read from the stored records, and the comparisons between its rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...engine.experiment import Record, Results
from ...engine.statistics import Difference, holm, over_documents, over_seeds
from .models import MIXTURES
from .search import Try, choose, corpus_unit
from .studies import BASELINE, CONTROL, MAIN, Cell, Row, Study

#: Rows that no gain is looked for in: what gains are measured against, functions that are not learned, and no function.
_NOT_CANDIDATES = (BASELINE, CONTROL, "plif-frozen", "plif-frozen-published", *MIXTURES)
#: Kept: the resampling takes a second, and a report has several sections with the same comparison.
_over_documents = lru_cache(maxsize=512)(over_documents)


@dataclass(frozen=True)
class RowResults:
    """A row with what is there of its results: the learning rates when their search is done, and ``runs`` by seed.

    ``figures["losses"]`` of a run are the sums of -log p of each test document, which has ``document_tokens``.
    """

    row: Row
    chosen: Try | None
    runs: dict[int, Record]
    diverged: tuple[int, ...] = ()  # Seeds, which are not in runs.
    missing: tuple[int, ...] = ()
    document_tokens: tuple[int, ...] = ()

    @property
    def seed0(self) -> dict[str, Any]:
        """The figures of seed 0; empty where that has not run."""
        return self.runs[0].figures if 0 in self.runs else {}

    def perplexities(self, split: str) -> list[float]:
        """One for each seed that ran."""
        return [run.figures["perplexity"][split] for run in self.runs.values()]

    def effective_rank(self, tolerance: float) -> int | None:
        """Of log P in validation contexts, of seed 0; None where that has not run."""
        return self.seed0.get("effective_ranks", {}).get(f"{tolerance:g}")


@dataclass(frozen=True)
class Comparison:
    """Mean differences of test losses, in nats per token; None where there are too few runs."""

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
        """By label, every other row minus the row ``label``; p values are adjusted by Holm's method for their number.

        Empty where the row has not run.
        """
        other = self.row(label)
        if other is None or not other.runs:
            return {}
        found = {each.row.label: compare(each, other) for each in self.rows if each.runs and each is not other}
        seeds = holm({label: each.seeds for label, each in found.items() if each.seeds is not None})
        documents = holm({label: each.documents for label, each in found.items() if each.documents is not None})
        return {label: Comparison(seeds.get(label), documents.get(label)) for label in found}

    def best_transform(self) -> RowResults | None:
        """The learned function with the lowest validation loss; None where no candidate has run."""
        return min(
            (each for each in self.rows if each.runs and each.row.settings.output not in _NOT_CANDIDATES),
            key=lambda each: statistics.mean(math.log(value) for value in each.perplexities("valid")),
            default=None,
        )


def read_cells(results: Results, study: Study = MAIN) -> list[CellResults]:
    """What there is of every cell of ``study``, run or not."""
    return [CellResults(cell, tuple(_read_row(results, study, cell, row) for row in cell.rows)) for cell in study.cells]


def _read_row(results: Results, study: Study, cell: Cell, row: Row) -> RowResults:
    names = {seed: f"{study.name}/{cell.name}/{row.slug}/seed{seed}" for seed in cell.seeds}
    found = {seed: results[name] for seed, name in names.items() if name in results}
    runs = {seed: run for seed, run in found.items() if "diverged" not in run.figures}
    diverged, missing = tuple(found.keys() - runs), tuple(seed for seed in names if seed not in found)
    corpus = results.get(corpus_unit(study, cell).name)
    tokens = () if corpus is None else tuple(corpus.figures["document_tokens"])
    return RowResults(row, choose(study, cell, row, results), runs, diverged, missing, tokens)


def compare(one: RowResults, other: RowResults) -> Comparison:
    """The test losses of ``one`` minus those of ``other``, over the seeds that both have.

    Over documents, the loss of each document is the mean over these seeds.
    """
    seeds, tokens = sorted(one.runs.keys() & other.runs), one.document_tokens
    first, second = ([math.log(each.runs[s].figures["perplexity"]["test"]) for s in seeds] for each in (one, other))
    documents = [_mean_losses(each, seeds) for each in (one, other)]
    return Comparison(
        over_seeds(first, second) if len(seeds) > 1 else None,
        _over_documents(*documents, tokens) if seeds and len(tokens) > 1 else None,
    )


def _mean_losses(row: RowResults, seeds: Sequence[int]) -> tuple[float, ...]:
    each = zip(*(row.runs[seed].figures["losses"] for seed in seeds), strict=True)
    return tuple(math.fsum(losses) / len(losses) for losses in each)
