"""The plots: learned transforms above the logits, reliability diagrams, spectra. All from the stored results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import replacing
from .fit_transforms import with_parameters
from .settings import TRANSFORMS

_COLOURS = {
    "identity": "#000000",
    "temperature": "#c7a76c",
    "plif": "#f4a582",
    "plif_40": "#d62728",
    "sigsoftmax": "#1f77b4",
    "gss": "#17becf",
    "soft_cap": "#ff9d0a",
    "sigmoid_cap": "#e377c2",
    "monotonic_mlp": "#8c564b",
    "spline": "#9467bd",
}

Records = Mapping[str, Mapping[str, Any]]


def draw_transforms(records: Records, logits: Mapping[str, Any], path: Path) -> None:
    """f less the identity, 0 at the mean of the largest logits, and f', above histograms of the logits."""
    figure = Figure(figsize=(7.5, 8.5), layout="constrained")
    values, slopes, counts = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.3))
    low, high = logits["range"]
    z = torch.linspace(low, high, 1801, dtype=torch.float64)
    meeting = torch.tensor([logits["mean"]["largest"]], dtype=torch.float64)
    for name, record in records.items():
        transform = with_parameters(TRANSFORMS[name].make(), record["parameters"])
        with torch.no_grad():
            y, slope = transform(z) - transform(meeting) - z + meeting, transform.derivative(z)
        style = {"color": _COLOURS[name], "linewidth": 1.0 if name == "identity" else 1.5}
        values.plot(z, y, label=name, **style)
        slopes.plot(z, slope, **style)
    values.set_ylabel(f"f(z) - z, shifted to 0 at z = {meeting.item():.1f}")
    # SigSoftmax leaves both panels downwards and upwards: its slope is 2 far to the left.
    values.set_ylim(-6, 4)
    values.legend(frameon=False, fontsize=8, ncols=2)
    slopes.set_ylabel("f'(z)")
    slopes.set_ylim(0.5, 1.6)
    edges = torch.linspace(low, high, len(logits["counts"]["all"]) + 1)
    for kind, label in (("all", "all logits"), ("largest", "largest of a context"), ("target", "of the next token")):
        share = torch.tensor(logits["counts"][kind])
        counts.stairs(share / share.sum(), edges, label=label)
    counts.set_yscale("log")
    counts.set_ylabel("share")
    counts.set_xlabel("logit z of the trained head")
    counts.legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_reliability(records: Records, path: Path) -> None:
    """Share of hits against the mean confidence, in each bin of the confidence, less the confidence below it."""
    figure = Figure(figsize=(6.0, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    below.axhline(0, color="0.7", linewidth=0.8)
    for name, record in records.items():
        bins = record["test"]["bins"]
        filled = [b for b in zip(bins["tokens"], bins["confidence"], bins["hits"], strict=True) if b[0]]
        confidence = [total / tokens for tokens, total, _ in filled]
        accuracy = [hits / tokens for tokens, _, hits in filled]
        style = {"color": _COLOURS[name], "marker": "o", "markersize": 3, "linewidth": 1.2}
        above.plot(confidence, accuracy, label=name, **style)
        below.plot(confidence, [a - c for a, c in zip(accuracy, confidence, strict=True)], **style)
    above.set_ylabel("share of hits")
    above.legend(frameon=False, fontsize=8)
    below.set_ylabel("hits - confidence")
    below.set_xlabel("probability of the likeliest token")
    _save(figure, path)


def draw_spectra(alone: Records, together: Records, path: Path) -> None:
    """Singular values of log P over the largest one: with f alone, and with f and the head fitted together."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, records, title in zip(panels, (alone, together), ("f alone", "f and the head together"), strict=True):
        _spectra(axes, records, title)
    panels[0].set_ylabel("singular value k / singular value 1")
    _save(figure, path)


def _spectra(axes: Axes, records: Records, title: str) -> None:
    for name, record in records.items():
        values = torch.tensor(record["test"]["singular_values"], dtype=torch.float64)
        axes.loglog(range(1, len(values) + 1), values / values[0], color=_COLOURS[name], linewidth=1.3, label=name)
    axes.set_title(title)
    axes.set_xlabel("index k")
    # Below, there is nothing but the rounding of the eigenvalues.
    axes.set_ylim(bottom=1e-7)
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    if records:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
