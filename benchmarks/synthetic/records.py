"""The results of units as files, which several processes may fill at the same time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import write_text
from ..machine import environment
from .methods import METHODS, build
from .settings import BETAS, LEARNING_RATES, SEARCH_SEED, WARM_UP_STEPS, Unit


class RecordError(Exception):
    """A file of results does not go with these settings."""


def path_of(unit: Unit, folder: Path) -> Path:
    """The file that holds the results of ``unit``."""
    return folder / unit.cell.name / f"{unit.method}.json"


def settings_of(unit: Unit) -> dict[str, Any]:
    """What the figures of a unit depend on beside seeds, versions and the machine, for JSON."""
    return {
        "cell": unit.cell.to_json(),
        "method": unit.method,
        "learning_rates": list(LEARNING_RATES),
        "search_seed": SEARCH_SEED,
        "warm_up_steps": WARM_UP_STEPS,
        "betas": list(BETAS),
    }


def read(unit: Unit, folder: Path) -> dict[str, Any]:
    """The record of ``unit``: as it is on the disk, or a new one without results.

    Raises:
        RecordError: the file has other settings, or is no record.
    """
    path, settings = path_of(unit, folder), settings_of(unit)
    if not path.is_file():
        cell = unit.cell
        model = build(unit.method, cell.contexts, cell.words, cell.dim, 0)
        return {
            "settings": settings,
            "description": METHODS[unit.method].description,
            "dim": model.context.shape[1],
            "parameters": model.trained_parameters(),
            "lr": None,
            "environments": [],
            "search": [],
            "runs": [],
        }
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


def write(record: dict[str, Any], unit: Unit, folder: Path) -> None:
    """Write the record atomically, with one line for each training: short, and good to compare."""
    lines = []
    for name, value in record.items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"
        else:
            text = json.dumps(value, allow_nan=False)
        lines.append(f' "{name}": {text}')
    write_text(path_of(unit, folder), "{\n" + ",\n".join(lines) + "\n}\n")


def environment_index(record: dict[str, Any]) -> int:
    """The place of this machine and these sources among the environments of the record, which gets it if it is new."""
    here = environment()
    if here not in record["environments"]:
        record["environments"].append(here)
    return int(record["environments"].index(here))


def best_rate(search: list[dict[str, Any]]) -> float | None:
    """The learning rate with the lowest KL; None where the loss diverged at all of them."""
    found = [(run["figures"]["kl"], run["lr"]) for run in search if run["figures"] is not None]
    return min(found)[1] if found else None


def at_edge(lr: float) -> bool:
    """Whether the search might have found a lower KL outside of its range."""
    return lr in (min(LEARNING_RATES), max(LEARNING_RATES))


def missing_searches(record: dict[str, Any]) -> list[float]:
    """The learning rates that are still to be tried."""
    return [lr for lr in LEARNING_RATES if not any(run["lr"] == lr for run in record["search"])]


def missing_seeds(record: dict[str, Any], unit: Unit) -> list[int]:
    """The seeds that are still to be run; none where every learning rate diverged."""
    if not missing_searches(record) and record["lr"] is None:
        return []
    done = {run["seed"] for run in record["runs"]}
    return [seed for seed in unit.cell.seeds if seed not in done]


def missing_runs(record: dict[str, Any], unit: Unit) -> int:
    """How many trainings are still to be done."""
    return len(missing_searches(record)) + len(missing_seeds(record, unit))
