"""The results as tables, on the terminal and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from .corpora import SOURCES, SPLITS
from .measurements import TOLERANCES
from .memory import how

BASELINE, CONTROL = "linear", "temperature"


def summary(layers: Sequence[dict[str, Any]], words_per_step: int) -> list[dict[str, Any]]:
    """One row for each output layer: means and standard deviations over seeds, and ratios to Linear-Softmax.

    Args:
        layers: for each output layer its name, what was measured on it once, and ``runs``, one for each seed.
        words_per_step: how many words a training step takes.

    Returns:
        Rows in the order of ``layers``. The standard deviation (of the sample) is None for a single seed, the ratios
        are None where Linear-Softmax is not among the layers.
    """
    rows: list[dict[str, Any]] = []
    for layer in layers:
        runs = layer["runs"]
        row: dict[str, Any] = {
            "output": layer["output"],
            "parameters": layer["parameters"]["model"],
            "output_layer_own_parameters": layer["parameters"]["output_layer_own"],
            "tokens_per_second": words_per_step / statistics.mean(run["median_step_seconds"] for run in runs),
            "layer_seconds": layer["layer_seconds"],
            "peak_bytes": layer["peak_bytes"],
            "effective_ranks": layer["spectrum"]["effective_ranks"],
        }
        for split in SPLITS:
            values = [run["perplexity"][split] for run in runs]
            row[f"{split}_perplexity"] = statistics.mean(values)
            row[f"{split}_perplexity_sd"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    baseline = next((row for row in rows if row["output"] == BASELINE), None)
    compared = ("parameters", "tokens_per_second", "layer_seconds", "peak_bytes")
    for row in rows:
        row["ratio_to_linear"] = {
            name: None if baseline is None or not row[name] or not baseline[name] else row[name] / baseline[name]
            for name in (*compared, *(f"{split}_perplexity" for split in SPLITS))
        }
    return rows


def tables(results: dict[str, Any], style: str) -> str:
    """The two tables and the notes below them.

    Args:
        results: what is in ``results.json``.
        style: a table format of tabulate.
    """
    return "\n\n".join([_quality(results["summary"], style), _cost(results["summary"], style), notes(results)])


def markdown(results: dict[str, Any], pictures: Sequence[str]) -> str:
    """The report as a Markdown document with the pictures."""
    settings, environment = results["settings"], results["environment"]
    facts = [
        f"# Language models on {settings['corpus']} ({settings['model']}, {settings['dim']} features)",
        tables(results, "github"),
        *(f"![{name}]({name})" for name in pictures),
        "## Settings",
        ", ".join(f"{name} {_setting(value)}" for name, value in settings.items()),
        "## Machine",
        ", ".join(f"{name} {_setting(value)}" for name, value in environment.items()),
        "## Data",
        f"{SOURCES[settings['corpus']].licence}. sha256 {results['data']['sha256']}.",
    ]
    return "\n\n".join(facts) + "\n"


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "-" if value is None else str(value)


def _quality(rows: Sequence[dict[str, Any]], style: str) -> str:
    headers = ["output", *(f"{split} ppl" for split in SPLITS), "test / linear", *(f"rank {t:g}" for t in TOLERANCES)]
    body = [
        [
            row["output"],
            *(_mean(row[f"{split}_perplexity"], row[f"{split}_perplexity_sd"]) for split in SPLITS),
            _ratio(row["ratio_to_linear"]["test_perplexity"], 3),
            *(row["effective_ranks"][f"{tolerance:g}"] for tolerance in TOLERANCES),
        ]
        for row in rows
    ]
    return _table(body, headers, style)


def _cost(rows: Sequence[dict[str, Any]], style: str) -> str:
    headers = [
        "output",
        "parameters",
        "/ linear",
        "tokens/s",
        "/ linear",
        "layer ms",
        "/ linear",
        "peak MiB",
        "/ linear",
    ]
    body = []
    for row in rows:
        ratios = row["ratio_to_linear"]
        body.append(
            [
                row["output"],
                f"{row['parameters']:,}",
                _ratio(ratios["parameters"], 3),
                f"{row['tokens_per_second']:,.0f}",
                _ratio(ratios["tokens_per_second"], 2),
                f"{row['layer_seconds'] * 1e3:.1f}",
                _ratio(ratios["layer_seconds"], 2),
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
                _ratio(ratios["peak_bytes"], 2),
            ]
        )
    return _table(body, headers, style)


def notes(results: dict[str, Any]) -> str:
    """What the columns are and what was done, one fact a line."""
    settings, data, training = results["settings"], results["data"], results["training"]
    batch = settings["batch_size"] * settings["length"]
    evaluated = settings["evaluation_tokens"]
    seeds = len(settings["seeds"])
    lines = [
        f"Training: {training['description']}",
        "Optimiser settings: the same for every layer, not searched for each of them.",
        f"ppl: perplexity per word of the final weights, {data['vocabulary']:,} words known, "
        + (f"on the first {evaluated:,} words of each split" if evaluated else "on each whole split")
        + (f", mean ± sd of {seeds} seeds." if seeds > 1 else ", one seed, so that their spread is not known."),
        f"rank: effective rank of the {results['layers'][0]['spectrum']['contexts']} x {data['vocabulary']} matrix of "
        "log-probabilities, the least k whose largest k singular values hold all but that share of the sum of squares.",
        f"tokens/s: whole training step. layer ms: output layer alone, forward and backward, {batch} words. Medians.",
        f"peak MiB: of that step above input, parameters and gradients, {how(settings['device'])}.",
    ]
    if results["peak_problem"]:
        lines[-1] = f"peak MiB was not measured: {results['peak_problem']}."
    control = temperature_note(results["summary"])
    return "\n\n".join([*lines, *([control] if control else [])])


def temperature_note(rows: Sequence[dict[str, Any]]) -> str | None:
    """What the control, a learned temperature and nothing else, measured beside the other layers; None without it."""
    control = next((row for row in rows if row["output"] == CONTROL), None)
    if control is None:
        return None
    others = ", ".join(
        f"{row['output']} {row['test_perplexity'] / control['test_perplexity']:.3f}"
        for row in rows
        if row is not control
    )
    return f"Control: a learned temperature alone has test ppl {control['test_perplexity']:.1f}" + (
        f"; test ppl divided by that: {others}." if others else "."
    )


def _table(body: list[list[Any]], headers: list[str], style: str) -> str:
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return str(tabulate(body, headers, style, disable_numparse=True, colalign=alignment))


def _mean(mean: float, sd: float | None) -> str:
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"


def _ratio(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
