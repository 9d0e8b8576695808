"""The report of ranks and spectra, from the stored results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy import stats
from tabulate import tabulate

from ..files import replacing
from ..statistics import SIGNIFICANCE, p_value
from . import heads, pictures
from .run import read
from .settings import (
    GROUPS,
    LANGUAGE_MODEL_CONTEXTS,
    LANGUAGE_MODEL_OUTPUTS,
    LARGE_CONTEXTS,
    LARGE_DIM,
    LARGE_LEADING,
    LARGE_TRANSFORMS,
    LARGE_WORDS,
    NOISE_PUBLISHED,
    NOISE_PUBLISHED_ROWS,
    NOISE_RANK,
    NOISE_ROWS,
    PILOT,
    PLIF_PIECES,
    RANDOM_DIMS,
    RANDOM_ROWS,
    RANDOM_TRANSFORMS,
    RESULTS,
    SEEDS,
    SYNTHETIC_METHODS,
    TOLERANCES,
    Unit,
    units,
)

_KEYS = tuple(f"{tolerance:g}" for tolerance in TOLERANCES)
_HEADER = " / ".join(_KEYS)
#: f of the random factors whose spectra are shown.
_SHOWN = ("linear", "plif-20", "plif-1000", "plif-100000", "sigsoftmax", "softcap", "sigmoidcap")

Runs = list[dict[str, Any]]


def section(folder: Path = RESULTS) -> str:
    """The section of the report, with the pictures written beside the results in ``folder``.

    Links to pictures are relative to the folder above ``folder``.

    Raises:
        RecordError: a file of results has other settings.
    """
    parts = [
        "## Ranks and spectra (`python -m benchmarks.rank`)",
        "Matrices are log P, contexts by words, in float64. Effective rank at a tolerance: the least k whose k largest "
        "squared singular values hold all but that share of their sum. Press: the numerical rank of Numerical Recipes, "
        "singular values above s_1 eps (N + V + 1)^(1/2) / 2, as published tables have it.",
        *(part for dim in RANDOM_DIMS for part in _random(dim, folder)),
        *_pieces(folder),
        *_spectra_of_random(folder),
        *_large(folder),
        *_noise(folder),
        *_synthetic(folder),
        *_language_model(folder),
        *_not_run(folder),
        "### Machine",
        _machines(folder),
    ]
    return "\n\n".join(parts) + "\n"


def document(folder: Path = RESULTS) -> str:
    """The section as a document of its own in ``folder``."""
    return section(folder).replace(f"]({folder.name}/", "](").replace("## ", "# ", 1)


def runs_of(group: str, name: str, folder: Path = RESULTS) -> Runs:
    """The runs of one unit; none where it has not been run."""
    record = read(Unit(group, name), folder)
    return [] if record is None else record["runs"]


def span(values: Sequence[int]) -> str:
    """``17``, or ``mean (least-most)`` where values differ."""
    if min(values) == max(values):
        return str(values[0])
    return f"{statistics.mean(values):.0f} ({min(values)}-{max(values)})"


def _spans(runs: Runs, *path: str) -> list[str]:
    """One span for each tolerance, of what lies under ``path`` in each run."""
    columns = []
    for key in _KEYS:
        values = []
        for run in runs:
            found: Any = run
            for step in path:
                found = found[step]
            values.append(found[key])
        columns.append(span(values))
    return columns


def _random(dim: int, folder: Path) -> list[str]:
    group = f"random-d{dim}"
    rows, raised, unchanged = [], [], []
    pilot = dim == RANDOM_DIMS[0]
    for name in RANDOM_TRANSFORMS:
        runs = runs_of(group, name, folder)
        if not runs:
            rows.append([name, "not run"])
            continue
        row = [name, *_spans(runs, "ranks"), *(span([run["press"][d] for run in runs]) for d in ("float64", "float32"))]
        if pilot:
            row.append(" / ".join(map(str, PILOT[name])) if name in PILOT else "")
        rows.append(row)
        lowest = min(run["ranks"][_KEYS[1]] for run in runs)
        (raised if lowest > dim + 1 else unchanged).append(name)
    headers = ["f", *_KEYS, "Press float64", "Press float32", *(["pilot, one draw"] if pilot else [])]
    title = (
        f"### Random factors, d = {dim}\n\n{RANDOM_ROWS} contexts, {RANDOM_ROWS} words, standard normal factors, no "
        f"bias; {len(SEEDS)} seeds: mean (least-most). What is not called random, and plif, gss, mlp and spline, "
        "which start as the identity, is at its defaults. plif-K: K pieces on [-20, 20] with the random slopes of the "
        "published initialisation; mlp-random, spline-random: standard normal noise on their raw parameters."
    )
    told = (
        f"Effective rank at {_KEYS[1]} above d + 1 = {dim + 1} for every seed: {_join(raised)}. "
        f"Not: {_join(unchanged)}."
    )
    return [title, _table(rows, headers), told]


def _pieces(folder: Path) -> list[str]:
    found: dict[int, dict[int, dict[str, list[int]]]] = {}
    for dim in RANDOM_DIMS:
        for count in PLIF_PIECES:
            runs = runs_of(f"random-d{dim}", f"plif-{count}", folder)
            if runs:
                ranks = {key: [run["ranks"][key] for run in runs] for key in _KEYS}
                found.setdefault(dim, {})[count] = ranks
    if not found:
        return []
    return [_picture(pictures.pieces(found), folder, "pieces.png", "Effective rank by the number of pieces")]


def _spectra_of_random(folder: Path) -> list[str]:
    groups = {}
    for dim in RANDOM_DIMS:
        named = {name: runs_of(f"random-d{dim}", name, folder) for name in _SHOWN}
        there = {name: runs[0]["singular_values"] for name, runs in named.items() if runs}
        if there:
            groups[f"random factors, d = {dim}"] = there
    return [_picture(pictures.spectra(groups), folder, "random.png", "Spectra of random factors")] if groups else []


def _large(folder: Path) -> list[str]:
    rows, exact = [], ""
    for name in LARGE_TRANSFORMS:
        runs = runs_of("large", name, folder)
        if not runs:
            rows.append([name, "not run"])
            continue
        run = runs[0]
        ranks = [f"> {LARGE_LEADING}" if run["ranks"][key] is None else run["ranks"][key] for key in _KEYS]
        rows.append([name, *ranks, f"{run['left_out']:.2e}"])
        if "exact" in run:
            errors = run["exact"]["relative_errors"]
            exact = (
                f"Exact, by all singular values, {name}: {_ranks(run['exact']['ranks'])}, "
                f"{run['exact']['left_out']:.2e} left out. The randomised singular values are too small by at most "
                f"{max(errors[: len(errors) // 2]):.1e} of their size in the first half and {max(errors):.1e} in the "
                "second."
            )
    title = (
        f"### A larger matrix, by a randomised SVD\n\n{LARGE_CONTEXTS:,} contexts, {LARGE_WORDS:,} words, "
        f"d = {LARGE_DIM}, one seed: the leading {LARGE_LEADING} singular values (`ms.analysis.leading_spectrum`, "
        "torch.svd_lowrank) and the exact squared norm. Left out: the share of the squared norm that these do not hold."
    )
    return [title, _table(rows, ["f", *_KEYS, "left out"]), *([exact] if exact else [])]


def _noise(folder: Path) -> list[str]:
    runs = runs_of("noise", "noise", folder)
    title = (
        f"### Why the numerical rank misleads\n\nThe published experiment (Parthiban et al., AAAI 2021, supplement, "
        f"tables 15 and 16): a matrix of rank {NOISE_RANK} with largest singular value 1, and normal noise of "
        f"variance c / n^2. The published n is {NOISE_PUBLISHED_ROWS:,}; here n = {NOISE_ROWS:,} and the noise has the "
        "same standard deviation, for which the same share of the singular values is expected above Press's threshold "
        "for every n. That the largest singular value is 1 and c / n^2 a variance is our reading of the supplement. "
        "Expected: by that reading, from the quarter-circle law of the singular values of noise. For float32 the noise "
        "is larger by the ratio of the two eps. (The published matrix had 10 singular values of a language model; here "
        "they are 1, 1/2, ..., 1/10.)"
    )
    if not runs:
        return [title, "Not run."]
    rows = []
    for run in runs:
        double, single = run["float64"], run["float32"]
        rows.append(
            [
                f"{run['c']:.0e}",
                f"{double['std']:.0e}",
                f"{double['share_of_squared_norm']:.0e}",
                double["press"],
                _expected(double["std"], NOISE_ROWS),
                f"{NOISE_PUBLISHED[run['c']]:,}",
                f"{_expected(double['std'], NOISE_PUBLISHED_ROWS):,}",
                _ranks(double["ranks"]),
                f"{single['std']:.0e}",
                single["press"],
                _ranks(single["ranks"]),
            ]
        )
    headers = ["c", "std", "share of squares", "Press", "expected", "published", "expected", f"effective {_HEADER}"]
    headers += ["std, float32", "Press", "effective"]
    last = max((run for run in runs if run["float64"]["press"] <= NOISE_RANK), key=lambda run: run["c"])
    full = min((run for run in runs if run["float64"]["press"] > NOISE_ROWS * 0.95), key=lambda run: run["c"])
    ranks = dict.fromkeys(_ranks(run["float64"]["ranks"]) for run in runs)
    told = (
        f"Between noise of standard deviation {last['float64']['std']:.0e} and {full['float64']['std']:.0e} the "
        f"numerical rank in float64 goes from {last['float64']['press']} to {full['float64']['press']} of "
        f"{NOISE_ROWS:,}, although the larger noise holds {full['float64']['share_of_squared_norm']:.0e} of the "
        f"squared norm. The effective ranks ({_HEADER}) of all these matrices are {_join(ranks)}."
    )
    stds = [run["float64"]["std"] for run in runs]
    lines = {
        "Press, float64": [run["float64"]["press"] for run in runs],
        f"effective, {_KEYS[-1]}": [run["float64"]["ranks"][_KEYS[-1]] for run in runs],
    }
    picture = _picture(
        pictures.noise(stds, lines, NOISE_ROWS, NOISE_RANK),
        folder,
        "noise.png",
        "Numerical rank by the size of the noise",
    )
    return [title, _table(rows, headers), told, picture]


def _expected(std: float, rows: int) -> int:
    """How many singular values of square normal noise exceed Press's threshold for s_1 = 1 in float64; at least the
    true rank.

    The quarter-circle law: s / (2 std n^(1/2)) has density 4 / pi (1 - x^2)^(1/2) on [0, 1]. The threshold over the
    largest value does not depend on n but for the 1 in 2 n + 1.
    """
    x = 2.0**-52 / 2 * math.sqrt(2 * rows + 1) / (2 * std * math.sqrt(rows))
    share = 0.0 if x >= 1 else 1 - 2 / math.pi * (math.asin(x) + x * math.sqrt(1 - x * x))
    return max(NOISE_RANK, round(share * rows))


def _synthetic(folder: Path) -> list[str]:
    cell = heads.SYNTHETIC_CELL
    rows, spectra_before, spectra_after = [], {}, {}
    measured: dict[str, tuple[float, float]] = {}
    for name in SYNTHETIC_METHODS:
        runs = runs_of("synthetic", name, folder)
        if not runs:
            rows.append([name, "not run"])
            continue
        kl = statistics.mean(run["kl"] for run in runs)
        modes = statistics.mean(run["modes"] for run in runs)
        mixture = runs[0]["before"] is None
        before = ["-"] * 3 if mixture else _spans(runs, "before", "ranks")
        press = [span([run["after"]["press"][dtype] for run in runs]) for dtype in ("float64", "float32")]
        rows.append([name, f"{kl:.3f}", f"{100 * modes:.0f}", *before, *_spans(runs, "after", "ranks"), *press])
        measured[name] = (statistics.mean(run["after"]["ranks"][_KEYS[1]] for run in runs), kl)
        spectra_after[name] = runs[0]["after"]["singular_values"]
        if not mixture:
            spectra_before[name] = runs[0]["before"]["singular_values"]
    title = (
        f"### Trained heads, synthetic: before and after f\n\nThe main cell of `benchmarks.synthetic` "
        f"(N = {cell.contexts}, M = {cell.words}, d = {cell.dim}, alpha = {cell.alpha:g}) with {cell.steps} steps, "
        f"{len(cell.seeds)} seeds and one learning rate, {heads.SYNTHETIC_LR:g}, for all: look there for the "
        "comparison of methods. Before: log softmax of the trained logits; after: of f of them, on the same contexts."
    )
    headers = ["f", "KL", "modes %", *(f"before {key}" for key in _KEYS), *(f"after {key}" for key in _KEYS)]
    headers += ["Press after, float64", "float32"]
    parts = [title, _table(rows, headers)]
    if len(measured) > 2:
        parts.append(correlation(measured, "KL"))
    if spectra_after:
        groups = {"before f": spectra_before, "after f": spectra_after}
        parts.append(
            _picture(pictures.spectra(groups), folder, "synthetic.png", "Spectra before and after f, synthetic")
        )
    return parts


def spearman(measured: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Spearman's correlation of ranks with losses, both by layer, and its p."""
    ranks, values = zip(*measured.values(), strict=True)
    found = stats.spearmanr(ranks, values)
    return float(found.statistic), float(found.pvalue)


