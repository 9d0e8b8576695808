"""What the loops of the CUDA kernels do, by the text of their sources: no line numbers.

A kernel takes rows in *sweeps*, each a loop over chunks of 16 bytes; what does not fill chunks, and the chunk with the
target, are edges, of which a thread of the first warp takes one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from enum import Enum
from functools import cache
from pathlib import Path

from .cuda_control_flow import ControlFlow, NaturalLoop
from .cuda_source import SourceLoop, conditions_around, functions_around, line_at, loops_around, source_file
from .sass import Instruction, ListingError


class Kind(Enum):
    """What a loop passes over."""

    ROWS = "rows"
    # Sweeps.
    COPY = "chunks, to shared memory"
    MAXIMUM = "chunks, for the largest logit"
    SUM = "chunks, for the sum of exponentials"
    SMOOTHING = "chunks, for smoothed labels"
    SMOOTHED_SUM = "chunks, for the sum of exponentials and smoothed labels"
    GRADIENT = "chunks, for the gradient"
    STATISTICS = "chunks, for entropy, largest logit and rank"
    LOG_P = "chunks, for log p"
    UPSTREAM = "chunks, for the sum of upstream gradients"
    ZEROS = "chunks or edges of an ignored row"
    EDGES = "edges"
    # Within them.
    UNITS = "units of an MLP"
    BISECTION = "steps of a bisection"
    FIRST_STEP = "powers of two, for the first step of a bisection"
    POWER = "powers of two, for the entries of a table"
    MEETING = "lanes that meet in a piece"
    BLOCKS = "blocks of a cluster"
    TOGETHER = "until the threads of a warp are together"


#: What an ordinary call passes over, of chunks.
SWEEPS = (Kind.COPY, Kind.MAXIMUM, Kind.SUM, Kind.GRADIENT, Kind.STATISTICS, Kind.LOG_P, Kind.UPSTREAM)

#: By what stands in the parentheses of the loop.
_BY_HEADER = {
    "row < arguments.rows": Kind.ROWS,
    "h < units_": Kind.UNITS,
    "step /= 2": Kind.BISECTION,
    "<= count": Kind.FIRST_STEP,
    "power < count": Kind.POWER,
    "__any_sync(": Kind.MEETING,
    "block < blocks": Kind.BLOCKS,
}

#: By what stands in a loop over chunks; the first that does.
_BY_BODY = {
    "copy_chunk(": Kind.COPY,
    "sums.add(": Kind.GRADIENT,
    "store_chunk(": Kind.ZEROS,
    "output.store(": Kind.LOG_P,
    "upstream.load(": Kind.UPSTREAM,
    "take(": Kind.STATISTICS,
    ".larger(": Kind.MAXIMUM,
    "exponential(": Kind.SUM,
}

#: Conditions of branches, as the sources have them: ``!`` is their else.
SMOOTHS = "smooths"
UNALIGNED = ("!aligned", "!in_chunks<E, kCount>(at)")
IN_CLUSTER = "!blocks == 1"
ATOMIC, NOT_ATOMIC = "total_ != nullptr", "!total_ != nullptr"
SCANNED = "scanned"
FROM_STATISTICS = "!arguments.losses"
_CONDITIONS = (SMOOTHS, *UNALIGNED, IN_CLUSTER, ATOMIC, NOT_ATOMIC, SCANNED, FROM_STATISTICS)
#: What is called for smoothed labels only, as the line of the call has it, and a function that only such labels need.
SMOOTHED_CALL = "scan_once<T, true>("
_FOR_SMOOTHED = "gaps_of"
#: Functions for rows that are ignored.
FOR_IGNORED = ("fill_with_zeros", "write_nothing")
#: Instructions of a loop that waits for the others of a warp: ptxas makes some for sm_75, which no source has.
_WAITING = 8
#: Calls for rows that may be of other types than the logits', by the type.
OTHER_TYPES = {"bf16": "_as<BFloat16>(", "fp16": "_as<Half>(", "fp32": "_as<float>("}
#: Functions that load chunks of logits; that load what is no logit: class weights, look-ups, sums, rows of other types;
#: and that store chunks.
_CHUNK_LOADS = ("chunk", "copy_chunk")
_OTHER_LOADS = ("gaps_of", "load", "load_again", "accumulate")
_UPSTREAM_LOADS = ("load_as",)
_CHUNK_STORES = ("store_chunk",)


@cache
def kind_of(loop: SourceLoop) -> Kind | None:
    """What a loop of the sources passes over; None where it is none of those within a row."""
    for text, kind in _BY_HEADER.items():
        if text in loop.header:
            return kind
    if "layout.edges()" in loop.header:
        return Kind.ZEROS if loop.body.startswith("{ store_element(") else Kind.EDGES
    if "layout.chunks()" not in loop.header:
        return None
    if SMOOTHS in loop.conditions:
        return Kind.SMOOTHING
    return next((kind for text, kind in _BY_BODY.items() if text in loop.body), None)


def find_kinds(flow: ControlFlow) -> dict[NaturalLoop, Kind | None]:
    """What the loops of a kernel, and those in them, pass over.

    The branch back lies on the first line of the loop in the source. Where no branch back does, what most instructions
    lie in decides, the loops of the sources that inner loops are aside.
    """
    found: dict[NaturalLoop, Kind | None] = {}
    for outermost in flow.loops:
        for loop in outermost.flat():
            kind = _kind(flow, loop, {kind for inner in loop.inner for kind in _kinds_in(inner, found)})
            smoothed = kind is Kind.SUM and any(_lies_in(each, [_FOR_SMOOTHED]) for each in flow.instructions(loop.own))
            found[loop] = Kind.SMOOTHED_SUM if smoothed else kind
    return found


def check_sources(folder: Path) -> None:
    """That the conditions and functions that this module knows are in the sources: else code would count as taken."""
    files = [source_file(str(path)) for path in sorted(folder.glob("*.cuh"))]
    conditions = {branch.condition for file in files for branch in file.branches}
    functions = {name for file in files for name in file.functions}
    missing = [each for each in _CONDITIONS if each not in conditions]
    wanted = (*FOR_IGNORED, *_CHUNK_LOADS, *_UPSTREAM_LOADS, *_CHUNK_STORES, _FOR_SMOOTHED)
    missing += [each for each in wanted if each not in functions]
    lines = [line for file in files for line in file.lines]
    missing += [each for each in (SMOOTHED_CALL, *OTHER_TYPES.values()) if not any(each in line for line in lines)]
    if missing:
        raise ListingError(f"{folder} has no branches or functions {missing} any more: adapt {Path(__file__).name}")


def lies_behind(
    instruction: Instruction,
    conditions: Collection[str] = (),
    functions: Collection[str] = (),
    calls: Collection[str] = (),
) -> bool:
    """Whether the source of an instruction lies in such a side of a branch, or is called by such a function or line."""
    return any(
        not conditions_around(frame).isdisjoint(conditions) or not functions_around(frame).isdisjoint(functions)
        for frame in instruction.frames
    ) or any(text in line_at(call) for call in instruction.calls for text in calls)


def chunk_loads(code: Sequence[Instruction]) -> list[Instruction]:
    """The loads of chunks of logits in a sweep, and the copies of them.

    Where logits need no unpacking, a load may have the line of what takes them: then it is one of the widest loads of
    those that are not known to load anything else.
    """
    loads = [each for each in code if each.name in ("LDG", "LDS", "LDGSTS") and each.has_effect]
    named = [each for each in loads if _lies_in(each, _CHUNK_LOADS)]
    return named or _widest([each for each in loads if not _lies_in(each, (*_OTHER_LOADS, *_UPSTREAM_LOADS))])


def upstream_loads(code: Sequence[Instruction], dtype: str) -> list[Instruction]:
    """The loads of chunks of upstream gradients of such a type. One stands for those that the types have in common."""
    loads = [each for each in code if each.name == "LDG"]
    named = [each for each in loads if lies_behind(each, calls=[OTHER_TYPES[dtype]])]
    return _widest(named) or _widest(loads)[:1]


def is_chunk_store(instruction: Instruction) -> bool:
    """Whether it stores a chunk of a gradient, or a part of one."""
    return instruction.name == "STG" and _lies_in(instruction, _CHUNK_STORES)


def is_transform(instruction: Instruction) -> bool:
    """Whether it belongs to a transform: its loads are look-ups."""
    return any("/transforms/" in path for path, _ in instruction.frames)


def source_kinds(instruction: Instruction) -> list[Kind]:
    """What the loops of the sources around an instruction pass over, from the innermost on."""
    loops = [loop for frame in instruction.frames for loop in loops_around(frame)]
    return [kind for loop in loops if (kind := kind_of(loop)) is not None]


def _kind(flow: ControlFlow, loop: NaturalLoop, inner: Collection[Kind]) -> Kind | None:
    if any(each.name == "YIELD" for each in flow.instructions(loop.own)) and flow.count(loop.blocks) <= _WAITING:
        return Kind.TOGETHER
    latches: Counter[SourceLoop] = Counter()
    for block in loop.latches:
        branch = flow.instructions([block])[-1]
        for frame in branch.frames[:1]:
            latches.update(each for each in loops_around(frame) if each.line == frame[1])
    if latches:
        return kind_of(latches.most_common(1)[0][0])
    votes: Counter[Kind] = Counter()
    for instruction in flow.instructions(loop.own):
        votes.update([each for each in source_kinds(instruction) if each not in inner][:1])
    return votes.most_common(1)[0][0] if votes else None


def _widest(loads: Sequence[Instruction]) -> list[Instruction]:
    width = max((each.access_bytes for each in loads), default=0)
    return [each for each in loads if each.access_bytes == width]


def _kinds_in(loop: NaturalLoop, found: dict[NaturalLoop, Kind | None]) -> set[Kind]:
    return {kind for each in loop.flat() if (kind := found[each]) is not None}


def _lies_in(instruction: Instruction, functions: Collection[str]) -> bool:
    return any(not functions_around(frame).isdisjoint(functions) for frame in instruction.frames)
