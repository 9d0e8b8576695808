"""What the project promises of its cost on a CPU, held against the results of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import Case

_TRANSFORMS = (
    "identity",
    "temperature",
    "plif-64",
    "sigsoftmax",
    "gss",
    "soft_cap",
    "sigmoid_cap",
    "monotonic_mlp",
    "spline",
)
#: Most that the fused loss may take of the time of the compiled plain one, for N=512, V=32000 in float32; and the aim.
_OF_COMPILED: dict[str, tuple[float, float | None]] = {
    "plif-64": (1.0, 0.75),
    "identity": (0.9, None),
    "sigsoftmax": (0.9, None),
    "soft_cap": (0.9, None),
    "gss": (0.9, None),
    "sigmoid_cap": (0.9, None),
    "monotonic_mlp": (2.5, None),
    "spline": (2.5, None),
    "plif-100000": (3.0, None),
}
_MIB = 2**20


@dataclass(frozen=True)
class Target:
    """A measured figure, the bound that it must keep, and what to aim for."""

    case: str
    claim: str
    value: float
    bound: float
    aim: float | None = None
    at_least: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields, and whether the bound is kept."""
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        return {**self.__dict__, "met": met}


def judge(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The targets that the cases of a run have the figures for, each with its verdict."""
    found: list[Target] = []
    for record in cases:
        case = Case(**record["case"])
        rows = {row["name"]: row for row in record["rows"]}
        for targets in (
            _logits(case, rows),
            _narrow(case, rows),
            _head(case, rows, record["floor"]),
            _mixture(case, rows),
        ):
            found += targets
    return [target.to_json() for target in found]


def _logits(case: Case, rows: Mapping[str, Any]) -> Iterator[Target]:
    if (case.group, case.mode, case.rows, case.classes, case.dtype) != ("logits", "train", 512, 32_000, "float32"):
        return
    for function, (bound, aim) in _OF_COMPILED.items():
        ratio = _ratio(rows, "median_ms", f"{function} fused", "plain compiled")
        if ratio is not None:
            yield Target(str(case), f"{function} fused / plain compiled", ratio, bound, aim)
    ratio = _ratio(rows, "median_ms", "plif-64 fused", "plain eager")
    if ratio is not None:
        yield Target(str(case), "plif-64 fused / plain eager", ratio, 0.6, 0.4)


def _narrow(case: Case, rows: Mapping[str, Any]) -> Iterator[Target]:
    if (case.group, case.mode, case.rows, case.classes) != ("logits", "train", 512, 32_000) or case.itemsize != 2:
        return
    for function in _TRANSFORMS:
        ratio = _ratio(rows, "median_ms", f"{function} fused", f"{function} fused float32")
        if ratio is not None:
            yield Target(str(case), f"{function} fused / the same in float32", ratio, 1.0)


def _head(case: Case, rows: Mapping[str, Any], floor: Mapping[str, Any] | None) -> Iterator[Target]:
    if (case.group, case.classes, case.dim, case.dtype) != ("head", 32_000, 1024, "float32"):
        return
    row = rows.get("plif-64 fused")
    if row is None or floor is None or row["median_ms"] is None:
        return
    if case.rows == 2048 and case.mode == "no-grad":
        yield Target(str(case), "plif-64 fused / one product", row["median_ms"] / floor["products_ms"], 1.10)
    if case.mode != "train":
        return
    if case.rows == 2048:
        yield Target(str(case), "plif-64 fused / three products", row["median_ms"] / floor["products_ms"], 1.12, 1.06)
        ratio = _ratio(rows, "median_ms", "plif-64 fused", "plain eager")
        if ratio is not None:
            yield Target(str(case), "plif-64 fused / plain eager", ratio, 1.0)
    if case.rows in (2048, 8192) and row["peak_bytes"] is not None:
        yield Target(str(case), "plif-64 fused, peak MiB", row["peak_bytes"] / _MIB, 80.0)


def _mixture(case: Case, rows: Mapping[str, Any]) -> Iterator[Target]:
    if (case.group, case.mode, case.dim, case.dtype) != ("head", "train", 280, "float32"):
        return
    for figure, label in (("median_ms", "time"), ("peak_bytes", "peak memory")):
        mixtures = [row for name, row in rows.items() if name.startswith("mos-15 ") and row[figure] is not None]
        if mixtures:
            best = min(mixtures, key=lambda row: float(row[figure]))
            ratio = _ratio(rows, figure, best["name"], "plif-64 fused")
            if ratio is not None:
                yield Target(str(case), f"{label} of {best['name']} / plif-64 fused", ratio, 20.0, at_least=True)


def _ratio(rows: Mapping[str, Any], figure: str, one: str, other: str) -> float | None:
    """``figure`` of one row relative to that of another; None where either is missing."""
    values = [float(rows[name][figure]) for name in (one, other) if name in rows and rows[name][figure] is not None]
    if len(values) < 2:
        return None
    # Peaks of less than a MiB are those of pages and threads: they count as one MiB.
    least = _MIB if figure == "peak_bytes" else 0.0
    return max(values[0], least) / max(values[1], least)
