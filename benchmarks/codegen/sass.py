"""Listings of NVIDIA machine code (SASS), as ``nvdisasm -c -g`` prints them: instructions, loops, and what they access.

The listings may come from any compiler. For :meth:`Function.loops` a loop is a branch back to a label, with all that
lies between the two: ptxas lays the loops of Triton's kernels out that way. The source line of that branch is the
loop's own line in the source, which ``-g`` prints where the code was compiled with line numbers (Triton's default,
nvcc's ``-lineinfo``). Code with blocks out of line takes :mod:`.cuda_control_flow`.

``-gi`` prints of inlined code every call that it lies in, from the innermost on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_OTHER_SECTION = re.compile(r"\s*\.section\s")
_LOCATION = re.compile(r'\s*//## File "([^"]*)", line (\d+)(?: inlined at "([^"]*)", line (\d+))?')
_LABEL = re.compile(r"\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_WIDTH = re.compile(r"\.(8|16|32|64|128|256)\b|\.[US](8|16)\b")

#: What is no work: padding.
_PADDING = ("NOP",)
#: Opcodes of matrix products: of a warp, of a warp group (wgmma), and of a processor's tensor memory (tcgen05).
MATRIX = ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA")
#: Atomic operations on global memory, with and without a result.
ATOMICS = ("ATOMG", "ATOM", "REDG", "RED")


class ListingError(ValueError):
    """A listing is not what this module takes listings to be."""


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``location``: file and line of the source, where they are known; ``calls``: those of the calls.

    The calls are those that the location is inlined at, the innermost first.
    """

    opcode: str
    operands: str = ""
    predicate: str = ""
    location: tuple[str, int] | None = None
    calls: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def access_bytes(self) -> int:
        """How many bytes a thread loads or stores."""
        found = _WIDTH.search(self.opcode)
        return 4 if found is None else int(found[1] or found[2]) // 8

    @property
    def has_effect(self) -> bool:
        """Whether a thread executes it: before asynchronous copies ptxas writes some that none does."""
        return self.predicate != "@!PT"

    @property
    def frames(self) -> tuple[tuple[str, int], ...]:
        """Location and calls, from the innermost on."""
        return () if self.location is None else (self.location, *self.calls)

    @property
    def label(self) -> str | None:
        """The label that it branches to, or calls."""
        found = _TARGET.search(self.operands)
        return None if found is None else found[1]


@dataclass(frozen=True)
class Loop:
    """Instructions ``begin`` to ``end`` (exclusive) of a function, and the loops that lie directly in it."""

    begin: int
    end: int
    location: tuple[str, int] | None
    inner: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Function:
    """A function of a listing. ``labels`` give the place of the instruction that follows them."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops, in order. The branch to itself that ends a function is none."""
        ends: dict[int, int] = {}
        for place, instruction in enumerate(self.instructions):
            target = self._target(instruction)
            if target is not None and target < place:
                ends[target] = max(place + 1, ends.get(target, 0))
        return self._nested(sorted(ends.items(), key=lambda each: (each[0], -each[1])))

    def matching(
        self, matches: Callable[[Instruction], bool], begin: int = 0, end: int | None = None
    ) -> list[Instruction]:
        """The instructions from ``begin`` to ``end`` that match."""
        return [each for each in self.instructions[begin:end] if matches(each)]

    def count(self, begin: int = 0, end: int | None = None) -> int:
        """How many instructions from ``begin`` to ``end`` are work. Those under a predicate are: they are issued."""
        stop = len(self.instructions) if end is None else end
        return sum(self._is_work(place) for place in range(begin, stop))

    def expected(self, trips: Callable[[Loop], float], within: Loop | None = None) -> float:
        """Instructions that a thread issues in one pass, each loop in there being passed as often as ``trips`` says.

        Of the two sides of a branch both count: an estimate from above.
        """
        begin, end = (0, len(self.instructions)) if within is None else (within.begin, within.end)
        total = float(self.count(begin, end))
        for loop in self.loops() if within is None else within.inner:
            total += trips(loop) * self.expected(trips, loop) - self.count(loop.begin, loop.end)
        return total

    def _is_work(self, place: int) -> bool:
        instruction = self.instructions[place]
        return instruction.name not in _PADDING and self._target(instruction) != place

    def _target(self, instruction: Instruction) -> int | None:
        if instruction.name != "BRA":
            return None
        found = _TARGET.search(instruction.operands)
        if found is None or found[1] not in self.labels:
            raise ListingError(f"{self.name}: a branch to nowhere: {instruction.opcode} {instruction.operands}")
        return self.labels[found[1]]

    def _nested(self, spans: Sequence[tuple[int, int]]) -> tuple[Loop, ...]:
        found: list[Loop] = []
        rest = list(spans)
        while rest:
            begin, end = rest.pop(0)
            inside = [each for each in rest if each[0] < end]
            rest = rest[len(inside) :]
            if any(each[1] > end for each in inside):
                raise ListingError(f"{self.name}: loops that overlap, at instructions {begin} to {end}")
            found.append(Loop(begin, end, self.instructions[end - 1].location, self._nested(inside)))
        return tuple(found)


def parse(listing: str) -> dict[str, Function]:
    """The functions of a listing, by name."""
    functions: dict[str, Function] = {}
    function: Function | None = None
    # From the innermost on, and where the last one is inlined at: then the next line continues them.
    frames: tuple[tuple[str, int], ...] = ()
    caller: tuple[str, int] | None = None
    for line in listing.splitlines():
        if found := _INSTRUCTION.match(line):
            if function is not None:
                location = frames[0] if frames else None
                function.instructions.append(Instruction(found[2], found[3], found[1] or "", location, frames[1:]))
        elif found := _SECTION.match(line):
            function = functions.setdefault(found[1], Function(found[1]))
            frames, caller = (), None
        elif _OTHER_SECTION.match(line):
            function = None
        elif function is None:
            continue
        elif found := _LOCATION.match(line):
            frame = found[1], int(found[2])
            frames = (*frames, frame) if frame == caller else (frame,)
            caller = None if found[3] is None else (found[3], int(found[4]))
        elif found := _LABEL.match(line):
            function.labels[found[1]] = len(function.instructions)
    if not any(each.instructions for each in functions.values()):
        raise ListingError("no instructions in the listing")
    return functions


def is_global_load(instruction: Instruction) -> bool:
    """Whether it loads from global memory, to registers or to shared memory."""
    return instruction.name in ("LDG", "LDGSTS")


def is_global_store(instruction: Instruction) -> bool:
    """Whether it stores to global memory."""
    return instruction.name == "STG"


def is_spill(instruction: Instruction) -> bool:
    """Whether it accesses the memory of a thread's own, where registers are spilled to."""
    return instruction.name in ("LDL", "STL")


def widest(instructions: Sequence[Instruction]) -> Instruction | None:
    """The one that accesses most bytes; None of none."""
    return max(instructions, key=lambda each: each.access_bytes, default=None)
