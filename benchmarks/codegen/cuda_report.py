"""The report on the CUDA kernels: spills, a table for the main target, bounds by data sheets, all targets, budgets."""

from __future__ import annotations

from collections.abc import Sequence

from .cuda_configurations import ALIGNED, Configuration
from .cuda_devices import LANES, SHARED_BYTES, SPECIAL_FUNCTIONS, SPEEDS
from .cuda_measure import MAIN_TARGET, KernelFacts, Measurement, Measurements
from .cuda_roofline import ISSUE, MEMORY, SHARED, SPECIAL, roofline
from .cuda_targets import FLAGS, TARGETS, nvcc_version
from .tables import line, table
from .verdict import Verdict, summary

_DETAILS = (
    "transform", "operator", "rows", "threads", "cluster", "registers", "KiB shared", "blocks", "occupancy", "load",
    "store", "instr/elem", "on the path", "whole row", "on the path", "all options", "special", "shared bytes",
)  # fmt: skip
_SHORT = (
    "transform", "operator", "logits", "V", "rows", "threads", "cluster", "blocks", "occupancy", "instr/elem",
    "on the path", "whole row", "on the path",
)  # fmt: skip
_BOUNDS = tuple(
    f"{gpu}: {each}" for gpu in SPEEDS for each in (MEMORY, ISSUE, SPECIAL, SHARED, "at best of memory bandwidth")
)

_INTRODUCTION = """\
# What the CUDA kernels compile to

Written by `python -m benchmarks.codegen cuda --write` with nvcc {version} (`{flags}`);
nothing was run, and nothing here is a time. `make test` holds a part of this file against the sources, `make test-slow`
all of it.

*instr/elem*: thread instructions of the loops over chunks of 16 bytes, summed over the sweeps of a row, per element:
all code of the loops, both sides of every branch. *whole row*: all thread instructions of a row, per element, with
edges and what is around the loops. *on the path*: without the blocks that an ordinary call does not come to, such as
stores of gradients that are aligned otherwise than their logits. *all options*: instr/elem with smoothed labels.
*special*: results of the special function unit, *shared bytes*: bytes through shared memory, both on the path of the
loops, per element (`benchmarks/codegen/cuda_figures.py`). Where lanes that meet in a piece add up among themselves
(plif-1000 and -5000 with gradients of coefficients), which depends on the logits, one pass is counted.

*rows*: whether they are kept on chip (resident), read again for the gradient (reread), or read once, by log_softmax
and token statistics once more; *threads* and *cluster*, the blocks that share a row, are the plan's for 8192 rows.
*blocks*: that a multiprocessor can have at once by registers and shared memory, *occupancy*: their threads, of those
that it can have (`cuda_occupancy.h`). *load*, *store*: bytes that a thread accesses at once, in the narrowest of the
loops on the path.
"""


def markdown(measurements: Measurements, verdicts: Sequence[Verdict]) -> str:
    """The report of a whole run."""
    found = measurements.configurations
    parts = [_INTRODUCTION.format(version=nvcc_version(), flags=" ".join(FLAGS))]
    parts.append(f"## Spills\n\n{_spills(measurements.kernels)}\n")
    parts.append(f"## bf16 for {MAIN_TARGET}, V = {ALIGNED}\n\n{table(_DETAILS, detail_lines(found))}\n")
    parts.append(f"## Bounds by data sheets\n\n{_bounds_text()}\n\n{table(_bound_heads(), bound_lines(found))}\n")
    parts.append(f"## Other rows for {MAIN_TARGET}\n\n{table(_SHORT, other_lines(found))}\n")
    heads = ("transform", "operator", *TARGETS)
    text = "bf16, V = 50304: instr/elem on each target; then rows, threads and cluster of the plan, and occupancy."
    plans = table(heads, plan_lines(found))
    parts.append(f"## Every target\n\n{text}\n\n{table(heads, count_lines(found))}\n\n{plans}\n")
    heads = ("kernel", "logits", *TARGETS)
    parts.append(f"## Registers of every kernel\n\n{table(heads, register_lines(measurements.kernels))}\n")
    parts.append(f"## Budgets\n\n{summary(verdicts, 'benchmarks/codegen/cuda_budgets.py')}\n")
    return "\n".join(parts)


