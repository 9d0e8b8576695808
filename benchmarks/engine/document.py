"""Markdown from results: templates for prose, tables, and the way in which figures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template


def template(path: Path, filters: Mapping[str, Any] | None = None, tests: Mapping[str, Any] | None = None) -> Template:
    """A Jinja template, in which a name that has no value is an error.

    Args:
        path: of the template.
        filters, tests: what it may use beside ``table`` (:func:`table`), ``count`` (``{{ 3 | count('seed') }}`` is
            "3 seeds") and Jinja's own.
    """
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters.update({"table": table, "count": count, **(filters or {})})
    jinja.tests.update(tests or {})
    return jinja.from_string(path.read_text(encoding="utf-8"))


def render(path: Path, **values: Any) -> str:
    """The text of the template ``path`` with ``values``."""
    return template(path).render(**values).strip()


def table(rows: Sequence[Mapping[str, Any]] | pd.DataFrame, style: str = "github") -> str:
    """Rows as a Markdown table: their keys are the headers, the first column is aligned left, all others right.

    Args:
        rows: of strings and numbers, which are written as they are; a cell that a row has not is empty.
        style: a table format of ``tabulate``; ``simple`` for a terminal.
    """
    frame = pd.DataFrame(rows, dtype=object).fillna("")
    if frame.empty:
        return "Nothing has been run yet."
    align = ["left", *["right"] * (len(frame.columns) - 1)]
    return frame.astype(str).to_markdown(index=False, tablefmt=style, colalign=align, disable_numparse=True)


def count(number: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def environments(records: Sequence[Any]) -> str:
    """A line for each environment: how many results are from it, its versions and its machine."""
    seen: dict[str, int] = {}
    for record in records:
        text = ", ".join(f"{name} {value}" for name, value in record.environment.items() if value is not None)
        seen[text] = seen.get(text, 0) + 1
    return "\n".join(f"- {count(number, 'result')}: {text}" for text, number in seen.items())
