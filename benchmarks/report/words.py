"""Differences and counts in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.statistics import Difference


def better(difference: Difference | None) -> bool:
    """Whether a loss is significantly lower."""
    return difference is not None and difference.significant and difference.mean < 0


def count_better(differences: Mapping[Any, Difference]) -> int:
    """In how many of ``differences`` the loss is significantly lower."""
    return sum(map(better, differences.values()))


def span(differences: Mapping[str, Difference]) -> str:
    """The smallest and the largest gain, like ``+0.01 to +0.02``."""
    gains = [-difference.mean for difference in differences.values()]
    return f"{min(gains):+.4f} to {max(gains):+.4f}"


def of_all(count: int, total: int, what: str) -> str:
    """``supported``, ``supported in part`` or ``not supported``, by how many of all cases agree."""
    word = "supported" if count == total else "supported in part" if count else "not supported"
    return f"**{word}**: {what} in {count} of {total}"
