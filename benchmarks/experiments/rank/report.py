"""The section of the report and its pictures, from the stored results: a part for each complete group of units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy import stats

import monosoftmax as ms

from ...engine import document
from ...engine.experiment import Experiment, Results
from ...engine.plots import picture
from ...engine.statistics import SIGNIFICANCE, p_value
from ..language_model.pictures import STYLES as LANGUAGE_MODEL_STYLES
from . import settings
from .measures import SMALLEST
from .settings import DIMS, LARGE, METHODS, NOISE, OUTPUTS, TRANSFORMS

_KEYS = tuple(f"{tolerance:g}" for tolerance in settings.TOLERANCES)
_HEADER = " / ".join(_KEYS)
#: The published Press ranks of 10,000, by c (supplement, table 15).
PUBLISHED = dict(zip(settings.NOISE_C, (9998, 9899, 9681, 9001, 6869, 1159, 10, 10, 10, 10), strict=True))
#: What the pilot found for d = 16 and one draw of the factors (reference/method.md, 2d), at the three tolerances.
_PILOT = {
    "linear": "17 / 17 / 17",
    "plif-100000": "17 / 17 / 17",
    "plif-1000": "17 / 17 / 236",
    "plif-20": "149 / 337 / 466",
    "sigsoftmax": "81 / 169 / 363",
    "softcap": "17 / 17 / 46",
    "sigmoidcap": "17 / 123 / 257",
}

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

Row = dict[str, Any]
Figures = Mapping[str, Any]


def section(experiment: Experiment, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``."""
    units = [unit.name for unit in experiment.units(results)]
    texts: dict[str, Any] = {}
    for part in (_random, _large, _noise, _synthetic, _language_model):
        name = part.__name__[1:]
        missing = [unit for unit in units if unit.startswith(name) and unit not in results]
        texts[name] = {"missing": missing} if missing else {"missing": [], **part(results, folder)}
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        settings=settings,
        key=_KEYS[1],
        header=_HEADER,
        command=experiment.command,
        environments=document.environments([*results.values()]),
        **texts,
    )


def of_seeds(results: Results, group: str, name: str) -> list[Figures]:
    """The figures of one f, of each seed."""
    return [record.figures for record in results.matching(f"{group}/{name}/seed*")]


