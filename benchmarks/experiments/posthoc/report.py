"""The section of the report, from the stored results alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine import document
from ...engine.experiment import ExperimentError, Record, Results
from ...engine.statistics import Difference, holm, mean_and_spread, over_seeds
from . import pictures
from .measure import TOLERANCES
from .results import (
    alone_difference,
    best_alone,
    calibration_error,
    common_seeds,
    fitted_alone,
    head_difference,
    head_roles,
    head_runs,
    head_search,
)
from .settings import BASELINE, CONTROL, TRANSFORMS, Data, Study

if TYPE_CHECKING:
    from .experiment import Posthoc

_CORPORA = {"wiki": "Wikipedia leads", "sotu": "State of the Union"}


def section(experiment: Posthoc, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``.

    Raises:
        ExperimentError: results are of different hidden states.
    """
    digests = {record.times["states"] for record in results.values()}
    if len(digests) > 1:
        raise ExperimentError(f"results of {experiment.name} are of different hidden states: run all of them anew")
    study, alone, roles = experiment.study, fitted_alone(results), head_roles(results)
    units = list(experiment.units(results))
    values: dict[str, Any] = {
        "data": results.get("states"),
        "missing": [u.name for u in units if u.name not in results],
    }
    if "states" in results:
        _draw(results, folder)
        values |= {
            "corpora": " and ".join(_CORPORA[name] for name in study.alone.states.corpora),
            "alone": [_alone_row(results, name) for name in alone],
            "search": [_search_row(name, record, study) for name, record in alone.items() if record.figures["rate"]],
            "differences": _alone_differences(results),
            "together": [_together_row(results, role, name) for role, name in roles.items()],
            "head_search": [_head_search_row(results, role, name, study) for role, name in roles.items()],
            "head_differences": _head_differences(results),
            "runs": (len(results.matching("head/*")), len(roles) * (len(study.rates) + len(study.seeds) - 1)),
        }
    template = Path(__file__).with_name("report.md.jinja")
    return document.render(
        template,
        study=study,
        settings=_settings(study),
        tolerances=TOLERANCES,
        command=experiment.command(),
        digest=min(digests, default=""),
        environments=document.environments(list(results.values())),
        rates=lambda rates: ", ".join(f"{rate:g}" for rate in rates),
        **values,
    )


def _draw(results: Results, folder: Path) -> None:
    alone, names = fitted_alone(results), head_roles(results).values()
    shown = {*names, "sigsoftmax"} if names else set(alone)
    pictures.transforms(folder / "posthoc-transforms.png", alone, results["states"].figures["logits"])
    pictures.reliability(folder / "posthoc-reliability.png", {n: r for n, r in alone.items() if n in shown})
    first = {name: run for name in names for run in head_runs(results, name).values() if run.settings["search"]}
    pictures.spectra(folder / "posthoc-spectra.png", {"f alone": alone, "f and the head together": first})


def _tested(results: Results, runs: Sequence[Record]) -> dict[str, str]:
    """What both stages have in their tables: means over runs, with their spread; ranks are of the first run."""
    figures = [run.figures for run in runs]
    ranks = next(each["effective_ranks"] for each in figures if "effective_ranks" in each)
    losses = [each["test_nll"] for each in figures]
    return {
        "test": mean_and_spread(losses, 4),
        "perplexity": f"{math.exp(statistics.fmean(losses)):.2f}",
        **{corpus: mean_and_spread([_loss(results, f, corpus) for f in figures], 4) for corpus in _CORPORA},
        "ECE %": mean_and_spread([100 * calibration_error(each["bins"]) for each in figures], 2),
        **{f"rank {size:g}": ranks[f"{size:g}"] for size in TOLERANCES},
    }


def _loss(results: Results, figures: dict[str, Any], corpus: str) -> float:
    data = results["states"].figures
    rows = zip(data["test_documents"], data["test_tokens"], figures["document_nll"], strict=True)
    of_corpus = [(tokens, nll) for name, tokens, nll in rows if name.startswith(f"{corpus}/")]
    return math.fsum(nll for _, nll in of_corpus) / sum(tokens for tokens, _ in of_corpus)


