"""The report of a study, from its JSON files alone: ``section`` for a larger report, ``write_report`` for one alone.

Verdicts are words that follow from the figures, and what was not run is named with the command that runs it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from ..files import replacing, write_text
from ..statistics import Difference, mean_and_spread
from . import study_pictures
from .measurements import TOLERANCES
from .report import BASELINE, CONTROL
from .settings import Settings
from .study import Cell, Study, load_study
from .study_results import CellResults, Comparison, RowResults, compare, read_cell
from .study_run import RESULTS

STUDIES = Path(__file__).parent / "studies"


def section(name: str = "main", results: Path = RESULTS) -> str:
    """The report of the study ``name`` in ``studies/``, as Markdown whose links start in the folder above ``results``.

    Its pictures are written beside its results.

    Raises:
        StudyError: the study file or a result is not as it must be.
    """
    study = load_study(STUDIES / f"{name}.json")
    return _markdown(study, results / study.name, f"{results.name}/{study.name}/")


def write_report(study: Study, folder: Path) -> Path:
    """Write ``report.md`` and its pictures into ``folder``, and return its path."""
    path = folder / "report.md"
    write_text(path, _markdown(study, folder, ""))
    return path


def _markdown(study: Study, folder: Path, prefix: str) -> str:
    cells = [read_cell(study, cell, folder) for cell in study.cells]
    against = {cell.cell.name: cell.against(BASELINE) for cell in cells}
    parts = [f"## Language models: study `{study.name}`", study.about, _method(study, cells)]
    parts += _overview(cells, against, folder, prefix)
    for cell in cells:
        parts += _cell_section(cell, against[cell.cell.name])
    spectrum = study_pictures.spectra(cells[0])
    if spectrum is not None:
        parts += [
            f"### Spectra of the log-probabilities, {cells[0].cell.name}",
            _picture(spectrum, folder, "spectra.png", prefix),
        ]
    parts += [_not_run(study, cells), _machines(cells)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(study: Study, cells: Sequence[CellResults]) -> str:
    """How to read what follows, one fact a line."""
    lines = [
        "Every row of a cell is trained on the same words in the same order for one seed, from the same initial body. "
        "ppl: perplexity per word of the final weights, mean ± sd over seeds.",
        "Differences are nats per token of the test split, row minus the other: negative is better.",
        "Over seeds: paired t test and Student's interval. Over documents: the losses of each document, averaged over "
        "seeds; sign-flip permutation test and percentile bootstrap. It says how sure the difference is for these "
        "trained models on other documents, and nothing about other trainings.",
        "Intervals are for 95 % and not adjusted. p is adjusted by Holm's method for the number of rows in its table, "
        "and the verdict (significant: p < 0.05) follows from the adjusted p.",
    ]
    if any(cell.cell.search is not None for cell in cells):
        lines.append(
            "Learning rates were searched for every row by one rule and with the same number of tries, on the "
            "validation perplexity of a shorter training with a seed that is in no table: a grid, then refinements "
            "towards the best. \\* marks a rate at the edge of what was tried."
        )
    lines.append(
        "Effective rank: the least k whose largest k singular values hold all but that share of the sum of squares of "
        f"the matrix of log-probabilities in {cells[0].cell.rows[0].settings.rank_contexts:,} validation contexts "
        "(seed 0). tokens/s: median training step on a shared machine; compare within a cell, and only roughly."
    )
    return "\n".join(f"- {line}" for line in lines)


def _overview(
    cells: Sequence[CellResults], against: Mapping[str, Mapping[str, Comparison]], folder: Path, prefix: str
) -> list[str]:
    rows = []
    for cell in cells:
        best = cell.best_transform()
        if best is None:
            rows.append([cell.cell.name, "not run", "-", "-", "-", "-"])
            continue
        linear = against[cell.cell.name].get(best.row.label)
        control = cell.against(CONTROL).get(best.row.label)
        rows.append([cell.cell.name, best.row.label, *_both(linear), *_both(control)])
    headers = [
        "cell",
        "best transform (on validation)",
        "minus linear, seeds",
        "minus linear, documents",
        "minus temperature, seeds",
        "minus temperature, documents",
    ]
    parts = ["### The best transform of each cell", _table(rows, headers)]
    drawn = study_pictures.gains(cells, against)
    if drawn is not None:
        parts.append(_picture(drawn, folder, "gains.png", prefix))
    drawn = study_pictures.transforms(cells)
    if drawn is not None:
        parts += ["### Learned functions (seed 0)", _picture(drawn, folder, "transforms.png", prefix)]
    return parts


def _cell_section(cell: CellResults, linear: Mapping[str, Comparison]) -> list[str]:
    parts = [f"### {cell.cell.name}", _describe(cell.cell)]
    if not any(each.runs or each.diverged for each in cell.rows):
        return [*parts, "Not run."]
    parts.append(_quality(cell))
    control = cell.against(CONTROL)
    for name, comparisons in ((BASELINE, linear), (CONTROL, control)):
        if not comparisons:
            parts.append(f"There is no run of {name} to compare with.")
            continue
        rows = [[label, *_both(each)] for label, each in comparisons.items()]
        parts.append(_table(rows, [f"minus {name}", "over seeds", "over documents"]))
    parts.append(_best_sentence(cell, linear, control))
    for one, other in cell.cell.comparisons:
        first, second = cell.row(one), cell.row(other)
        assert first is not None and second is not None
        found = compare(first, second)
        parts.append(
            f"{one} minus {other} (p not adjusted): over seeds {_text(found.seeds)}; over documents "
            f"{_text(found.documents)}."
        )
    return parts


def _describe(cell: Cell) -> str:
    settings = cell.rows[0].settings
    known = "all words" if settings.vocabulary_size is None else f"{settings.vocabulary_size:,} words known"
    text = (
        f"{settings.corpus}, {settings.model}, d = {settings.dim}, {known}, {settings.epochs:g} epochs, "
        f"{len(cell.seeds)} seeds"
    )
    if settings.evaluation_tokens is not None:
        text += f", evaluated on the first {settings.evaluation_tokens:,} words of a split"
    if any(row.output in ("mos", "moc") for row in cell.rows):
        text += f", {settings.experts} experts in mixtures"
    if cell.search is not None:
        text += (
            f". Search: {cell.search.tries} tries a row, {cell.search.epochs:g} epochs, grid "
            f"{', '.join(f'{rate:g}' for rate in cell.search.lr)}"
        )
    wide = [f"{row.label}: d = {row.settings.dim}" for row in cell.rows if row.settings.dim != settings.dim]
    return ". ".join([text, *wide]) + "."


def _quality(cell: CellResults) -> str:
    headers = [
        "output",
        "lr",
        "transform lr",
        "seeds",
        "valid ppl",
        "test ppl",
        "parameters",
        "tokens/s",
        *(f"rank {tolerance:g}" for tolerance in TOLERANCES),
    ]
    rows = []
    for each in cell.rows:
        if not each.runs:
            rows.append([each.row.label, *_rates(each), _seeds(each), *["-"] * (4 + len(TOLERANCES))])
            continue
        run = next(iter(each.runs.values()))
        settings = each.row.settings
        words = settings.batch_size * settings.length
        speed = words / statistics.mean(run["median_step_seconds"] for run in each.runs.values())
        ranks = each.first["spectrum"]["effective_ranks"] if each.first is not None else {}
        rows.append(
            [
                each.row.label,
                *_rates(each),
                _seeds(each),
                mean_and_spread(each.perplexities("valid"), 2),
                mean_and_spread(each.perplexities("test"), 2),
                f"{run['parameters']['model']:,}",
                f"{speed:,.0f}",
                *(ranks.get(f"{tolerance:g}", "-") for tolerance in TOLERANCES),
            ]
        )
    return _table(rows, headers)


def _rates(each: RowResults) -> list[str]:
    if each.chosen is None:
        return ["-", "-"]
    edge = "\\*" if each.chosen["at_edge"] else ""
    return [f"{each.chosen['lr']:g}{edge}", f"{each.chosen['transform_lr']:g}" if each.row.learns_transform else "-"]


def _seeds(each: RowResults) -> str:
    text = str(len(each.runs))
    return f"{text}, {len(each.diverged)} diverged" if each.diverged else text


def _best_sentence(cell: CellResults, linear: Mapping[str, Comparison], control: Mapping[str, Comparison]) -> str:
    best = cell.best_transform()
    if best is None:
        return "No transform has run in this cell."
    found = []
    for name, comparisons in ((BASELINE, linear), (CONTROL, control)):
        each = comparisons.get(best.row.label)
        if each is not None:
            found.append(f"gain over {name} {_gain(each.seeds)} over seeds, {_gain(each.documents)} over documents")
    return f"**The best transform in this cell is {best.row.label} (chosen on validation): {'; '.join(found)}.**"


def _gain(difference: Difference | None) -> str:
    """The difference with its sign turned round, so that a gain is positive."""
    if difference is None:
        return "not known (one seed)"
    turned = Difference(-difference.mean, -difference.high, -difference.low, difference.p, difference.pairs)
    return turned.describe("nats", 4)


def _both(comparison: Comparison | None) -> list[str]:
    return ["-", "-"] if comparison is None else [_text(comparison.seeds), _text(comparison.documents)]


def _text(difference: Difference | None) -> str:
    return "-" if difference is None else difference.describe("", 4)


def _not_run(study: Study, cells: Sequence[CellResults]) -> str:
    """What is missing, and what this study stands for."""
    lines = []
    for cell in cells:
        missing = [f"{each.row.label} (seeds {_list(each.missing)})" for each in cell.rows if each.missing]
        if missing:
            lines.append(f"- {cell.cell.name}: {', '.join(missing)}")
    text = ["### What was not run"]
    if lines:
        text += ["\n".join(lines), f"These runs are done by `{command(study.path)}`."]
    else:
        text.append(f"Every run of study `{study.name}` is done.")
    if study.beyond is not None:
        larger = load_study(study.beyond)
        runs = sum(
            len(cell.rows) * (len(cell.seeds) + (cell.search.tries * len(cell.search.seeds) if cell.search else 0))
            for cell in larger.cells
        )
        text.append(
            f"Study `{larger.name}` was not run here: {runs:,} runs in {len(larger.cells)} cells "
            f"({_extent(larger)}). It is run by `{command(larger.path)}` and reported by the same with `--report`."
        )
    return "\n\n".join(text)


def _extent(study: Study) -> str:
    settings: list[Settings] = [cell.rows[0].settings for cell in study.cells]
    dims = sorted({each.dim for each in settings})
    epochs = sorted({each.epochs or 0.0 for each in settings})
    labels = {row.label for cell in study.cells for row in cell.rows}
    return (
        f"{' and '.join(sorted({each.corpus for each in settings}))}, "
        f"{' and '.join(sorted({each.model for each in settings}))}, d {_list(dims)}, "
        f"{_list(f'{e:g}' for e in epochs)} epochs, {len(labels)} rows, device {settings[0].device}"
    )


def command(path: Path) -> str:
    """What runs the study in the file ``path``, from the root of the repository."""
    root = Path(__file__).parents[2]
    shown = path.resolve().relative_to(root) if path.resolve().is_relative_to(root) else path
    return f"python -m benchmarks.language_model --study {shown}"


def _machines(cells: Sequence[CellResults]) -> str:
    """On what the runs were made; more than one line where it changed."""
    seen: dict[str, int] = {}
    for cell in cells:
        for each in cell.rows:
            for run in each.runs.values():
                facts: Mapping[str, Any] = run["environment"]
                text = ", ".join(
                    f"{name} {facts[name]}" for name in ("processor", "cores", "threads", "torch", "python", "gpu")
                    if facts[name] is not None
                )  # fmt: skip
                seen[text] = seen.get(text, 0) + 1
    lines = [f"- {count} runs: {text}" for text, count in seen.items()]
    return "\n\n".join(["### Machine", "\n".join(lines)]) if lines else ""


def _picture(figure: Figure, folder: Path, name: str, prefix: str) -> str:
    with replacing(folder / name) as file:
        figure.savefig(file, format="png", dpi=130)
    return f"![{name.removesuffix('.png')}]({prefix}{name})"


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return str(tabulate(rows, headers, "github", disable_numparse=True, colalign=alignment))


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