def correlation(measured: Mapping[str, tuple[float, float]], what: str) -> str:
    """In words: :func:`spearman`, and which layers have the lowest loss and the extreme ranks."""
    statistic, p = spearman(measured)
    lowest_rank = min(measured, key=lambda name: measured[name][0])
    best = min(measured, key=lambda name: measured[name][1])
    largest_rank = max(measured, key=lambda name: measured[name][0])
    verdict = "significant" if p < SIGNIFICANCE else "not significant"
    return (
        f"Rank and {what} over these {len(measured)} layers: Spearman's correlation of the effective rank at "
        f"{_KEYS[1]} with {what} is {statistic:+.2f} ({p_value(p)}, {verdict}; negative: higher rank goes with lower "
        f"{what}; p takes the layers for independent). Lowest {what}: {best} (rank {measured[best][0]:.0f}); highest "
        f"rank: {largest_rank} ({measured[largest_rank][0]:.0f}); lowest rank: {lowest_rank} "
        f"({measured[lowest_rank][0]:.0f})."
    )


def _language_model(folder: Path) -> list[str]:
    rows, spectra_before, spectra_after = [], {}, {}
    tokens = 0
    for name in LANGUAGE_MODEL_OUTPUTS:
        runs = runs_of("language_model", name, folder)
        if not runs:
            rows.append([name, "not run"])
            continue
        run = runs[0]
        tokens = run["tokens"]
        before, after = run["before"], run["after"]
        rows.append(
            [
                name,
                f"{run['valid_perplexity']:.1f}",
                *(["-"] * 2 if before is None else [_ranks(before["ranks"]), _ranks(before["centred"])]),
                _ranks(after["ranks"]),
                _ranks(after["centred"]),
                after["press"]["float64"],
                after["press"]["float32"],
            ]
        )
        spectra_after[name] = after["singular_values"]
        if before is not None:
            spectra_before[name] = before["singular_values"]
    settings = heads.LANGUAGE_MODEL
    title = (
        f"### Trained heads, language model: before and after f\n\nAn LSTM (d = {settings.dim}, hidden "
        f"{settings.hidden}, {settings.vocabulary_size:,} words) on {settings.corpus}, {tokens:,} words of training, "
        "one seed, one learning rate: far too little to compare output layers by their perplexity. log P of "
        f"{LANGUAGE_MODEL_CONTEXTS} validation contexts. Centred: without the mean of each word and of each context, "
        "which are of rank 2 at most and hold most of the squared norm: every context agrees on which words are rare."
    )
    headers = ["output", "valid ppl", f"before f, {_HEADER}", "before, centred", "after f", "after, centred"]
    headers += ["Press after, float64", "float32"]
    parts = [title, _table(rows, headers)]
    if spectra_after:
        groups = {"before f": spectra_before, "after f": spectra_after}
        name = "language_model.png"
        parts.append(_picture(pictures.spectra(groups), folder, name, "Spectra before and after f, language model"))
    return parts


