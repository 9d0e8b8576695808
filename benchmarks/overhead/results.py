"""What the stored cases say, for this experiment's section and for other parts of the report."""

from __future__ import annotations

from typing import Any

from ..engine.experiment import NotRun, Results

#: Units whose figures are cited: a head, the loss of given logits, and a head beside mixtures of softmaxes.
HEAD = "quick/head train N=1024 d=256 V=32000 float32 std 1"
LOGITS = "logits/logits train N=512 V=32000 float32 std 1"
MIXTURES = "head_280/head train N=2048 d=280 V=32000 float32 std 1"


def figure(results: Results, unit: str, name: str, what: str = "median_ms") -> float:
    """A figure of a case; :class:`NotRun` where there is none.

    Args:
        results, unit: of the experiment, and the name of the case, such as :data:`HEAD`.
        name: a contestant, such as ``plif-64 fused``; or ``products`` for the time of the bare matrix products,
            ``four_products`` for those of tokens with the logits computed twice, ``memory`` for that of a copy of the
            bytes that must be moved, ``floor`` for the longer of ``products`` and ``memory``.
        what: ``median_ms``, or ``peak_bytes`` beyond operands, parameters and gradients.
    """
    times: dict[str, Any] = results[unit].times if unit in results else {"contestants": {}}
    floors = {key: times.get(f"{key}_ms") for key in ("memory", "products", "four_products")}
    floors["floor"] = max((floors[key] for key in ("memory", "products") if floors[key] is not None), default=None)
    value = floors[name] if name in floors else times["contestants"].get(name, {}).get(what)
    if value is None:
        raise NotRun(f"python -m benchmarks run overhead --only '{unit}'")
    return float(value)


def ratio(results: Results, unit: str, name: str, other: str, what: str = "median_ms") -> float:
    """The figure of ``name`` over that of ``other``, both as in :func:`figure`."""
    return figure(results, unit, name, what) / figure(results, unit, other, what)
