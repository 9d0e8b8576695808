"""The section of the report, from the stored results alone: its tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ...engine import document
from ...engine.experiment import Experiment, Record, Results
from ...engine.plots import picture
from ...engine.statistics import holm, mean_and_spread, over_seeds
from . import results as stored
from .fit import with_parameters
from .measure import TOLERANCES, kept
from .settings import BASELINE, CONTROL, TRANSFORMS

_COLOURS = {name: f"C{number - 1}" if number else "black" for number, name in enumerate(TRANSFORMS)}


def section(experiment: Experiment, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``. It has a stage when all results of that are there."""
    missing = [unit.name for unit in experiment.units(results) if unit.name not in results]
    roles = stored.head_roles(results) if "states" in results else {}
    alone, together = _alone(results) if roles else None, None
    if roles:
        spectra = {"f alone": stored.fitted_alone(results)}
        if not missing:
            together = _together(results, roles)
            searches = {name: stored.head_search(results, name) for name in roles.values()}
            spectra["f and the head together"] = {name: of[stored.best_rate(of)] for name, of in searches.items()}
        _draw_transforms(results, folder / "posthoc-transforms.png")
        _draw_spectra(spectra, folder / "posthoc-spectra.png")
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        experiment=experiment,
        missing=missing,
        data=results["states"].figures if alone else None,
        contestants=TRANSFORMS,
        alone=alone,
        together=together,
        environments=document.environments(list(results.values())),
    )


def _alone(results: Results) -> dict[str, Any]:
    alone = stored.fitted_alone(results)
    over = {
        base: holm({name: stored.alone_difference(results, name, base) for name in alone if name != base})
        for base in (BASELINE, CONTROL)
    }
    rows, search, differences = [], [], []
    for name, record in alone.items():
        label, found = TRANSFORMS[name].label, record.figures
        learned = sum(parameter.numel() for parameter in TRANSFORMS[name].make().parameters())
        start = {"transform": label, "learned": learned or "-", "rate": found["rate"] or "-"}
        rows.append({**start, "valid": f"{found['valid_nll']:.4f}", **_tested(results, [record])})
        if found["rate"]:
            losses = {f"rate {each['rate']:g}": f"{each['valid_nll']:.5f}" for each in found["search"]}
            search.append({"validation loss": label, **losses})
        cells = [of[name].describe("") if name in of else "-" for of in over.values()]
        differences.append({"transform": label, "less the identity": cells[0], "less Temperature": cells[1]})
    best = stored.best_alone(results)
    return {"rows": rows, "search": search, "differences": differences, "over": over, "best": best}


def _together(results: Results, roles: Mapping[str, str]) -> dict[str, Any]:
    labels = {role: f"head, {TRANSFORMS[name].label}" for role, name in roles.items()} | {"linear": "head, linear"}
    labels |= {role: f"{label} ({role})" for role, label in labels.items() if role.startswith("best")}
    runs = {role: stored.head_runs(results, name) for role, name in roles.items()}
    rows, search = [], []
    for role, of in runs.items():
        rate = next(iter(of.values())).settings["rate"]
        rows.append({"method": labels[role], "rate": rate, "seeds": len(of), **_tested(results, list(of.values()))})
        search.append({"validation / test loss (best step)": labels[role]})
        for rate, run in sorted(stored.head_search(results, roles[role]).items()):
            losses = f"{run.figures['valid_nll']:.4f} / {run.figures['test_nll']:.4f}"
            search[-1][f"rate {rate:g}"] = f"{losses} (step {run.figures['step']})"
    over_documents, over = {}, {}
    # All pairs but that of the two best ones.
    for base, role in list(combinations(roles, 2))[:-1]:
        label = f"{labels[role]}, less {labels[base]}"
        over_documents[label], seeds = stored.head_difference(results, roles[role], roles[base])
        losses = [[runs[each][seed].figures["test_nll"] for seed in seeds] for each in (role, base)]
        over[label] = over_seeds(*losses).describe("") + f" ({len(seeds)} seeds)"
    differences = [
        {"difference": label, "over documents": each.describe(""), "over seeds": over[label]}
        for label, each in holm(over_documents).items()
    ]
    return {"rows": rows, "search": search, "differences": differences}


