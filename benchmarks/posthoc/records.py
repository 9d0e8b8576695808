"""The results as files, which several processes may fill at the same time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from .settings import BASELINE, CONTROL, TRANSFORMS, HeadSettings

PLIFS = ("plif", "plif_40")


class RecordError(Exception):
    """A file of results does not go with these settings or hidden states, or is no such file."""


def head_unit(name: str, rate: float, seed: int) -> str:
    """The unit of stage 2 with that transform, learning rate of the weight, and seed."""
    return f"head/{name}-rate{rate:g}-seed{seed}"


def transform_unit(name: str) -> str:
    """The unit of stage 1 with that transform."""
    return f"transforms/{name}"


def read(folder: Path, unit: str) -> dict[str, Any] | None:
    """What is stored of a unit; None if nothing is.

    Raises:
        RecordError: the file is no JSON object.
    """
    path = folder / f"{unit}.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not a record of results: {error}") from error
    if not isinstance(found, dict) or "settings" not in found:
        raise RecordError(f"{path} is not a record of results: it has no settings")
    return found


def read_matching(folder: Path, unit: str, settings: Mapping[str, Any], digest: str) -> dict[str, Any] | None:
    """:func:`read`, of these settings and hidden states.

    Raises:
        RecordError: the file is of others.
    """
    found = read(folder, unit)
    if found is None:
        return None
    place = f"{folder / unit}.json"
    if found["settings"] != settings:
        names = ", ".join(name for name in settings if found["settings"].get(name) != settings[name])
        raise RecordError(f"{place} has other settings ({names}): move it away, or choose another --results")
    if found["states"]["digest"] != digest:
        raise RecordError(
            f"{place} is of other hidden states ({found['states']['digest'][:12]}...) than those of this cache "
            f"({digest[:12]}...): choose another --results"
        )
    return found


def write(folder: Path, unit: str, record: Mapping[str, Any]) -> None:
    """Write a record atomically, one line for each of its entries: short, and good to compare."""
    lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items()]
    write_text(folder / f"{unit}.json", "{\n" + ",\n".join(lines) + "\n}\n")


def stage_one(folder: Path) -> dict[str, dict[str, Any]]:
    """What is stored of stage 1, by the names of the transforms, in the order of ``TRANSFORMS``."""
    found = {name: read(folder, transform_unit(name)) for name in TRANSFORMS}
    return {name: record for name, record in found.items() if record is not None}


def head_methods(folder: Path) -> dict[str, str]:
    """The methods of stage 2: the name of the transform by its role, empty as long as stage 1 is not complete.

    The choices are made on the validation split.
    """
    stored = stage_one(folder)
    if len(stored) < len(TRANSFORMS):
        return {}

    def best(names: list[str]) -> str:
        return min(names, key=lambda name: stored[name]["valid_nll"])

    others = [name for name in TRANSFORMS if name not in (BASELINE, CONTROL, *PLIFS)]
    return {"linear": BASELINE, "temperature": CONTROL, "best PLIF": best(list(PLIFS)), "best other": best(others)}


def head_records(folder: Path, name: str, settings: HeadSettings) -> dict[tuple[float, int], dict[str, Any]]:
    """What is stored of stage 2 with that transform, by learning rate and seed."""
    units = {(rate, seed): head_unit(name, rate, seed) for rate in settings.rates for seed in settings.seeds}
    found = {key: read(folder, unit) for key, unit in units.items()}
    return {key: record for key, record in found.items() if record is not None}


def chosen_rate(records: Mapping[tuple[float, int], Mapping[str, Any]], settings: HeadSettings) -> float | None:
    """The rate with the lowest validation loss under the first seed; None until each rate has been tried."""
    tried = {rate: records.get((rate, settings.seeds[0])) for rate in settings.rates}
    if any(record is None for record in tried.values()):
        return None
    return min(settings.rates, key=lambda rate: tried[rate]["valid_nll"])  # type: ignore[index]
