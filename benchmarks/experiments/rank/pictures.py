"""The pictures: effective ranks by the number of PLIF's pieces, noise against numerical rank, and spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import monosoftmax as ms

from ...engine.plots import picture
from ..language_model.pictures import STYLES as LANGUAGE_MODEL_STYLES
from .matrices import SMALLEST

#: Colour and dashes of each f, those of the language models' pictures where these have it.
_STYLES = {
    **LANGUAGE_MODEL_STYLES,
    "plif-20": ("#d62728", "-"),
    "plif-1000": ("#d62728", "--"),
    "plif-100000": ("#8b1a1b", "-."),
    "published-sgd": ("#8b1a1b", ":"),
    "published-adam": ("#8b1a1b", "-."),
    "mos4": ("#2ca02c", "-"),
}


def pieces(path: Path, ranks: Mapping[int, Mapping[int, Sequence[Mapping[str, int]]]]) -> None:
    """Effective ranks of random PLIFs: by dimension and number of pieces, those of all seeds by tolerance."""
    with picture(path, 1, len(ranks), (4.2, 3.2)) as grid:
        for axes, (dim, by_pieces) in zip(grid[0], ranks.items(), strict=True):
            counts = list(by_pieces)
            for tolerance in by_pieces[counts[0]][0]:
                found = [[each[tolerance] for each in of] for of in by_pieces.values()]
                means = [sum(of) / len(of) for of in found]
                axes.plot(counts, means, marker="o", markersize=4, label=tolerance)
                axes.fill_between(counts, [min(of) for of in found], [max(of) for of in found], alpha=0.15)
            axes.axhline(dim + 1, color="0.4", linewidth=0.8, linestyle=":", label=f"d + 1 = {dim + 1}")
            axes.set_xscale("log")
            axes.set(xlabel="pieces of a random PLIF on [-20, 20]", title=f"d = {dim}")
            axes.legend(title="tolerance")
        grid[0, 0].set_ylabel("effective rank (mean, and range over seeds)")


def noise(path: Path, stds: Sequence[float], found: Mapping[str, Sequence[int]], rank: int) -> None:
    """Ranks of a matrix of rank ``rank`` by the standard deviation of the noise on it."""
    with picture(path, size=(5.6, 3.2)) as grid:
        axes = grid[0, 0]
        for name, values in found.items():
            axes.plot(stds, values, marker="o", markersize=4, label=name)
        axes.axhline(rank, color="0.4", linewidth=0.8, linestyle=":", label=f"true rank {rank}")
        axes.set(xscale="log", yscale="log", ylabel="rank")
        axes.set_xlabel("standard deviation of the noise (largest singular value: 1)")
        axes.legend()


def spectra(path: Path, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Singular values by index, relative to the largest; one part for each of ``groups``, one line for each f."""
    with picture(path, 1, len(groups), (4.2, 3.6)) as grid:
        for axes, (title, named) in zip(grid[0], groups.items(), strict=True):
            colours, dashes = zip(*(_STYLES[name] for name in named), strict=True)
            axes.set_prop_cycle(color=colours, linestyle=dashes)
            values = {name: torch.tensor(of, dtype=torch.float64) for name, of in named.items()}
            ms.analysis.plot_spectrum(values, axes)
            axes.set_ylim(SMALLEST, 1.5)
            axes.set_title(title)
            axes.legend(fontsize=6)
