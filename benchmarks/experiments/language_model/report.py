"""The section of the report: verdicts are words that follow from the figures, and what is missing is named."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...engine import document
from ...engine.experiment import Results
from ...engine.statistics import Difference, mean_and_spread
from . import pictures
from .measures import TOLERANCES
from .results import CellResults, Comparison, RowResults, compare, read_cells
from .studies import BASELINE, CONTROL, GPU, Cell, Study


def section(results: Results, folder: Path, study: Study) -> str:
    """The section about ``study``, whose pictures are written into ``folder``."""
    cells = read_cells(results, study)
    first = cells[0]
    plotted = {
        each.row.label: (each.row.output, each.runs[0].figures)
        for each in first.rows
        if 0 in each.runs and "singular_values" in each.runs[0].figures
    }
    drawn = {
        "gains": pictures.gains(cells, folder / "language_model-gains.png"),
        "transforms": pictures.learned(cells, folder / "language_model-transforms.png"),
        "spectra": pictures.spectra(plotted, folder / "language_model-spectra.png"),
    }
    missing = {
        cell.cell.name: [f"{each.row.label} (seeds {_list(each.missing)})" for each in cell.rows if each.missing]
        for cell in cells
    }
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        study=study.name,
        contexts=first.cell.rows[0].settings.rank_contexts,
        overview=[_overview(cell) for cell in cells],
        drawn=drawn,
        cells=[_cell(cell) for cell in cells],
        missing={name: rows for name, rows in missing.items() if rows},
        gpu=sum(len(each.rows) * (len(each.seeds) + each.search.tries) for each in GPU.cells),
        machines=document.environments([run for cell in cells for each in cell.rows for run in each.runs.values()]),
    )


def _overview(cell: CellResults) -> dict[str, str]:
    best = cell.best_transform()
    linear, control = (best and cell.against(label).get(best.row.label) for label in (BASELINE, CONTROL))
    return {
        "cell": cell.cell.name,
        "best transform (on validation)": best.row.label if best else "not run",
        **_both("minus linear, ", linear),
        **_both("minus temperature, ", control),
    }


def _cell(cell: CellResults) -> dict[str, Any]:
    """What the template says about a cell."""
    tables = {
        other: [{f"minus {other}": label, **_both("over ", each)} for label, each in cell.against(other).items()]
        for other in (BASELINE, CONTROL)
    }
    best = cell.best_transform()
    gains = [
        f"gain over {other} {_gain(found.seeds)} over seeds, {_gain(found.documents)} over documents"
        for other in (BASELINE, CONTROL)
        if best and (found := cell.against(other).get(best.row.label))
    ]
    return {
        "name": cell.cell.name,
        "about": _describe(cell.cell),
        "ran": any(each.runs or each.diverged for each in cell.rows),
        "quality": [_quality(each) for each in cell.rows],
        "tables": tables,
        "best": best and best.row.label,
        "gains": "; ".join(gains),
        "comparisons": [_pair(cell, *labels) for labels in cell.cell.comparisons],
    }


def _pair(cell: CellResults, one: str, other: str) -> dict[str, str]:
    first, second = cell.row(one), cell.row(other)
    assert first is not None and second is not None
    found = compare(first, second)
    return {"one": one, "other": other, "seeds": _text(found.seeds), "documents": _text(found.documents)}


def _describe(cell: Cell) -> str:
    settings, search_of = cell.rows[0].settings, cell.search
    known = "all words" if settings.vocabulary_size is None else f"{settings.vocabulary_size:,} words known"
    mixtures = any(row.output in ("mos", "moc") for row in cell.rows)
    words = [
        f"{settings.corpus}, {settings.model}, d = {settings.dim}, {known}, {settings.epochs:g} epochs, "
        f"{len(cell.seeds)} seeds" + (f", {settings.experts} experts in mixtures" if mixtures else ""),
        f"Search: {search_of.tries} tries a row, {search_of.epochs:g} epochs, grid "
        + _list(f"{rate:g}" for rate in search_of.lr),
        *(f"{row.label}: d = {row.settings.dim}" for row in cell.rows if row.settings.dim != settings.dim),
    ]
    return ". ".join(words) + "."


def _quality(each: RowResults) -> dict[str, Any]:
    rates = {"lr": "-", "transform lr": "-"}
    if each.chosen is not None:
        rates["lr"] = f"{each.chosen.lr:g}" + ("\\*" if each.chosen.at_edge else "")
        if each.row.learns_transform:
            rates["transform lr"] = f"{each.chosen.transform_lr:g}"
    diverged = f", {len(each.diverged)} diverged" if each.diverged else ""
    found: dict[str, Any] = {"output": each.row.label, **rates, "seeds": f"{len(each.runs)}{diverged}"}
    measured = ["valid ppl", "test ppl", "parameters", "tokens/s", *(f"rank {tolerance:g}" for tolerance in TOLERANCES)]
    if not each.runs:
        return found | dict.fromkeys(measured, "-")
    runs, settings = list(each.runs.values()), each.row.settings
    speed = settings.batch_size * settings.length / statistics.mean(r.times["median_step_seconds"] for r in runs)
    ranks = (each.effective_rank(tolerance) for tolerance in TOLERANCES)
    values = (
        *(mean_and_spread(each.perplexities(split), 2) for split in ("valid", "test")),
        f"{runs[0].figures['parameters']:,}",
        f"{speed:,.0f}",
        *("-" if rank is None else rank for rank in ranks),
    )
    return found | dict(zip(measured, values, strict=True))


def _both(prefix: str, comparison: Comparison | None) -> Mapping[str, str]:
    kinds = ("seeds", "documents")
    return {f"{prefix}{kind}": _text(getattr(comparison, kind, None)) for kind in kinds}


def _text(difference: Difference | None) -> str:
    return "-" if difference is None else difference.describe("", 4)


def _gain(difference: Difference | None) -> str:
    """The difference with its sign turned round, so that a gain is positive."""
    if difference is None:
        return "not known (one seed)"
    turned = Difference(-difference.mean, -difference.high, -difference.low, difference.p, difference.pairs)
    return turned.describe("nats", 4)


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
