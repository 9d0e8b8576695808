"""Markdown from results: templates for prose, tables, and the way in which figures are written.

Needs pandas and jinja2 only when it writes: a machine that only runs units may lack them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Template


def template(path: Path, filters: Mapping[str, Any] | None = None, tests: Mapping[str, Any] | None = None) -> Template:
    """A Jinja template with the filters ``table`` and ``count`` beside; a name that has no value is an error."""
    from jinja2 import Environment, StrictUndefined

    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters.update({"table": table, "count": count, **(filters or {})})
    jinja.tests.update(tests or {})
    return jinja.from_string(path.read_text(encoding="utf-8"))


def render(path: Path, **values: Any) -> str:
    """The text of the template ``path`` with ``values``."""
    return template(path).render(**values).strip()


def table(rows: Sequence[Mapping[str, Any]] | pd.DataFrame, style: str = "github") -> str:
    """Rows as a table of that ``tabulate`` style: their keys are headers, all columns but the first are aligned right.

    Strings and numbers are written as they are; a cell that a row has not is empty.
    """
    import pandas as pd

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
