"""The section of the report and its pictures, from the stored results: a part for each cell that is complete."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ...engine import document
from ...engine.experiment import Experiment, Record, Results
from ...engine.plots import picture
from ...engine.statistics import SIGNIFICANCE, Difference, holm, mean_and_spread, over_seeds, p_value
from .methods import METHODS, size
from .settings import ALPHAS, EAGER, GRID, GRID_METHODS, LARGER, LEARNING_RATES, MAIN, STUDY, TIMINGS, Cell
from .training import TOLERANCES

BASELINE, CONTROL = "linear", "temperature"


def section(experiment: Experiment, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``."""
    missing = [unit.name for unit in experiment.units(results) if unit.name not in results]
    partly = {name.partition("/")[0] for name in missing}
    found = {cell: Found(results, cell, methods) for cell, (methods, _) in STUDY.items() if cell.name not in partly}
    trainings = [record for record in results.values() if "backend" in record.times]
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        cell=MAIN,
        methods=METHODS,
        grid_steps=GRID[0].steps,
        main=_main(found[MAIN], folder) if MAIN in found else None,
        grid=_grid(found, folder) if found.keys() >= {MAIN, *GRID} else {},
        larger={cell: _quality(found[cell]) for cell in LARGER if cell in found},
        timings=[results[name] for each in TIMINGS if (name := f"timing/{each.cell.name}") in results],
        times=_times,
        missing=missing,
        command=experiment.command(),
        backends=Counter(record.times["backend"] for record in trainings),
        environments=document.environments(trainings),
    )


@dataclass(frozen=True)
class Found:
    """What there is of ``methods`` in a cell."""

    results: Results
    cell: Cell
    methods: Iterable[str]

    def by_seed(self, method: str, figure: str = "kl") -> dict[int, Any]:
        """A figure of the trainings that did not diverge."""
        names = {seed: f"{self.cell.name}/{method}/seed{seed}" for seed in STUDY[self.cell][1]}
        figures = {seed: self.results[name].figures for seed, name in names.items() if name in self.results}
        return {seed: of[figure] for seed, of in figures.items() if figure in of}

    def values(self, method: str, figure: str = "kl") -> list[Any]:
        return [*self.by_seed(method, figure).values()]

    def difference(self, one: str, other: str) -> Difference | None:
        """KL minus KL over the seeds that both have; None where there are fewer than two."""
        mine, theirs = self.by_seed(one), self.by_seed(other)
        common = sorted(mine.keys() & theirs.keys())
        return over_seeds([mine[s] for s in common], [theirs[s] for s in common]) if len(common) > 1 else None

    def against(self, other: str = BASELINE) -> pd.DataFrame:
        """The difference of every method from ``other``, with p adjusted by Holm for all of them.

        Its ``mark`` is a star for a KL that is significantly below that of the other, a cross for one that is above.
        """
        found = {method: self.difference(method, other) for method in self.methods if method not in (BASELINE, other)}
        adjusted = holm({method: difference for method, difference in found.items() if difference is not None})
        frame = pd.DataFrame({method: vars(difference) for method, difference in adjusted.items()}).T
        frame["mark"] = np.select([frame["p"] >= SIGNIFICANCE, frame["mean"] < 0], ["", " *"], " †")
        return frame


def _main(found: Found, folder: Path) -> dict[str, Any]:
    """What the template says about the cell with all methods."""
    marks = found.against()["mark"]
    shapes = {m: s for m in METHODS if not m.startswith(BASELINE) for s in found.values(m, "shape")}
    _draw_shapes(folder / "synthetic-shapes.png", shapes)
    means = {m: [mean(found.values(m, figure)) for figure in ("kl", "modes")] for m in METHODS if found.values(m)}
    return {
        "rows": _quality(found),
        "means": {m: (*of, len(found.values(m))) for m, of in means.items() if METHODS[m].transform},
        "sizes": {m: size(m, MAIN.contexts, MAIN.words, MAIN.dim) for m in METHODS},
        "differences": _differences(found),
        "marked": {mark: [*marks.index[marks == mark]] for mark in (" *", "", " †")},
        "difference": found.difference,
    }


def _quality(found: Found) -> pd.DataFrame:
    """A row for each method: what the trainings that did not diverge have reached."""
    cell, frame = found.cell, found.results.frame(f"{found.cell.name}/*/seed*").dropna(subset="figures.kl")
    of = frame.rename(columns=lambda name: name.partition(".")[2] or name).groupby("method")
    header, ranks = f"rank {' / '.join(f'{t:g}' for t in TOLERANCES)}", [f"ranks.{t:g}" for t in TOLERANCES]
    ends, seconds = (LEARNING_RATES[0], LEARNING_RATES[-1]), of["step_seconds"].median()
    columns = {
        "lr": of["lr"].first().map(lambda lr: f"{lr:g}*" if lr in ends else f"{lr:g}"),
        "seeds": of.size().astype(str),
        "KL": of["kl"].agg(lambda kl: mean_and_spread([*kl])),
        "modes %": of["modes"].agg(lambda shares: f"{100 * mean(shares):.1f}"),
        "top-5 %": of["top5"].agg(lambda shares: f"{100 * mean(shares):.1f}"),
        header: of[ranks].mean().map("{:.0f}".format).agg(" / ".join, axis=1),
    }
    rows = pd.DataFrame(columns).reindex(found.methods)
    sizes = [size(method, cell.contexts, cell.words, cell.dim) for method in found.methods]
    rows["d"], rows["parameters"] = zip(*((dim, f"{number:,}") for dim, number in sizes), strict=True)
    rows["step / linear"] = (seconds / seconds[BASELINE]).map("{:.2f}".format)
    return rows.reset_index(names="method")


