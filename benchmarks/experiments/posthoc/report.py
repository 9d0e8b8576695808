"""The section of the report, from the stored results alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...engine import document
from ...engine.experiment import Experiment, ExperimentError, Record, Results
from ...engine.statistics import Difference, holm, mean_and_spread, over_seeds
from . import pictures
from .measure import TOLERANCES
from .results import (
    alone_difference,
    best_alone,
    calibration_error,
    fitted_alone,
    head_difference,
    head_roles,
    head_runs,
    head_search,
)
from .settings import BASELINE, CONTROL, TRANSFORMS, Study

_TITLE = "A trained model, after the fact"
_CORPORA = {"wiki": "Wikipedia leads", "sotu": "State of the Union"}

Row = dict[str, Any]


def section(experiment: Experiment, study: Study, results: Results, folder: Path) -> str:
    """The section, with its pictures in ``folder``.

    Raises:
        ExperimentError: results are of different hidden states.
    """
    if "states" not in results:
        return f"## {_TITLE}\n\nNot run. `{experiment.command()}` runs it."
    data, alone = results["states"], fitted_alone(results)
    roles = {role: name for role, name in head_roles(results).items() if head_search(results, name)}
    if any(record.times["states"] != data.times["states"] for record in results.values()):
        raise ExperimentError(f"results of {experiment.name} are of different hidden states: run all of them anew")
    _draw(results, folder)
    units = list(experiment.units(results))
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        title=_TITLE,
        command=experiment.command(),
        missing=[unit.name for unit in units if unit.name not in results],
        study=study,
        data=data,
        corpora=" and ".join(_CORPORA[name] for name in study.alone.states.corpora),
        rates=lambda rates: ", ".join(f"{rate:g}" for rate in rates),
        alone=[_alone_row(results, name) for name in alone],
        search=[_search_row(name, record) for name, record in alone.items() if record.figures["rate"]],
        differences=_alone_differences(results),
        together=[_together_row(results, role, name) for role, name in roles.items()],
        head_search=[_head_search_row(results, role, name) for role, name in roles.items()],
        head_differences=_head_differences(results),
        runs=(len(results.matching("head/*")), len(head_roles(results)) * (len(study.rates) + len(study.seeds) - 1)),
        settings=_settings(study),
        environments=document.environments(list(results.values())),
    )


def _draw(results: Results, folder: Path) -> None:
    alone, names = fitted_alone(results), head_roles(results).values()
    pictures.transforms(folder / "posthoc-transforms.png", alone, results["states"].figures["logits"])
    few = {*names, "sigsoftmax"} if names else alone
    pictures.reliability(folder / "posthoc-reliability.png", {n: record for n, record in alone.items() if n in few})
    searches = {name: run for name in names for run in head_runs(results, name).values() if run.settings["search"]}
    pictures.spectra(folder / "posthoc-spectra.png", {"f alone": alone, "f and the head together": searches})


def _tested(results: Results, runs: Sequence[Record]) -> Row:
    """What both stages have in their tables: means over runs and their spread; ranks are those under the first seed."""
    data, figures = results["states"].figures, [run.figures for run in runs]

    def loss(of_run: Row, corpus: str) -> float:
        rows = zip(data["test_documents"], data["test_tokens"], of_run["document_nll"], strict=True)
        members = [(tokens, nll) for name, tokens, nll in rows if name.startswith(f"{corpus}/")]
        return math.fsum(nll for _, nll in members) / sum(tokens for tokens, _ in members)

    losses = [each["test_nll"] for each in figures]
    ranks = next(each["effective_ranks"] for each in figures if "effective_ranks" in each)
    return {
        "test": mean_and_spread(losses, 4),
        "perplexity": f"{math.exp(statistics.fmean(losses)):.2f}",
        **{corpus: mean_and_spread([loss(each, corpus) for each in figures], 4) for corpus in _CORPORA},
        "ECE %": mean_and_spread([100 * calibration_error(each["bins"]) for each in figures], 2),
        **{f"rank {size:g}": ranks[f"{size:g}"] for size in TOLERANCES},
    }


def _alone_row(results: Results, name: str) -> Row:
    record = results[f"transforms/{name}"]
    start = {"transform": TRANSFORMS[name].label, "learned": TRANSFORMS[name].learned() or "-"}
    rate = f"{record.figures['rate']:g}" if record.figures["rate"] else "-"
    return {**start, "rate": rate, "valid": f"{record.figures['valid_nll']:.4f}", **_tested(results, [record])}


def _search_row(name: str, record: Record) -> Row:
    losses = {f"rate {each['rate']:g}": f"{each['valid_nll']:.5f}" for each in record.figures["search"]}
    return {"validation loss": TRANSFORMS[name].label, **losses}


def _adjusted(found: Iterable[Difference]) -> list[Difference]:
    found = list(found)
    return [replace(each, p=p) for each, p in zip(found, holm([each.p for each in found]), strict=True)]


def _alone_differences(results: Results) -> Row | None:
    alone = fitted_alone(results)
    others = [name for name in alone if name not in (BASELINE, CONTROL)]
    if not {BASELINE, CONTROL} < alone.keys():
        return None
    columns = {}
    for base in (BASELINE, CONTROL):
        names = [name for name in alone if name != base]
        found = _adjusted(alone_difference(results, name, base) for name in names)
        columns[base] = dict(zip(names, found, strict=True))
    cells = {name: [of[name].describe(digits=4) if name in of else "-" for of in columns.values()] for name in alone}
    headers = ("transform", "less the identity", "less Temperature")
    rows = [dict(zip(headers, (TRANSFORMS[name].label, *cells[name]), strict=True)) for name in alone]
    best = best_alone(results, others)
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


def _together_row(results: Results, role: str, name: str) -> Row:
    runs = list(head_runs(results, name).values())
    start = {"method": _label(role, name), "rate": f"{runs[0].settings['rate']:g}", "seeds": len(runs)}
    return start | _tested(results, runs)


def _head_search_row(results: Results, role: str, name: str) -> Row:
    found = {rate: record.figures for rate, record in sorted(head_search(results, name).items())}
    return {"validation / test loss (best step)": _label(role, name)} | {
        f"rate {rate:g}": f"{each['valid_nll']:.4f} / {each['test_nll']:.4f} (step {each['step']})"
        for rate, each in found.items()
    }


def _head_differences(results: Results) -> list[Row]:
    roles = head_roles(results)
    rows, found = [], []
    for role, base in [(role, base) for base in list(roles)[:2] for role in list(roles)[1:] if role != base]:
        try:
            difference, seeds = head_difference(results, roles[role], roles[base])
        except LookupError:
            continue
        runs = [head_runs(results, roles[each]) for each in (role, base)]
        losses = [[of[seed].figures["test_nll"] for seed in seeds] for of in runs]
        over = f"{over_seeds(*losses).describe(digits=4)} ({len(seeds)} seeds)" if len(seeds) > 1 else "one seed"
        rows.append((f"{_label(role, roles[role])}, less {_label(base, roles[base])}", over))
        found.append(difference)
    return [
        {"difference": label, "over documents": difference.describe(digits=4), "over seeds": over}
        for (label, over), difference in zip(rows, _adjusted(found), strict=True)
    ]


def _settings(study: Study) -> dict[str, str]:
    """The settings that are the same for all units of a kind."""
    alone, together = asdict(study.alone), asdict(study.together)
    found = {"states": alone.pop("states"), "evaluation": alone.pop("evaluation"), "f alone": alone}
    own = ("states", "evaluation", "transform", "start", "rate", "seed", "search")
    found["f and the head"] = {name: value for name, value in together.items() if name not in own}
    del alone["transform"]
    return {title: json.dumps(values) for title, values in found.items()}
