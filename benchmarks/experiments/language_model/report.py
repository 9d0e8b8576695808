"""The section of the report: verdicts are words that follow from the figures, and what is missing is named."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ...engine import document
from ...engine.experiment import Results
from ...engine.statistics import Difference, mean_and_spread
from . import pictures
from .measures import TOLERANCES
from .models import MIXTURES
from .results import CellResults, Comparison, RowResults, compare, read_cells
from .studies import BASELINE, CONTROL, GPU, Study


def section(results: Results, folder: Path, study: Study) -> str:
    """The section about ``study``, whose pictures are written into ``folder``."""
    cells = read_cells(results, study)
    rows = [each for cell in cells for each in cell.rows]
    plotted = {r.row.label: (r.row.settings.output, r.seed0) for r in cells[0].rows if "singular_values" in r.seed0}
    return document.render(
        Path(__file__).with_name("report.md.jinja"),
        study=study.name,
        cells=cells,
        controls=(BASELINE, CONTROL),
        mixtures=tuple(MIXTURES),
        drawn={
            "gains": pictures.gains(cells, folder / "language_model-gains.png"),
            "transforms": pictures.learned(cells, folder / "language_model-transforms.png"),
            "spectra": pictures.spectra(plotted, folder / "language_model-spectra.png"),
        },
        overview=[_overview(cell) for cell in cells],
        quality=lambda cell: [_quality(each) for each in cell.rows],
        differences=_differences,
        text=_text,
        gain=_gain,
        compare=compare,
        missing=any(each.missing for each in rows),
        gpu=sum(len(each.rows) * (len(each.seeds) + each.search.tries) for each in GPU.cells),
        machines=document.environments([run for each in rows for run in each.runs.values()]),
    )


def _overview(cell: CellResults) -> dict[str, str]:
    best = cell.best_transform()
    found = {"cell": cell.cell.name, "best transform (on validation)": best.row.label if best else "not run"}
    for other in (BASELINE, CONTROL):
        found |= _both(f"minus {other}, ", cell.against(other).get(best.row.label) if best else None)
    return found


def _quality(each: RowResults) -> dict[str, Any]:
    chosen, runs, settings = each.chosen, list(each.runs.values()), each.row.settings
    found: dict[str, Any] = {
        "output": each.row.label,
        "lr": f"{chosen.lr:g}" + "\\*" * chosen.at_edge if chosen else "-",
        "transform lr": f"{chosen.transform_lr:g}" if chosen and each.row.learns_transform else "-",
        "seeds": f"{len(runs)}" + (f", {len(each.diverged)} diverged" if each.diverged else ""),
    }
    if runs:
        step = statistics.mean(run.times["median_step_seconds"] for run in runs)
        found |= {f"{split} ppl": mean_and_spread(each.perplexities(split), 2) for split in ("valid", "test")}
        found["parameters"] = f"{runs[0].figures['parameters']:,}"
        found["tokens/s"] = f"{settings.batch_size * settings.length / step:,.0f}"
        found |= {f"rank {tolerance:g}": each.effective_rank(tolerance) for tolerance in TOLERANCES}
    return found


def _differences(cell: CellResults, other: str) -> list[dict[str, str]]:
    return [{f"minus {other}": label, **_both("over ", found)} for label, found in cell.against(other).items()]


def _both(prefix: str, comparison: Comparison | None) -> dict[str, str]:
    return {f"{prefix}{kind}": _text(getattr(comparison, kind, None)) for kind in ("seeds", "documents")}


def _text(difference: Difference | None) -> str:
    return "-" if difference is None else difference.describe("")


def _gain(difference: Difference | None) -> str:
    return "not known (one seed)" if difference is None else (-difference).describe()
