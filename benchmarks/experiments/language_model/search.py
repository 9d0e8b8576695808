"""The units of a study, and the learning rates that the searches among them find."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest

from ...engine.experiment import Results, Unit
from .studies import Cell, Row, Search, Study

#: Of the tries; it is in no table.
SEARCH_SEED = 100


@dataclass(frozen=True)
class Try:
    """A pair of learning rates, and the validation perplexity that a training with them ended with.

    ``at_edge``, of the best pair: no lower or no higher rate was tried.
    """

    lr: float
    transform_lr: float
    perplexity: float = math.nan
    at_edge: bool = False


@dataclass(frozen=True)
class Preparation:
    """A corpus as a study reads it."""

    corpus: str
    text_style: str
    vocabulary_size: int | None
    min_count: int
    batch_size: int
    evaluation_tokens: int | None


def units(study: Study, results: Results) -> Iterator[Unit]:
    """Every unit of ``study`` that is known by now, in the order in which they are useful."""
    if study.verify is not None:
        yield Unit(f"{study.name}/verify/{study.verify.output}/seed{study.verify.seed}", study.verify)
    yield from dict.fromkeys(corpus_unit(study, cell) for cell in study.cells)
    for cell in study.cells:
        found = [[search_unit(study, cell, row, one) for one in tries(study, cell, row, results)] for row in cell.rows]
        yield from (unit for turn in zip_longest(*found) for unit in turn if unit is not None)
        chosen = {row: choose(study, cell, row, results) for row in cell.rows}
        for seed in cell.seeds:
            for row, best in chosen.items():
                if best is not None:
                    settings = replace(row.settings, seed=seed, lr=best.lr, transform_lr=best.transform_lr)
                    yield Unit(f"{study.name}/{cell.name}/{row.slug}/seed{seed}", settings)


def corpus_unit(study: Study, cell: Cell) -> Unit:
    """What is found out about the corpus of a cell once for all of its trainings."""
    settings = cell.rows[0].settings
    preparation = Preparation(**{field.name: getattr(settings, field.name) for field in fields(Preparation)})
    return Unit(f"{study.name}/corpus/{settings.corpus}-{settings.vocabulary_size or 'all'}", preparation)


def search_unit(study: Study, cell: Cell, row: Row, one: Try) -> Unit:
    """A training at a pair of rates, of which only the validation perplexity is measured."""
    pair = {"lr": one.lr, "transform_lr": one.transform_lr}
    settings = replace(row.settings, seed=SEARCH_SEED, epochs=cell.search.epochs, validations=1, **pair)
    rates = f"lr{one.lr:g}" + (f"-transform_lr{one.transform_lr:g}" if row.learns_transform else "")
    return Unit(f"{study.name}/{cell.name}/{row.slug}/search-{rates}-seed{SEARCH_SEED}", settings)


def next_try(search: Search, done: Sequence[Try], learns_transform: bool) -> Try:
    """The pair of learning rates to try after ``done``, by one rule for every row.

    First the grid. Then, as long as the best rate is the lowest or highest that was tried, one step further out; else
    another ``transform_lr`` at the best rate, for a row that trains f and has one left; else the geometric mean of the
    best rate and its better neighbour.
    """
    if len(done) < len(search.lr):
        return Try(search.lr[len(done)], search.transform_lr[0])
    best = _best(done)
    rates = sorted({one.lr for one in done})
    place = rates.index(best.lr)
    if place in (0, len(rates) - 1):
        inner = rates[1] if place == 0 else rates[-2]
        return Try(_rounded(best.lr * best.lr / inner), best.transform_lr)
    tried = {one.transform_lr for one in done if one.lr == best.lr}
    left = [rate for rate in search.transform_lr if rate not in tried]
    if learns_transform and left:
        return Try(best.lr, left[0])
    neighbour = _best([one for one in done if one.lr in (rates[place - 1], rates[place + 1])])
    return Try(_rounded(math.sqrt(best.lr * neighbour.lr)), best.transform_lr)


def tries(study: Study, cell: Cell, row: Row, results: Results) -> list[Try]:
    """The tries of a row that are known, with perplexity NaN where they are not done, and infinity where they diverged.

    Those of the grid may be done in any order, but what follows from them is only known when all of them are done.
    """
    search, found = cell.search, list[Try]()
    while len(found) < search.tries and (len(found) < len(search.lr) or _done(found)):
        one = next_try(search, found, row.learns_transform)
        record = results.get(search_unit(study, cell, row, one).name)
        if record is not None:
            diverged = "diverged" in record.figures
            one = replace(one, perplexity=math.inf if diverged else record.figures["perplexity"]["valid"])
        found.append(one)
    return found


def choose(study: Study, cell: Cell, row: Row, results: Results) -> Try | None:
    """The best learning rates of a row; None as long as not every try is done."""
    found = tries(study, cell, row, results)
    if len(found) < cell.search.tries or not _done(found):
        return None
    best, rates = _best(found), [one.lr for one in found]
    return replace(best, at_edge=best.lr in (min(rates), max(rates)))


def _best(found: Sequence[Try]) -> Try:
    return min(found, key=lambda one: one.perplexity)


def _done(found: Sequence[Try]) -> bool:
    return not any(math.isnan(one.perplexity) for one in found)


def _rounded(rate: float) -> float:
    """To four digits: it becomes part of a name."""
    return float(f"{rate:.4g}")