def _not_run(folder: Path) -> list[str]:
    missing = [unit for unit in units() if read(unit, folder) is None]
    if not missing:
        return []
    groups = [group for group in GROUPS if any(unit.group == group for unit in missing)]
    return [f"Not run: {_join(map(str, missing))}. `python -m benchmarks.rank --groups {','.join(groups)}` runs them."]


def _machines(folder: Path) -> str:
    seen: dict[str, int] = {}
    for unit in units():
        record = read(unit, folder)
        if record is not None:
            facts = record["environment"]
            names = ("processor", "cores", "threads", "instructions", "torch", "python")
            text = ", ".join(f"{name} {facts[name]}" for name in names)
            seen[text] = seen.get(text, 0) + 1
    return "\n".join(f"- {count} files: {text}" for text, count in seen.items()) or "Nothing has been run."


def _ranks(found: dict[str, int]) -> str:
    return " / ".join(str(found[key]) for key in _KEYS)


def _join(names: Any) -> str:
    return ", ".join(names) or "none"


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    width = len(headers)
    padded = [[*row, *[""] * (width - len(row))] for row in rows]
    return str(tabulate(padded, headers, "github", disable_numparse=True, colalign=["left"] + ["right"] * (width - 1)))


def _picture(figure: Figure, folder: Path, name: str, title: str) -> str:
    with replacing(folder / name) as file:
        # Without matplotlib's version in it, the file follows from the results.
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return f"![{title}]({folder.name}/{name})"
