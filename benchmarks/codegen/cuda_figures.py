"""Instructions per element, from a kernel's machine code and what its loops are known to do.

All are thread instructions per element of a row:

- *main loops*: those of the sweeps over chunks of 16 bytes, added up. It is what long rows tend to.
- *whole row*: all that the threads of a row issue for it, divided by its length: chunks, edges, and what is around the
  loops. Warps count as a whole; what is done once for several rows is left out.

Both are given twice. *Static* figures have all code of a loop in them, both sides of every branch. Those *on the
path* leave out the blocks that an ordinary call does not come to: no smoothed labels, other rows of the type of the
logits and aligned as those, threads of a warp together, no slow path of a division, no units of an MLP that are left
over. What is left are both sides of branches that calls do come to, such as those around edges: an estimate from
above for whole rows.

Loops within sweeps count as often as the call has them pass; where lanes meet in a piece, which depends on the logits,
once. *All options* are the static main loops with the sweep for smoothed labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .cuda_configurations import LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD, STATISTICS, Configuration
from .cuda_control_flow import NaturalLoop, calls_function
from .cuda_loops import (
    ATOMIC,
    FOR_IGNORED,
    FROM_STATISTICS,
    IN_CLUSTER,
    NOT_ATOMIC,
    OTHER_TYPES,
    SCANNED,
    SMOOTHED_CALL,
    SMOOTHS,
    SWEEPS,
    UNALIGNED,
    Kind,
    chunk_loads,
    is_chunk_store,
    is_transform,
    lies_behind,
    source_kinds,
    upstream_loads,
)
from .cuda_plans import Plan
from .cuda_targets import CudaError, Kernel
from .sass import Instruction

CHUNK_BYTES = 16
_SWEEPS = (*SWEEPS, Kind.SMOOTHING, Kind.SMOOTHED_SUM)
_SWEEPS_OF = {
    STATISTICS: [Kind.SUM, Kind.STATISTICS],
    LOG_SOFTMAX: [Kind.SUM, Kind.LOG_P],
    LOG_SOFTMAX_BACKWARD: [Kind.UPSTREAM, Kind.GRADIENT],
}
_WARP = 32

#: What the special function unit executes: approximations, conversions that are not packed, counts of bits.
_SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV")
_SHARED_ACCESSES = ("LDS", "STS", "LDGSTS")


@dataclass(frozen=True)
class Sweep:
    """A loop over chunks: instructions of a pass, static and on the path, and the chunks that a pass takes."""

    kind: Kind
    static: float
    path: float
    chunks: float


@dataclass(frozen=True)
class Figures:
    """Per element of a row; see the module. ``special``: by the special function unit, on the path of main loops."""

    sweeps: tuple[Sweep, ...]
    main: float
    main_path: float
    whole: float
    whole_path: float
    all_options: float
    special: float
    #: Bytes that pass through shared memory, on the path of the main loops. Of a look-up, at which lanes may meet: 4.
    shared_bytes: float
    #: Bytes of the narrowest load of a chunk, and of the widest store on the path of the loop in which that is
    #: narrowest; 0 where there are none.
    load_bytes: int
    store_bytes: int


def figures_of(kernel: Kernel, configuration: Configuration, plan: Plan) -> Figures:
    """The figures of a kernel, as it is launched for a configuration."""
    return _Counter(kernel, configuration, plan).figures()


class _Counter:
    def __init__(self, kernel: Kernel, configuration: Configuration, plan: Plan) -> None:
        self._kernel, self._configuration, self._plan = kernel, configuration, plan
        self._flow = kernel.flow
        self._kinds = kernel.kinds
        rows = [each for each, kind in self._kinds.items() if kind is Kind.ROWS]
        if len(rows) != 1:
            raise CudaError(f"{self._name}: {len(rows)} loops over rows")
        self._rows = rows[0]
        self._around = {inner: each for each in self._rows.flat() for inner in each.inner}
        for each in self._rows.flat():
            if self._kinds[each] is None:
                where = self._flow.instructions(each.latches)[-1].frames
                raise CudaError(f"{self._name}: how often is the loop at {where} passed?")

    def figures(self) -> Figures:
        """See :class:`Figures`."""
        loops = {kind: self._loops_of(kind) for kind in _SWEEPS}
        wanted = self._wanted
        missing = [kind.name for kind in wanted if not loops[kind]]
        if missing:
            raise CudaError(f"{self._name}: no loops {missing} were found")
        main = [loops[kind][0] for kind in wanted]
        sweeps = tuple(self._sweep(each) for each in main)
        static = {each.kind: each.static / each.chunks for each in sweeps}
        smoothed = {**static, **self._smoothed(loops, Kind.SUM in wanted)}
        elements = CHUNK_BYTES // self._configuration.element_bytes
        of_row = self._plan.team / self._configuration.classes
        loads = [each for loop in main for each in self._loads(loop)]
        stores = [self._own(loop, self._cold) for loop in main]
        widths = [{each.access_bytes for each in code if is_chunk_store(each)} for code in stores]
        return Figures(
            sweeps=sweeps,
            main=sum(static.values()) / elements,
            main_path=sum(each.path / each.chunks for each in sweeps) / elements,
            whole=self._expected(self._rows, frozenset()) * of_row,
            whole_path=self._expected(self._rows, self._cold) * of_row,
            all_options=sum(smoothed.values()) / elements,
            special=self._per_element(main, lambda each: float(each.name in _SPECIAL)),
            shared_bytes=self._per_element(main, _shared_bytes),
            load_bytes=min(loads, default=0),
            store_bytes=min((max(each) for each in widths if each), default=0),
        )

    def _smoothed(self, loops: Mapping[Kind, Sequence[NaturalLoop]], scans: bool) -> dict[Kind, float]:
        """What smoothed labels take beside an ordinary call, or in the place of a part of it: instructions a chunk."""
        found = [self._sweep(each) for kind in (Kind.SMOOTHING, Kind.SMOOTHED_SUM) for each in loops[kind][:1] if scans]
        return {Kind.SUM if each.kind is Kind.SMOOTHED_SUM else each.kind: each.static / each.chunks for each in found}

    @property
    def _name(self) -> str:
        return f"{self._kernel.name} for {self._kernel.target}"

    @cached_property
    def _wanted(self) -> list[Kind]:
        """The sweeps that the call makes."""
        operator = self._configuration.operator
        if operator in _SWEEPS_OF:
            return _SWEEPS_OF[operator]
        gradient = [Kind.GRADIENT] * self._configuration.gradient
        if self._kernel.name.resident:
            return [Kind.COPY, Kind.MAXIMUM, Kind.SUM, *gradient]
        return [*([Kind.SUM] * self._configuration.losses), *gradient]

    def _loops_of(self, kind: Kind) -> list[NaturalLoop]:
        """The loops of a sweep: one, or one that is unrolled and one for the chunks that it leaves.

        Of those that the compiler has made for each type of other rows, the one for the type of the logits.
        """
        found = [each for each in self._rows.flat() if self._kinds[each] is kind]
        own = OTHER_TYPES[self._configuration.dtype]
        typed = [each for each in found if any(lies_behind(x, calls=[own]) for x in self._own(each))]
        found = typed if len(found) > 1 and typed else found
        found.sort(key=lambda each: -self._chunks_of(each))
        if len(found) > 2 or (len(found) == 2 and self._chunks_of(found[0]) == self._chunks_of(found[1])):
            raise CudaError(f"{self._name}: {len(found)} loops {kind.name}")
        return found

    def _sweep(self, loop: NaturalLoop) -> Sweep:
        kind = self._kinds[loop]
        assert kind is not None
        static, path = (self._expected(loop, cold) for cold in (frozenset[int](), self._cold))
        return Sweep(kind, static, path, self._chunks_of(loop))

    def _chunks_of(self, loop: NaturalLoop) -> float:
        """How many chunks a pass takes: as many as it loads."""
        loaded = sum(self._loads(loop))
        if loaded == 0 or loaded % CHUNK_BYTES != 0:
            raise CudaError(f"{self._name}: a pass of a loop {self._kinds[loop]} loads {loaded} bytes of chunks")
        return loaded / CHUNK_BYTES

    def _loads(self, loop: NaturalLoop) -> list[int]:
        """Bytes of the loads of chunks that a sweep passes over."""
        code = self._own(loop)
        upstream = self._kinds[loop] is Kind.UPSTREAM
        loads = upstream_loads(code, self._configuration.dtype) if upstream else chunk_loads(code)
        return [each.access_bytes for each in loads]

    def _own(self, loop: NaturalLoop, without: Collection[int] = ()) -> list[Instruction]:
        return self._flow.instructions(loop.own.difference(without))

    def _expected(self, loop: NaturalLoop, without: frozenset[int]) -> float:
        """Instructions of a pass through a loop, without some blocks."""
        return sum(times * self._flow.count(blocks) for blocks, times in self._passes(loop, without))

    def _passes(
        self, loop: NaturalLoop, without: frozenset[int], times: float = 1
    ) -> Iterator[tuple[frozenset[int], float]]:
        """Blocks of a loop, and how often they are passed in one pass of it."""
        yield loop.own - without, times
        for inner in loop.inner:
            if inner.header not in without:
                yield from self._passes(inner, without, times * self._trips(inner))

    def _per_element(self, loops: Collection[NaturalLoop], measure: Callable[[Instruction], float]) -> float:
        """What instructions on the path of the main loops come to."""
        total = 0.0
        for loop in loops:
            for blocks, times in self._passes(loop, self._cold):
                found = sum(measure(each) for each in self._flow.instructions(blocks) if each.has_effect)
                total += times * found / self._chunks_of(loop)
        return total / (CHUNK_BYTES // self._configuration.element_bytes)

    def _trips(self, loop: NaturalLoop) -> float:
        kind, size = self._kinds[loop], self._configuration.size
        if kind in SWEEPS:
            return self._passes_of_sweep(loop)
        if kind in (Kind.SMOOTHING, Kind.SMOOTHED_SUM, Kind.ZEROS):
            return 0
        if kind is Kind.EDGES:
            return _WARP / self._plan.team  # The first warp's: others do not come in.
        if kind is Kind.UNITS:
            return self._units // self._units_of_pass(loop)
        if kind is Kind.BISECTION:
            return (size - 1).bit_length() / self._steps_of_pass(loop)
        if kind is Kind.FIRST_STEP:
            return max(0, (size - 1).bit_length() - 1)
        if kind is Kind.POWER:
            return (size - 1).bit_length()
        if kind is Kind.BLOCKS:
            return self._plan.cluster if self._plan.cluster > 1 else 0
        assert kind in (Kind.MEETING, Kind.TOGETHER)
        return 1

    def _passes_of_sweep(self, loop: NaturalLoop) -> float:
        kind = self._kinds[loop]
        assert kind is not None
        loops = self._loops_of(kind)
        if kind not in self._wanted or loop not in loops:
            return 0
        # The chunk with the target is one of edges.
        chunks = self._configuration.classes * self._configuration.element_bytes // CHUNK_BYTES
        chunks -= self._configuration.operator not in _SWEEPS_OF
        passes = math.ceil(chunks / _WARP) * _WARP / self._plan.team
        unrolled, *rest = loops
        if not rest:
            return passes / self._chunks_of(unrolled)
        full = passes // self._chunks_of(unrolled)
        return full if loop is unrolled else passes - full * self._chunks_of(unrolled)

    @property
    def _units(self) -> int:
        """Of an MLP."""
        return (self._configuration.size - 1) // 3

    def _units_of_pass(self, loop: NaturalLoop) -> int:
        """How many units a pass takes: one exponential each, for each logit that is taken at once."""
        exponentials = sum(each.opcode == "MUFU.EX2" for each in self._own(loop))
        at_once = self._kernel.name.width if self._kinds[self._around[loop]] in _SWEEPS else 1
        if exponentials == 0 or exponentials % at_once != 0:
            raise CudaError(f"{self._name}: {exponentials} exponentials in a loop over units, for {at_once} logits")
        return exponentials // at_once

    def _steps_of_pass(self, loop: NaturalLoop) -> int:
        """How many steps a pass takes: one look-up each."""
        return max(1, sum(each.name in ("LDS", "LDG") and each.has_effect for each in self._own(loop)))

    @cached_property
    def _cold(self) -> frozenset[int]:
        """The blocks that an ordinary call does not come to."""
        conditions = {SMOOTHS, *UNALIGNED, NOT_ATOMIC if self._plan.atomic else ATOMIC}
        conditions.update([IN_CLUSTER] * (self._plan.cluster == 1))
        conditions.add(FROM_STATISTICS if self._configuration.losses else SCANNED)
        calls = {SMOOTHED_CALL, *self._other_types}
        diverged = {
            label
            for each in self._kernel.function.instructions
            if each.opcode.startswith("BRA.DIV") and (label := each.label) is not None
        }
        begins = {self._kernel.function.labels[each] for each in diverged}
        units = [each for each in self._around if self._kinds[each] is Kind.UNITS]
        in_units = frozenset[int]().union(*(each.blocks for each in units))
        leaves_none = all(self._units % self._units_of_pass(each) == 0 for each in units)
        # What ways have in common may have the source lines of either: to what a call must come, all before leads.
        certain = {loop.header for kind in self._wanted for loop in self._loops_of(kind)}
        for block in self._rows.blocks:
            if any(map(self._is_certain, self._flow.instructions([block]))):
                certain.add(block)

        def is_cold(block: int) -> bool:
            code = self._flow.instructions([block])
            if any(self._flow.dominates(block, each) for each in certain):
                return False
            if self._flow.blocks[block].begin in begins or any(map(calls_function, code)):
                return True
            if leaves_none and block not in in_units and any(map(_is_of_unit, code)):
                return True
            votes = Counter(lies_behind(each, conditions, FOR_IGNORED, calls) for each in code if each.frames)
            return votes[True] > votes[False]

        return self._flow.behind(is_cold)

    @property
    def _other_types(self) -> list[str]:
        """Where rows are accessed that are not of the logits' type: rows of upstream gradients and of results are."""
        return [text for dtype, text in OTHER_TYPES.items() if dtype != self._configuration.dtype]

    def _is_certain(self, instruction: Instruction) -> bool:
        """Whether a call must come to it: it accesses an aligned chunk of a row of the logits' type."""
        if instruction.access_bytes != CHUNK_BYTES:
            return False
        if is_chunk_store(instruction):
            return not lies_behind(instruction, functions=FOR_IGNORED, calls=self._other_types)
        return instruction.name == "LDG" and lies_behind(instruction, calls=[OTHER_TYPES[self._configuration.dtype]])


def _is_of_unit(instruction: Instruction) -> bool:
    """Whether it forms the exponential or the reciprocal of a unit of an MLP."""
    return instruction.name == "MUFU" and source_kinds(instruction)[:1] == [Kind.UNITS]


def _shared_bytes(instruction: Instruction) -> float:
    if instruction.name not in _SHARED_ACCESSES:
        return 0
    return 4 if is_transform(instruction) else instruction.access_bytes
