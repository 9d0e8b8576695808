"""The report of the synthetic experiment, from the stored results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from ..files import replacing, write_text
from ..statistics import SIGNIFICANCE, Difference, holm, mean_and_spread, over_seeds, p_value
from . import pictures, records
from .methods import METHODS
from .problem import TOLERANCES
from .settings import (
    ALPHAS,
    DIMS,
    GRID,
    GRID_METHODS,
    LARGER,
    LARGER_METHODS,
    LEARNING_RATES,
    MAIN,
    RESULTS,
    Cell,
    Unit,
)
from .timing import EAGER

BASELINE, CONTROL = "linear", "temperature"
#: What a transform must reach in the main cell: KL in nats, share of modes.
WANTED_KL, WANTED_MODES = 1.05, 0.9

Records = dict[str, dict[str, Any]]


def section(folder: Path = RESULTS) -> str:
    """The section of the report, with the pictures written beside the results in ``folder``.

    Links to pictures are relative to the folder above ``folder``.

    Raises:
        RecordError: a file of results has other settings than the study.
    """
    main = _records(MAIN, METHODS, folder)
    parts = [
        "## Synthetic: random distributions (`python -m benchmarks.synthetic`)",
        _introduction(main),
        "### d = 10, alpha = 0.1: all methods",
        _main_table(main),
        _target_sentence(main),
        _parameters_sentence(main),
        "### Differences",
        *_differences(main),
        *_published(main),
        "### By d and alpha",
        *_grid(folder),
        "### Learned shapes",
        *_shapes(main, folder),
        "### More words",
        *_larger(folder),
        "### Time",
        _timing(folder),
        "### Machines and sources",
        _environments(folder),
    ]
    return "\n\n".join(parts) + "\n"


def write(folder: Path = RESULTS) -> Path:
    """Write ``report.md`` and the pictures into ``folder``; returns its path."""
    path = folder / "report.md"
    write_text(path, section(folder).replace(f"]({folder.name}/", "](").replace("## ", "# ", 1))
    return path


def summary(cell: Cell, methods: Sequence[str], folder: Path) -> str:
    """A table of one cell for the terminal."""
    return _quality(_records(cell, methods, folder), "simple")


def _records(cell: Cell, methods: Sequence[str] | dict[str, Any], folder: Path) -> Records:
    """The records of a cell by method, complete or not."""
    return {method: records.read(Unit(cell, method), folder) for method in methods}


def _values(record: dict[str, Any], name: str) -> list[float]:
    """A figure of every seed that did not diverge."""
    return [run["figures"][name] for run in record["runs"] if run["figures"] is not None]


def _paired(record: dict[str, Any], other: dict[str, Any]) -> Difference | None:
    """KL minus KL over the seeds that both have; None where there are fewer than two."""
    mine, theirs = (
        {run["seed"]: run["figures"]["kl"] for run in each["runs"] if run["figures"] is not None}
        for each in (record, other)
    )
    common = sorted(mine.keys() & theirs.keys())
    if len(common) < 2:
        return None
    return over_seeds([mine[seed] for seed in common], [theirs[seed] for seed in common])


def _introduction(main: Records) -> str:
    return (
        f"N = {MAIN.contexts} contexts, M = {MAIN.words} words, targets P from a symmetric Dirichlet(alpha), free "
        "context vectors (standard normal at first) and word vectors (standard deviation 1/sqrt(d)), biases 0. Exact "
        "cross entropy over all contexts at once, through the package's own loss with probability targets; Adam "
        "(0.9, 0.99), 20 steps of warm-up, then a cosine to 0; float32, one thread. Figures are computed in float64. "
        f"Every method has the same search: {len(LEARNING_RATES)} learning rates "
        f"({', '.join(f'{lr:g}' for lr in LEARNING_RATES)}), the rate of f's parameters a tenth of that (0.02 in the "
        "published setting), the lowest KL on a problem of its own (seed 100). The seed makes both the targets and the "
        "initial values. KL: mean KL(P || Q) in nats, ± standard deviation over seeds. Modes: contexts whose most "
        "probable word is matched. Rank: effective rank of log Q, the least k whose k largest singular values hold all "
        "but that share of the sum of squares. Parameters: all that are trained, context vectors included. A star "
        "after a rate: it is at the end of the range, beyond which a lower KL might be found."
        + ("" if any(record["runs"] for record in main.values()) else " Nothing of the main cell has been run yet.")
    )


def _command(cell: Cell, method: str) -> str:
    name = "main" if cell == MAIN else cell.name
    return f"`python -m benchmarks.synthetic --cells {name} --methods {method}`"


def _quality(of: Records, style: str = "github") -> str:
    """The table of one cell. Methods that were not run have a row that says so."""
    linear = of.get(BASELINE)
    reference = linear and [run["seconds_per_step"] for run in linear["runs"] if run["figures"] is not None]
    rows = []
    for method, record in of.items():
        runs = [run for run in record["runs"] if run["figures"] is not None]
        diverged = len(record["runs"]) - len(runs)
        if not runs:
            tried = [run for run in record["search"] if run["figures"] is None]
            rows.append([method, "diverged at all rates" if len(tried) == len(LEARNING_RATES) else "not run"])
            continue
        ranks = [[run["figures"]["ranks"][f"{t:g}"] for run in runs] for t in TOLERANCES]
        seconds = statistics.median(run["seconds_per_step"] for run in runs)
        rows.append(
            [
                method,
                f"{record['lr']:g}" + ("*" if records.at_edge(record["lr"]) else ""),
                len(runs) if not diverged else f"{len(runs)} ({diverged} diverged)",
                mean_and_spread(_values(record, "kl")),
                f"{100 * statistics.mean(_values(record, 'modes')):.1f}",
                f"{100 * statistics.mean(_values(record, 'top5')):.1f}",
                " / ".join(f"{statistics.mean(values):.0f}" for values in ranks),
                record["dim"],
                f"{record['parameters']:,}",
                f"{seconds / statistics.median(reference):.2f}" if reference else "-",
            ]
        )
    ranks = " / ".join(f"{t:g}" for t in TOLERANCES)
    headers = ["method", "lr", "seeds", "KL", "modes %", "top-5 %", f"rank {ranks}", "d", "parameters", "step / linear"]
    width = len(headers)
    rows = [row + [""] * (width - len(row)) for row in rows]
    return str(tabulate(rows, headers, style, disable_numparse=True, colalign=["left"] + ["right"] * (width - 1)))


def _main_table(main: Records) -> str:
    missing = [method for method, record in main.items() if records.missing_runs(record, Unit(MAIN, method))]
    text = _quality(main)
    text += "\n\nStep: median processor time of a training step, while other work may have run beside it; the table "
    text += "under Time has them in turn.\n\n" + "\n".join(f"- `{name}`: {METHODS[name].description}" for name in main)
    if missing:
        text += f"\n\nNot complete: {_command(MAIN, ','.join(missing))}."
    return text


def _target_sentence(main: Records) -> str:
    reached, others = [], []
    for method, record in main.items():
        if METHODS[method].transform is None or method.startswith("linear") or not record["runs"]:
            continue
        kl, modes = statistics.mean(_values(record, "kl")), statistics.mean(_values(record, "modes"))
        text = f"{method} ({kl:.3f}, {100 * modes:.1f} %, {len(record['runs'])} seeds)"
        (reached if kl <= WANTED_KL and modes >= WANTED_MODES else others).append(text)
    linear = main[BASELINE]
    beside = (
        f"Linear-Softmax is at {statistics.mean(_values(linear, 'kl')):.3f} and "
        f"{100 * statistics.mean(_values(linear, 'modes')):.1f} %."
        if linear["runs"]
        else "Linear-Softmax has not been run."
    )
    return (
        f"**KL of at most {WANTED_KL} and at least {100 * WANTED_MODES:.0f} % of the modes**: "
        f"{', '.join(reached) or 'no transform'}. {beside} Not among them: {', '.join(others) or 'none'}."
    )


def _parameters_sentence(main: Records) -> str:
    linear, plif = main[BASELINE]["parameters"], main["plif"]["parameters"]
    dimension = MAIN.contexts + MAIN.words
    return (
        f"Equal parameters: one more dimension costs {dimension} parameters, PLIF {plif - linear}, so that no larger "
        "Linear-Softmax has as few parameters as a transform. "
        + " ".join(
            f"{name} has d = {main[name]['dim']} and {main[name]['parameters']:,} parameters, "
            f"{METHODS[name].as_many_as} {main[METHODS[name].as_many_as or '']['parameters']:,}."
            for name in main
            if METHODS[name].as_many_as
        )
    )


def _differences(main: Records) -> list[str]:
    methods = [method for method in main if method != BASELINE]
    columns: list[dict[str, tuple[Difference, float]]] = []
    for other in (BASELINE, CONTROL):
        found = {method: _paired(main[method], main[other]) for method in methods if method != other}
        there = {method: difference for method, difference in found.items() if difference is not None}
        adjusted = holm([difference.p for difference in there.values()])
        columns.append({m: (difference, p) for (m, difference), p in zip(there.items(), adjusted, strict=True)})
    rows = []
    for method in methods:
        row = [method]
        for column in columns:
            if method in column:
                difference, p = column[method]
                row += [_interval(difference), p_value(p), _verdict(p)]
            else:
                row += ["-" if method == CONTROL else "not run", "", ""]
        rows.append(row)
    headers = ["method", "KL - linear", "Holm p", "verdict", "KL - temperature", "Holm p", "verdict"]
    table = tabulate(rows, headers, "github", disable_numparse=True)
    against = columns[0]
    lower = [m for m, (d, p) in against.items() if p < SIGNIFICANCE and d.mean < 0]
    higher = [m for m, (d, p) in against.items() if p < SIGNIFICANCE and d.mean > 0]
    neither = [m for m, (_, p) in against.items() if p >= SIGNIFICANCE]
    return [
        "KL of a method minus that of another, paired by seeds, with Student's 95 % interval and the paired t test; "
        "p is adjusted by Holm for the comparisons of its column. Negative is better.",
        str(table),
        f"Significantly lower KL than Linear-Softmax: {', '.join(lower) or 'none'}. Not significant: "
        f"{', '.join(neither) or 'none'}. Significantly higher: {', '.join(higher) or 'none'}. Significant is not "
        "large: look at the differences.",
    ]


def _interval(difference: Difference) -> str:
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _verdict(p: float) -> str:
    return "significant" if p < SIGNIFICANCE else "not significant"


def _published(main: Records) -> list[str]:
    sentences = []
    for one, other in (
        ("published-sgd", "published-frozen"),
        ("published-adam", "published-sgd"),
        ("published-frozen", BASELINE),
        ("plif", "plif-frozen"),
    ):
        difference = _paired(main[one], main[other])
        if difference is None:
            sentences.append(f"{one} minus {other}: not run ({_command(MAIN, f'{one},{other}')}).")
        else:
            sentences.append(f"{one} minus {other}: {difference.describe('nats', 4)}.")
    return [
        "**The published setting, and what its optimiser does** (KL; these p are not adjusted): " + " ".join(sentences)
    ]


def _grid(folder: Path) -> list[str]:
    cells = {(cell.dim, cell.alpha): cell for cell in (*GRID, MAIN)}
    found = {key: _records(cell, METHODS if cell == MAIN else GRID_METHODS, folder) for key, cell in cells.items()}
    gains: dict[str, dict[tuple[int, float], float]] = {}
    for method in GRID_METHODS:
        if method == BASELINE:
            continue
        differences = {key: _paired(of[method], of[BASELINE]) for key, of in found.items()}
        there = {key: -difference.mean for key, difference in differences.items() if difference is not None}
        if there:
            gains[method] = there
    parts = [
        f"{GRID[0].steps} steps in these cells, {MAIN.steps} at d = {MAIN.dim}, alpha = {MAIN.alpha:g}. KL / modes % "
        "(mean over seeds); a star marks a KL that is significantly below that of Linear-Softmax, a cross one that is "
        "significantly above (paired t test, adjusted by Holm over the methods of that cell)."
    ]
    for alpha in ALPHAS:
        marks = {dim: _marks(found[dim, alpha]) for dim in DIMS}
        rows = []
        for method in GRID_METHODS:
            row = [method]
            for dim in DIMS:
                kl, modes = (_values(found[dim, alpha][method], name) for name in ("kl", "modes"))
                row.append(
                    f"{statistics.mean(kl):.3f} / {100 * statistics.mean(modes):.0f}{marks[dim].get(method, '')}"
                    if kl
                    else "not run"
                )
            rows.append(row)
        headers = ["method", *(f"d = {dim}" for dim in DIMS)]
        parts += [f"alpha = {alpha:g}:", str(tabulate(rows, headers, "github", disable_numparse=True))]
    incomplete = _incomplete([Unit(cell, method) for cell in GRID for method in GRID_METHODS], folder)
    if incomplete:
        parts.append(incomplete)
    if gains:
        _save(pictures.heat_maps(gains, DIMS, ALPHAS), folder / "heat_maps.png")
        parts.append(f"![Gain over Linear-Softmax by d and alpha]({folder.name}/heat_maps.png)")
    return parts


def _marks(of: Records) -> dict[str, str]:
    differences = {m: _paired(record, of[BASELINE]) for m, record in of.items() if m != BASELINE}
    there = {m: difference for m, difference in differences.items() if difference is not None}
    adjusted = holm([difference.p for difference in there.values()])
    return {
        m: " *" if difference.mean < 0 else " †"
        for (m, difference), p in zip(there.items(), adjusted, strict=True)
        if p < SIGNIFICANCE
    }


def _incomplete(units: Sequence[Unit], folder: Path) -> str:
    missing = sum(records.missing_runs(records.read(unit, folder), unit) for unit in units)
    if not missing:
        return ""
    cells = ",".join(dict.fromkeys(unit.cell.name for unit in units))
    return f"Not complete: {missing} trainings are missing; `python -m benchmarks.synthetic --cells {cells}` runs them."


def _shapes(main: Records, folder: Path) -> list[str]:
    learned = {}
    for method, record in main.items():
        if method.startswith("linear"):
            continue
        kept = next((run["shape"] for run in record["runs"] if run.get("shape")), None)
        if kept is not None:
            learned[method] = kept
    if not learned:
        return ["Not run yet."]
    _save(pictures.shapes(learned), folder / "shapes.png")
    return [
        f"f of the first seed at d = {MAIN.dim}, alpha = {MAIN.alpha:g}, from the 5 % to the 99.9 % quantile of its "
        "logits; the thin line has slope 1.",
        f"![The transforms over the logits]({folder.name}/shapes.png)",
    ]


def _larger(folder: Path) -> list[str]:
    parts = []
    for cell in LARGER:
        of = _records(cell, LARGER_METHODS, folder)
        parts += [
            f"N = {cell.contexts:,}, M = {cell.words:,}, d = {cell.dim}, alpha = {cell.alpha:g}, {cell.steps} steps:",
            _quality(of),
        ]
        incomplete = _incomplete([Unit(cell, method) for method in LARGER_METHODS], folder)
        if incomplete:
            parts.append(incomplete)
    return parts


def _timing(folder: Path) -> str:
    path = folder / "timing.json"
    if not path.is_file():
        return "Not run yet: `python -m benchmarks.synthetic --timing`."
    return "\n\n".join(_timing_table(timing) for timing in json.loads(path.read_text()))


def _timing_table(timing: dict[str, Any]) -> str:
    cell, seconds = timing["cell"], timing["seconds"]
    linear = seconds[BASELINE]
    rows = []
    for method, of in seconds.items():
        loss, step = of.get("loss"), of["step"]
        rows.append(
            [
                "PyTorch's eager F.cross_entropy, Linear-Softmax" if method == EAGER else method,
                _milliseconds(loss),
                f"{loss[1] / linear['loss'][1]:.2f}" if loss else "-",
                _milliseconds(step),
                f"{step[1] / linear['step'][1]:.2f}",
            ]
        )
    headers = ["method", "loss ms", "/ linear", "step ms", "/ linear"]
    table = tabulate(rows, headers, "github", disable_numparse=True, colalign=["left"] + ["right"] * 4)
    backends = ", ".join(sorted(set(timing["backends"].values())))
    return (
        f"N = {cell['contexts']:,}, M = {cell['words']:,}, d = {cell['dim']}; all methods in turn, {timing['rounds']} "
        "rounds, medians [quartiles] of processor time. Loss: forward and backward with all gradients, logits and "
        "targets given. Step: with the products, and the optimiser. "
        f"{timing['environment']['processor']}, {timing['environment']['threads']} thread; backends: {backends}."
        f"\n\n{table}"
    )


def _milliseconds(quartiles: Sequence[float] | None) -> str:
    if quartiles is None:
        return "-"
    low, middle, high = (1e3 * value for value in quartiles)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _environments(folder: Path) -> str:
    seen: dict[str, int] = {}
    backends: dict[str, int] = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text())
        for run in [*record["search"], *record["runs"]]:
            here = record["environments"][run["environment"]]
            text = ", ".join(f"{name} {value}" for name, value in here.items())
            seen[text] = seen.get(text, 0) + 1
            backends[run["backend"]] = backends.get(run["backend"], 0) + 1
    if not seen:
        return "Nothing has been run yet."
    lines = [f"- {count} trainings: {text}" for text, count in seen.items()]
    used = ", ".join(f"{name} {count}" for name, count in backends.items())
    return "\n".join([f"Trainings by backend of the loss: {used}.", "", *lines])


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        # Without the version of matplotlib, so that the same results make the same file.
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
