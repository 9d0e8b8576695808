"""The loops of Python sources that Triton compiles to loops, and which of them enclose a line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class SourceLoop:
    """A loop. ``bound``: the arguments of its ``range``, or the condition of its ``while``, as the source has them."""

    path: str
    line: int
    last_line: int
    bound: str


def enclosing(location: tuple[str, int] | None) -> list[SourceLoop]:
    """The loops that a file and line lie in, from the outermost on; of no location, none."""
    if location is None:
        return []
    path, line = location
    return [each for each in _loops(path) if each.line <= line <= each.last_line]


@cache
def _loops(path: str) -> tuple[SourceLoop, ...]:
    file = Path(path)
    if file.suffix != ".py":
        return ()
    return tuple(sorted(_found(path, ast.parse(file.read_text(encoding="utf-8"))), key=lambda each: each.line))


def _found(path: str, tree: ast.Module) -> Iterator[SourceLoop]:
    for node in ast.walk(tree):
        if isinstance(node, ast.While):
            bound = ast.unparse(node.test)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call) and _is_range(node.iter.func):
            bound = ", ".join(map(ast.unparse, node.iter.args))
        else:
            continue
        yield SourceLoop(path, node.lineno, node.end_lineno or node.lineno, bound)


def _is_range(function: ast.expr) -> bool:
    """Not of ``tl.static_range``, which the compiler's front end unrolls."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name == "range"
