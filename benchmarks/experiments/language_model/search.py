"""The units of a study, and the learning rates that the searches among them find."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...engine.experiment import Results, Unit
from .studies import SEARCH_SEED, Cell, Row, Search, Study


@dataclass(frozen=True)
class Try:
    """A pair of learning rates, and the validation perplexity that a training with them ended with."""

    lr: float
    transform_lr: float
    perplexity: float = math.nan


@dataclass(frozen=True)
class Chosen:
    """The best pair; ``at_edge`` where no lower or no higher rate was tried."""

    lr: float
    transform_lr: float
    at_edge: bool


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
        known = {row: tries(study, cell, row, results) for row in cell.rows}
        for number in range(cell.search.tries):
            for row, found in known.items():
                if number < len(found):
                    yield search_unit(study, cell, row, found[number])
        chosen = {row: choose(study, cell, row, results) for row in cell.rows}
        for seed in cell.seeds:
            for row, best in chosen.items():
                if best is not None:
                    yield table_unit(study, cell, row, best, seed)


def corpus_unit(study: Study, cell: Cell) -> Unit:
    """What is found out about the corpus of a cell once for all of its trainings."""
    settings = cell.rows[0].settings
    names = Preparation.__dataclass_fields__
    known = "all" if settings.vocabulary_size is None else settings.vocabulary_size
    preparation = Preparation(**{name: getattr(settings, name) for name in names})
    return Unit(f"{study.name}/corpus/{settings.corpus}-{known}", preparation)


def search_unit(study: Study, cell: Cell, row: Row, one: Try) -> Unit:
    """A training at a pair of rates, of which only the validation perplexity is measured."""
    rates = f"lr{one.lr:g}" + (f"-transform_lr{one.transform_lr:g}" if row.learns_transform else "")
    settings = replace(
        row.settings,
        seed=SEARCH_SEED,
        lr=one.lr,
        transform_lr=one.transform_lr,
        epochs=cell.search.epochs,
        validations=1,
    )
    return Unit(f"{study.name}/{cell.name}/{row.slug}/search-{rates}-seed{SEARCH_SEED}", settings)


def table_unit(study: Study, cell: Cell, row: Row, chosen: Chosen, seed: int) -> Unit:
    """A training that the tables consist of."""
    settings = replace(row.settings, seed=seed, lr=chosen.lr, transform_lr=chosen.transform_lr)
    return Unit(f"{study.name}/{cell.name}/{row.slug}/seed{seed}", settings)


def next_try(search: Search, done: Sequence[Try], learns_transform: bool) -> Try:
    """The pair of learning rates to try after ``done``, by one rule for every row.

    First the grid. Then, as long as the best rate is the lowest or highest that was tried, one step further out; else
    another ``transform_lr`` at the best rate, for a row that trains f and has one left; else the geometric mean of the
    best rate and its better neighbour.
    """
    if len(done) < len(search.lr):
        return Try(search.lr[len(done)], search.transform_lr[0])
    best = min(done, key=lambda one: one.perplexity)
    by_rate = {}
    for one in done:
        by_rate[one.lr] = min(one.perplexity, by_rate.get(one.lr, math.inf))
    rates = sorted(by_rate)
    place = rates.index(best.lr)
    if place in (0, len(rates) - 1):
        inner = rates[min(1, len(rates) - 1)] if place == 0 else rates[-2]
        return Try(_rounded(best.lr * best.lr / inner), best.transform_lr)
    tried = {one.transform_lr for one in done if one.lr == best.lr}
    left = [rate for rate in search.transform_lr if rate not in tried]
    if learns_transform and left:
        return Try(best.lr, left[0])
    neighbour = min(rates[place - 1], rates[place + 1], key=lambda rate: by_rate[rate])
    return Try(_rounded(math.sqrt(best.lr * neighbour)), best.transform_lr)


def tries(study: Study, cell: Cell, row: Row, results: Results) -> list[Try]:
    """The tries of a row that are known, with perplexity NaN where they are not done, and infinity where they diverged.

    Those of the grid may be done in any order, but what follows from them is only known when all of them are done.
    """
    search, found = cell.search, list[Try]()
    while len(found) < search.tries and (len(found) < len(search.lr) or all(map(_done, found))):
        one = next_try(search, found, row.learns_transform)
        record = results.get(search_unit(study, cell, row, one).name)
        figures = {} if record is None else record.figures
        perplexity = math.inf if "diverged" in figures else figures.get("perplexity", {}).get("valid", math.nan)
        found.append(replace(one, perplexity=perplexity))
    return found


def choose(study: Study, cell: Cell, row: Row, results: Results) -> Chosen | None:
    """The best learning rates of a row; None as long as not every try is done."""
    found = tries(study, cell, row, results)
    if len(found) < cell.search.tries or not all(map(_done, found)):
        return None
    best = min(found, key=lambda one: one.perplexity)
    rates = [one.lr for one in found]
    return Chosen(best.lr, best.transform_lr, best.lr in (min(rates), max(rates)))


def _done(one: Try) -> bool:
    return not math.isnan(one.perplexity)


def _rounded(rate: float) -> float:
    """To four digits: it becomes part of a name."""
    return float(f"{rate:.4g}")
