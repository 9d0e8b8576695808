"""The pictures of a run: perplexity over time, the learned f, and the spectrum of the log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

import monosoftmax as ms

from ..files import replacing
from .measurements import TOLERANCES, logits, transform
from .training import Trainer

#: Colour and dashes of each output layer, the same in every picture. Dashes let lines that coincide show through.
STYLES: dict[str, tuple[str, str]] = {
    "linear": ("#000000", "-"),
    "temperature": ("#8c8c8c", "--"),
    "plif": ("#d62728", "-"),
    "plif-frozen": ("#f29a9b", "--"),
    "plif-published": ("#8b1a1b", "-."),
    "plif-frozen-published": ("#f29a9b", ":"),
    "sigsoftmax": ("#1f77b4", "-"),
    "gss": ("#17becf", "--"),
    "softcap": ("#ff9d0a", "--"),
    "softcap-learned": ("#c46a00", ":"),
    "sigmoidcap": ("#e377c2", "-"),
    "sigmoidcap-learned": ("#9e3f81", ":"),
    "mlp": ("#8c564b", "-."),
    "spline": ("#9467bd", "--"),
    "mos": ("#2ca02c", "-"),
    "moc": ("#8fd14f", "-."),
}


def draw(results: dict[str, Any], trainers: Sequence[Trainer], folder: Path) -> list[Path]:
    """Draw the pictures of ``results`` into ``folder``; f and the logits are those of ``trainers`` (the first seed)."""
    figures = {
        "perplexity.png": perplexity(results["layers"]),
        "spectrum.png": spectrum(results["layers"]),
        "transforms.png": transforms(trainers),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            with replacing(folder / name) as file:
                figure.savefig(file, format="png", dpi=130)
            paths.append(folder / name)
    return paths


def perplexity(layers: Sequence[dict[str, Any]]) -> Figure:
    """Validation perplexity over training time and over words."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    over_time, over_words = figure.subplots(1, 2, sharey=True)
    ranked = sorted(layers, key=lambda layer: layer["runs"][0]["history"][-1]["valid_perplexity"], reverse=True)
    lowest, highest = math.inf, 0.0
    for layer in ranked:
        for index, run in enumerate(layer["runs"]):
            values = [point["valid_perplexity"] for point in run["history"]]
            lowest, highest = min(lowest, *values), max(highest, *values)
            label = f"{layer['output']}: {values[-1]:.1f}" if index == 0 else None
            colour, dashes = STYLES[layer["output"]]
            style: dict[str, Any] = {
                "color": colour,
                "linestyle": dashes,
                "marker": "o",
                "markersize": 3,
                "linewidth": 1.5,
            }
            over_time.plot([point["seconds"] / 60 for point in run["history"]], values, label=label, **style)
            over_words.plot([point["tokens"] / 1000 for point in run["history"]], values, **style)
    over_time.set_xlabel("training time of this layer [minutes]")
    over_words.set_xlabel("words trained on [thousands]")
    over_time.set_ylabel("validation perplexity")
    for axes in (over_time, over_words):
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.03, highest * 1.03)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    title = "output layer: last value" + (" of the first seed" if len(layers[0]["runs"]) > 1 else "")
    figure.legend(loc="outside right upper", frameon=False, title=title)
    return figure


def spectrum(layers: Sequence[dict[str, Any]]) -> Figure:
    """Singular values of the log-probability matrix of each layer, with its effective ranks in the legend."""
    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    colours, dashes = zip(*(STYLES[layer["output"]] for layer in layers), strict=True)
    axes.set_prop_cycle(color=colours, linestyle=dashes)
    named = {}
    for layer in layers:
        ranks = " / ".join(str(layer["spectrum"]["effective_ranks"][f"{tolerance:g}"]) for tolerance in TOLERANCES)
        named[f"{layer['output']}: {ranks}"] = torch.tensor(layer["spectrum"]["singular_values"], dtype=torch.float64)
    ms.analysis.plot_spectrum(named, axes)
    # What lies below 1e-7 of the largest singular value is the rounding of the float32 log-probabilities.
    axes.set_ylim(1e-7, 1.5)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend_ = None
    title = "output layer: effective ranks at\n" + ", ".join(f"{tolerance:g}" for tolerance in TOLERANCES)
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title=title)
    return figure


def transforms(trainers: Sequence[Trainer]) -> Figure | None:
    """f of each output layer that has one, with the histogram of its logits beneath; None where none has."""
    shown = [trainer for trainer in trainers if transform(trainer) is not None]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    width, height = 4.2 * columns, 4.2 * rows
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, squeeze=False)
    # By hand: the histograms lie outside of the axes that they belong to, where a layout engine does not look for them.
    figure.subplots_adjust(
        left=0.85 / width, right=1 - 0.15 / width, top=1 - 0.35 / height, bottom=1.25 / height, wspace=0.28, hspace=0.62
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, trainer in zip(grid.flat, shown, strict=False):
        function = transform(trainer)
        assert function is not None
        learned = any(parameter.requires_grad for parameter in function.parameters())
        axes.set_prop_cycle(color=[STYLES[trainer.output][0]])
        ms.analysis.plot_transform(function, logits(trainer), axes, label="learned f" if learned else "f, fixed")
        axes.set_title(trainer.output)
    return figure
