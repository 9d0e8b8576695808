"""The pictures: learned transforms above the logits, reliability, spectra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...engine.experiment import Record
from ...engine.plots import picture
from .fit import with_parameters
from .measure import kept
from .settings import TRANSFORMS

_COLOURS = dict(zip(TRANSFORMS, ("black", *(f"C{number}" for number in range(9))), strict=True))


def transforms(path: Path, alone: Mapping[str, Record], logits: Mapping[str, Any]) -> None:
    """f less the identity, 0 at the mean of the largest logits, and f', above histograms of the logits."""
    low, high = logits["range"]
    z = torch.linspace(low, high, 901, dtype=torch.float64)
    meeting = torch.tensor([logits["mean"]["largest"]], dtype=torch.float64)
    with picture(path, rows=3, size=(6.4, 2.4)) as grid:
        values, slopes, counts = grid[:, 0]
        for name, record in alone.items():
            f = with_parameters(TRANSFORMS[name].make(), record.figures["parameters"])
            with torch.no_grad():
                values.plot(z, f(z) - f(meeting) - z + meeting, label=name, color=_COLOURS[name])
                slopes.plot(z, f.derivative(z), color=_COLOURS[name])
        # SigSoftmax leaves both panels downwards and upwards: its slope is 2 far to the left.
        values.set(ylabel=f"f(z) - z, shifted to 0 at z = {meeting.item():.1f}", ylim=(-6, 4), xlim=(low, high))
        values.legend(ncols=3)
        slopes.set(ylabel="f'(z)", ylim=(0.5, 1.6), xlim=(low, high))
        edges = torch.linspace(low, high, len(logits["counts"]["all"]) + 1)
        for kind, label in (("all", "all logits"), ("largest", "largest of a context"), ("target", "next token")):
            share = torch.tensor(logits["counts"][kind])
            counts.stairs(share / share.sum(), edges, label=label)
        counts.set(yscale="log", ylabel="share", xlabel="logit z of the trained head", xlim=(low, high))
        counts.legend()


def reliability(path: Path, alone: Mapping[str, Record]) -> None:
    """Share of hits less the mean confidence, in each bin of the confidence."""
    with picture(path, size=(6.4, 3.0)) as grid:
        axes = grid[0, 0]
        axes.axhline(0, color="0.7", linewidth=0.8)
        for name, record in alone.items():
            tokens, confidence, hits = (torch.tensor(sums) for sums in record.figures["bins"].values())
            gaps = (hits - confidence) / tokens
            axes.plot(confidence / tokens, gaps, label=name, color=_COLOURS[name], marker="o", markersize=3)
        axes.set(ylabel="share of hits - confidence", xlabel="probability of the likeliest token")
        axes.legend(ncols=2)


def spectra(path: Path, stages: Mapping[str, Mapping[str, Record]]) -> None:
    """Singular values of log P over the largest one, a panel for each of the stages."""
    with picture(path, columns=len(stages), size=(4.2, 3.2)) as grid:
        for axes, (title, records) in zip(grid[0], stages.items(), strict=True):
            for name, record in records.items():
                values = torch.tensor(record.figures["singular_values"], dtype=torch.float64)
                places = kept(record.settings["evaluation"]["rank_contexts"])
                axes.loglog(places, values / values[0], label=name, color=_COLOURS[name])
            # Below, there is nothing but the rounding of the eigenvalues.
            axes.set(title=title, xlabel="index k", ylim=(1e-7, 2), ylabel="singular value k / singular value 1")
            if records:
                axes.legend()
