"""The section of the report and its pictures, from the stored results alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine import document
from ...engine.experiment import Experiment, Record, Results
from ...engine.plots import picture
from ...engine.statistics import SIGNIFICANCE, Difference, holm, mean_and_spread, over_seeds, p_value
from . import settings
from .experiment import best_rate, search_name
from .methods import METHODS, size
from .settings import DIMS, GRID, GRID_METHODS, LARGER, LARGER_METHODS, LEARNING_RATES, MAIN, SEEDS, Cell, seeds_of
from .training import TOLERANCES

_COLUMNS = 4
BASELINE, CONTROL = "linear", "temperature"
#: What a transform must reach in the main cell: KL in nats, share of modes.
_WANTED_KL, _WANTED_MODES = 1.05, 0.9
_PUBLISHED = (
    ("published-sgd", "published-frozen"),
    ("published-adam", "published-sgd"),
    ("published-frozen", BASELINE),
    ("plif", "plif-frozen"),
)

Row = dict[str, Any]


def section(experiment: Experiment, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``."""
    main = Found(results, MAIN, METHODS)
    grid = {(cell.dim, cell.alpha): Found(results, cell, GRID_METHODS) for cell in GRID}
    grid[MAIN.dim, MAIN.alpha] = main
    gains = _gains(grid)
    if gains:
        _heat_maps(folder / "synthetic-gains.png", gains)
    shapes = {method: shape for method in METHODS if (shape := main.by_seed(method, "shape").get(SEEDS[0]))}
    shapes = {method: shape for method, shape in shapes.items() if not method.startswith(BASELINE)}
    if shapes:
        _draw_shapes(folder / "synthetic-shapes.png", shapes)
    trainings = [record for record in results.values() if "backend" in record.times]
    backends = [record.times["backend"] for record in trainings]
    transforms = [m for m, how in METHODS.items() if how.transform and not m.startswith(BASELINE) and main.values(m)]
    marks = main.marks()
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        cell=MAIN,
        rows=[_quality(main, method) for method in METHODS],
        methods=METHODS,
        wanted=(_WANTED_KL, _WANTED_MODES),
        found={m: (mean(main.values(m)), mean(main.values(m, "modes")), len(main.values(m))) for m in transforms},
        linear=[row for row in [_quality(main, BASELINE)] if main.values(BASELINE)],
        sizes={name: size(name, MAIN.contexts, MAIN.words, MAIN.dim) for name in METHODS},
        differences=_differences(main),
        marked={mark: [m for m in marks if marks[m] == mark] for mark in (" *", "", " †")},
        published=[(one, other, main.difference(one, other)) for one, other in _PUBLISHED],
        grid_steps=GRID[0].steps,
        grid={alpha: _grid_rows({dim: grid[dim, alpha] for dim in DIMS}) for alpha in settings.ALPHAS},
        gains=gains,
        shapes=shapes,
        larger={cell: [_quality(Found(results, cell, LARGER_METHODS), m) for m in LARGER_METHODS] for cell in LARGER},
        timings=[results[name] for each in settings.TIMINGS if (name := f"timing/{each.cell.name}") in results],
        timing_rows=_timing_rows,
        missing=[unit.name for unit in experiment.units(results) if unit.name not in results],
        command=experiment.command(),
        backends={name: backends.count(name) for name in dict.fromkeys(backends)},
        environments=document.environments(trainings),
    )


@dataclass(frozen=True)
class Found:
    """What there is of ``methods`` in a cell."""

    results: Results
    cell: Cell
    methods: Iterable[str]

    def trainings(self, method: str) -> dict[int, Record]:
        """By seed, diverged or not."""
        names = {seed: f"{self.cell.name}/{method}/seed{seed}" for seed in seeds_of(self.cell)}
        return {seed: self.results[name] for seed, name in names.items() if name in self.results}

    def by_seed(self, method: str, figure: str = "kl") -> dict[int, Any]:
        """A figure of the trainings that did not diverge."""
        return {seed: t.figures[figure] for seed, t in self.trainings(method).items() if figure in t.figures}

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

    def step_seconds(self, method: str) -> float:
        """Median over the seeds."""
        return median(t.times["step_seconds"] for t in self.trainings(method).values() if "kl" in t.figures)


