"""The report on the kernels of a compiler: what they take on the main target, and beside it on every other one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engine import document
from .budgets import Verdict
from .figures import Accesses, Kernel, Measurement

_HEADS = (
    *("transform", "kernel", "variant", "logits", "threads", "registers", "local", "shared", "blocks"),
    *("loads", "stores", "async", "atomics", "matrix", "code"),
)


def markdown(compiler: Any, measurements: Sequence[Measurement], verdicts: Sequence[Verdict]) -> str:
    """The report of a whole run."""
    main = [each for each in measurements if each.target == compiler.MAIN_TARGET]
    text = document.render(
        Path(__file__).with_name("report.md.jinja"),
        compiler=compiler,
        version=compiler.version(),
        summary=summary(verdicts),
        main=table(_HEADS, map(detail_line, main)),
        targets=table((*_HEADS[:4], *compiler.TARGETS), target_lines(measurements, compiler.TARGETS)),
    )
    return f"{text}\n"


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many budgets are kept, and each that is not."""
    broken = [str(each) for each in verdicts if not each.kept]
    if not broken:
        return f"All {len(verdicts)} are kept (`benchmarks/codegen/budgets.py`)."
    return "\n- ".join([f"{len(broken)} of {len(verdicts)} are broken (`benchmarks/codegen/budgets.py`):\n", *broken])


def detail_line(each: Measurement) -> str:
    """The line of a kernel, with all figures."""
    found = each.figures
    cells: list[object] = [*_names(each.kernel), found.threads, found.registers, found.local, found.shared]
    cells += [found.blocks, _widths(found.loads), _widths(found.stores), found.async_copies, found.atomics]
    return line([*cells, " ".join(found.matrix), found.code])


def target_lines(measurements: Sequence[Measurement], targets: Sequence[str]) -> list[str]:
    """A line for each kernel, with the targets side by side."""
    known = {(each.kernel, each.target): each for each in measurements}
    kernels = dict.fromkeys(each.kernel for each in measurements)
    return [line([*_names(one), *(_short(known.get((one, target))) for target in targets)]) for one in kernels]


def table(heads: Sequence[str], lines: Any) -> str:
    """A table of Markdown."""
    return "\n".join([line(heads), line(["---"] * len(heads)), *lines])


def line(cells: Sequence[object]) -> str:
    """A line of a table; None is an empty cell."""
    return f"| {' | '.join('' if each is None else str(each) for each in cells)} |"


def _names(kernel: Kernel) -> tuple[str, ...]:
    return kernel.transform, kernel.operator, kernel.variant, kernel.dtype


def _widths(accesses: Accesses) -> str:
    return ", ".join(f"{width}: {count}" for width, count in accesses)


def _short(each: Measurement | None) -> str | None:
    if each is None:
        return None
    found = each.figures
    shared = [f"{found.shared / 1024:.0f} KiB"] * (found.shared >= 8 * 1024)
    return ", ".join([str(found.registers), str(found.code), *shared, *found.matrix])
