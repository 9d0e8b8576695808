"""The pictures of the report: gains over Linear-Softmax by d and alpha, and the learned shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .methods import METHODS

#: Gains: by (d, alpha), nats of KL less than Linear-Softmax.
Gains = Mapping[tuple[int, float], float]

_MISSING = "#d9d9d9"


def heat_maps(gains: Mapping[str, Gains], dims: Sequence[int], alphas: Sequence[float]) -> Figure:
    """The gain of each method by d and alpha, all on one scale; cells that were not run are grey.

    Args:
        gains: by method; a missing (d, alpha) was not run.
        dims, alphas: columns and rows.
    """
    columns = min(4, len(gains))
    rows = math.ceil(len(gains) / columns)
    figure = Figure(figsize=(3.1 * columns + 0.9, 1.9 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    largest = max(abs(value) for of in gains.values() for value in of.values())
    image = None
    for axes in grid.flat[len(gains) :]:
        axes.set_axis_off()
    for axes, (method, of) in zip(grid.flat, gains.items(), strict=False):
        values = np.array([[of.get((dim, alpha), math.nan) for dim in dims] for alpha in alphas])
        axes.set_facecolor(_MISSING)
        image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            text = "not run" if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}"
            strong = not math.isnan(value) and abs(value) > 0.6 * largest
            size = 6 if math.isnan(value) else 8
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if strong else "black")
        axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
        axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_title(method, fontsize=9)
        axes.tick_params(labelsize=7, length=0)
    for axes in grid[:, 0]:
        axes.set_ylabel("alpha", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("d", fontsize=8)
    assert image is not None  # there is at least one method
    bar = figure.colorbar(image, ax=grid, shrink=0.9)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("gain: less KL [nats]", fontsize=8)
    return figure


def shapes(learned: Mapping[str, dict[str, Any]]) -> Figure:
    """f(z) - f(median logit) of each method from the 5 % to the 99.9 % quantile of its logits.

    Args:
        learned: what :func:`benchmarks.synthetic.training.shape` kept, by method.
    """
    columns = min(4, len(learned))
    rows = math.ceil(len(learned) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(learned) :]:
        axes.set_axis_off()
    for axes, (method, kept) in zip(grid.flat, learned.items(), strict=False):
        quantiles = dict(map(tuple, kept["quantiles"]))
        low, middle, high = quantiles[0.05], quantiles[0.5], quantiles[0.999]
        z = torch.linspace(low, high, 401, dtype=torch.float64)
        f = curve(method, kept, torch.cat([z, torch.tensor([middle], dtype=torch.float64)]))
        axes.plot(z, z - middle, color="0.6", linewidth=0.8, label="identity")
        axes.plot(z, f[:-1] - f[-1], color="#d62728", linewidth=1.6)
        bottom, top = (f[:-1] - f[-1]).min().item(), (f[:-1] - f[-1]).max().item()
        axes.set_ylim(bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom))
        for share, style in ((0.5, "-"), (0.95, ":"), (0.99, ":")):
            axes.axvline(quantiles[share], color="#1f77b4", linewidth=0.7, linestyle=style)
        axes.set_title(method, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("logit z (blue: median, 95 % and 99 % of the logits lie to the left)", fontsize=9)
    figure.supylabel("f(z) - f(median)", fontsize=9)
    return figure


def curve(method: str, kept: dict[str, Any], z: Tensor) -> Tensor:
    """The learned f of ``method`` at ``z``, up to an offset."""
    if "curve" in kept:
        points = kept["curve"]
        return torch.from_numpy(np.interp(z.numpy(), points["z"], points["f"]))
    make = METHODS[method].transform
    assert make is not None  # nothing is kept of mixtures
    function = make(torch.Generator())
    function.load_state_dict({name: torch.tensor(value) for name, value in kept["state"].items()})
    with torch.no_grad():
        return function(z)
