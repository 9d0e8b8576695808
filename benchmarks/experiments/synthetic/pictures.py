"""The pictures of the report: gains over Linear-Softmax by d and alpha, and the learned shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine.plots import picture
from .methods import METHODS

_COLUMNS = 4


def heat_maps(
    path: Path, gains: Mapping[str, Mapping[tuple[int, float], float]], dims: Sequence[int], alphas: Sequence[float]
) -> None:
    """Nats of KL less than Linear-Softmax, by method and (d, alpha), on one scale; what was not run is grey."""
    largest = max(abs(value) for of in gains.values() for value in of.values())
    image = None
    with picture(path, math.ceil(len(gains) / _COLUMNS), _COLUMNS, (2.6, 1.7)) as grid:
        for axes, (method, of) in zip(grid.flat, gains.items(), strict=False):
            values = np.array([[of.get((dim, alpha), math.nan) for dim in dims] for alpha in alphas])
            axes.set_facecolor("#d9d9d9")
            axes.grid(False)
            image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
            for row, column in np.ndindex(values.shape):
                value = values[row, column]
                text = "-" if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}"
                colour = "white" if abs(value) > 0.6 * largest else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
            axes.set_xticks(range(len(dims)), [f"{dim}" for dim in dims])
            axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
            axes.set_title(method)
        bar = grid[0, 0].figure.colorbar(image, ax=grid, shrink=0.9)
        bar.set_label("less KL than linear [nats], by d and alpha", fontsize=8)


def shapes(path: Path, learned: Mapping[str, dict[str, Any]]) -> None:
    """f(z) - f(median logit) from the 5 % to the 99.9 % quantile of the logits; ``training.shape`` by method."""
    with picture(path, math.ceil(len(learned) / _COLUMNS), _COLUMNS, (2.6, 2.1)) as grid:
        for axes, (method, kept) in zip(grid.flat, learned.items(), strict=False):
            quantiles = dict(map(tuple, kept["quantiles"]))
            middle = quantiles[0.5]
            z = torch.linspace(quantiles[0.05], quantiles[0.999], 401, dtype=torch.float64)
            f = curve(method, kept, torch.cat([z, z.new_tensor([middle])]))
            f = f[:-1] - f[-1]
            axes.plot(z, z - middle, color="0.6", linewidth=0.8)
            axes.plot(z, f, color="#d62728")
            bottom, top = f.min().item(), f.max().item()
            axes.set_ylim(bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom))
            for share, style in ((0.5, "-"), (0.95, ":"), (0.99, ":")):
                axes.axvline(quantiles[share], color="#1f77b4", linewidth=0.7, linestyle=style)
            axes.set_title(method)
        figure = grid[0, 0].figure
        figure.supxlabel("logit z (blue: median, 95 % and 99 % of the logits lie to the left)", fontsize=9)
        figure.supylabel("f(z) - f(median)", fontsize=9)


def curve(method: str, kept: dict[str, Any], z: Tensor) -> Tensor:
    """The learned f of ``method`` at ``z``, up to an offset."""
    if "curve" in kept:
        return torch.from_numpy(np.interp(z.numpy(), kept["curve"]["z"], kept["curve"]["f"]))
    make = METHODS[method].transform
    assert make is not None  # nothing is kept of mixtures
    function = make(torch.Generator())
    function.load_state_dict({name: torch.tensor(value) for name, value in kept["state"].items()})
    with torch.no_grad():
        return function(z)
