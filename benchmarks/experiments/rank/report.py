"""The section of the report and its pictures, from the stored results: a part for each complete group of units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from cycler import cycler
from matplotlib import rcParams
from scipy import stats

import monosoftmax as ms

from ...engine import document
from ...engine.experiment import Experiment, Results
from ...engine.plots import picture
from ...engine.statistics import SIGNIFICANCE, p_value
from . import settings
from .experiment import SMALLEST
from .settings import DIMS, PLIF_PIECES, UNITS

_KEYS = [f"{tolerance:g}" for tolerance in settings.TOLERANCES]
_HEADER = " / ".join(_KEYS)
_WHEN = ("before", "after")
_PRESS = ["Press float64", "Press float32"]
#: The published Press ranks of 10,000, by c (supplement, table 15).
PUBLISHED = dict(zip(settings.NOISE_C, (9998, 9899, 9681, 9001, 6869, 1159, 10, 10, 10, 10), strict=True))


def section(experiment: Experiment, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``."""
    texts: dict[str, Any] = {}
    for part in (_random, _large, _noise, _synthetic, _language_model):
        name = part.__name__[1:]
        units = [unit for unit in UNITS if unit.startswith(name)]
        missing = [unit for unit in units if unit not in results]
        frame = results.frame(f"{name}*").rename(columns=_header)
        texts[name] = {"missing": missing} if missing else part(frame.set_index("unit").loc[units], folder)
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        settings=settings,
        key=_KEYS[1],
        header=_HEADER,
        command=experiment.command,
        environments=document.environments([*results.values()]),
        **texts,
    )


def of_seeds(results: Results, group: str, name: str) -> list[Mapping[str, Any]]:
    """The figures of one f, of each seed."""
    return [record.figures for record in results.matching(f"{group}/{name}/seed*")]


def span(values: Sequence[float]) -> str:
    """``17``, or ``mean (least-most)`` where values differ; ``nan`` without values."""
    low, high = min(values), max(values)
    return f"{sum(values) / len(values):.0f} ({low:.0f}-{high:.0f})" if low < high else f"{low:.0f}"


def _header(column: str) -> str:
    """Like ``after Press float64`` or ``before 0.001``, for columns of figures and settings."""
    short = column.removeprefix("figures.").removeprefix("settings.").replace("ranks.", "").replace("press.", "Press ")
    return short.replace("before.", "before ").replace("after.", "after ").replace("centred.", "centred ")


def _joined(frame: pd.DataFrame, prefix: str) -> pd.Series:
    """The ranks at all tolerances in one column."""
    ranks = frame[[f"{prefix}{key}" for key in _KEYS]].map("{:.0f}".format)
    return ranks.agg(" / ".join, axis=1).replace("nan / nan / nan", "-")


def _random(frame: pd.DataFrame, folder: Path) -> dict[str, Any]:
    by = frame.groupby(["dim", "transform"], sort=False)
    spans, lowest = by[_KEYS + _PRESS].agg(span), by[_KEYS[1]].min()
    rows = {dim: spans.loc[dim].reset_index(names="f") for dim in DIMS}
    with picture(folder / "rank-pieces.png", 1, len(DIMS), (4.2, 3.2)) as grid:
        for axes, dim in zip(grid[0], DIMS, strict=True):
            of = by[_KEYS].mean().loc[dim].loc[[f"plif-{n}" for n in PLIF_PIECES]].set_axis(PLIF_PIECES)
            of.assign(**{f"d + 1 = {dim + 1}": dim + 1}).plot(ax=axes, logx=True, marker=".", title=f"d = {dim}")
            axes.set(xlabel="pieces of a random PLIF on [-20, 20]", ylabel="effective rank by tolerance")
    shown = frame.dropna(subset="singular_values").set_index("transform").groupby("dim")["singular_values"]
    _draw_spectra(folder / "rank-random.png", {f"random factors, d = {dim}": of for dim, of in shown})
    return {"rows": rows, "lowest": {dim: dict(lowest[dim]) for dim in DIMS}}


def _large(frame: pd.DataFrame, folder: Path) -> dict[str, Any]:
    ranks = frame[_KEYS].map("{:.0f}".format).replace("nan", f"> {frame['leading'].iloc[0]}")
    rows = pd.concat([frame["transform"].rename("f"), ranks], axis=1)
    rows["left out"] = frame["left_out"].map("{:.2e}".format)
    exact = frame[frame["exact"]]
    return {"rows": rows, "exact": exact.assign(ranks=_joined(exact, "exact.")).to_dict("records")}


