"""Figures that were held against budgets, and what a command does with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_text


@dataclass(frozen=True)
class Verdict:
    """A figure held against its budget."""

    budget: str
    subject: str
    value: float
    limit: float
    reason: str
    at_least: bool = False

    @property
    def kept(self) -> bool:
        """Whether the budget is kept."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        relation = "at least" if self.at_least else "at most"
        state = "ok    " if self.kept else "BROKEN"
        return f"{state} {self.subject}: {self.budget} {self.value:.4g}, {relation} {self.limit:.4g} ({self.reason})"


def summary(verdicts: Sequence[Verdict], source: str) -> str:
    """What a report says of them; ``source`` is the file with the budgets."""
    broken = [each for each in verdicts if not each.kept]
    if not broken:
        return f"All {len(verdicts)} are kept (`{source}`)."
    lines = [f"- {str(each).removeprefix('BROKEN ')}" for each in broken]
    return "\n".join([f"{len(broken)} of {len(verdicts)} are broken (`{source}`):\n", *lines])


def finish(text: str, verdicts: Sequence[Verdict], report: Path, write: bool, check: bool) -> int:
    """Prints a report, or writes it to its file; with ``check`` prints the verdicts. Returns the exit code."""
    if write:
        write_text(report, text)
        print(report)
    else:
        print(text)
    if not check:
        return 0
    for verdict in verdicts:
        print(verdict)
    broken = [verdict for verdict in verdicts if not verdict.kept]
    print(f"{len(verdicts)} figures held against their budgets, {len(broken)} broken", file=sys.stderr)
    return 1 if broken else 0
