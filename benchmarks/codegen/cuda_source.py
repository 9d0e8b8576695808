"""Loops and branches of the CUDA sources, as far as their text tells: which of them enclose a line.

No C++ parser: comments and literals are blanked, brackets matched, and the words ``for``, ``while``, ``if`` and
``else`` taken for what they are. Of a branch that is written on one line nothing is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"

_BLANKED = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.S)
_STATEMENT = re.compile(r"\b(for|while|if(?:\s+constexpr)?)\s*(?=\()")
_NESTED = re.compile(r"(?:MONOSOFTMAX_\w+\s+)?(?:for|while|if(?:\s+constexpr)?)\s*(?=\()")
_FUNCTION = re.compile(r"\b([A-Za-z_]\w*)\s*(?=\()")
#: Loops that a macro has the compiler unroll completely: there are none in the machine code.
_UNROLLED = re.compile(r"\bMONOSOFTMAX_UNROLL\s*$")
_CLOSING = {"(": ")", "{": "}", "[": "]"}


@dataclass(frozen=True)
class SourceLoop:
    """A loop. ``header`` is what stands in its parentheses, ``conditions`` those of the ``if`` around it."""

    path: str
    line: int
    last_line: int
    header: str
    body: str
    conditions: tuple[str, ...]
    unrolled: bool


@dataclass(frozen=True)
class SourceBranch:
    """A side of an ``if``: from its first to its last line. The condition of an ``else`` has a ``!`` before it.

    What follows a return is a side, too, up to the end of the block: of the return's condition, negated.
    """

    path: str
    line: int
    last_line: int
    condition: str


@dataclass(frozen=True)
class SourceFile:
    """What :func:`source_file` found."""

    loops: tuple[SourceLoop, ...]
    branches: tuple[SourceBranch, ...]
    #: First and last lines of the bodies of functions, by their names.
    functions: dict[str, tuple[tuple[int, int], ...]]
    lines: tuple[str, ...]


def line_at(location: tuple[str, int]) -> str:
    """The text of a line of ``csrc``, without comments; of any other, none."""
    path, line = location
    lines = source_file(path).lines
    return lines[line - 1] if 0 < line <= len(lines) else ""


@cache
def loops_around(location: tuple[str, int]) -> tuple[SourceLoop, ...]:
    """The loops that a file and line lie in, from the innermost on, but for those that are unrolled."""
    path, line = location
    found = [each for each in source_file(path).loops if not each.unrolled and each.line <= line <= each.last_line]
    return tuple(sorted(found, key=lambda each: -each.line))


@cache
def conditions_around(location: tuple[str, int]) -> frozenset[str]:
    """The conditions of the sides of branches that a file and line lie in."""
    path, line = location
    return frozenset(each.condition for each in source_file(path).branches if each.line <= line <= each.last_line)


@cache
def functions_around(location: tuple[str, int]) -> frozenset[str]:
    """The functions that a file and line lie in."""
    path, line = location
    functions = source_file(path).functions
    return frozenset(name for name, bodies in functions.items() if any(a <= line <= b for a, b in bodies))


@cache
def source_file(path: str) -> SourceFile:
    """The loops and branches of a file in a folder ``csrc``, which may be a copy of ours; of any other, none."""
    file = Path(path).resolve()
    if CSRC.name not in file.parts:
        return SourceFile((), (), {}, ())
    return scan(str(file), file.read_text(encoding="utf-8"))


def scan(path: str, text: str) -> SourceFile:
    """The loops and branches of a text."""
    return _Scanner(path, text).scan()


class _Scanner:
    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._text = _BLANKED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
        #: The word, and where the statement begins and its parentheses open and close.
        self._statements = [
            (_words(found[1]), found.start(), found.end(), self._closing(found.end()))
            for found in _STATEMENT.finditer(self._text)
        ]

    def scan(self) -> SourceFile:
        """All that there is."""
        branches: list[tuple[int, int, SourceBranch]] = []
        for word, _, opening, closing in self._statements:
            if word.startswith("if"):
                branches += self._sides(opening, closing)
        loops = []
        for word, start, opening, closing in self._statements:
            if word.startswith("if"):
                continue
            begin, end = self._body(closing + 1)
            around = tuple(branch.condition for first, last, branch in branches if first <= start < last)
            before = self._text[max(0, start - 60) : start]
            loops.append(
                SourceLoop(
                    self._path,
                    self._line(start),
                    self._line(end - 1),
                    _words(self._text[opening + 1 : closing]),
                    _words(self._text[begin:end]),
                    around,
                    _UNROLLED.search(before) is not None,
                )
            )
        lines = tuple(self._text.splitlines())
        return SourceFile(tuple(loops), tuple(branch for _, _, branch in branches), self._functions(), lines)

    def _sides(self, opening: int, closing: int) -> list[tuple[int, int, SourceBranch]]:
        """The sides of an ``if``, and what follows it where it returns."""
        condition = _words(self._text[opening + 1 : closing])
        begin, end = self._body(closing + 1)
        found = [self._side(opening, begin, end, condition)]
        other = re.compile(r"\s*else\b").match(self._text, end)
        if other is not None:
            found.append(self._side(other.end() - 1, *self._body(other.end()), f"!{condition}"))
        elif re.search(r"\breturn\b[^;{}]*;\s*\}?\s*$", self._text[begin:end]):
            found.append(self._side(end - 1, end, self._end_of_rest(end), f"!{condition}"))
        return [each for each in found if each is not None]

    def _side(self, at: int, begin: int, end: int, condition: str) -> tuple[int, int, SourceBranch] | None:
        # What lies on the line of the condition cannot be told from it.
        first = self._line(begin + len(self._text[begin:end]) - len(self._text[begin:end].lstrip("{ \n")))
        last = self._line(end - 1)
        first = max(first, self._line(at) + 1)
        return (begin, end, SourceBranch(self._path, first, last, condition)) if first <= last else None

    def _functions(self) -> dict[str, tuple[tuple[int, int], ...]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for match in _FUNCTION.finditer(self._text):
            if match[1] in ("for", "while", "if", "switch", "return", "sizeof", "catch"):
                continue
            closing = self._closing(match.end())
            rest = re.compile(r"(?:\s|\bconst\b|\bnoexcept\b)*\{").match(self._text, closing + 1)
            if rest is not None:
                end = self._closing(rest.end() - 1)
                found.setdefault(match[1], []).append((self._line(rest.end()), self._line(end)))
        return {name: tuple(bodies) for name, bodies in found.items()}

    def _body(self, place: int) -> tuple[int, int]:
        """Where the statement that follows begins and ends (exclusive)."""
        begin = place + len(self._text[place:]) - len(self._text[place:].lstrip())
        if self._text[begin] == "{":
            return begin, self._closing(begin) + 1
        statement = _NESTED.match(self._text, begin)
        if statement is not None:
            _, end = self._body(self._closing(statement.end()) + 1)
            other = re.compile(r"\s*else\b").match(self._text, end)
            return begin, end if other is None else self._body(other.end())[1]
        place = begin
        while self._text[place] != ";":
            place = self._closing(place) + 1 if self._text[place] in _CLOSING else place + 1
        return begin, place + 1

    def _closing(self, opening: int) -> int:
        """Where the bracket at a place is closed."""
        pending = [_CLOSING[self._text[opening]]]
        place = opening
        while pending:
            place += 1
            character = self._text[place]
            if character in _CLOSING:
                pending.append(_CLOSING[character])
            elif character == pending[-1]:
                pending.pop()
        return place

    def _end_of_rest(self, place: int) -> int:
        """Where the block around a place ends; if it is that of an ``if constexpr``, taken as true, the one around."""
        end = self._end_of_block(place)
        for word, _, _, closing in self._statements:
            if word == "if constexpr" and closing < place and self._body(closing + 1)[1] == end + 1:
                return self._end_of_rest(end + 1)
        return end

    def _end_of_block(self, place: int) -> int:
        while self._text[place] != "}":
            place = self._closing(place) + 1 if self._text[place] in _CLOSING else place + 1
        return place

    def _line(self, place: int) -> int:
        return self._text.count("\n", 0, place) + 1


def _words(text: str) -> str:
    return " ".join(text.split())
