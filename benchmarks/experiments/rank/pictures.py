"""The pictures: effective ranks by the number of PLIF's pieces, noise against numerical rank, and spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import monosoftmax as ms

from ...engine.plots import picture
from ..language_model.pictures import STYLES as LANGUAGE_MODEL_STYLES
from .matrices import SMALLEST

#: Colour and dashes of each f, those of the language models' pictures where these have it.
_STYLES = LANGUAGE_MODEL_STYLES | {
    "plif-20": ("#d62728", "-"),
    "plif-1000": ("#d62728", "--"),
    "plif-100000": ("#8b1a1b", "-."),
    "published-sgd": ("#8b1a1b", ":"),
    "published-adam": ("#8b1a1b", "-."),
    "mos4": ("#2ca02c", "-"),
}
_DOTS, _LINE = {"marker": "o", "markersize": 4}, {"color": "0.4", "linewidth": 0.8, "linestyle": ":"}


def pieces(path: Path, ranks: Mapping[int, Mapping[int, Sequence[Mapping[str, int]]]]) -> None:
    """Effective ranks of random PLIFs: by dimension and number of pieces, those of all seeds by tolerance."""
    with picture(path, 1, len(ranks), (4.2, 3.2)) as grid:
        for axes, (dim, by_pieces) in zip(grid[0], ranks.items(), strict=True):
            for tolerance in next(iter(by_pieces.values()))[0]:
                found = [[each[tolerance] for each in of] for of in by_pieces.values()]
                axes.plot([*by_pieces], [sum(of) / len(of) for of in found], label=tolerance, **_DOTS)
                axes.fill_between([*by_pieces], [*map(min, found)], [*map(max, found)], alpha=0.15)
            axes.axhline(dim + 1, label=f"d + 1 = {dim + 1}", **_LINE)
            axes.set(xscale="log", xlabel="pieces of a random PLIF on [-20, 20]", title=f"d = {dim}")
            axes.legend(title="tolerance")
        grid[0, 0].set_ylabel("effective rank (mean, and range over seeds)")


def noise(path: Path, stds: Sequence[float], found: Mapping[str, Sequence[int]], rank: int) -> None:
    """Ranks of a matrix of rank ``rank`` by the standard deviation of the noise on it."""
    with picture(path, size=(5.6, 3.2)) as grid:
        axes = grid[0, 0]
        for name, values in found.items():
            axes.plot(stds, values, label=name, **_DOTS)
        axes.axhline(rank, label=f"true rank {rank}", **_LINE)
        axes.set(xscale="log", yscale="log", ylabel="rank")
        axes.set_xlabel("standard deviation of the noise (largest singular value: 1)")
        axes.legend()


def spectra(path: Path, groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """``singular_values`` by index, relative to the largest; a part for each of ``groups``, a line for each f."""
    with picture(path, 1, len(groups), (4.2, 3.6)) as grid:
        for axes, (title, named) in zip(grid[0], groups.items(), strict=True):
            colours, dashes = zip(*(_STYLES[name] for name in named), strict=True)
            axes.set_prop_cycle(color=colours, linestyle=dashes)
            lines = {name: torch.tensor(of["singular_values"], dtype=torch.float64) for name, of in named.items()}
            ms.analysis.plot_spectrum(lines, axes)
            axes.set(ylim=(SMALLEST, 1.5), title=title)
            axes.legend(fontsize=6)