def detail_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each transform and operator: as compiled for the main target."""
    lines = []
    for each in _ordinary(measurements):
        if each.target != MAIN_TARGET:
            continue
        one, plan, figures = each.configuration, each.plan, each.figures
        cells: list[object] = [one.transform, one.operator, plan.rows, plan.threads, plan.cluster, each.registers]
        cells += [f"{each.shared / 1024:.1f}", each.blocks, _percent(each.occupancy)]
        cells += [figures.load_bytes, figures.store_bytes or None]
        cells += [_number(x) for x in (figures.main, figures.main_path, figures.whole, figures.whole_path)]
        cells += [_number(figures.all_options) if _has_options(one) else None]
        cells += [_number(figures.special), f"{figures.shared_bytes:.1f}"]
        lines.append(line(cells))
    return lines


def bound_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each transform and operator: picoseconds per element on each GPU, and what they come to."""
    known = {(each.configuration, each.target): each for each in _ordinary(measurements)}
    lines = []
    for one in dict.fromkeys(configuration for configuration, _ in known):
        cells: list[object] = [one.transform, one.operator]
        for speeds in SPEEDS.values():
            each = known.get((one, speeds.target))
            if each is None:
                cells += [None] * 5
                continue
            bounds = roofline(one, each.figures, speeds)
            cells += [f"{1e12 * bounds.seconds[name]:.2f}" for name in (MEMORY, ISSUE, SPECIAL, SHARED)]
            cells.append(f"{_percent(bounds.of_memory_bandwidth)} ({bounds.bound})")
        lines.append(line(cells))
    return lines


def other_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each other type of logits and length of rows: as compiled for the main target."""
    ordinary = set(map(id, _ordinary(measurements)))
    lines = []
    for each in measurements:
        if each.target != MAIN_TARGET or id(each) in ordinary:
            continue
        one, plan, figures = each.configuration, each.plan, each.figures
        cells: list[object] = [one.transform, one.operator, one.dtype, one.classes, plan.rows, plan.threads]
        cells += [plan.cluster, each.blocks, _percent(each.occupancy)]
        cells += [_number(x) for x in (figures.main, figures.main_path, figures.whole, figures.whole_path)]
        lines.append(line(cells))
    return lines


def count_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each transform and operator, instructions on the targets side by side."""
    return _by_target({(_names(each), each.target): _number(each.figures.main) for each in _ordinary(measurements)})


def plan_lines(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each transform and operator, plans for the targets side by side."""
    return _by_target({(_names(each), each.target): _plan(each) for each in _ordinary(measurements)})


def register_lines(kernels: Sequence[KernelFacts]) -> list[str]:
    """A line for each kernel, registers on the targets side by side."""
    return _by_target({((each.kernel, each.dtype), each.target): str(each.registers) for each in kernels})


def _by_target(known: dict[tuple[tuple[str, str], str], str]) -> list[str]:
    subjects = dict.fromkeys(subject for subject, _ in known)
    return [line((*subject, *(known.get((subject, target)) for target in TARGETS))) for subject in subjects]


def _ordinary(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Those of bf16 and rows that begin at multiples of 16 bytes."""
    return [
        each
        for each in measurements
        if each.configuration == Configuration(each.configuration.transform, each.configuration.operator)
    ]


def _names(each: Measurement) -> tuple[str, str]:
    return each.configuration.transform, each.configuration.operator


def _plan(each: Measurement) -> str:
    cluster = f"{each.plan.cluster} x " if each.plan.cluster > 1 else ""
    return f"{each.plan.rows}, {cluster}{each.plan.threads}, {_percent(each.occupancy)}"


def _has_options(one: Configuration) -> bool:
    return one.operator.startswith("loss")


def _spills(kernels: Sequence[KernelFacts]) -> str:
    spilling = [each for each in kernels if each.spills or each.stack or each.local_accesses]
    if not spilling:
        targets = list(dict.fromkeys(each.target for each in kernels))
        return f"None in {len(kernels)} compiled kernels, and no stack, for {', '.join(targets)}."
    return "\n".join(
        f"- {each.kernel} ({each.dtype}) for {each.target}: {each.spills} bytes spilled, {each.stack} bytes of stack, "
        f"{each.local_accesses} accesses"
        for each in spilling
    )


def _bounds_text() -> str:
    gpus = "; ".join(
        f"{name} ({speeds.device.product}): {speeds.bytes_per_second / 1e12:.3g} TB/s, {speeds.device.multiprocessors} "
        f"multiprocessors at {speeds.clock / 1e9:.2f} GHz"
        for name, speeds in SPEEDS.items()
    )
    return (
        "No measurements: picoseconds that a unit of the GPU takes at least for an element of a row, and the part of "
        "the memory's bandwidth that the longest of them leaves. Latencies, bank conflicts, atomic operations and "
        f"caches are not in it, nor is a clock that falls under load. {gpus}, of the float32 figures of the data "
        f"sheets; {LANES} instructions, {SPECIAL_FUNCTIONS} results of the special function unit and {SHARED_BYTES} "
        "bytes of shared memory a clock (`benchmarks/codegen/cuda_roofline.py`). bf16, V = 50304."
    )


def _bound_heads() -> tuple[str, ...]:
    return ("transform", "operator", *_BOUNDS)


def _number(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
