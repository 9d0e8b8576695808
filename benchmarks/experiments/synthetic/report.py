"""The section of the report and its pictures, from the stored results: a part for each cell that is complete."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ...engine import document
from ...engine.experiment import Experiment, Record, Results
from ...engine.plots import picture
from ...engine.statistics import SIGNIFICANCE, Difference, holm, mean_and_spread, over_seeds, p_value
from .methods import METHODS, size
from .settings import ALPHAS, EAGER, GRID, GRID_METHODS, LARGER, LEARNING_RATES, MAIN, STUDY, TIMINGS, Cell
from .training import TOLERANCES

BASELINE, CONTROL = "linear", "temperature"
_PUBLISHED = (
    ("published-sgd", "published-frozen"),
    ("published-adam", "published-sgd"),
    ("published-frozen", BASELINE),
    ("plif", "plif-frozen"),
)


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

    def against(self, other: str = BASELINE) -> dict[str, tuple[Difference, float]]:
        """The difference of every method from ``other``, and its p, adjusted by Holm for all of them."""
        found = {method: self.difference(method, other) for method in self.methods if method not in (BASELINE, other)}
        there = {method: difference for method, difference in found.items() if difference is not None}
        adjusted = holm([difference.p for difference in there.values()])
        return {method: (there[method], p) for method, p in zip(there, adjusted, strict=True)}

    def marks(self) -> dict[str, str]:
        """A star for a KL that is significantly below that of Linear-Softmax, a cross for one that is above."""
        return {m: "" if p >= SIGNIFICANCE else " *" if d.mean < 0 else " †" for m, (d, p) in self.against().items()}


def _main(found: Found, folder: Path) -> dict[str, Any]:
    """What the template says about the cell with all methods."""
    marks = found.marks()
    shapes = {m: s for m in METHODS if not m.startswith(BASELINE) for s in found.values(m, "shape")}
    _draw_shapes(folder / "synthetic-shapes.png", shapes)
    means = {m: [mean(found.values(m, figure)) for figure in ("kl", "modes")] for m in METHODS if found.values(m)}
    return {
        "rows": _quality(found),
        "means": {m: (*of, len(found.values(m))) for m, of in means.items() if METHODS[m].transform},
        "sizes": {m: size(m, MAIN.contexts, MAIN.words, MAIN.dim) for m in METHODS},
        "differences": _differences(found),
        "marked": {mark: [m for m in marks if marks[m] == mark] for mark in (" *", "", " †")},
        "published": [(one, other, found.difference(one, other)) for one, other in _PUBLISHED],
    }


def _quality(found: Found) -> pd.DataFrame:
    """A row for each method: what the trainings that did not diverge have reached."""
    cell = found.cell
    frame = found.results.frame(f"{cell.name}/*/seed*").dropna(subset="figures.kl")
    of = frame.rename(columns=lambda name: name.partition(".")[2] or name).groupby("method")
    ranks, seconds = [f"ranks.{tolerance:g}" for tolerance in TOLERANCES], of["step_seconds"].median()
    ends = (LEARNING_RATES[0], LEARNING_RATES[-1])
    rows = pd.DataFrame(
        {
            "lr": of["lr"].first().map(lambda lr: f"{lr:g}*" if lr in ends else f"{lr:g}"),
            "seeds": of.size().astype(str),
            "KL": of["kl"].agg(lambda kl: mean_and_spread([*kl])),
            "modes %": of["modes"].agg(lambda shares: f"{100 * mean(shares):.1f}"),
            "top-5 %": of["top5"].agg(lambda shares: f"{100 * mean(shares):.1f}"),
            f"rank {' / '.join(f'{t:g}' for t in TOLERANCES)}": of[ranks]
            .mean()
            .map("{:.0f}".format)
            .agg(" / ".join, 1),
        }
    ).reindex(found.methods)
    sizes = [size(method, cell.contexts, cell.words, cell.dim) for method in found.methods]
    rows["d"], rows["parameters"] = zip(*((dim, f"{number:,}") for dim, number in sizes), strict=True)
    rows["step / linear"] = (seconds / seconds[BASELINE]).map("{:.2f}".format)
    return rows.reset_index(names="method")


def _differences(main: Found) -> pd.DataFrame:
    """Differences from the baseline and from the control."""
    columns: dict[str, dict[str, str]] = {}
    for other in (BASELINE, CONTROL):
        against = main.against(other)
        texts = {m: f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]" for m, (d, _) in against.items()}
        columns[f"KL - {other}"] = texts
        columns[f"Holm p, {other}"] = {m: p_value(p) for m, (_, p) in against.items()}
        verdicts = {m: "significant" if p < SIGNIFICANCE else "not significant" for m, (_, p) in against.items()}
        columns[f"verdict, {other}"] = verdicts
    return pd.DataFrame(columns).reset_index(names="method")


def _grid(found: Mapping[Cell, Found], folder: Path) -> dict[float, pd.DataFrame]:
    """KL, modes and marks of each method by dimension, for each alpha."""
    texts, gains = {}, {}
    for cell in sorted((MAIN, *GRID), key=lambda cell: cell.dim):
        of = found[cell]
        marks, against = of.marks(), of.against()
        texts[cell.alpha, f"d = {cell.dim}"] = {
            m: f"{mean(of.values(m)):.3f} / {100 * mean(of.values(m, 'modes')):.0f}{marks.get(m, '')}"
            for m in GRID_METHODS
            if of.values(m)
        }
        gains[cell.dim, cell.alpha] = {m: -against[m][0].mean for m in GRID_METHODS if m in against}
    _draw_gains(folder / "synthetic-gains.png", pd.DataFrame(gains))
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


def _multiples(
    path: Path, methods: Collection[str], draw: Callable[[Axes, str], object], x_label: str, y_label: str
) -> None:
    """A small picture for each method."""
    with picture(path, math.ceil(len(methods) / 4), 4, (2.6, 2.0)) as grid:
        for axes, method in zip(grid.flat, methods, strict=False):
            draw(axes, method)
            axes.set(title=method, xlabel="")
        grid[0, 0].figure.supxlabel(x_label, fontsize=9)
        grid[0, 0].figure.supylabel(y_label, fontsize=9)


def _draw_gains(path: Path, gains: pd.DataFrame) -> None:
    """``gains``: nats of KL less than Linear-Softmax; a row for each method, columns (d, alpha)."""

    def draw(axes: Axes, method: str) -> None:
        by_dim = gains.loc[method].unstack().rename(index=str, columns="alpha = {:g}".format)
        by_dim.plot(ax=axes, ylim=limits, marker=".", legend=method == gains.index[0])

    limits = (gains.min().min() - 0.03, gains.max().max() + 0.03)
    _multiples(path, gains.index, draw, "d", "less KL than linear [nats]")


def _draw_shapes(path: Path, learned: Mapping[str, dict[str, Any]]) -> None:
    """f(z) - f(median logit) from the 5 % to the 99.9 % quantile of the logits; ``training.shape`` by method."""

    def draw(axes: Axes, method: str) -> None:
        quantiles = dict(learned[method]["quantiles"])
        z = torch.linspace(quantiles[0.05], quantiles[0.999], 401, dtype=torch.float64)
        middle = torch.tensor([quantiles[0.5]], dtype=torch.float64)
        axes.plot(z, curve(method, learned[method], z) - curve(method, learned[method], middle), color="#d62728")
        axes.axline((quantiles[0.5], 0), slope=1, color="0.6", linewidth=0.8)
        for share, style in ((0.5, "-"), (0.95, ":"), (0.99, ":")):
            axes.axvline(quantiles[share], color="#1f77b4", linewidth=0.7, linestyle=style)

    _multiples(
        path, learned, draw, "logit z (blue: 50 %, 95 %, 99 % of the logits lie to the left)", "f(z) - f(median)"
    )


def curve(method: str, kept: dict[str, Any], z: Tensor) -> Tensor:
    """The learned f of ``method`` at ``z``, up to an offset."""
    if "curve" in kept:
        return torch.from_numpy(np.interp(z.numpy(), kept["curve"]["z"], kept["curve"]["f"]))
    function = METHODS[method].transform(torch.Generator())
    function.load_state_dict({name: torch.tensor(value) for name, value in kept["state"].items()})
    return function(z).detach()