def _differences(main: Found) -> pd.DataFrame:
    """Differences from the baseline and from the control."""
    columns = {}
    for other in (BASELINE, CONTROL):
        found = main.against(other)
        interval = found.apply("{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format_map, axis=1)
        columns[f"KL - {other}"], columns[f"Holm p, {other}"] = interval, found["p"].map(p_value)
        columns[f"verdict, {other}"] = (found["p"] < SIGNIFICANCE).map({True: "significant", False: "not significant"})
    return pd.DataFrame(columns).reindex([*METHODS][1:]).reset_index(names="method")


def _grid(found: Mapping[Cell, Found], folder: Path) -> dict[float, pd.DataFrame]:
    """KL, modes and marks of each method by dimension, for each alpha."""
    texts, gains = {}, {}
    for cell in sorted((MAIN, *GRID), key=lambda cell: cell.dim):
        of, against = found[cell], found[cell].against()
        marks = dict(against["mark"])
        texts[cell.alpha, f"d = {cell.dim}"] = {
            m: f"{mean(of.values(m)):.3f} / {100 * mean(of.values(m, 'modes')):.0f}{marks.get(m, '')}"
            for m in GRID_METHODS
            if of.values(m)
        }
        gains[cell.alpha, cell.dim] = -against["mean"].reindex(GRID_METHODS[1:]).astype(float)
    with picture(folder / "synthetic-gains.png", 1, len(ALPHAS), (3.4, 3.4)) as grid:
        for axes, alpha in zip(grid[0], ALPHAS, strict=True):
            by_dim = pd.DataFrame(gains)[alpha].T.rename(index=str)
            by_dim.plot(ax=axes, style=["-"] * 7 + ["--"] * 8, title=f"alpha = {alpha:g}", xlabel="d", legend=False)
        grid[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        grid[0, 0].set_ylabel("less KL than linear [nats]")
    table = pd.DataFrame(texts).reindex(GRID_METHODS)
    return {alpha: table[alpha].reset_index(names="method") for alpha in ALPHAS}


def _times(record: Record) -> list[dict[str, str]]:
    """Medians and quartiles, and medians relative to Linear-Softmax."""
    rows, linear = [], record.times["seconds"][BASELINE]
    for method, of in record.times["seconds"].items():
        row = {"method": "PyTorch's eager F.cross_entropy, Linear-Softmax" if method == EAGER else method}
        for what, quartiles in of.items():
            row[f"{what} ms"] = "{1:.3f} [{0:.3f}, {2:.3f}]".format(*(1e3 * value for value in quartiles))
            row[f"{what} / linear"] = f"{quartiles[1] / linear[what][1]:.2f}"
        rows.append(row)
    return rows


def _draw_shapes(path: Path, learned: Mapping[str, dict[str, Any]]) -> None:
    """f(z) - f(median logit) from the 5 % to the 99.9 % quantile of the logits; ``training.shape`` by method."""
    with picture(path, math.ceil(len(learned) / 4), 4, (2.6, 2.0)) as grid:
        for axes, (method, kept) in zip(grid.flat, learned.items(), strict=False):
            quantiles = dict(kept["quantiles"])
            z = torch.linspace(quantiles[0.05], quantiles[0.999], 401, dtype=torch.float64)
            middle = torch.tensor([quantiles[0.5]], dtype=torch.float64)
            axes.plot(z, curve(method, kept, z) - curve(method, kept, middle), color="#d62728")
            axes.axline((quantiles[0.5], 0), slope=1, color="0.6", linewidth=0.8)
            for share, style in ((0.5, "-"), (0.95, ":"), (0.99, ":")):
                axes.axvline(quantiles[share], linewidth=0.7, linestyle=style)
            axes.set_title(method)
        grid[0, 0].figure.supxlabel("logit z (blue: 50 %, 95 %, 99 % of the logits lie to the left)", fontsize=9)
        grid[0, 0].figure.supylabel("f(z) - f(median)", fontsize=9)


def curve(method: str, kept: dict[str, Any], z: Tensor) -> Tensor:
    """The learned f of ``method`` at ``z``, up to an offset."""
    if "curve" in kept:
        return torch.from_numpy(np.interp(z.numpy(), kept["curve"]["z"], kept["curve"]["f"]))
    function = METHODS[method].transform(torch.Generator())
    function.load_state_dict({name: torch.tensor(value) for name, value in kept["state"].items()})
    return function(z).detach()
