"""The runs: what is missing, doing it, and doing some of it once more to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..claims import claimed, lock_of
from ..files import write_text
from ..machine import environment, machine_changes
from . import heads, matrices
from .settings import (
    LARGE_CONTEXTS,
    LARGE_DIM,
    LARGE_LEADING,
    LARGE_WORDS,
    NOISE_PUBLISHED_ROWS,
    NOISE_RANK,
    NOISE_ROWS,
    RANDOM_ROWS,
    SEEDS,
    TOLERANCES,
    Unit,
)

#: By how much figures may differ from those of another machine: relatively (singular values to the largest), and
#: ranks by whole numbers where that is more.
RELATIVE_TOLERANCE, RANK_TOLERANCE = 0.02, 3


class RecordError(Exception):
    """A file of results does not go with these settings."""


def prepare(threads: int) -> None:
    """Make results the same each time: this many threads, and no operator whose sums come in any order."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def path_of(unit: Unit, folder: Path) -> Path:
    """The file that holds the results of ``unit``."""
    return folder / unit.group / f"{unit.name}.json"


def settings_of(unit: Unit) -> dict[str, Any]:
    """What the figures of a unit depend on beside versions and the machine, for JSON."""
    settings: dict[str, Any] = {"group": unit.group, "name": unit.name, "tolerances": list(TOLERANCES)}
    if unit.group == "noise":
        settings |= {"rows": NOISE_ROWS, "rank": NOISE_RANK, "published_rows": NOISE_PUBLISHED_ROWS}
    elif unit.group == "synthetic":
        settings |= heads.synthetic_settings()
    elif unit.group == "language_model":
        settings |= heads.language_model_settings()
    elif unit.group == "large":
        settings |= {"contexts": LARGE_CONTEXTS, "words": LARGE_WORDS, "dim": LARGE_DIM, "leading": LARGE_LEADING}
    else:
        settings |= {"contexts": RANDOM_ROWS, "words": RANDOM_ROWS, "dim": _dim(unit)}
    return settings


def measure(unit: Unit) -> list[dict[str, Any]]:
    """The figures of ``unit``: one entry for each seed, or for each size of the noise."""
    if unit.group == "noise":
        return matrices.noise()
    if unit.group == "synthetic":
        seeds = heads.SYNTHETIC_CELL.seeds
        return [heads.synthetic(unit.name, seed, keep_spectrum=seed == seeds[0]) for seed in seeds]
    if unit.group == "language_model":
        return [heads.language_model(unit.name)]
    if unit.group == "large":
        return [matrices.large(unit.name, SEEDS[0])]
    return [matrices.random_factors(unit.name, _dim(unit), seed, keep_spectrum=seed == SEEDS[0]) for seed in SEEDS]


def read(unit: Unit, folder: Path) -> dict[str, Any] | None:
    """The record of ``unit``; None where there is none yet.

    Raises:
        RecordError: the file has other settings, or is no record.
    """
    path, settings = path_of(unit, folder), settings_of(unit)
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        there = record["settings"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not a record of results: {error}") from error
    if there != settings:
        names = [name for name in settings if there.get(name) != settings[name]]
        changes = ", ".join(f"{name}: {there.get(name)} -> {settings[name]}" for name in names)
        raise RecordError(f"{path} has results of other settings ({changes}): move it away, or choose another --out")
    return record


def execute(units: Sequence[Unit], folder: Path, measured: Callable[[Unit], list[dict[str, Any]]] = measure) -> int:
    """Measure what is missing of ``units`` and no other process is at; returns how many are still missing then."""
    with tqdm(units, unit="unit") as bar:
        for unit in bar:
            bar.set_description(str(unit))
            with claimed(lock_of(folder, str(unit))) as mine:
                # Read only now: another process may have finished it since this one started.
                if mine and read(unit, folder) is None:
                    write(unit, folder, measured(unit))
    return sum(read(unit, folder) is None for unit in units)


def write(unit: Unit, folder: Path, runs: list[dict[str, Any]]) -> None:
    """Write the record of ``unit`` atomically, with one line for each run."""
    lines = ",\n  ".join(json.dumps(run, allow_nan=False) for run in runs)
    head = {"settings": settings_of(unit), "environment": environment()}
    text = "".join(f' "{name}": {json.dumps(value, allow_nan=False)},\n' for name, value in head.items())
    write_text(path_of(unit, folder), f'{{\n{text} "runs": [\n  {lines}\n ]\n}}\n')


def verify(
    units: Sequence[Unit], folder: Path, measured: Callable[[Unit], list[dict[str, Any]]] = measure
) -> list[tuple[str, bool]]:
    """Measure ``units`` once more and compare with their records: a line for each, and whether it is as it must be.

    On the machine, the versions and the number of threads that the record is from, every figure must be the same to
    the last bit. Elsewhere figures may differ by ``RELATIVE_TOLERANCE``, and ranks by ``RANK_TOLERANCE``.

    Raises:
        RecordError: a unit has no record.
    """
    lines = []
    here = environment()
    for unit in units:
        record = read(unit, folder)
        if record is None:
            raise RecordError(f"{path_of(unit, folder)} is missing: run python -m benchmarks.rank first")
        # Through JSON, where tuples are lists.
        again = json.loads(json.dumps(measured(unit)))
        changed = machine_changes(record["environment"], here)
        if again == record["runs"]:
            lines.append((f"{unit}: the same to the last bit", True))
        elif not changed:
            lines.append(
                (f"{unit}: NOT the same, on the same machine: {_first_difference(again, record['runs'])}", False)
            )
        else:
            close = _close(again, record["runs"])
            how = "within the tolerance" if close else f"NOT close: {_first_difference(again, record['runs'])}"
            lines.append((f"{unit}: another machine ({', '.join(changed)}), {how}", close))
    return lines


def _dim(unit: Unit) -> int:
    return int(unit.group.removeprefix("random-d"))


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_close(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        if one and all(isinstance(value, float) for value in one + other):
            # Small singular values are rounding errors of the large ones.
            return all(abs(a - b) <= RELATIVE_TOLERANCE * max(map(abs, other)) for a, b in zip(one, other, strict=True))
        return all(map(_close, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return abs(one - other) <= max(RANK_TOLERANCE, RELATIVE_TOLERANCE * other)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= RELATIVE_TOLERANCE * max(abs(one), abs(other))
    return bool(one == other)


def _first_difference(one: Any, other: Any, place: str = "runs") -> str:
    """Where two values of JSON differ first, and how."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(one[key], other[key], f"{place}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(a, b, f"{place}[{index}]") for index, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return f"{place} is {one!r}, was {other!r}"
    a, b, deeper = next(pair for pair in pairs if pair[0] != pair[1])
    return _first_difference(a, b, deeper)
