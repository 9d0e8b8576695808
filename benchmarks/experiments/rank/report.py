"""The section of the report, from the stored results alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from ...engine import document
from ...engine.experiment import Experiment, Results
from ...engine.statistics import SIGNIFICANCE, p_value
from . import pictures
from .settings import (
    DIMS, HEAD_SEEDS, LANGUAGE_MODEL, LARGE, METHODS, NOISE, OUTPUTS, PLIF_PIECES, RANDOM, SEEDS, SHOWN, SYNTHETIC,
    TOLERANCES, TRANSFORMS,
)  # fmt: skip

_KEYS = tuple(f"{tolerance:g}" for tolerance in TOLERANCES)
_HEADER = " / ".join(_KEYS)
#: The published Press ranks of 10,000, by c (supplement, table 15).
PUBLISHED = {
    1e-16: 9998, 1e-20: 9899, 1e-21: 9681, 1e-22: 9001, 1e-23: 6869, 1e-24: 1159, 1e-25: 10, 1e-26: 10, 1e-28: 10,
    1e-32: 10,
}  # fmt: skip
#: What the pilot found for d = 16 and one draw of the factors (reference/method.md, 2d), at the three tolerances.
PILOT = {
    "linear": "17 / 17 / 17",
    "plif-100000": "17 / 17 / 17",
    "plif-1000": "17 / 17 / 236",
    "plif-20": "149 / 337 / 466",
    "sigsoftmax": "81 / 169 / 363",
    "softcap": "17 / 17 / 46",
    "sigmoidcap": "17 / 123 / 257",
}

Row = dict[str, Any]


def section(experiment: Experiment, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``."""
    missing = [unit.name for unit in experiment.units(results) if unit.name not in results]
    drawn = _draw(results, folder)
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        size=next(iter(RANDOM.values())),
        seeds=len(SEEDS),
        random={dim: _random(results, dim) for dim in DIMS},
        raised={dim: _raised(results, dim) for dim in DIMS},
        key=_KEYS[1],
        header=_HEADER,
        large=next(iter(LARGE.values())),
        large_rows=[_large(results, name) for name in LARGE],
        exact={name.split("/")[1]: r.figures["exact"] for name, r in results.items() if "exact" in r.figures},
        noise=next(iter(NOISE.values())),
        noise_rows=[_noise(results, name) for name in NOISE],
        noise_found=_noise_found(results),
        head=next(iter(SYNTHETIC.values())),
        head_seeds=len(HEAD_SEEDS),
        heads=[_head(results, method) for method in METHODS],
        correlation=_correlation(results),
        language_model=next(iter(LANGUAGE_MODEL.values())),
        outputs=[_output(results, output) for output in OUTPUTS],
        drawn=drawn,
        missing=missing,
        command=experiment.command(),
        environments=document.environments([*results.values()]),
    )


def figures(results: Results, group: str, name: str) -> list[dict[str, Any]]:
    """The figures of one f of a group: of each seed that was run."""
    return [record.figures for record in results.matching(f"{group}/{name}/seed*")]


def span(values: Sequence[int]) -> str:
    """``17``, or ``mean (least-most)`` where values differ."""
    if min(values) == max(values):
        return str(values[0])
    return f"{mean(values):.0f} ({min(values)}-{max(values)})"


def ranks(found: Mapping[str, int]) -> str:
    """The ranks at the three tolerances."""
    return " / ".join(str(found[key]) for key in _KEYS)


def _spans(found: Sequence[Mapping[str, Any]], prefix: str = "") -> Row:
    """One span for each tolerance."""
    return {f"{prefix}{key}": span([each["ranks"][key] for each in found]) if found else "" for key in _KEYS}


def _press(found: Sequence[Mapping[str, Any]], what: str = "Press") -> Row:
    """One span for each dtype."""
    dtypes = ("float64", "float32")
    return {f"{what} {d}": span([each["press"][d] for each in found]) if found else "" for d in dtypes}