def _quality(found: Found, method: str) -> Row:
    """The row of a method in the table of a cell. It says so where nothing was run."""
    cell, kl = found.cell, found.values(method)
    lr, diverged = best_rate(found.results, cell, method), len(found.trainings(method)) - len(kl)
    if not kl:
        searched = all(search_name(cell, method, each) in found.results for each in LEARNING_RATES)
        return {"method": method, "lr": "diverged at all rates" if searched and lr is None else "not run"}
    dim, parameters = size(method, cell.contexts, cell.words, cell.dim)
    ranks = [mean(each[f"{tolerance:g}"] for each in found.values(method, "ranks")) for tolerance in TOLERANCES]
    linear = found.step_seconds(BASELINE) if found.values(BASELINE) else math.nan
    return {
        "method": method,
        "lr": f"{lr:g}{'*' if lr in (min(LEARNING_RATES), max(LEARNING_RATES)) else ''}",
        "seeds": f"{len(kl)} ({diverged} diverged)" if diverged else len(kl),
        "KL": mean_and_spread(kl),
        "modes %": f"{100 * mean(found.values(method, 'modes')):.1f}",
        "top-5 %": f"{100 * mean(found.values(method, 'top5')):.1f}",
        f"rank {' / '.join(f'{t:g}' for t in TOLERANCES)}": " / ".join(f"{rank:.0f}" for rank in ranks),
        "d": dim,
        "parameters": f"{parameters:,}",
        "step / linear": f"{found.step_seconds(method) / linear:.2f}".replace("nan", "-"),
    }


def _differences(main: Found) -> list[Row]:
    """Differences from the baseline and from the control."""
    rows: dict[str, Row] = {method: {"method": method} for method in METHODS if method != BASELINE}
    for other in (BASELINE, CONTROL):
        against = main.against(other)
        for method, row in rows.items():
            row[f"KL - {other}"] = "-" if method == other else "not run"
            if method in against:
                d, p = against[method]
                row[f"KL - {other}"] = f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
                row[f"Holm p, {other}"] = p_value(p)
                row[f"verdict, {other}"] = "significant" if p < SIGNIFICANCE else "not significant"
    return [*rows.values()]


def _gains(grid: Mapping[tuple[int, float], Found]) -> dict[str, dict[tuple[int, float], float]]:
    """Nats of KL less than Linear-Softmax, by method, d and alpha; what was not run is left out."""
    gains: dict[str, dict[tuple[int, float], float]] = {}
    for key, found in grid.items():
        for method, (difference, _) in found.against(BASELINE).items():
            if method in GRID_METHODS:
                gains.setdefault(method, {})[key] = -difference.mean
    return {method: gains[method] for method in GRID_METHODS if method in gains}


def _grid_rows(by_dim: Mapping[int, Found]) -> list[Row]:
    """KL, modes and marks of each method by dimension."""
    rows: dict[str, Row] = {method: {"method": method} for method in GRID_METHODS}
    for dim, found in by_dim.items():
        marks = found.marks()
        for method, row in rows.items():
            kl, modes = found.values(method), found.values(method, "modes")
            text = f"{mean(kl):.3f} / {100 * mean(modes):.0f}{marks.get(method, '')}" if kl else "not run"
            row[f"d = {dim}"] = text
    return [*rows.values()]


def _timing_rows(record: Record) -> list[Row]:
    """Medians and quartiles, and medians relative to Linear-Softmax."""
    seconds, rows = record.times["seconds"], []
    for method, of in seconds.items():
        row = {"method": "PyTorch's eager F.cross_entropy, Linear-Softmax" if method == settings.EAGER else method}
        for what in ("loss", "step"):
            low, middle, high = (1e3 * value for value in of.get(what, (0, 0, 0)))
            row[f"{what} ms"] = f"{middle:.3f} [{low:.3f}, {high:.3f}]" if what in of else "-"
            row[f"{what} / linear"] = f"{of[what][1] / seconds[BASELINE][what][1]:.2f}" if what in of else "-"
        rows.append(row)
    return rows


def _heat_maps(path: Path, gains: Mapping[str, Mapping[tuple[int, float], float]]) -> None:
    """Nats of KL less than Linear-Softmax, by method and (d, alpha), on one scale; what was not run is grey."""
    largest = max(abs(value) for of in gains.values() for value in of.values())
    image = None
    with picture(path, math.ceil(len(gains) / _COLUMNS), _COLUMNS, (2.6, 1.7)) as grid:
        for axes, (method, of) in zip(grid.flat, gains.items(), strict=False):
            values = np.array([[of.get((dim, alpha), math.nan) for dim in DIMS] for alpha in settings.ALPHAS])
            axes.set_facecolor("#d9d9d9")
            axes.grid(False)
            image = axes.imshow(values, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
            for row, column in np.ndindex(values.shape):
                value = values[row, column]
                text = "-" if math.isnan(value) else f"{round(value, 2) + 0.0:+.2f}"
                colour = "white" if abs(value) > 0.6 * largest else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
            axes.set_xticks(range(len(DIMS)), [f"{dim}" for dim in DIMS])
            axes.set_yticks(range(len(settings.ALPHAS)), [f"{alpha:g}" for alpha in settings.ALPHAS])
            axes.set_title(method)
        bar = grid[0, 0].figure.colorbar(image, ax=grid, shrink=0.9)
        bar.set_label("less KL than linear [nats], by d and alpha", fontsize=8)


def _draw_shapes(path: Path, learned: Mapping[str, dict[str, Any]]) -> None:
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
