"""Study files: which runs a study has, in which order, and how the learning rates of each row are searched.

A study is a JSON file with

- ``name``, and ``defaults``: fields of :class:`Settings` that differ from the preset "full";
- ``verify``: fields of a small run, with its output and seed, which ``--verify`` repeats;
- ``cells``, each with a ``name``, the fields of :class:`Settings` that it changes, ``seeds``, ``outputs``, optionally
  ``comparisons`` (pairs of labels) and ``search``;
- ``beyond`` (optional): the file of the larger study that this one stands for.

An output is a name, or an object with ``output``, a ``label`` and fields of its own. ``search`` has ``lr`` (a grid,
from low to high), ``transform_lr`` (candidates, the usual one first), ``refinements``, ``seeds`` and ``epochs``. Every
row gets the same number of tries: the grid at the usual ``transform_lr``, then the refinements (:func:`next_try`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .models import OUTPUTS, transform_of
from .settings import PRESETS, Settings, SettingsError, from_values

#: Fields of a cell or a row that are no settings.
_CELL_KEYS = {"name", "seeds", "outputs", "search", "comparisons"}
_ROW_KEYS = {"output", "label"}
_SEARCH_KEYS = {"lr", "transform_lr", "refinements", "seeds", "epochs"}
_STUDY_KEYS = {"name", "defaults", "verify", "cells", "beyond", "about"}
#: What a study decides itself.
_NOT_FREE = {"output", "seeds", "minutes", "time_limit"}


class StudyError(Exception):
    """A study file is not as it must be, or its results do not belong to it."""


@dataclass(frozen=True)
class Try:
    """Learning rates, and the validation perplexity that they led to; infinity where training diverged."""

    lr: float
    transform_lr: float
    perplexity: float = math.nan


@dataclass(frozen=True)
class Search:
    """How the learning rates of a row are found."""

    lr: tuple[float, ...]
    transform_lr: tuple[float, ...]
    refinements: int
    seeds: tuple[int, ...]
    epochs: float

    @property
    def tries(self) -> int:
        """How many pairs of learning rates every row tries."""
        return len(self.lr) + self.refinements


@dataclass(frozen=True)
class Row:
    """An output layer in a cell, under the name ``label``; ``settings`` name neither its learning rates nor a seed."""

    label: str
    output: str
    settings: Settings

    @property
    def folder(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")

    @property
    def learns_transform(self) -> bool:
        """Whether f has parameters that are trained, so that ``transform_lr`` means something."""
        transform = transform_of(self.output)
        return transform is not None and any(p.requires_grad for p in transform.parameters())


@dataclass(frozen=True)
class Cell:
    """Rows that differ in their output layer and are compared with each other."""

    name: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    search: Search | None
    comparisons: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Unit:
    """One run, which makes one file. ``settings`` are None as long as its learning rates are still searched for."""

    cell: str
    row: Row
    kind: str
    seed: int
    settings: Settings | None
    chosen: Mapping[str, Any] | None = None

    @property
    def path(self) -> Path:
        """Of its result, relative to the folder of the study."""
        assert self.settings is not None
        rates = f"lr{self.settings.lr:g}"
        if self.row.learns_transform:
            rates += f"-transform_lr{self.settings.transform_lr:g}"
        return Path(self.cell) / self.row.folder / f"{self.kind}-{rates}-seed{self.seed}.json"

    def describe(self) -> str:
        """In one line, for the terminal."""
        rates = "learning rate not known yet" if self.settings is None else f"lr {self.settings.lr:g}"
        if self.settings is not None and self.row.learns_transform:
            rates += f", transform_lr {self.settings.transform_lr:g}"
        return f"{self.cell} | {self.row.label} | {self.kind} | seed {self.seed} | {rates}"


@dataclass(frozen=True)
class Study:
    """A study file, checked."""

    name: str
    path: Path
    about: str
    cells: tuple[Cell, ...]
    verify: Unit
    beyond: Path | None

    def units(self, folder: Path) -> list[Unit]:
        """Every run in the order in which they are useful; learning rates come from the results in ``folder``."""
        result = [self.verify]
        for cell in self.cells:
            tries = {row.label: _tries(cell, row, folder) for row in cell.rows}
            for number in range(cell.search.tries if cell.search else 0):
                for row in cell.rows:
                    result += tries[row.label][number]
            chosen = {row.label: choose(cell, row, folder) for row in cell.rows}
            for seed in cell.seeds:
                result += [_main_unit(cell, row, seed, chosen[row.label]) for row in cell.rows]
        return result

    def main_units(self, cell: Cell, folder: Path) -> list[Unit]:
        """The runs of a cell that its table consists of."""
        return [_main_unit(cell, row, seed, choose(cell, row, folder)) for row in cell.rows for seed in cell.seeds]


def read_result(folder: Path, unit: Unit) -> dict[str, Any] | None:
    """The stored result of ``unit``, or None where there is none.

    Raises:
        StudyError: it was made with other settings.
    """
    if unit.settings is None or not (folder / unit.path).is_file():
        return None
    result: dict[str, Any] = json.loads((folder / unit.path).read_text())
    asked = unit.settings.to_json()
    changed = [f"{n}: {result['settings'].get(n)} -> {v}" for n, v in asked.items() if result["settings"].get(n) != v]
    if changed:
        raise StudyError(
            f"{folder / unit.path} was made with other settings ({', '.join(changed)}): give the study or the cell "
            "a new name, or remove the file"
        )
    return result


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


def choose(cell: Cell, row: Row, folder: Path) -> dict[str, Any] | None:
    """The best learning rates of a row with the tries they come from; None as long as not every try is done."""
    if cell.search is None:
        return {"lr": row.settings.lr, "transform_lr": row.settings.transform_lr, "tries": [], "at_edge": False}
    done = _done_tries(cell, row, folder)
    if len(done) < cell.search.tries:
        return None
    best = min(done, key=lambda one: one.perplexity)
    rates = [one.lr for one in done]
    return {
        "lr": best.lr,
        "transform_lr": best.transform_lr,
        "tries": [
            {
                "lr": one.lr,
                "transform_lr": one.transform_lr,
                "valid_perplexity": None if math.isinf(one.perplexity) else one.perplexity,
            }
            for one in done
        ],
        "at_edge": best.lr in (min(rates), max(rates)),
    }


def _tries(cell: Cell, row: Row, folder: Path) -> list[list[Unit]]:
    """The units of each try of a row; with settings as far as the results tell which they are."""
    search = cell.search
    if search is None:
        return []
    done = _done_tries(cell, row, folder)
    known = [Try(one.lr, one.transform_lr) for one in done]
    if len(done) < len(search.lr):
        known += [Try(rate, search.transform_lr[0]) for rate in search.lr[len(done) :]]
    elif len(done) < search.tries:
        known.append(next_try(search, done, row.learns_transform))
    units = [[_search_unit(cell, row, seed, one) for seed in search.seeds] for one in known]
    waiting = [Unit(cell.name, row, "search", seed, None) for seed in search.seeds]
    return units + [waiting] * (search.tries - len(units))


def _done_tries(cell: Cell, row: Row, folder: Path) -> list[Try]:
    """The tries whose runs are all there, up to the first that is not.

    Tries of the grid may be done in any order, but what follows from them is only decided when all of them are known.
    """
    search = cell.search
    assert search is not None
    done: list[Try] = []
    while len(done) < search.tries:
        one = next_try(search, done, row.learns_transform)
        results = [read_result(folder, _search_unit(cell, row, seed, one)) for seed in search.seeds]
        if any(result is None for result in results):
            break
        logs = [math.inf if r["diverged"] else math.log(r["perplexity"]["valid"]) for r in results if r is not None]
        done.append(replace(one, perplexity=math.exp(math.fsum(logs) / len(logs))))
    return done


def _search_unit(cell: Cell, row: Row, seed: int, one: Try) -> Unit:
    assert cell.search is not None
    settings = replace(
        row.settings,
        seeds=(seed,),
        lr=one.lr,
        transform_lr=one.transform_lr,
        epochs=cell.search.epochs,
        validations=1,
    )
    return Unit(cell.name, row, "search", seed, settings)


def _main_unit(cell: Cell, row: Row, seed: int, chosen: dict[str, Any] | None) -> Unit:
    if chosen is None:
        return Unit(cell.name, row, "main", seed, None)
    settings = replace(row.settings, seeds=(seed,), lr=chosen["lr"], transform_lr=chosen["transform_lr"])
    return Unit(cell.name, row, "main", seed, settings, chosen)


def _rounded(rate: float) -> float:
    """To four digits: it becomes part of a file's name."""
    return float(f"{rate:.4g}")