def _random(results: Results, dim: int) -> list[Row]:
    rows = []
    for name in TRANSFORMS:
        found = figures(results, f"random-d{dim}", name)
        pilot = {"pilot, one draw": PILOT.get(name, "")} if dim == DIMS[0] else {}
        rows.append({"f": name if found else f"{name}: not run", **_spans(found), **_press(found), **pilot})
    return rows


def _raised(results: Results, dim: int) -> dict[bool, list[str]]:
    """Which f have a higher rank than a linear layer can have, for every seed, and which not."""
    found = {name: figures(results, f"random-d{dim}", name) for name in TRANSFORMS}
    higher = {name: all(each["ranks"][_KEYS[1]] > dim + 1 for each in of) for name, of in found.items() if of}
    return {verdict: [name for name in higher if higher[name] == verdict] for verdict in (True, False)}


def _large(results: Results, unit: str) -> Row:
    name = LARGE[unit].transform
    if unit not in results:
        return {"f": f"{name}: not run", **dict.fromkeys((*_KEYS, "left out"), "")}
    found = results[unit].figures
    shown = {k: f"> {LARGE[unit].leading}" if found["ranks"][k] is None else found["ranks"][k] for k in _KEYS}
    return {"f": name, **shown, "left out": f"{found['left_out']:.2e}"}


def _noise(results: Results, unit: str) -> Row:
    settings = NOISE[unit]
    row: Row = {"c": f"{settings.c:.0e}" if unit in results else f"{settings.c:.0e}: not run"}
    found = results[unit].figures if unit in results else None
    double, single = (found["float64"], found["float32"]) if found else (None, None)
    std = settings.c**0.5 / settings.published_rows
    row["std"] = f"{std:.0e}"
    row["share of squares"] = f"{double['share_of_squared_norm']:.0e}" if double else ""
    row["Press"] = double["press"] if double else ""
    row["expected"] = expected(std, settings.rows, settings.rank)
    row[f"published, n = {settings.published_rows:,}"] = f"{PUBLISHED[settings.c]:,}"
    row["expected there"] = f"{expected(std, settings.published_rows, settings.rank):,}"
    row[f"effective {_HEADER}"] = ranks(double["ranks"]) if double else ""
    row["std, float32"] = f"{single['std']:.0e}" if single else ""
    row["Press, float32"] = single["press"] if single else ""
    row["effective, float32"] = ranks(single["ranks"]) if single else ""
    return row


def expected(std: float, rows: int, rank: int) -> int:
    """How many singular values of square normal noise exceed Press's threshold for s_1 = 1 in float64; at least ``rank``.

    The quarter-circle law: s / (2 std n^(1/2)) has density 4 / pi (1 - x^2)^(1/2) on [0, 1]. The threshold over the
    largest value does not depend on n but for the 1 in 2 n + 1.
    """
    x = 2.0**-52 / 2 * math.sqrt(2 * rows + 1) / (2 * std * math.sqrt(rows))
    share = 0.0 if x >= 1 else 1 - 2 / math.pi * (math.asin(x) + x * math.sqrt(1 - x * x))
    return max(rank, round(share * rows))


def _noise_found(results: Results) -> dict[str, Any] | None:
    """Between which noises the numerical rank goes from the true rank to nearly all; None where they are not there."""
    found = {settings.c: results[name].figures["float64"] for name, settings in NOISE.items() if name in results}
    settings = next(iter(NOISE.values()))
    low = [c for c, each in found.items() if each["press"] <= settings.rank]
    high = [c for c, each in found.items() if each["press"] > 0.95 * settings.rows]
    if not low or not high:
        return None
    effective = dict.fromkeys(ranks(each["ranks"]) for each in found.values())
    return {"last": found[max(low)], "full": found[min(high)], "effective": [*effective]}


def _head(results: Results, method: str) -> Row:
    found = figures(results, "synthetic", method)
    before = [each["before"] for each in found if each["before"]]
    after = [each["after"] for each in found]
    return {
        "f": method if found else f"{method}: not run",
        "KL": f"{mean(each['kl'] for each in found):.3f}" if found else "",
        "modes %": f"{100 * mean(each['modes'] for each in found):.0f}" if found else "",
        **{name: text or "-" for name, text in _spans(before, "before ").items()},
        **_spans(after, "after "),
        **_press(after, "Press after,"),
    }