def span(values: Sequence[int]) -> str:
    """``17``, or ``mean (least-most)`` where values differ."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{mean(values):.0f} ({low}-{high})"


def _ranks(found: Mapping[str, int]) -> str:
    return " / ".join(str(found[key]) for key in _KEYS)


def _spans(found: Sequence[Figures], prefix: str = "") -> Row:
    """One span for each tolerance."""
    return {f"{prefix}{key}": span([each["ranks"][key] for each in found]) if found else "-" for key in _KEYS}


def _press(found: Iterable[Figures], what: str = "Press") -> Row:
    """One span for each dtype."""
    return {f"{what} {dtype}": span([each["press"][dtype] for each in found]) for dtype in ("float64", "float32")}


def _random(results: Results, folder: Path) -> dict[str, Any]:
    found = {dim: {name: of_seeds(results, f"random-d{dim}", name) for name in TRANSFORMS} for dim in DIMS}
    rows = {dim: [{"f": f, **_spans(of), **_press(of)} for f, of in found[dim].items()] for dim in DIMS}
    for row in rows[DIMS[0]]:
        row["pilot, one draw"] = _PILOT.get(row["f"], "")
    lowest = {dim: {n: min(each["ranks"][_KEYS[1]] for each in of) for n, of in found[dim].items()} for dim in DIMS}
    ranks = {d: {k: [each["ranks"] for each in found[d][f"plif-{k}"]] for k in settings.PLIF_PIECES} for d in DIMS}
    _draw_pieces(folder / "rank-pieces.png", ranks)
    spectra = {f"random factors, d = {dim}": {name: found[dim][name][0] for name in settings.SHOWN} for dim in DIMS}
    _draw_spectra(folder / "rank-random.png", spectra)
    return {"rows": rows, "lowest": lowest}


def _large(results: Results, folder: Path) -> dict[str, Any]:
    rows, exact = [], {}
    for unit, size in LARGE.items():
        found = results[unit].figures
        ranks = {key: rank or f"> {size.leading}" for key, rank in found["ranks"].items()}
        rows.append({"f": size.transform, **ranks, "left out": f"{found['left_out']:.2e}"})
        if size.exact:
            exact[size.transform] = found["exact"]
    return {"rows": rows, "exact": exact}


def _noise(results: Results, folder: Path) -> dict[str, Any]:
    rows, doubles = [], {size.c: results[unit].figures["float64"] for unit, size in NOISE.items()}
    for unit, size in NOISE.items():
        double, single = doubles[size.c], results[unit].figures["float32"]
        row = {
            "c": f"{size.c:.0e}",
            "std": f"{double['std']:.0e}",
            "share of squares": f"{double['share_of_squared_norm']:.0e}",
            "Press": double["press"],
            "expected": expected(double["std"], size.rows, size.rank),
            f"published, n = {size.published_rows:,}": f"{PUBLISHED[size.c]:,}",
            "expected there": f"{expected(double['std'], size.published_rows, size.rank):,}",
            f"effective {_HEADER}": _ranks(double["ranks"]),
            "std, float32": f"{single['std']:.0e}",
            "Press, float32": single["press"],
            "effective, float32": _ranks(single["ranks"]),
        }
        rows.append(row)
    lines = {
        "Press, float64": [each["press"] for each in doubles.values()],
        f"effective, {_KEYS[-1]}": [each["ranks"][_KEYS[-1]] for each in doubles.values()],
    }
    _draw_noise(folder / "rank-noise.png", [each["std"] for each in doubles.values()], lines, size.rank)
    return {
        "rows": rows,
        "last": doubles[max(c for c, each in doubles.items() if each["press"] <= size.rank)],
        "full": doubles[min(c for c, each in doubles.items() if each["press"] > 0.95 * size.rows)],
        "effective": [*dict.fromkeys(_ranks(each["ranks"]) for each in doubles.values())],
    }


def expected(std: float, rows: int, rank: int) -> int:
    """Singular values of square normal noise above Press's threshold for s_1 = 1 in float64; at least ``rank``.

    The quarter-circle law: s / (2 std n^(1/2)) has density 4 / pi (1 - x^2)^(1/2) on [0, 1]. The threshold over the
    largest value does not depend on n but for the 1 in 2 n + 1.
    """
    x = 2.0**-52 / 2 * math.sqrt(2 * rows + 1) / (2 * std * math.sqrt(rows))
    share = 0.0 if x >= 1 else 1 - 2 / math.pi * (math.asin(x) + x * math.sqrt(1 - x * x))
    return max(rank, round(share * rows))


def _synthetic(results: Results, folder: Path) -> dict[str, Any]:
    found = {method: of_seeds(results, "synthetic", method) for method in METHODS}
    kl = {method: mean(each["kl"] for each in of) for method, of in found.items()}
    rank = {method: mean(each["after"]["ranks"][_KEYS[1]] for each in of) for method, of in found.items()}
    rows = [
        {
            "f": method,
            "KL": f"{kl[method]:.3f}",
            "modes %": f"{100 * mean(each['modes'] for each in of):.0f}",
            **_spans([each["before"] for each in of if each["before"]], "before "),
            **_spans([each["after"] for each in of], "after "),
            **_press([each["after"] for each in of], "Press after,"),
        }
        for method, of in found.items()
    ]
    _draw_both(folder / "rank-synthetic.png", {method: of[0] for method, of in found.items()})
    test = stats.spearmanr([*rank.values()], [*kl.values()])
    return {
        "rows": rows,
        "correlation": f"{test.statistic:+.2f} ({p_value(test.pvalue)}, {'' if test.pvalue < SIGNIFICANCE else 'not '}",
        "rank": rank,
        "best": min(kl, key=kl.__getitem__),
        "highest": max(rank, key=rank.__getitem__),
        "lowest": min(rank, key=rank.__getitem__),
    }


def _language_model(results: Results, folder: Path) -> dict[str, Any]:
    found = {output: results[f"language_model/{output}"].figures for output in OUTPUTS}
    rows = []
    for output, of in found.items():
        row = {"output": output, "valid ppl": f"{of['valid_perplexity']:.1f}"}
        for name, header in (("before", f"before f, {_HEADER}"), ("after", "after f")):
            row[header] = _ranks(of[name]["ranks"]) if of[name] else "-"
            row[f"{name}, centred"] = _ranks(of[name]["centred"]) if of[name] else "-"
        rows.append(row | _press([of["after"]], "Press after,"))
    _draw_both(folder / "rank-language_model.png", found)
    return {"rows": rows, "tokens": found[OUTPUTS[0]]["tokens"]}


def _draw_both(path: Path, found: Mapping[str, Figures]) -> None:
    both = {f"{w} f": {name: of[w] for name, of in found.items() if of[w]} for w in ("before", "after")}
    _draw_spectra(path, both)


def _draw_pieces(path: Path, ranks: Mapping[int, Mapping[int, Sequence[Mapping[str, int]]]]) -> None:
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


def _draw_noise(path: Path, stds: Sequence[float], found: Mapping[str, Sequence[int]], rank: int) -> None:
    """Ranks of a matrix of rank ``rank`` by the standard deviation of the noise on it."""
    with picture(path, size=(5.6, 3.2)) as grid:
        axes = grid[0, 0]
        for name, values in found.items():
            axes.plot(stds, values, label=name, **_DOTS)
        axes.axhline(rank, label=f"true rank {rank}", **_LINE)
        axes.set(xscale="log", yscale="log", ylabel="rank")
        axes.set_xlabel("standard deviation of the noise (largest singular value: 1)")
        axes.legend()


def _draw_spectra(path: Path, groups: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """``singular_values`` by index, relative to the largest; a part for each of ``groups``, a line for each f."""
    with picture(path, 1, len(groups), (4.2, 3.6)) as grid:
        for axes, (title, named) in zip(grid[0], groups.items(), strict=True):
            colours, dashes = zip(*(_STYLES[name] for name in named), strict=True)
            axes.set_prop_cycle(color=colours, linestyle=dashes)
            lines = {name: torch.tensor(of["singular_values"], dtype=torch.float64) for name, of in named.items()}
            ms.analysis.plot_spectrum(lines, axes)
            axes.set(ylim=(SMALLEST, 1.5), title=title)
            axes.legend(fontsize=6)
