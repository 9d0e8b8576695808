"""Plots of a run: time and peak memory against V and against N, on logarithmic axes, with the floors drawn in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..files import replacing

#: What the names of this suite's plots begin with.
PREFIX = "overhead-"
_LABELS = {"classes": "V", "rows": "N"}
_FUNCTIONS = {
    "plain": "#000000",
    "identity": "#8c8c8c",
    "temperature": "#c7a76c",
    "plif-16": "#f4a582",
    "plif-64": "#d62728",
    "plif-1024": "#a50f15",
    "plif-100000": "#67000d",
    "sigsoftmax": "#1f77b4",
    "gss": "#17becf",
    "soft_cap": "#ff9d0a",
    "sigmoid_cap": "#e377c2",
    "monotonic_mlp": "#8c564b",
    "spline": "#9467bd",
    "mos-4": "#2ca02c",
    "mos-15": "#1b6b1b",
    "moc-4": "#8fd14f",
    "moc-15": "#b8cf3c",
}
#: Dashes and marker of each form. What computes the same has the same colour.
_FORMS = {
    "fused": ("-", "o"),
    "cuda": ("-", "o"),
    "triton": ("--", "x"),
    "triton chunked": ("--", "x"),
    "triton recompute": (":", "*"),
    "eager": ("-", "s"),
    "compiled": ("--", "D"),
    "linear_cross_entropy": (":", "^"),
    "linear_cross_entropy chunked": ("-.", "v"),
    "cut-cross-entropy": ((0, (1, 2)), "P"),
    "cut-cross-entropy kernels": ((0, (1, 1)), "X"),
    "liger": ("-.", "d"),
    "fair": ("--", "o"),
    "published": (":", "s"),
}
#: Forms that are drawn of each function; of some functions, the slower forms are drawn, too.
_IN_ALL_FUNCTIONS = {"fused", "cuda", "triton", "triton chunked", "triton recompute"}
_IN_ALL_FORMS = {"plain", "mos-4", "mos-15", "moc-4", "moc-15"}
_Series = dict[str, list[tuple[int, float]]]


def draw(cases: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """A PNG for each group, mode, type and width of the logits that has a sweep over V or N; returns the paths."""
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in cases:
        if record["rows"]:
            case = record["case"]
            kinds[case["group"], case["mode"], case["dtype"], case["std"]].append(record)
    paths = []
    for (group, mode, dtype, std), records in kinds.items():
        figure = cost(records, f"{group}, {mode}, {dtype}, logits of standard deviation {std:g}")
        if figure is not None:
            path = folder / f"{PREFIX}{group}-{mode}-{dtype}-std{std:g}.png"
            with replacing(path) as file:
                figure.savefig(file, format="png", dpi=130)
            paths.append(path)
    return paths


def cost(records: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Time (above) and peak memory (below) against V and N; None where neither has two values at a fixed other one."""
    sweeps = {axis: found for axis in _LABELS if (found := longest_sweep(records, axis))}
    if not sweeps:
        return None
    figure = Figure(figsize=(4.6 * len(sweeps) + 2.6, 8.2), layout="constrained")
    grid = figure.subplots(2, len(sweeps), squeeze=False)
    for (axis, sweep), (above, below) in zip(sweeps.items(), grid.T, strict=True):
        fixed = {name: value for name, value in sweep[0]["case"].items() if name in ("rows", "classes", "dim")}
        del fixed[axis]
        at = ", ".join(f"{_LABELS.get(name, 'd')} = {value:,}" for name, value in fixed.items() if value is not None)
        _plot(above, series(sweep, axis, "median_ms"))
        _draw_floors(above, sweep, axis)
        above.set_title(at)
        above.set_ylabel("time [ms]")
        _plot(
            below,
            {name: [(x, y / 2**20) for x, y in points] for name, points in series(sweep, axis, "peak_bytes").items()},
        )
        _draw_logits(below, sweep, axis)
        below.set_ylabel("peak memory beyond inputs, gradients [MiB]")
        for axes in (above, below):
            _set_scale(axes, [record["case"][axis] for record in sweep])
            axes.set_xlabel(_LABELS[axis])
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles.update((label, handle) for handle, label in zip(*axes.get_legend_handles_labels(), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    return figure


def longest_sweep(records: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    """The cases that differ in ``axis`` only, in its order: of all such sets the largest; empty if that is one case."""
    sets: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        sets[tuple(value for name, value in record["case"].items() if name != axis)].append(record)
    # Of equally long ones, that of the largest cases: they are measured best.
    largest = max(sets.values(), key=lambda found: (len(found), found[0]["case"]["rows"], found[0]["case"]["classes"]))
    return sorted(largest, key=lambda record: int(record["case"][axis])) if len(largest) > 1 else []


def series(sweep: Sequence[Mapping[str, Any]], axis: str, figure: str) -> _Series:
    """The points of each contestant that is drawn and has at least two of them."""
    found: _Series = defaultdict(list)
    for record in sweep:
        for row in record["rows"]:
            function, form = row["name"].split(" ", 1)
            drawn = form in _FORMS and (form in _IN_ALL_FUNCTIONS or function in _IN_ALL_FORMS)
            if drawn and row[figure] is not None:
                # Memory below 0.1 MiB is that of pages and threads.
                value = max(row[figure], 0.1 * 2**20) if figure == "peak_bytes" else row[figure]
                found[row["name"]].append((record["case"][axis], value))
    return {name: points for name, points in found.items() if len(points) > 1}


def _plot(axes: Axes, lines: _Series) -> None:
    for name, points in lines.items():
        function, form = name.split(" ", 1)
        dashes, marker = _FORMS[form]
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            # A PLIF of another number of pieces has the colour of the usual one.
            color=_FUNCTIONS.get(function, _FUNCTIONS["plif-64"]),
            linestyle=dashes,
            marker=marker,
            markersize=4,
            linewidth=1.4,
        )


def _draw_floors(axes: Axes, sweep: Sequence[Mapping[str, Any]], axis: str) -> None:
    values = [record["case"][axis] for record in sweep]
    for name, label, colour in (
        ("memory_ms", "floor: bytes / copy bandwidth", "#5b8fd6"),
        ("products_ms", "floor: bare matrix products", "#d68f5b"),
    ):
        heights = [record["floor"][name] for record in sweep]
        if None not in heights:
            axes.plot(values, heights, label=label, color=colour, linewidth=4, alpha=0.45, zorder=0)


def _draw_logits(axes: Axes, sweep: Sequence[Mapping[str, Any]], axis: str) -> None:
    itemsize = {"float64": 8, "float32": 4}.get(sweep[0]["case"]["dtype"], 2)
    sizes = [record["case"]["rows"] * record["case"]["classes"] * itemsize / 2**20 for record in sweep]
    values = [record["case"][axis] for record in sweep]
    axes.plot(values, sizes, label="bytes of the logits", color="0.6", linewidth=4, alpha=0.45, zorder=0)


def _set_scale(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="x", labelrotation=30)
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