def _correlation(results: Results) -> dict[str, Any] | None:
    """Spearman's correlation of ranks with KL, both by layer, and which layers have the extreme ones."""
    found = {method: figures(results, "synthetic", method) for method in METHODS}
    rank = {m: mean(each["after"]["ranks"][_KEYS[1]] for each in of) for m, of in found.items() if of}
    kl = {m: mean(each["kl"] for each in found[m]) for m in rank}
    if len(kl) < 3:
        return None
    test = stats.spearmanr([*rank.values()], [*kl.values()])
    best, highest, lowest = (
        min(kl, key=kl.__getitem__),
        max(rank, key=rank.__getitem__),
        min(rank, key=rank.__getitem__),
    )
    return {
        "layers": len(kl),
        "statistic": f"{test.statistic:+.2f}",
        "p": p_value(float(test.pvalue)),
        "significant": bool(test.pvalue < SIGNIFICANCE),
        "named": [(name, f"{rank[name]:.0f}") for name in (best, highest, lowest)],
    }


def _output(results: Results, output: str) -> Row:
    record = results.get(f"language_model/{output}")
    found = record.figures if record else {"before": None, "after": None}
    row: Row = {"output": output if record else f"{output}: not run"}
    row["valid ppl"] = f"{found['valid_perplexity']:.1f}" if record else ""
    for name, header in (("before", f"before f, {_HEADER}"), ("after", "after f")):
        row[header] = ranks(found[name]["ranks"]) if found[name] else "-"
        row[f"{name}, centred"] = ranks(found[name]["centred"]) if found[name] else "-"
    return row | _press([found["after"]] if record else [], "Press after,")


def _draw(results: Results, folder: Path) -> dict[str, bool]:
    """Draw what there are results for; whether there were any, by picture."""
    by_pieces = {
        dim: {k: [each for each in figures(results, f"random-d{dim}", f"plif-{k}")] for k in PLIF_PIECES}
        for dim in DIMS
    }
    by_pieces = {dim: {k: of for k, of in found.items() if of} for dim, found in by_pieces.items()}
    pieces = {
        dim: {k: [each["ranks"] for each in of] for k, of in found.items()} for dim, found in by_pieces.items() if found
    }
    if pieces:
        pictures.pieces(folder / "rank_pieces.png", pieces)
    random = {
        f"random factors, d = {dim}": {name: results.get(f"random-d{dim}/{name}/seed0") for name in SHOWN}
        for dim in DIMS
    }
    doubles = {name: results[name].figures["float64"] for name in NOISE if name in results}
    if doubles:
        lines = {
            "Press, float64": [each["press"] for each in doubles.values()],
            f"effective, {_KEYS[-1]}": [each["ranks"][_KEYS[-1]] for each in doubles.values()],
        }
        settings = next(iter(NOISE.values()))
        pictures.noise(folder / "rank_noise.png", [each["std"] for each in doubles.values()], lines, settings.rank)
    spectra = {
        "random": {title: {n: r.figures for n, r in named.items() if r} for title, named in random.items()},
        "synthetic": _before_and_after({m: results.get(f"synthetic/{m}/seed0") for m in METHODS}),
        "language_model": _before_and_after({o: results.get(f"language_model/{o}") for o in OUTPUTS}),
    }
    drawn = {"pieces": bool(pieces), "noise": bool(doubles)}
    for name, groups in spectra.items():
        there = {
            title: {n: each["singular_values"] for n, each in named.items()} for title, named in groups.items() if named
        }
        drawn[name] = bool(there)
        if there:
            pictures.spectra(folder / f"rank_{name}.png", there)
    return drawn


def _before_and_after(records: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    there = {name: record.figures for name, record in records.items() if record}
    return {f"{w} f": {name: of[w] for name, of in there.items() if of[w]} for w in ("before", "after")}
