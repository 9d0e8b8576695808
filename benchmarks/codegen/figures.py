"""Instructions per element, from a kernel's machine code and what its loops are known to do.

A kernel passes over a row in sweeps, each a loop over tiles. Two figures, both thread instructions per element:

- *main loops*: those of the loops over full tiles, summed over the sweeps: threads * instructions of a pass / elements
  of a tile. It is what long rows tend to.
- *whole row*: all that the threads of a program issue for a row of V elements, divided by V: full tiles, masked tiles,
  and what is before, between and after the loops. A kernel that takes several rows (a loop over rows) sets sums up
  before them and adds those up after them; that is once a program, not once a row, and left out.

How often a loop is passed follows from the bound that it has in the source, where :mod:`.source_loops` finds it; a
bound that is not known here is an error, not a guess. A loop that the compiler has unrolled has as many 16-byte loads
of the row more (one over the units of a transform, exponentials), and is followed by the same loop for what is left.
Branches count with both sides, predicated instructions as issued. Loops over the units of a transform count as often as
there are units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from . import sass
from .launches import Launch
from .source_loops import SourceLoop, enclosing
from .triton_targets import CodegenError, Compiled

#: Where look-ups of tables lie: their loads are not the row's.
_TABLES = "/transforms/"

#: The bound of the loops over the units of an MLP. A unit takes an exponential for each element.
_UNITS = "(size - 1) // 3"


@dataclass(frozen=True)
class Row:
    """What a program does with a row: its length, its tile, and how often it passes the loops, by their bounds.

    ``sweeps`` are the bounds of the loops over tiles, that over full tiles first; ``rows`` that of a loop over rows.
    Full tiles are loaded by code in files whose path ends in ``full_tiles_in``. ``with_upstream``: where p is formed,
    by exponentials, a tile of upstream gradients is loaded beside that of logits.
    """

    classes: int
    tile: int
    itemsize: int
    trips: Mapping[str, float]
    sweeps: tuple[str, ...]
    rows: str | None = None
    full_tiles_in: str = "/tiles.py"
    with_upstream: bool = False


@dataclass(frozen=True)
class Counts:
    """The two figures, and the bytes that the narrowest of the main loops loads of the row at once."""

    main: float
    whole: float
    load_bytes: int


def row_of(launch: Launch) -> Row | None:
    """What one of the package's kernels over rows does with a row; None of the head's, which have tiles of products.

    The names are those of ``triton_kernels``.
    """
    values = launch.values
    if "EDGES" not in values:
        return None
    classes, lanes, width, edges, size = (values[each] for each in ("classes", "LANES", "WIDTH", "EDGES", "size"))
    tile = lanes * width
    trips = {
        "full": float(max(classes // tile - (edges - 1), 0)),
        "EDGES": float(edges),
        "program, end, step": 1.0,
        # Units of the MLP; steps of a bisection.
        _UNITS: (size - 1) // 3,
        "step > 0": math.ceil(math.log2(size)) if size > 1 else 0,
        # Once a program.
        "entries": float(size * values.get("table_rows", 0) // 2),
        "size": float(size),
    }
    return Row(
        classes,
        tile,
        values["input"].element_size(),
        trips,
        ("full",),
        "program, end, step",
        with_upstream="grad_output" in values,
    )


def counts_of(compiled: Compiled, row: Row) -> Counts:
    """The figures of a kernel that was compiled for NVIDIA."""
    if compiled.function is None:
        raise CodegenError(f"{compiled.kernel} for {compiled.target}: no machine code to count")
    return _Counter(compiled, compiled.function, row).counts()


class _Counter:
    def __init__(self, compiled: Compiled, function: sass.Function, row: Row) -> None:
        self._compiled, self._function, self._row = compiled, function, row
        self._bounds: dict[sass.Loop, str] = {}
        self._unrolled: dict[sass.Loop, int] = {}
        for loop in function.loops():
            self._find_bounds(loop)
        for loop, bound in self._bounds.items():
            self._unrolled[loop] = self._times_unrolled(loop, bound)

    def counts(self) -> Counts:
        """See :class:`Counts`."""
        sweeps = [loop for loop, bound in self._bounds.items() if bound in self._row.sweeps and self._loads(loop)]
        if not sweeps:
            raise CodegenError(f"{self._name}: no loop over tiles was found")
        main = [loop for loop in sweeps if not self._is_remainder(loop)]
        per_tile = sum(self._function.expected(self._trips, loop) / self._unrolled[loop] for loop in main)
        widths = []
        for loop in main:
            widest = sass.widest(self._loads(loop))
            widths.append(0 if widest is None else widest.access_bytes)
        within = [loop for loop, bound in self._bounds.items() if bound == self._row.rows]
        if len(within) > 1:
            raise CodegenError(f"{self._name}: {len(within)} loops over rows")
        whole = self._function.expected(self._trips, within[0] if within else None)
        threads = self._compiled.threads
        return Counts(per_tile * threads / self._row.tile, whole * threads / self._row.classes, min(widths))

    @property
    def _name(self) -> str:
        return f"{self._compiled.kernel} for {self._compiled.target}"

    def _find_bounds(self, loop: sass.Loop) -> None:
        for inner in loop.inner:
            self._find_bounds(inner)
        bound = self._bound(loop)
        if bound is None or bound not in self._row.trips:
            raise CodegenError(f"{self._name}: how often is the loop at {loop.location} passed? Its bound is {bound}")
        self._bounds[loop] = bound

    def _bound(self, loop: sass.Loop) -> str | None:
        """As the branch's line has it, as a rule; else what loads a full tile, or what most instructions lie in."""
        at_branch = _at(loop)
        if at_branch is not None:
            return at_branch.bound
        if self._wide_loads(loop):
            return self._row.sweeps[0]
        # A loop that loads from the row, or has such loops in it, is not one of a transform.
        over_rows = any(self._bounds[each] in self._row.sweeps for each in _flat(loop.inner))
        of_row = over_rows or bool(self._loads(loop))
        votes: Counter[str] = Counter()
        for each, count in self._votes(loop).items():
            if (_TABLES not in each.path) == of_row and (each.bound == self._row.rows) == over_rows:
                votes[each.bound] += count
        return votes.most_common(1)[0][0] if votes else None

    def _source_loop(self, loop: sass.Loop) -> SourceLoop | None:
        """The loop of the source, of those that have the bound; None where no instruction says."""
        at_branch = _at(loop)
        if at_branch is not None:
            return at_branch
        votes = self._votes(loop)
        found = [each for each in votes if each.bound == self._bounds[loop]]
        return max(found, key=lambda each: votes[each], default=None)

    def _votes(self, loop: sass.Loop) -> Counter[SourceLoop]:
        """How many instructions of a loop lie in each loop of the source."""
        return Counter(each for instruction in self._own(loop) for each in enclosing(instruction.location))

    def _own(self, loop: sass.Loop) -> list[sass.Instruction]:
        """The instructions of a loop that lie in no loop in it."""
        places = set(range(loop.begin, loop.end))
        for inner in loop.inner:
            places -= set(range(inner.begin, inner.end))
        return [self._function.instructions[place] for place in sorted(places)]

    def _loads(self, loop: sass.Loop) -> list[sass.Instruction]:
        """The loads of the row in a loop, without those of the loops in it."""
        return [each for each in self._own(loop) if self._is_load(each)]

    @staticmethod
    def _is_load(instruction: sass.Instruction) -> bool:
        return (
            sass.is_global_load(instruction)
            and instruction.location is not None
            and _TABLES not in instruction.location[0]
        )

    def _wide_loads(self, loop: sass.Loop) -> int:
        """How many 16-byte loads of full tiles are in a loop, those of the loops in it aside."""
        return sum(
            each.access_bytes == 16 and each.location is not None and each.location[0].endswith(self._row.full_tiles_in)
            for each in self._loads(loop)
        )

    def _times_unrolled(self, loop: sass.Loop, bound: str) -> int:
        elements = self._row.tile // self._compiled.threads
        exponentials = sum(each.opcode == "MUFU.EX2" for each in self._own(loop))
        if bound == _UNITS:
            return max(1, exponentials // elements)
        if bound not in self._row.sweeps:
            return 1
        once = elements * self._row.itemsize / 16
        if self._row.with_upstream and exponentials > 0:
            once *= 2
        return max(1, round(self._wide_loads(loop) / once))

    def _unrolled_before(self, loop: sass.Loop) -> int:
        """How many passes each pass of the loop before makes, where that is ``loop`` itself, unrolled; else 1."""
        bound = self._bounds[loop]
        before = [each for each, other in self._bounds.items() if other == bound and each.end <= loop.begin]
        if not before or self._unrolled[loop] > 1:
            return 1
        last = max(before, key=lambda each: each.begin)
        same = {self._source_loop(each) for each in (last, loop)} - {None}
        return self._unrolled[last] if len(same) < 2 else 1

    def _is_remainder(self, loop: sass.Loop) -> bool:
        """Whether it does what an unrolled loop has left."""
        return self._unrolled_before(loop) > 1

    def _trips(self, loop: sass.Loop) -> float:
        if self._bounds[loop] in self._row.sweeps and not self._loads(loop):
            return 0.0  # It fills the row of an ignored target, on the other side of a branch.
        trips = self._row.trips[self._bounds[loop]]
        times = self._unrolled_before(loop)
        return trips % times if times > 1 else float(trips // self._unrolled[loop])


def _at(loop: sass.Loop) -> SourceLoop | None:
    """The loop of the source that begins at the line of the branch."""
    found = enclosing(loop.location)
    return found[-1] if found and loop.location is not None and found[-1].line == loop.location[1] else None


def _flat(loops: tuple[sass.Loop, ...]) -> list[sass.Loop]:
    return [each for loop in loops for each in (loop, *_flat(loop.inner))]
