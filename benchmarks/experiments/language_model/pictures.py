"""The pictures: gains by cell, learned functions, and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps

import monosoftmax as ms

from ...engine.plots import picture
from .measures import TOLERANCES, logits
from .models import TRANSFORMS, learns_transform
from .results import CellResults
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
    # A line is left free between two cells.
    lines = [line for cell in cells for line in [*((cell, *each) for each in cell.against(BASELINE).items()), None]]
    shown = {place: line for place, line in enumerate(lines) if line and (line[2].seeds or line[2].documents)}
    if not shown:
        return False
    with picture(path, size=(8, 0.9 + 0.2 * len(lines))) as grid:
        axes = grid[0, 0]
        for place, (cell, label, found) in shown.items():
            difference, colour = found.seeds or found.documents, STYLES[cell.row(label).row.settings.output][0]
            axes.plot([-difference.high, -difference.low], [place, place], color=colour, solid_capstyle="butt")
            axes.plot(-difference.mean, place, "o", color=colour, mfc=colour if found.seeds else "white")
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_yticks(list(shown), [f"{cell.cell.name}  {label}" for cell, label, _ in shown.values()])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("gain over linear [nats per token], test split, with its 95 % interval")
    return True


def learned(cells: Sequence[CellResults], path: Path) -> bool:
    """The learned f of each row, a curve for each cell, over the range of its logits; False where none is stored."""
    stored = [(each, cell.cell.name) for cell in cells for each in cell.rows if "transform" in each.seed0]
    if not stored:
        return False
    labels = list(dict.fromkeys(each.row.label for each, _ in stored))
    colours = {cell.cell.name: colormaps["tab10"](number % 10) for number, cell in enumerate(cells)}
    columns = min(3, len(labels))
    with picture(path, math.ceil(len(labels) / columns), columns, (3.4, 2.9)) as grid:
        handles: dict[str, Any] = {}
        for each, name in stored:
            axes = grid.flat[labels.index(each.row.label)]
            axes.set_prop_cycle(color=[colours[name]])
            function = TRANSFORMS[each.row.settings.output]()
            function.load_state_dict({key: torch.tensor(value) for key, value in each.seed0["transform"].items()})
            # The whole range that the logits of the validation contexts take.
            ms.analysis.plot_transform(function, ax=axes, bounds=tuple(each.seed0["logits"]), label=name)
            handles[name] = axes.lines[-1]
            axes.get_legend().remove()
            axes.set_title(each.row.label)
        grid[0, 0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return True


def spectra(found: Mapping[str, tuple[str, Mapping[str, Any]]], path: Path) -> bool:
    """Singular values of the log-probabilities of several output layers; False where there are none.

    ``found`` has by label the name of the output layer, and ``singular_values`` and ``effective_ranks``.
    """
    if not found:
        return False
    with picture(path, size=(8, 3.6)) as grid:
        axes = grid[0, 0]
        colours, dashes = zip(*(STYLES[output] for output, _ in found.values()), strict=True)
        axes.set_prop_cycle(color=colours, linestyle=dashes)
        named = {}
        for label, (_, figures) in found.items():
            ranks = " / ".join(str(figures["effective_ranks"][f"{tolerance:g}"]) for tolerance in TOLERANCES)
            named[f"{label}: {ranks}"] = torch.tensor(figures["singular_values"], dtype=torch.float64)
        ms.analysis.plot_spectrum(named, axes)
        # What lies below 1e-7 of the largest singular value is the rounding of the float32 log-probabilities.
        axes.set_ylim(1e-7, 1.5)
        axes.get_legend().remove()
        title = "output layer: effective ranks at\n" + ", ".join(f"{tolerance:g}" for tolerance in TOLERANCES)
        axes.figure.legend(loc="outside right upper", title=title, title_fontsize=8)
    return True


def transforms(trainers: Sequence[Trainer], path: Path) -> None:
    """f of each output layer that has one, with the histogram of its logits beneath."""
    shown = [trainer for trainer in trainers if trainer.settings.output in TRANSFORMS]
    columns = min(3, len(shown))
    with picture(path, math.ceil(len(shown) / columns), columns, (3.4, 3.4)) as grid:
        for axes, trainer in zip(grid.flat, shown, strict=False):
            output, function = trainer.settings.output, trainer.model.output.transform
            label = "learned f" if learns_transform(output) else "f, fixed"
            axes.set_prop_cycle(color=[STYLES[output][0]])
            ms.analysis.plot_transform(function, logits(trainer), axes, label=label)
            axes.set_title(output)
