"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table(heads: Iterable[object], lines: Iterable[str]) -> str:
    """A table of such heads, and of lines that :func:`line` made."""
    heads = list(heads)
    return "\n".join([line(heads), line(["---"] * len(heads)), *lines])


def line(cells: Iterable[object]) -> str:
    """A line of a table; None is an empty cell."""
    return f"| {' | '.join('' if each is None else str(each) for each in cells)} |"