def _tested(results: Results, runs: Sequence[Record]) -> dict[str, Any]:
    """What both stages have in their tables: means over runs and their spread; ranks are those under the first seed."""
    data, figures = results["states"].figures, [run.figures for run in runs]
    corpora = [name.partition("/")[0] for name in data["test_documents"]]
    losses = pd.DataFrame([each["document_nll"] for each in figures]).T.groupby(corpora, sort=False).sum()
    losses = losses.div(pd.Series(data["test_tokens"]).groupby(corpora, sort=False).sum(), axis=0)
    nll = [each["test_nll"] for each in figures]
    ranks = next(each["effective_ranks"] for each in figures if "effective_ranks" in each)
    return {
        "test": mean_and_spread(nll, 4),
        "perplexity": f"{math.exp(sum(nll) / len(nll)):.2f}",
        **{corpus: mean_and_spread(list(of_runs), 4) for corpus, of_runs in losses.iterrows()},
        "ECE %": mean_and_spread([100 * stored.calibration_error(each["bins"]) for each in figures], 2),
        **{f"rank {size:g}": ranks[f"{size:g}"] for size in TOLERANCES},
    }


@torch.no_grad()
def _draw_transforms(results: Results, path: Path) -> None:
    """f less the identity, 0 at the mean of the largest logits, and f', above histograms of the logits."""
    logits = results["states"].figures["logits"]
    low, high = logits["range"]
    z = torch.linspace(low, high, 901, dtype=torch.float64)
    meeting = torch.tensor([logits["mean"]["largest"]], dtype=torch.float64)
    with picture(path, rows=3, size=(6.4, 2.4)) as grid:
        values, slopes, counts = grid[:, 0]
        for name, record in stored.fitted_alone(results).items():
            f = with_parameters(TRANSFORMS[name].make(), record.figures["parameters"])
            values.plot(z, f(z) - f(meeting) - z + meeting, label=name, color=_COLOURS[name])
            slopes.plot(z, f.derivative(z), color=_COLOURS[name])
        # SigSoftmax leaves both panels downwards and upwards: its slope is 2 far to the left.
        values.set(ylabel=f"f(z) - z, shifted to 0 at z = {meeting.item():.1f}", ylim=(-6, 4), xlim=(low, high))
        values.legend(ncols=3)
        slopes.set(ylabel="f'(z)", ylim=(0.5, 1.6), xlim=(low, high))
        edges = torch.linspace(low, high, len(logits["counts"]["all"]) + 1)
        for kind, label in (("all", "all logits"), ("largest", "largest of a context"), ("target", "next token")):
            share = torch.tensor(logits["counts"][kind])
            counts.stairs(share / share.sum(), edges, label=label)
        counts.set(yscale="log", ylabel="share", xlabel="logit z of the trained head", xlim=(low, high))
        counts.legend()


def _draw_spectra(stages: Mapping[str, Mapping[str, Record]], path: Path) -> None:
    """Singular values of log P over the largest one, a panel for each of the stages."""
    with picture(path, columns=len(stages), size=(4.2, 3.2)) as grid:
        for axes, (title, records) in zip(grid[0], stages.items(), strict=True):
            for name, record in records.items():
                values = torch.tensor(record.figures["singular_values"], dtype=torch.float64)
                places = kept(record.settings["evaluation"]["rank_contexts"])
                axes.loglog(places, values / values[0], label=name, color=_COLOURS[name])
            # Below, there is nothing but the rounding of the eigenvalues.
            axes.set(title=title, xlabel="index k", ylim=(1e-7, 2), ylabel="singular value k / singular value 1")
            axes.legend()