def _alone_row(results: Results, name: str) -> dict[str, Any]:
    record = results[f"transforms/{name}"]
    return {
        "transform": TRANSFORMS[name].label,
        "learned": TRANSFORMS[name].learned() or "-",
        "rate": f"{record.figures['rate']:g}" if record.figures["rate"] else "-",
        "valid": f"{record.figures['valid_nll']:.4f}",
        **_tested(results, [record]),
    }


def _search_row(name: str, record: Record, study: Study) -> dict[str, str]:
    losses = {f"rate {each['rate']:g}": f"{each['valid_nll']:.5f}" for each in record.figures["search"]}
    return {"validation loss": TRANSFORMS[name].label, **losses}


def _adjusted(found: Iterable[Difference]) -> list[Difference]:
    found = list(found)
    return [replace(each, p=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]


def _alone_differences(results: Results) -> dict[str, Any] | None:
    alone = fitted_alone(results)
    if not {BASELINE, CONTROL} < alone.keys():
        return None
    columns = {}
    for base in (BASELINE, CONTROL):
        names = [name for name in alone if name != base]
        columns[base] = dict(zip(names, _adjusted(alone_difference(results, n, base) for n in names), strict=True))
    rows = []
    for name in alone:
        less = [columns[base][name].describe(digits=4) if name != base else "-" for base in (BASELINE, CONTROL)]
        rows.append({"transform": TRANSFORMS[name].label, "less the identity": less[0], "less Temperature": less[1]})
    best = best_alone(results, [name for name in alone if name not in (BASELINE, CONTROL)])
    return {
        "rows": rows,
        "best": TRANSFORMS[best].label,
        "control": columns[BASELINE][CONTROL].describe("nats", 4),
        "over_model": columns[BASELINE][best].describe("nats", 4),
        "over_control": columns[CONTROL][best].describe("nats", 4),
    }


def _label(role: str, name: str) -> str:
    label = "linear" if name == BASELINE else TRANSFORMS[name].label
    return f"head, {label}" if role in ("linear", "temperature") else f"head, {label} ({role})"


def _together_row(results: Results, role: str, name: str) -> dict[str, Any]:
    runs = list(head_runs(results, name).values())
    if not runs:
        return {"method": _label(role, name)}
    rate = f"{runs[0].settings['rate']:g}"
    return {"method": _label(role, name), "rate": rate, "seeds": len(runs), **_tested(results, runs)}


def _head_search_row(results: Results, role: str, name: str, study: Study) -> dict[str, str]:
    row = {"validation / test loss (best step)": _label(role, name)}
    for rate, record in sorted(head_search(results, name).items()):
        found = record.figures
        row[f"rate {rate:g}"] = f"{found['valid_nll']:.4f} / {found['test_nll']:.4f} (step {found['step']})"
    return row


def _head_differences(results: Results) -> list[dict[str, str]]:
    roles = head_roles(results)
    pairs = [(role, base) for base in ("linear", "temperature") for role in list(roles)[1:] if role != base]
    rows, found = [], []
    for role, base in pairs:
        seeds = common_seeds(results, roles[role], roles[base])
        if not seeds:
            continue
        runs = [head_runs(results, roles[each]) for each in (role, base)]
        losses = [[of[seed].figures["test_nll"] for seed in seeds] for of in runs]
        over = f"{over_seeds(*losses).describe(digits=4)} ({len(seeds)} seeds)" if len(seeds) > 1 else "one seed"
        rows.append((f"{_label(role, roles[role])}, less {_label(base, roles[base])}", over))
        found.append(head_difference(results, roles[role], roles[base])[0])
    return [
        {"difference": label, "over documents": difference.describe(digits=4), "over seeds": over}
        for (label, over), difference in zip(rows, _adjusted(found), strict=True)
    ]


def _settings(study: Study) -> dict[str, str]:
    """The settings that are the same for all units of a kind."""
    of_unit = {*Data.__dataclass_fields__, "transform", "start", "rate", "search"}
    stages = {"f alone": study.alone, "f and the head": study.together}
    found = {"states": asdict(study.alone.states), "evaluation": asdict(study.alone.evaluation)}
    for title, stage in stages.items():
        found[title] = {name: value for name, value in asdict(stage).items() if name not in of_unit}
    return {title: json.dumps(values) for title, values in found.items()}
