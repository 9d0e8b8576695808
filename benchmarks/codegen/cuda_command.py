"""``python -m benchmarks.codegen cuda``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .cuda_budgets import judge
from .cuda_measure import MAIN_TARGET, QUICK, measure
from .cuda_report import markdown
from .cuda_targets import TARGETS, CudaError
from .sass import ListingError
from .verdict import finish

REPORT = Path(__file__).with_name("cuda.md")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("cuda", help="the CUDA kernels, by nvcc")
    parser.add_argument("--check", action="store_true", help="hold every figure against its budget; 1 if one is broken")
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name} instead of printing it")
    parser.add_argument("--quick", action="store_true", help=f"only what the ordinary tests compile: {QUICK}")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="what to compile for (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compiles and reports; returns the exit code."""
    if options.write and (options.quick or options.targets):
        print("error: --write takes all sources and targets", file=sys.stderr)
        return 2
    targets = options.targets or ((MAIN_TARGET,) if options.quick else TARGETS)
    try:
        measurements = measure(targets, QUICK if options.quick else None, options.jobs)
    except (CudaError, ListingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    verdicts = judge(measurements)
    return finish(markdown(measurements, verdicts), verdicts, REPORT, options.write, options.check)
