"""A figure that was held against a budget."""

from __future__ import annotations

from dataclasses import dataclass


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
