"""``python -m benchmarks.overhead``; ``--help`` lists the options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from .emulation import emulating
from .report import targets_table
from .run import REPORT, RESULTS, RunError, Suite, failures
from .settings import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 0, 1 if it cannot run or a contestant failed, 130 after Ctrl-C."""
    run = parse(arguments)
    try:
        suite = Suite(run)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        with emulating() if run.emulated else nullcontext():
            results = suite.execute()
    except KeyboardInterrupt:
        print(f"Interrupted. The cases that were finished are in {run.folder}, marked as incomplete.", file=sys.stderr)
        return 130
    if results["targets"]:
        print(f"\n{targets_table(results['targets'], 'simple')}")
    print(f"\n{run.folder / REPORT}\n{run.folder / RESULTS}")
    failed = failures(results)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
