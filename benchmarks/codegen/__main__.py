"""``python -m benchmarks.codegen``: compiles the kernels, reports what they take, and holds it to budgets."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .budgets import judge
from .cubin import ToolError
from .figures import Measurement
from .report import markdown

COMPILERS = ("triton", "cuda")
FOLDER = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles and reports; returns the exit code: 0, or 1 for a broken budget or an old report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    parser.add_argument("compilers", nargs="*", metavar="COMPILER", help=f"of {', '.join(COMPILERS)} (default: both)")
    parser.add_argument("--check", action="store_true", help="1 if a budget is broken or a report is out of date")
    parser.add_argument("--write", action="store_true", help="write the reports instead of printing them")
    parser.add_argument("--targets", nargs="+", help="what to compile for (default: all that the report has)")
    jobs = min(2, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := set(options.compilers) - set(COMPILERS):
        parser.error(f"no compilers: {', '.join(sorted(unknown))}")
    if options.targets and (options.write or options.check):
        parser.error("--write and --check take all targets")
    modules = [import_module(f".{each}_compiler", __package__) for each in options.compilers or COMPILERS]
    try:
        codes = [_run(each, options) for each in modules]
    except ToolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return max(codes)


def measure(compiler: Any, work: Sequence[tuple[Any, str]], jobs: int = 1) -> list[Measurement]:
    """Compiles each piece of work, in ``jobs`` processes."""
    if jobs == 1:
        return [found for each in work for found in compiler.measure(*each)]
    # Spawned: torch and LLVM have threads, which do not survive a fork.
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        parts = pool.map(compiler.measure, *zip(*work, strict=True))
        return [found for part in tqdm(parts, compiler.NAME, len(work), leave=False, disable=None) for found in part]


def _run(compiler: Any, options: argparse.Namespace) -> int:
    report = FOLDER / f"{compiler.NAME}.md"
    measurements = measure(compiler, compiler.work(tuple(options.targets or compiler.TARGETS)), options.jobs)
    verdicts = judge(measurements)
    broken = [each for each in verdicts if not each.kept]
    text = markdown(compiler, measurements, verdicts)
    if options.write:
        report.write_text(text, encoding="utf-8")
        print(report)
    elif not options.check:
        print(text)
    for each in broken:
        print(f"BROKEN {each}")
    old = options.check and _is_old(report, text, compiler.version())
    print(f"{compiler.NAME}: {len(verdicts)} figures held to budgets, {len(broken)} broken", file=sys.stderr)
    return int(options.check and (bool(broken) or old))


def _is_old(report: Path, text: str, version: str) -> bool:
    """Whether a report says something else than ``text``; prints what. One of another compiler cannot be compared."""
    written = report.read_text(encoding="utf-8") if report.exists() else ""
    if written and version not in written:
        print(f"{report.name} is not of {version}: only budgets are checked", file=sys.stderr)
        return False
    lines = [*difflib.unified_diff(written.splitlines(), text.splitlines(), report.name, "now", n=0, lineterm="")]
    print("\n".join(lines), end="\n" if lines else "")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