# Reading


def load_study(path: Path) -> Study:
    """The study in the file ``path``.

    Raises:
        StudyError: the file cannot be read, or something in it is missing, unknown or wrong.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise StudyError(f"study file {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise StudyError(f"study file {path} is not JSON: {error}") from error
    try:
        return _study(path, content)
    except (StudyError, SettingsError) as error:
        raise StudyError(f"study file {path}: {error}") from error


def _study(path: Path, content: Mapping[str, Any]) -> Study:
    _require(content, "the study", {"name", "defaults", "verify", "cells"}, _STUDY_KEYS)
    base = replace(PRESETS["full"], time_limit=None, threads=1)
    defaults = _settings(base, content["defaults"], "defaults", set())
    cells = tuple(_cell(defaults, cell) for cell in content["cells"])
    if not cells:
        raise StudyError("cells must not be empty")
    if "verify" in (names := [cell.name for cell in cells]):
        raise StudyError('no cell may be called "verify": the run of --verify has that folder')
    _require_distinct("cells", names)
    beyond = path.parent / content["beyond"] if "beyond" in content else None
    return Study(
        content["name"], path, content.get("about", ""), cells, _verify_unit(defaults, content["verify"]), beyond
    )


def _cell(defaults: Settings, given: Mapping[str, Any]) -> Cell:
    where = f"cell {given.get('name', '?')}"
    _require(given, where, {"name", "seeds", "outputs"}, None)
    if not re.fullmatch(r"[a-z0-9-]+", given["name"]):
        raise StudyError(f"{where}: its name must consist of a-z, 0-9 and -")
    settings = _settings(defaults, given, where, _CELL_KEYS)
    rows = tuple(_row(settings, row, where) for row in given["outputs"])
    _require_distinct(f"{where}: labels of its outputs", [row.folder for row in rows])
    labels = [row.label for row in rows]
    comparisons = tuple((one, other) for one, other in given.get("comparisons", ()))
    for label in (label for pair in comparisons for label in pair):
        if label not in labels:
            raise StudyError(f"{where}: comparisons name {label!r}, which is not among its outputs")
    seeds = _seeds(given["seeds"], where)
    search = _search(given["search"], where) if given.get("search") is not None else None
    if search is not None and set(search.seeds) & set(seeds):
        raise StudyError(f"{where}: the seeds of its search must not be among those of its table")
    return Cell(given["name"], rows, seeds, search, comparisons)


def _row(settings: Settings, given: str | Mapping[str, Any], where: str) -> Row:
    if isinstance(given, str):
        given = {"output": given}
    output = given.get("output")
    if output not in OUTPUTS:
        raise StudyError(f"{where}: output must be of {', '.join(OUTPUTS)}, got {output!r}")
    label = given.get("label", output)
    own = _settings(settings, given, f"{where}, {label}", _ROW_KEYS)
    return Row(label, output, replace(own, output=(output,)))


def _search(given: Mapping[str, Any], where: str) -> Search:
    where = f"{where}, search"
    _require(given, where, _SEARCH_KEYS, _SEARCH_KEYS)
    rates = tuple(given["lr"])
    if len(rates) < 2 or sorted(set(rates)) != list(rates) or not rates[0] > 0:
        raise StudyError(f"{where}: lr must be two or more rates from low to high, got {given['lr']}")
    transform_rates = tuple(given["transform_lr"])
    if not transform_rates or len(set(transform_rates)) < len(transform_rates):
        raise StudyError(f"{where}: transform_lr must be one or more different rates, got {given['transform_lr']}")
    if not (isinstance(given["refinements"], int) and given["refinements"] >= 0):
        raise StudyError(f"{where}: refinements must be a whole number, got {given['refinements']!r}")
    return Search(rates, transform_rates, given["refinements"], _seeds(given["seeds"], where), given["epochs"])


def _verify_unit(defaults: Settings, given: Mapping[str, Any]) -> Unit:
    _require(given, "verify", {"output", "seed"}, None)
    row = _row(defaults, {name: value for name, value in given.items() if name != "seed"}, "verify")
    (seed,) = _seeds([given["seed"]], "verify")
    settings = replace(row.settings, seeds=(seed,))
    return Unit("verify", row, "verify", seed, settings)


def _settings(base: Settings, given: Mapping[str, Any], where: str, others: set[str]) -> Settings:
    values = {name: value for name, value in given.items() if name not in others}
    for name in sorted(_NOT_FREE & set(values)):
        raise StudyError(f"{where}: {name} is not a setting of a study")
    try:
        settings = from_values(base, values)
    except SettingsError as error:
        raise StudyError(f"{where}: {error}") from error
    if settings.threads < 1:
        raise StudyError(f"{where}: threads must be a number, so that a run is the same each time, got 0")
    return settings


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    valid = isinstance(given, list) and given and all(isinstance(seed, int) and seed >= 0 for seed in given)
    if not valid or len(set(given)) < len(given):
        raise StudyError(f"{where}: seeds must be different whole numbers, got {given!r}")
    return tuple(given)


def _require(given: Mapping[str, Any], where: str, needed: set[str], known: set[str] | None) -> None:
    for name in sorted(needed - set(given)):
        raise StudyError(f"{where}: {name} is missing")
    for name in sorted(set(given) - known if known is not None else ()):
        raise StudyError(f"{where}: {name} is not known; known are {', '.join(sorted(known or ()))}")


def _require_distinct(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise StudyError(f"{what} must differ, {name} is there twice")
