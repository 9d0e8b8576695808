"""The section of the report on a trained model, from the stored results alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ..files import write_text
from ..statistics import SIGNIFICANCE, Difference, holm, mean_and_spread, over_documents, over_seeds
from . import pictures, records
from .calibration import calibration_error
from .settings import BASELINE, CONTROL, RESULTS, TOLERANCES, TRANSFORMS, HeadSettings, Settings

COMMAND = "python -m benchmarks.posthoc"
_SETTINGS = Settings()
_CORPORA = {"wiki": "Wikipedia leads", "sotu": "State of the Union"}

Record = dict[str, Any]


def section(folder: Path = RESULTS, settings: Settings = _SETTINGS) -> str:
    """The section of the report, with the plots written beside the results in ``folder``.

    Links to plots are relative to the folder above ``folder``.

    Raises:
        RecordError: a file of results is none, or of other hidden states than the rest.
    """
    title = f"## A trained model, after the fact (`{COMMAND}`)"
    data = records.read(folder, "states")
    if data is None:
        return f"{title}\n\nNot run. `{COMMAND}` runs it.\n"
    stored = records.stage_one(folder)
    together = _together(folder, settings.head)
    cells = [record for runs in together.values() for record in runs.values()]
    for record in (*stored.values(), *cells):
        if record["states"]["digest"] != data["states"]["digest"]:
            raise records.RecordError(f"{folder} has results of different hidden states; run them anew")
    parts = [title, _introduction(data), "### f alone", _alone_text(settings), _alone_table(stored, data)]
    parts += [_alone_search(stored, settings)]
    parts += _missing_alone(stored)
    if BASELINE in stored and CONTROL in stored:
        parts += ["#### Differences of the loss, f alone", *_alone_differences(stored, data)]
    if stored:
        parts += _plots(folder, stored, data, _seed_zero(together, settings.head))
    parts += ["### f and the head together", *_together_parts(together, data, settings.head)]
    parts += ["### Settings, machines and sources", _settings(data, [*stored.values(), *cells])]
    return "\n\n".join(parts) + "\n"


def write(folder: Path = RESULTS, settings: Settings = _SETTINGS) -> Path:
    """Write ``report.md`` and the plots into ``folder``; returns its path."""
    path = folder / "report.md"
    # A document of its own starts with a heading of the first level, and has its plots beside it.
    write_text(
        path, section(folder, settings).replace(f"]({folder.name}/", "](").replace("\n##", "\n#").replace("##", "#", 1)
    )
    return path


def _introduction(data: Record) -> str:
    states, logits = data["states"], data["logits"]
    names = [_CORPORA[name] for name in data["settings"]["states"]["corpora"]]
    shares = ", ".join(
        f"{states['tokens'][split]:,} tokens of {states['documents'][split]} documents {purpose}"
        for split, purpose in (("fit", "to fit to"), ("valid", "to choose by"), ("test", "to test on"))
    )
    return (
        f"{data['model']}: {states['classes']:,} classes, {states['features']} features, no bias. Its hidden states on "
        f"{' and '.join(names)}, half of the tokens each, were computed once: {shares}, all documents different, at "
        f"most {data['settings']['states']['length']} tokens of each. Losses are nats per token of the model's "
        f"vocabulary. On the test documents its logits have mean {logits['mean']['all']:.1f} and standard deviation "
        f"{logits['standard_deviation']['all']:.1f}, range {logits['extremes']['all'][0]:.1f} to "
        f"{logits['extremes']['all'][1]:.1f}; the largest one of a context is {logits['mean']['largest']:.1f} on "
        f"average."
    )


def _alone_text(settings: Settings) -> str:
    fit, evaluation = settings.transforms, settings.evaluation
    rates = ", ".join(f"{rate:g}" for rate in fit.rates)
    return (
        f"The head stays as it is; the parameters of f are fitted with Adam, {fit.epochs} epochs in batches of "
        f"{fit.batch_tokens} tokens, the same for all. Each transform with rates {rates}, of which the validation "
        "loss chooses. All f are increasing, so that the likeliest token, and the share of hits with it, is the same. "
        "ECE is the expected calibration error of the likeliest token, sum_b n_b / N |hits_b - confidence_b| over "
        f"{evaluation.bins} bins of equal width. Ranks are those that leave a share of the squared spectrum "
        f"of log P (contexts x classes, {evaluation.rank_contexts:,} test contexts, not centred) out. "
        "GSS has slope 1 above c and k below it: it cannot lower the slope for the likely tokens, as Temperature does."
    )


def _alone_table(stored: Mapping[str, Record], data: Record) -> str:
    headers = ["transform", "learned", "rate", "valid", "test", "perplexity", *_CORPORA, "ECE %"]
    headers += [f"rank {size:g}" for size in TOLERANCES]
    rows = []
    for name, contestant in TRANSFORMS.items():
        if name not in stored:
            rows.append([contestant.label, *["not run"] * (len(headers) - 1)])
            continue
        record = stored[name]
        test = record["test"]
        rows.append(
            [
                record["transform"],
                record["learned"] or "-",
                f"{record['rate']:g}" if record["rate"] else "-",
                f"{record['valid_nll']:.4f}",
                f"{test['nll']:.4f}",
                f"{math.exp(test['nll']):.2f}",
                *(f"{value:.4f}" for value in _by_corpus(test["document_nll"], data)),
                f"{100 * calibration_error(test['bins']):.2f}",
                *(test["effective_ranks"][f"{size:g}"] for size in TOLERANCES),
            ]
        )
    return _table(rows, headers)


def _alone_search(stored: Mapping[str, Record], settings: Settings) -> str:
    rates = settings.transforms.rates
    rows = []
    for record in stored.values():
        losses = {one["rate"]: f"{one['valid_nll']:.5f}" for one in record["search"]}
        if record["learned"]:
            rows.append([record["transform"], *(losses[rate] for rate in rates)])
    return _table(rows, ["validation loss", *(f"rate {rate:g}" for rate in rates)])


def _by_corpus(document_nll: Sequence[float], data: Record) -> list[float]:
    found = []
    for corpus in _CORPORA:
        members = [i for i, name in enumerate(data["test_documents"]) if name.startswith(f"{corpus}/")]
        tokens = sum(data["test_tokens"][i] for i in members)
        found.append(math.fsum(document_nll[i] for i in members) / tokens if tokens else math.nan)
    return found


def _missing_alone(stored: Mapping[str, Record]) -> list[str]:
    missing = [name for name in TRANSFORMS if name not in stored]
    return [f"Not run: {', '.join(missing)}. `{COMMAND} --only transforms` runs them."] if missing else []


def _alone_differences(stored: Mapping[str, Record], data: Record) -> list[str]:
    tokens = data["test_tokens"]
    tables, best = [], {}
    for base in (BASELINE, CONTROL):
        names = [name for name in stored if name != base]
        found = [
            over_documents(stored[name]["test"]["document_nll"], stored[base]["test"]["document_nll"], tokens)
            for name in names
        ]
        best[base] = dict(zip(names, _adjusted(found), strict=True))
    headers = ["transform", "less the identity", "less Temperature"]
    rows = [
        [stored[name]["transform"], *(_cell(best[base].get(name)) for base in (BASELINE, CONTROL))] for name in stored
    ]
    tables.append(
        f"Paired over {len(tokens)} documents: bootstrap intervals of {1 - SIGNIFICANCE:.0%}, p of random signs with "
        f"Holm's adjustment for the {len(stored) - 1} comparisons of a column. Negative is better."
    )
    tables.append(_table(rows, headers))
    others = [name for name in stored if name not in (BASELINE, CONTROL)]
    if others:
        name = min(others, key=lambda one: stored[one]["valid_nll"])
        tables.append(
            f"Temperature, the control, against the model as it is: {best[BASELINE][CONTROL].describe('nats', 4)}. "
            f"The transform with the lowest validation loss beside it is {stored[name]['transform']}: against the "
            f"model as it is {best[BASELINE][name].describe('nats', 4)}; against Temperature "
            f"{best[CONTROL][name].describe('nats', 4)}."
        )
    return tables


def _adjusted(found: Sequence[Difference]) -> list[Difference]:
    adjusted = holm([difference.p for difference in found])
    return [replace(difference, p=p) for difference, p in zip(found, adjusted, strict=True)]


def _cell(difference: Difference | None) -> str:
    return "-" if difference is None else difference.describe(digits=4)


def _plots(folder: Path, stored: Mapping[str, Record], data: Record, together: Mapping[str, Record]) -> list[str]:
    pictures.draw_transforms(stored, data["logits"], folder / "transforms.png")
    methods = records.head_methods(folder)
    shown = {*methods.values(), "sigsoftmax"} if methods else set(stored)
    pictures.draw_reliability({n: r for n, r in stored.items() if n in shown}, folder / "reliability.png")
    pictures.draw_spectra(stored, together, folder / "spectra.png")
    captions = {
        "transforms": "The learned transforms and their slopes above the logits of the trained head",
        "reliability": "Reliability of the likeliest token's probability, f alone",
        "spectra": "Spectra of log P",
    }
    return [f"![{caption}]({folder.name}/{name}.png)" for name, caption in captions.items()]


Runs = dict[tuple[float, int], Record]


def _together(folder: Path, head: HeadSettings) -> dict[tuple[str, str], Runs]:
    """The stored runs of stage 2 by role and transform."""
    return {
        (role, name): records.head_records(folder, name, head) for role, name in records.head_methods(folder).items()
    }


def _chosen(runs: Runs, head: HeadSettings) -> dict[int, Record]:
    """The runs with the chosen rate by seed."""
    rate = records.chosen_rate(runs, head)
    return {seed: record for (one, seed), record in runs.items() if one == rate}


def _seed_zero(together: Mapping[tuple[str, str], Runs], head: HeadSettings) -> dict[str, Record]:
    found = {name: _chosen(runs, head).get(head.seeds[0]) for (_, name), runs in together.items()}
    return {name: record for name, record in found.items() if record is not None}


def _together_parts(together: Mapping[tuple[str, str], Runs], data: Record, head: HeadSettings) -> list[str]:
    if not together:
        return [f"Not run. `{COMMAND}` runs it after stage 1."]
    total = len(together) * (len(head.rates) + len(head.seeds) - 1)
    done = sum(len(runs) for runs in together.values())
    parts = [
        f"A copy of the head is fitted with Adam to {head.fit_tokens:,} of the tokens to fit to, in batches of "
        f"{head.batch_tokens}, f beside it with rate {head.transform_rate:g}, from where stage 1 left it (so that "
        f"Linear starts from the model as it is). Rates of the head: {', '.join(f'{r:g}' for r in head.rates)}, chosen "
        f"under seed {head.seeds[0]} by the loss of {head.valid_tokens:,} validation tokens, which is taken "
        f"{head.validations} times and chooses the step, too. Seeds choose and order the tokens. "
        f"{done} of {total} runs are there.",
        _together_table(together, data, head),
        _search_table(together, head),
    ]
    if done < total:
        parts.append(f"`{COMMAND} --only head` runs what is not run.")
    parts += ["#### Differences of the loss, f and the head together", *_together_differences(together, data, head)]
    return parts


def _together_table(together: Mapping[tuple[str, str], Runs], data: Record, head: HeadSettings) -> str:
    headers = ["method", "rate", "seeds", "test", "perplexity", *_CORPORA, "ECE %"]
    headers += [f"rank {size:g}" for size in TOLERANCES]
    rows = []
    for (role, name), runs in together.items():
        label = _label(role, name)
        chosen = _chosen(runs, head)
        if not chosen:
            rows.append([label, *["not run"] * (len(headers) - 1)])
            continue
        tests = [record["test"] for record in chosen.values()]
        corpora = zip(*(_by_corpus(test["document_nll"], data) for test in tests), strict=True)
        spectrum = next(test for test in tests if "effective_ranks" in test)
        rows.append(
            [
                label,
                f"{next(iter(chosen.values()))['rate']:g}",
                len(chosen),
                mean_and_spread([test["nll"] for test in tests], 4),
                f"{math.exp(statistics.mean(test['nll'] for test in tests)):.2f}",
                *(mean_and_spread(list(values), 4) for values in corpora),
                mean_and_spread([100 * calibration_error(test["bins"]) for test in tests], 2),
                *(spectrum["effective_ranks"][f"{size:g}"] for size in TOLERANCES),
            ]
        )
    return _table(rows, headers)


def _label(role: str, name: str) -> str:
    if role in ("linear", "temperature"):
        return f"head, {'linear' if name == BASELINE else TRANSFORMS[name].label}"
    return f"head, {TRANSFORMS[name].label} ({role})"


def _search_table(together: Mapping[tuple[str, str], Runs], head: HeadSettings) -> str:
    rows = []
    for (role, name), runs in together.items():
        cells = []
        for rate in head.rates:
            record = runs.get((rate, head.seeds[0]))
            cells.append(
                "not run"
                if record is None
                else f"{record['valid_nll']:.4f} / {record['test']['nll']:.4f} (step {record['step']})"
            )
        rows.append([_label(role, name), *cells])
    headers = ["validation / test loss (best step)", *(f"rate {rate:g}" for rate in head.rates)]
    return _table(rows, headers)


def _together_differences(together: Mapping[tuple[str, str], Runs], data: Record, head: HeadSettings) -> list[str]:
    by_role = {role: (name, _chosen(runs, head)) for (role, name), runs in together.items()}
    rows, sentences = [], []
    pairs = [(role, base) for base in ("linear", "temperature") for role in by_role if role != base]
    pairs = [(role, base) for role, base in pairs if (role, base) != ("linear", "temperature")]
    found = []
    for role, base in pairs:
        (name, one), (base_name, other) = by_role[role], by_role[base]
        seeds = sorted(set(one) & set(other))
        label = f"{_label(role, name)}, less {_label(base, base_name)}"
        if not seeds:
            rows.append([label, "not run", "not run"])
            continue
        difference = over_documents(
            _mean_documents([one[s] for s in seeds]), _mean_documents([other[s] for s in seeds]), data["test_tokens"]
        )
        over = "one seed"
        if len(seeds) > 1:
            over = over_seeds(
                [one[s]["test"]["nll"] for s in seeds], [other[s]["test"]["nll"] for s in seeds]
            ).describe(digits=4)
        found.append((label, difference, over, len(seeds)))
    adjusted = _adjusted([difference for _, difference, _, _ in found]) if found else []
    for (label, _, over, count), difference in zip(found, adjusted, strict=True):
        rows.append([label, difference.describe(digits=4), f"{over} ({count} seeds)" if count > 1 else over])
    sentences.append(
        f"Over documents: the losses of a document are means over the seeds that both methods have; Holm's adjustment "
        f"for the {len(found)} comparisons. Over seeds: Student's interval and the paired t test, not adjusted."
    )
    sentences.append(_table(rows, ["difference", "over documents", "over seeds"]))
    return sentences


def _mean_documents(runs: Sequence[Record]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*(run["test"]["document_nll"] for run in runs), strict=True)]


def _settings(data: Record, cells: Sequence[Record]) -> str:
    settings = {name: value for record in (data, *cells) for name, value in record["settings"].items()}
    lines = [f"- {name}: {json.dumps(value)}" for name, value in settings.items()]
    lines.append(f"- hidden states: digest {data['states']['digest'][:16]}")
    for environment in _unique([record["environment"] for record in (data, *cells)]):
        lines.append("- " + ", ".join(f"{name} {value}" for name, value in environment.items()))
    lines.append(
        f"- `{COMMAND} --verify` fits and tests one cell again: bit for bit the same on the same machine. "
        f"Significant means p < {SIGNIFICANCE:.2g}."
    )
    return "\n".join(lines)


def _unique(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
