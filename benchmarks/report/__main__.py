"""``python -m benchmarks.report``: writes REPORT.md from the stored results; ``--check`` compares it with them."""

from __future__ import annotations

import argparse
import difflib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text
from .document import document
from .evidence import RESULTS

#: Lines of the difference that --check shows.
_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, or 1 where --check finds another report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write REPORT.md and the pictures of its sections from the results of the other commands.",
        allow_abbrev=False,
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="their folder (benchmarks/results)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where REPORT.md is not the same"
    )
    given = parser.parse_args(arguments)
    path = given.results / "REPORT.md"
    if given.check:
        return _check(path)
    write_text(path, document(given.results))
    print(path)
    return 0


def _check(path: Path) -> int:
    if not path.is_file():
        print(f"{path} is missing: python -m benchmarks.report writes it", file=sys.stderr)
        return 1
    # The sections write their pictures beside the results: here beside a copy of them.
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / path.parent.name
        shutil.copytree(path.parent, copied, ignore=shutil.ignore_patterns("*.png", "checkpoints"))
        fresh = document(copied)
    stored = path.read_text()
    if fresh == stored:
        return 0
    lines = list(
        difflib.unified_diff(stored.splitlines(), fresh.splitlines(), str(path), "from the results", n=0, lineterm="")
    )
    print(f"{path} is not what the results give; python -m benchmarks.report writes it anew:", file=sys.stderr)
    print("\n".join(line[:200] for line in lines[:_SHOWN]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
