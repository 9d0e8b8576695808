"""The pictures: effective ranks by the number of PLIF's pieces, noise against numerical rank, and spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import monosoftmax as ms

from ..language_model import pictures as language_model
from .settings import TOLERANCES

#: Colour and dashes of each f, those of the language models' pictures where these have it.
STYLES: dict[str, tuple[str, str]] = {
    **language_model.STYLES,
    "plif-20": ("#d62728", "-"),
    "plif-50": ("#f29a9b", "-"),
    "plif-1000": ("#d62728", "--"),
    "plif-100000": ("#8b1a1b", "-."),
    "published-sgd": ("#8b1a1b", ":"),
    "published-adam": ("#8b1a1b", "-."),
    "mos4": ("#2ca02c", "-"),
}
#: Below this share of the largest singular value there is nothing that any tolerance sees.
_SMALLEST = 1e-6


def pieces(ranks: Mapping[int, Mapping[int, Mapping[str, Sequence[int]]]]) -> Figure:
    """Effective ranks of random PLIFs by their number of pieces, one part for each dimension.

    Args:
        ranks: for each dimension and number of pieces, the ranks of all seeds by tolerance.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (dim, by_pieces) in zip(
        figure.subplots(1, len(ranks), sharey=True, squeeze=False)[0], ranks.items(), strict=True
    ):
        for tolerance in TOLERANCES:
            key = f"{tolerance:g}"
            means = [sum(found[key]) / len(found[key]) for found in by_pieces.values()]
            lows, highs = ([limit(found[key]) for found in by_pieces.values()] for limit in (min, max))
            axes.plot(list(by_pieces), means, marker="o", markersize=4, label=key)
            axes.fill_between(list(by_pieces), lows, highs, alpha=0.15)
        axes.axhline(dim + 1, color="0.4", linewidth=0.8, linestyle=":", label=f"d + 1 = {dim + 1}")
        axes.set_xscale("log")
        axes.set_xlabel("pieces of a random PLIF on [-20, 20]")
        axes.set_title(f"d = {dim}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="tolerance")
    figure.axes[0].set_ylabel("effective rank (mean, and range over seeds)")
    return figure


def noise(stds: Sequence[float], found: Mapping[str, Sequence[int]], rows: int, rank: int) -> Figure:
    """Ranks of a matrix of rank ``rank`` by the standard deviation of the noise on it."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, values in found.items():
        axes.plot(stds, values, marker="o", markersize=4, label=name)
    axes.axhline(rank, color="0.4", linewidth=0.8, linestyle=":", label=f"true rank {rank}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("standard deviation of the noise (largest singular value: 1)")
    axes.set_ylabel(f"rank of a matrix of {rows:,} rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def spectra(groups: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Singular values by index, relative to the largest; one part for each of ``groups``, one line for each f."""
    figure = Figure(figsize=(5.2 * len(groups) + 1.6, 4.4), layout="constrained")
    parts = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    legend: dict[str, object] = {}
    for axes, (title, named) in zip(parts, groups.items(), strict=True):
        _spectra(axes, title, named)
        handles, labels = axes.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
        axes.legend_ = None
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", frameon=False)
    return figure


def _spectra(axes: Axes, title: str, named: Mapping[str, Sequence[float]]) -> None:
    colours, dashes = zip(*(STYLES[name] for name in named), strict=True)
    axes.set_prop_cycle(color=colours, linestyle=dashes)
    ms.analysis.plot_spectrum({name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}, axes)
    axes.set_ylim(_SMALLEST, 1.5)
    axes.set_title(title)