def _noise(frame: pd.DataFrame, folder: Path) -> dict[str, Any]:
    size = settings.Noise(0)
    std, press, effective = frame["float64.std"], frame["float64.press"], _joined(frame, "float64.")
    rows = {
        "c": frame["c"].map("{:.0e}".format),
        "std": std.map("{:.0e}".format),
        "share of squares": frame["float64.share_of_squared_norm"].map("{:.0e}".format),
        "Press": press,
        "expected": [expected(each, size.rows, size.rank) for each in std],
        f"published, n = {size.published_rows:,}": frame["c"].map(PUBLISHED).map("{:,}".format),
        "expected there": [f"{expected(each, size.published_rows, size.rank):,}" for each in std],
        f"effective {_HEADER}": effective,
        "std, float32": frame["float32.std"].map("{:.0e}".format),
        "Press, float32": frame["float32.press"],
        "effective, float32": _joined(frame, "float32."),
    }
    with picture(folder / "rank-noise.png", size=(5.6, 3.2)) as grid:
        lines = {"Press": press, f"effective, {_KEYS[-1]}": frame[f"float64.{_KEYS[-1]}"]}
        x_label = "standard deviation of the noise (largest singular value: 1)"
        pd.DataFrame(lines).set_index(std).plot(ax=grid[0, 0], loglog=True, marker=".", xlabel=x_label, ylabel="rank")
    # The largest noise first.
    last, full = frame[press <= size.rank].iloc[0], frame[press > 0.95 * size.rows].iloc[-1]
    return {"rows": pd.DataFrame(rows), "last": last, "full": full, "effective": effective.unique()}


def expected(std: float, rows: int, rank: int) -> int:
    """Singular values of square normal noise above Press's threshold for s_1 = 1 in float64; at least ``rank``.

    The quarter-circle law: s / (2 std n^(1/2)) has density 4 / pi (1 - x^2)^(1/2) on [0, 1]. The threshold over the
    largest value does not depend on n but for the 1 in 2 n + 1.
    """
    x = 2.0**-52 / 2 * math.sqrt(2 * rows + 1) / (2 * std * math.sqrt(rows))
    share = 0.0 if x >= 1 else 1 - 2 / math.pi * (math.asin(x) + x * math.sqrt(1 - x * x))
    return max(rank, round(share * rows))


def _synthetic(frame: pd.DataFrame, folder: Path) -> dict[str, Any]:
    by = frame.groupby("method", sort=False)
    kl, rank = by["kl"].mean(), by[f"after {_KEYS[1]}"].mean()
    texts = {"KL": kl.map("{:.3f}".format), "modes %": (100 * by["modes"].mean()).map("{:.0f}".format)}
    spans = by[[*(f"before {key}" for key in _KEYS), *(f"after {key}" for key in _KEYS + _PRESS)]].agg(span)
    rows = pd.concat([pd.DataFrame(texts), spans.replace("nan", "-")], axis=1)
    spectra = frame.set_index("method")
    _draw_spectra(folder / "rank-synthetic.png", {f"{w} f": spectra[f"{w} singular_values"].dropna() for w in _WHEN})
    test = stats.spearmanr(rank, kl)
    correlation = f"{test.statistic:+.2f} ({p_value(test.pvalue)}, {'' if test.pvalue < SIGNIFICANCE else 'not '}"
    return {"rows": rows.reset_index(names="f"), "correlation": correlation, "kl": kl, "rank": rank}


def _language_model(frame: pd.DataFrame, folder: Path) -> dict[str, Any]:
    rows = {"output": frame["training.output"], "valid ppl": frame["valid_perplexity"].map("{:.1f}".format)}
    for when, header in (("before", f"before f, {_HEADER}"), ("after", "after f")):
        rows |= {header: _joined(frame, f"{when} "), f"{when}, centred": _joined(frame, f"{when} centred ")}
    rows |= {f"after {press}": frame[f"after {press}"] for press in _PRESS}
    spectra = frame.set_index("training.output")
    _draw_spectra(
        folder / "rank-language_model.png", {f"{w} f": spectra[f"{w} singular_values"].dropna() for w in _WHEN}
    )
    return {"rows": pd.DataFrame(rows), "tokens": frame["tokens"].iloc[0]}


def _draw_spectra(path: Path, groups: Mapping[str, pd.Series]) -> None:
    """Singular values by index, relative to the largest: a part for each of ``groups``, a line for each f."""
    with picture(path, 1, len(groups), (4.2, 3.6)) as grid:
        for axes, (title, named) in zip(grid[0], groups.items(), strict=True):
            axes.set_prop_cycle(cycler(linestyle=("-", "--")) * rcParams["axes.prop_cycle"])
            lines = {name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}
            ms.analysis.plot_spectrum(lines, axes)
            axes.set(ylim=(SMALLEST, 1.5), title=title)
            axes.legend(fontsize=6)
