"""``python -m benchmarks.codegen triton``, or ``cuda``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cuda_command
from .budgets import judge
from .configurations import ALIGNED, QUICK, SHIFTED, Configuration, configurations
from .measure import measure
from .peers import Peer, peers
from .report import markdown
from .triton_targets import TARGETS
from .verdict import finish

REPORT = Path(__file__).with_name("triton.md")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and report; returns the exit code: 0, or 1 where ``--check`` finds a broken budget."""
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMPILER")
    triton = commands.add_parser("triton", help="the Triton kernels, by Triton's compiler")
    triton.add_argument("--check", action="store_true", help="hold every figure against its budget; 1 if one is broken")
    triton.add_argument("--write", action="store_true", help=f"write {REPORT.name} instead of printing it")
    triton.add_argument("--quick", action="store_true", help="only what the ordinary tests compile")
    triton.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="what to compile for")
    triton.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    triton.set_defaults(run=_triton)
    cuda_command.add_parser(commands)
    return parser


def _triton(options: argparse.Namespace) -> int:
    if options.write and (options.quick or options.targets != list(TARGETS)):
        print("error: --write takes all configurations and targets", file=sys.stderr)
        return 2
    work: list[Configuration | Peer] = [
        *(QUICK if options.quick else configurations()),
        *peers(ALIGNED),
        *peers(SHIFTED),
    ]
    measurements = measure(work, options.targets, options.jobs)
    verdicts = judge(measurements)
    return finish(markdown(measurements, verdicts), verdicts, REPORT, options.write, options.check)


if __name__ == "__main__":
    sys.exit(main())
