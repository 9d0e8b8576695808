"""What the stored cases say, for this experiment's section and for other parts of the report.

``ratio(results, HEAD, "plif-64 fused", "identity fused")`` is what f costs in a head, where ``results`` is
``Store("overhead").results()``.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import pandas as pd

from ..engine.experiment import Results

#: Units whose figures are cited: a head, the loss of given logits, and a head beside mixtures of softmaxes.
HEAD = "quick/head train N=1024 d=256 V=32000 float32 std 1"
LOGITS = "logits/logits train N=512 V=32000 float32 std 1"
MIXTURES = "head_280/head train N=2048 d=280 V=32000 float32 std 1"


class NotMeasured(LookupError):
    """There is no such figure; the message is the command that measures it."""


def figure(results: Results, unit: str, name: str, what: str = "median_ms") -> float:
    """A figure of a case.

    Args:
        results, unit: of the experiment, and the name of the case, such as :data:`HEAD`.
        name: a contestant, such as ``plif-64 fused``; or ``products`` for the time of the bare matrix products,
            ``memory`` for that of a copy of the bytes that must be moved, ``floor`` for the longer of both.
        what: ``median_ms``, or ``peak_bytes`` beyond operands, parameters and gradients.

    Raises:
        NotMeasured: there is none.
    """
    times: dict[str, Any] = results[unit].times if unit in results else {"contestants": {}}
    floors = {key: times.get(f"{key}_ms") for key in ("memory", "products")}
    floors["floor"] = max((each for each in floors.values() if each is not None), default=None)
    row = {"median_ms": floors[name]} if name in floors else times["contestants"].get(name, {})
    if row.get(what) is None:
        raise NotMeasured(f"python -m benchmarks run overhead --only '{unit}'")
    return float(row[what])


def ratio(results: Results, unit: str, name: str, other: str, what: str = "median_ms") -> float:
    """The figure of ``name`` over that of ``other``, both as in :func:`figure`."""
    return figure(results, unit, name, what) / figure(results, unit, other, what)


def frame(results: Results, units: str, names: str = "*") -> pd.DataFrame:
    """A row for each contestant that matches of the units that match: ``unit``, ``contestant``, ``status``, figures.

    ``to_NAME`` is its time relative to that of others; NaN where the case has not both. ``to_wide`` is relative to the
    same with logits in float32.
    """
    others = {"identity": "identity fused", "eager": "plain eager", "compiled": "plain compiled", "floor": "floor"}
    rows = []
    for record in results.matching(units):
        for name, row in record.times["contestants"].items():
            if fnmatchcase(name, names):
                found = {"unit": record.unit, "contestant": name, "status": "measured", **row}
                found["peak_mib"] = math.nan if row.get("peak_bytes") is None else row["peak_bytes"] / 2**20
                for key, other in (others | {"wide": f"{name} float32"}).items():
                    try:
                        found[f"to_{key}"] = ratio(results, record.unit, name, other)
                    except NotMeasured:
                        found[f"to_{key}"] = math.nan
                rows.append(found)
    return pd.DataFrame(rows, columns=None if rows else ["to_wide"])
