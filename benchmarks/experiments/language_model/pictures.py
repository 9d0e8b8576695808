"""The pictures: gains by cell, learned functions, and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes

import monosoftmax as ms

from ...engine.plots import picture
from .measures import TOLERANCES, logits, transform
from .models import transform_of
from .results import CellResults, Comparison, RowResults
from .studies import BASELINE
from .training import Trainer

#: Colour and dashes of each output layer, the same in every picture. Dashes let lines that coincide show through.
STYLES: dict[str, tuple[str, str]] = {
    "linear": ("#000000", "-"), "temperature": ("#8c8c8c", "--"), "plif": ("#d62728", "-"),
    "plif-frozen": ("#f29a9b", "--"), "plif-published": ("#8b1a1b", "-."), "plif-frozen-published": ("#f29a9b", ":"),
    "sigsoftmax": ("#1f77b4", "-"), "gss": ("#17becf", "--"), "softcap": ("#ff9d0a", "--"),
    "softcap-learned": ("#c46a00", ":"), "sigmoidcap": ("#e377c2", "-"), "sigmoidcap-learned": ("#9e3f81", ":"),
    "mlp": ("#8c564b", "-."), "spline": ("#9467bd", "--"), "mos": ("#2ca02c", "-"), "moc": ("#8fd14f", "-."),
}  # fmt: skip


def gains(cells: Sequence[CellResults], path: Path) -> bool:
    """The gain over Linear-Softmax of each row of each cell, with its interval; False, and no picture, without any.

    The interval is over seeds; over documents, with a hollow point, where there is one seed.
    """
    lines: list[tuple[str, str, Comparison] | None] = []
    for cell in cells:
        found = cell.against(BASELINE)
        shown = [
            (f"{cell.cell.name}  {each.row.label}", STYLES[each.row.output][0], found[each.row.label])
            for each in cell.rows
            if each.row.label in found and (found[each.row.label].seeds or found[each.row.label].documents)
        ]
        lines += [*shown, None] if shown else []
    if not lines:
        return False
    with picture(path, size=(8, 0.9 + 0.2 * len(lines))) as grid:
        axes = grid[0, 0]
        for place, line in enumerate(lines):
            if line is None:
                continue
            _, colour, comparison = line
            difference = comparison.seeds or comparison.documents
            assert difference is not None
            inside = colour if comparison.seeds else "white"
            axes.plot([-difference.high, -difference.low], [place, place], color=colour, solid_capstyle="butt")
            axes.plot([-difference.mean], [place], "o", color=colour, markerfacecolor=inside)
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_yticks(*zip(*((place, line[0]) for place, line in enumerate(lines) if line), strict=True))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("gain over linear [nats per token], test split, with its 95 % interval")
    return True


def learned(cells: Sequence[CellResults], path: Path) -> bool:
    """The learned f of each row, a curve for each cell, over the range of its logits; False where none is stored."""
    curves: dict[str, list[tuple[str, RowResults]]] = {}
    for cell in cells:
        for each in cell.rows:
            if 0 in each.runs and "transform" in each.runs[0].figures:
                curves.setdefault(each.row.label, []).append((cell.cell.name, each))
    if not curves:
        return False
    names = [cell.cell.name for cell in cells]
    columns = min(3, len(curves))
    with picture(path, math.ceil(len(curves) / columns), columns, (3.4, 2.9)) as grid:
        handles: dict[str, Any] = {}
        for axes, (label, members) in zip(grid.flat, curves.items(), strict=False):
            for name, each in members:
                _curve(axes, name, each, colormaps["tab10"](names.index(name) % 10))
                handles[name] = axes.lines[-1]
            axes.get_legend().remove()
            axes.set_title(label)
        grid[0, 0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return True


def _curve(axes: Axes, name: str, each: RowResults, colour: Any) -> None:
    function, figures = transform_of(each.row.output), each.runs[0].figures
    assert function is not None
    function.load_state_dict({key: torch.tensor(value) for key, value in figures["transform"].items()})
    axes.set_prop_cycle(color=[colour])
    # The whole range that the logits of the validation contexts take.
    ms.analysis.plot_transform(function, ax=axes, bounds=tuple(figures["logits"]), label=name)


def spectra(found: Mapping[str, tuple[str, Mapping[str, Any]]], path: Path) -> bool:
    """Singular values of the log-probabilities of several output layers; False where there are none.

    Args:
        found: by label, the name of the output layer, and ``singular_values`` and ``effective_ranks``.
        path: of the picture.
    """
    if not found:
        return False
    with picture(path, size=(8, 3.6)) as grid:
        axes = grid[0, 0]
        styles = [STYLES[output] for output, _ in found.values()]
        axes.set_prop_cycle(color=[colour for colour, _ in styles], linestyle=[dashes for _, dashes in styles])
        named = {}
        for label, (_, figures) in found.items():
            ranks = " / ".join(str(figures["effective_ranks"][f"{tolerance:g}"]) for tolerance in TOLERANCES)
            named[f"{label}: {ranks}"] = torch.tensor(figures["singular_values"], dtype=torch.float64)
        ms.analysis.plot_spectrum(named, axes)
        # What lies below 1e-7 of the largest singular value is the rounding of the float32 log-probabilities.
        axes.set_ylim(1e-7, 1.5)
        handles, labels = axes.get_legend_handles_labels()
        axes.get_legend().remove()
        title = "output layer: effective ranks at\n" + ", ".join(f"{tolerance:g}" for tolerance in TOLERANCES)
        axes.figure.legend(handles, labels, loc="outside right upper", title=title, title_fontsize=8)
    return True


def transforms(trainers: Sequence[Trainer], path: Path) -> None:
    """f of each output layer that has one, with the histogram of its logits beneath."""
    shown = [trainer for trainer in trainers if transform(trainer) is not None]
    columns = min(3, len(shown))
    with picture(path, math.ceil(len(shown) / columns), columns, (3.4, 3.4)) as grid:
        for axes, trainer in zip(grid.flat, shown, strict=False):
            function = transform(trainer)
            assert function is not None
            learns = any(parameter.requires_grad for parameter in function.parameters())
            axes.set_prop_cycle(color=[STYLES[trainer.settings.output][0]])
            ms.analysis.plot_transform(function, logits(trainer), axes, label="learned f" if learns else "f, fixed")
            axes.set_title(trainer.settings.output)
