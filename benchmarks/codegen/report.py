"""The report: a table of what each kernel takes on one target, the counts for the others, the peers, the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton

from .configurations import ALIGNED, HEAD_BACKWARD, HEAD_LOSS, SHIFTED, Configuration
from .measure import MAIN_TARGET, Measurement
from .peers import Peer
from .tables import line, table
from .triton_targets import TARGETS
from .verdict import Verdict, summary

_COUNTED = [name for name, target in TARGETS.items() if target.backend == "cuda"]
_DETAILS = (
    "transform", "operator", "logits", "threads", "registers", "shared", "load", "store", "loop load", "atomics",
    "instr/elem", "whole row", f"instr/elem, V={SHIFTED}", "whole row", "registers",
)  # fmt: skip
_COUNTS = ("transform", "operator", "logits", *(f"{each}" for each in _COUNTED), *(f"registers {t}" for t in TARGETS))
_HEADS = ("transform", "operator", "logits", *TARGETS)
_PEERS = ("kernel", "threads", "registers", "spilled", "shared", "matrix", "instr/elem", "whole row")

_INTRODUCTION = f"""\
# What the Triton kernels compile to

Written by `python -m benchmarks.codegen triton --write` with Triton {triton.__version__} and the assemblers that come
with it; nothing was run, and nothing here is a time. `make test` holds a part of this file against the sources, `make
test-slow` all of it.

*instr/elem*: thread instructions of the loops over full tiles, summed over the sweeps of a row, per element. *whole
row*: all thread instructions of a row, per element, with masked tiles and what is around the loops
(`benchmarks/codegen/figures.py`). *load*, *store*, *loop load*: bytes that a thread accesses at once, at most; in the
narrowest of the loops over full tiles. V = {ALIGNED}, with rows that begin at multiples of 16 bytes, where nothing else
is said; rows of V = {SHIFTED} begin anywhere, as *sliced* ones do, the columns after the first one of a larger matrix,
whose very pointer is no multiple of 16 bytes.
"""


def markdown(measurements: Sequence[Measurement], verdicts: Sequence[Verdict]) -> str:
    """The report of a whole run."""
    ours = [each for each in measurements if isinstance(each.configuration, Configuration)]
    spilling = [each for each in ours if each.spills]
    targets = list(dict.fromkeys(each.target for each in ours))
    parts = [_INTRODUCTION]
    parts.append(f"## Spills\n\n{_spills(ours, spilling, targets)}\n")
    parts.append(f"## Compiled for {MAIN_TARGET}\n\n{table(_DETAILS, detail_lines(ours))}\n")
    parts.append(
        "## Compiled for every target\n\nThread instructions of the main loops per element on NVIDIA's, then "
        f"registers.\n\n{table(_COUNTS, count_lines(ours))}\n"
    )
    heads = head_lines(ours)
    if heads:
        parts.append(
            "## The recomputed head\n\nIts logits are in no memory: registers of a thread, KiB of shared memory and "
            f"matrix instructions, bf16, d = 1024.\n\n{table(_HEADS, heads)}\n"
        )
    theirs = [each for each in measurements if isinstance(each.configuration, Peer)]
    if theirs:
        parts.append(
            f"## Other packages, compiled for {MAIN_TARGET}\n\nLaunched by their own launchers, counted in the same "
            f"way.\n\n{table(_PEERS, peer_lines(theirs))}\n"
        )
    parts.append(f"## Budgets\n\n{summary(verdicts, 'benchmarks/codegen/budgets.py')}\n")
    return "\n".join(parts)


def detail_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each configuration, its shifted rows beside its aligned ones: as compiled for the main target."""
    known = {each.configuration: each for each in measurements if each.target == MAIN_TARGET}
    lines = []
    for one, each in known.items():
        if not isinstance(one, Configuration) or one.classes != ALIGNED or _is_head(each):
            continue
        cells: list[object] = [
            *_names(one),
            each.threads,
            each.registers,
            each.shared,
            each.load_bytes,
            each.store_bytes,
        ]
        cells += [each.main_load_bytes, each.atomics, _number(each.main), _number(each.whole)]
        shifted = known.get(replace(one, classes=SHIFTED))
        if shifted is None:
            cells += [None] * 3
        else:
            cells += [_number(shifted.main), _number(shifted.whole), shifted.registers]
        lines.append(line(cells))
    return lines


def count_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each configuration with aligned rows, its targets side by side."""
    known = {(each.configuration, each.target): each for each in measurements}
    lines = []
    for one in dict.fromkeys(each.configuration for each in measurements):
        if not isinstance(one, Configuration) or one.classes != ALIGNED or one.operator in (HEAD_LOSS, HEAD_BACKWARD):
            continue
        counts = [_number(known[one, target].main) if (one, target) in known else None for target in _COUNTED]
        registers = [known[one, target].registers if (one, target) in known else None for target in TARGETS]
        lines.append(line((*_names(one), *counts, *registers)))
    return lines


def head_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each configuration of the recomputed head, its targets side by side."""
    known = {(each.configuration, each.target): each for each in measurements if _is_head(each)}
    lines = []
    for one in dict.fromkeys(each.configuration for each in measurements if _is_head(each)):
        cells = [
            f"{each.registers} / {each.shared // 1024} / {', '.join(each.matrix)}"
            if (each := known.get((one, target))) is not None
            else None
            for target in TARGETS
        ]
        lines.append(line((*_names(one), *cells)))
    return lines


def _is_head(measurement: Measurement) -> bool:
    one = measurement.configuration
    return isinstance(one, Configuration) and one.operator in (HEAD_LOSS, HEAD_BACKWARD)


def peer_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each kernel of another package."""
    return [
        line((
            each.configuration, each.threads, each.registers, each.spills, each.shared, ", ".join(each.matrix),
            _number(each.main), _number(each.whole),
        ))
        for each in measurements
    ]  # fmt: skip


def _names(one: Configuration) -> tuple[str, str, str]:
    return one.transform, one.what, one.dtype


def _spills(ours: Sequence[Measurement], spilling: Sequence[Measurement], targets: Sequence[str]) -> str:
    if not spilling:
        return f"None in {len(ours)} compiled kernels, for {', '.join(targets)}."
    return "\n".join(f"- {each.configuration} for {each.target}: {each.spills} bytes a thread" for each in spilling)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}"
