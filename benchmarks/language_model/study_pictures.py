"""The pictures of a study: gains by cell, learned functions, and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import monosoftmax as ms

from ..statistics import Difference
from .measurements import TOLERANCES
from .models import transform_of
from .pictures import STYLES
from .report import BASELINE
from .study_results import CellResults, Comparison, RowResults


def gains(cells: Sequence[CellResults], against: Mapping[str, Mapping[str, Comparison]]) -> Figure | None:
    """The gain over Linear-Softmax of each row of each cell, with its interval over seeds; None where there is none.

    Args:
        cells: the cells.
        against: for each cell by its name, the comparisons with Linear-Softmax.
    """
    shown = [cell for cell in cells if any(_interval(each) for each in against[cell.cell.name].values())]
    if not shown:
        return None
    lines = sum(len(against[cell.cell.name]) + 1 for cell in shown)
    figure = Figure(figsize=(8.5, 1.2 + 0.24 * lines), layout="constrained")
    axes = figure.subplots()
    place, ticks, names = 0, [], []
    for cell in shown:
        for each in cell.rows:
            comparison = against[cell.cell.name].get(each.row.label)
            difference = None if comparison is None else _interval(comparison)
            if difference is None:
                continue
            colour = STYLES[each.row.output][0]
            over_seeds = comparison is not None and comparison.seeds is not None
            axes.plot(
                [-difference.high, -difference.low], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt"
            )
            axes.plot([-difference.mean], [place], "o", color=colour, markerfacecolor=colour if over_seeds else "white")
            ticks.append(place)
            names.append(f"{cell.cell.name}  {each.row.label}")
            place += 1
        place += 1
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("gain over linear [nats per token], test split; the line is the 95 % interval over seeds\n"
                    "(hollow: over documents, where there is one seed)")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="x", color="0.92")
    return figure


def transforms(cells: Sequence[CellResults]) -> Figure | None:
    """The learned f of each row, a curve for each cell, over the range of its logits; None where none is stored."""
    curves: dict[str, list[tuple[str, RowResults]]] = {}
    for cell in cells:
        for each in cell.rows:
            if each.first is not None and each.first["transform"] and each.row.output != BASELINE:
                curves.setdefault(each.row.label, []).append((cell.cell.name, each))
    if not curves:
        return None
    names = [cell.cell.name for cell in cells]
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes, (label, members) in zip(grid.flat, curves.items(), strict=False):
        for name, each in members:
            _curve(axes, name, each, colormaps["tab10"](names.index(name) % 10))
            handles[name] = axes.lines[-1]
        axes.get_legend().remove()
        axes.set_title(label, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _curve(axes: Axes, name: str, each: RowResults, colour: Any) -> None:
    function = transform_of(each.row.output)
    run = each.first
    assert function is not None and run is not None
    function.load_state_dict({key: torch.tensor(value) for key, value in run["transform"].items()})
    axes.set_prop_cycle(color=[colour])
    # The whole range that the logits of the validation contexts take.
    ms.analysis.plot_transform(function, ax=axes, bounds=(run["logits"]["0"], run["logits"]["1"]), label=name)


def spectra(cell: CellResults) -> Figure | None:
    """Singular values of the log-probabilities of each row of a cell; None where none is stored."""
    measured = [each for each in cell.rows if each.first is not None]
    if not measured:
        return None
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = [STYLES[each.row.output] for each in measured]
    axes.set_prop_cycle(color=[colour for colour, _ in styles], linestyle=[dashes for _, dashes in styles])
    named = {}
    for each in measured:
        assert each.first is not None
        found = each.first["spectrum"]
        ranks = " / ".join(str(found["effective_ranks"][f"{tolerance:g}"]) for tolerance in TOLERANCES)
        named[f"{each.row.label}: {ranks}"] = torch.tensor(found["singular_values"], dtype=torch.float64)
    ms.analysis.plot_spectrum(named, axes)
    # What lies below 1e-7 of the largest singular value is the rounding of the float32 log-probabilities.
    axes.set_ylim(1e-7, 1.5)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend_ = None
    title = "output layer: effective ranks at\n" + ", ".join(f"{tolerance:g}" for tolerance in TOLERANCES)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title=title)
    return figure


def _interval(comparison: Comparison) -> Difference | None:
    return comparison.seeds or comparison.documents
