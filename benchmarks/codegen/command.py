"""``python -m benchmarks codegen``: compiles the kernels, reports what they take, and holds it to budgets."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from ..engine.experiment import ExperimentError
from .budgets import judge
from .figures import Measurement
from .report import markdown

FOLDER = Path(__file__).parent


def codegen(
    compilers: tyro.conf.Positional[tuple[Literal["triton", "cuda"], ...]] = ("triton", "cuda"),
    /,
    check: bool = False,
    write: bool = False,
    targets: tuple[str, ...] = (),
    jobs: int = 2,
) -> int:
    """Compile the kernels for GPUs that are not there, and report what they take.

    Args:
        compilers: whose kernels.
        check: print nothing but what is wrong, and exit with 1 if a budget is broken or a report is out of date.
        write: write the reports instead of printing them.
        targets: what to compile for; all that the report has, if none is named.
        jobs: processes.
    """
    if targets and (write or check):
        raise ExperimentError("check and write take all targets")
    failed = False
    for compiler in (import_module(f".{each}_compiler", __package__) for each in compilers):
        measurements = measure(compiler, compiler.work(targets or compiler.TARGETS), jobs)
        verdicts = judge(measurements)
        broken = [each for each in verdicts if not each.kept]
        report, text = FOLDER / f"{compiler.NAME}.md", markdown(compiler, measurements, verdicts)
        if write:
            report.write_text(text, encoding="utf-8")
        elif not check:
            print(text)
        for each in broken:
            print(f"BROKEN {each}")
        failed |= check and (_is_old(report, text, compiler.version()) or bool(broken))
        print(f"{compiler.NAME}: {len(verdicts)} figures held to budgets, {len(broken)} broken", file=sys.stderr)
    return int(failed)


def measure(compiler: Any, work: Sequence[tuple[Any, str]], jobs: int = 1) -> list[Measurement]:
    """Compiles each piece of work, in ``jobs`` processes."""
    if jobs == 1:
        return [found for each in work for found in compiler.measure(*each)]
    # Spawned: torch and LLVM have threads, which do not survive a fork.
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        parts = pool.map(compiler.measure, *zip(*work, strict=True))
        return [found for part in tqdm(parts, compiler.NAME, len(work), leave=False, disable=None) for found in part]


def _is_old(report: Path, text: str, version: str) -> bool:
    """Whether a report says something else than ``text``; prints what. One of another compiler cannot be compared."""
    written = report.read_text(encoding="utf-8") if report.exists() else ""
    if written and version not in written:
        print(f"{report.name} is not of {version}: only budgets are checked", file=sys.stderr)
        return False
    lines = [*difflib.unified_diff(written.splitlines(), text.splitlines(), report.name, "now", n=0, lineterm="")]
    print("\n".join(lines), end="\n" if lines else "")
    return bool(lines)
