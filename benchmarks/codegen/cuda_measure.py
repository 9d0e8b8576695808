"""Compiles the CUDA sources for targets, and takes down what a report and the budgets need."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from .cuda_configurations import Configuration, configurations
from .cuda_devices import DEVICES
from .cuda_figures import Figures, figures_of
from .cuda_loops import SWEEPS, Kind, check_sources, chunk_loads, is_chunk_store
from .cuda_plans import Launch, Plan, Programs, programs
from .cuda_source import CSRC
from .cuda_targets import ELEMENTS, TARGETS, CudaError, Kernel, compile_source, sources

#: The target that budgets of instructions are stated for, and the source that the ordinary tests compile for it.
MAIN_TARGET = "sm_90"
QUICK = "cross_entropy_bfloat16.cu"


@dataclass(frozen=True)
class KernelFacts:
    """What a kernel takes on a target, however it is launched. Bytes are a thread's, but for static shared memory."""

    kernel: str
    transform: str
    dtype: str
    target: str
    registers: int
    stack: int
    spills: int
    local_accesses: int
    shared: int
    instructions: int
    #: Of the loops over chunks: the narrowest load, and the widest store of the loop in which that is narrowest.
    load_bytes: int | None
    store_bytes: int | None
    #: Whether chunks are copied to shared memory past the registers; None of kernels that copy none.
    async_copies: bool | None


@dataclass(frozen=True)
class Measurement:
    """What a configuration comes to on a target."""

    configuration: Configuration
    target: str
    plan: Plan
    registers: int
    shared: int
    #: That a multiprocessor can have at once.
    blocks: int
    figures: Figures

    @property
    def occupancy(self) -> float:
        """Threads that a multiprocessor can have at once, of those that it could."""
        return self.blocks * self.plan.threads / DEVICES[self.target].threads_of_multiprocessor


@dataclass(frozen=True)
class Measurements:
    """Everything of a run."""

    kernels: list[KernelFacts]
    configurations: list[Measurement]


def measure(targets: Sequence[str] = TARGETS, source: str | None = None, jobs: int = 1) -> Measurements:
    """The kernels of every source, or of one, and the configurations that launch them; by ``jobs`` processes."""
    with _copy_of_sources() as csrc, programs(csrc) as helpers:
        check_sources(csrc / "cuda")
        work = [(each, target, helpers) for target in targets for each in sources(csrc) if source in (None, each.name)]
        if not work:
            raise CudaError(f"{CSRC} has no source {source}")
        found = Measurements([], [])
        with tqdm(total=len(work), desc="compile", leave=False, disable=None) as bar:
            for part in _each(work, jobs):
                found.kernels.extend(part.kernels)
                found.configurations.extend(part.configurations)
                bar.update()
    order = {each: place for place, each in enumerate(configurations())}
    found.configurations.sort(key=lambda each: order[each.configuration])
    return found


def measure_source(source: Path, target: str, helpers: Programs) -> Measurements:
    """The kernels of a source for a target, and the configurations that launch them."""
    kernels = compile_source(source, target)
    wanted = [one for one in configurations() if any(one.is_of(each.name) for each in kernels)]
    plans = helpers.plans([each.request for each in wanted], target)
    launched = [_launched(kernels, one, plan) for one, plan in zip(wanted, plans, strict=True)]
    launches = [
        Launch(kernel.registers, kernel.shared, plan.shared_bytes, plan.threads)
        for kernel, plan in zip(launched, plans, strict=True)
    ]
    blocks = helpers.blocks(launches, DEVICES[target])
    return Measurements(
        [_facts(each) for each in kernels],
        [
            Measurement(
                configuration=one,
                target=target,
                plan=plan,
                registers=kernel.registers,
                shared=kernel.shared + plan.shared_bytes,
                blocks=at_once,
                figures=figures_of(kernel, one, plan),
            )
            for one, plan, kernel, at_once in zip(wanted, plans, launched, blocks, strict=True)
        ],
    )


def _facts(kernel: Kernel) -> KernelFacts:
    loads: list[int] = []
    stores: list[int] = []
    copies: set[str] = set()
    for loop, kind in kernel.kinds.items():
        if kind not in (*SWEEPS, Kind.SMOOTHING, Kind.SMOOTHED_SUM, Kind.ZEROS):
            continue
        code = kernel.flow.instructions(loop.own)
        found = chunk_loads(code)
        loads += [each.access_bytes for each in found]
        stores += [max(widths)] if (widths := [each.access_bytes for each in code if is_chunk_store(each)]) else []
        copies.update(each.name for each in found if kind is Kind.COPY)
    dtypes = [dtype for dtype, element in ELEMENTS.items() if element == kernel.name.element]
    return KernelFacts(
        kernel=str(kernel.name),
        transform=kernel.name.transform,
        dtype=dtypes[0] if dtypes else "",
        target=kernel.target,
        registers=kernel.registers,
        stack=kernel.stack,
        spills=kernel.spills,
        local_accesses=kernel.local_accesses,
        shared=kernel.shared,
        instructions=kernel.function.count(),
        load_bytes=min(loads, default=None),
        store_bytes=min(stores, default=None),
        async_copies=copies == {"LDGSTS"} if copies else None,
    )


def _launched(kernels: Sequence[Kernel], one: Configuration, plan: Plan) -> Kernel:
    found = [each for each in kernels if one.is_launched(each.name, plan)]
    if len(found) != 1:
        raise CudaError(f"{one}: {len(found)} kernels for {plan}")
    return found[0]


def _each(work: Sequence[tuple[Path, str, Programs]], jobs: int) -> Iterator[Measurements]:
    if jobs == 1 or len(work) == 1:
        yield from (measure_source(*each) for each in work)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(measure_source, *zip(*work, strict=True))


@contextmanager
def _copy_of_sources() -> Iterator[Path]:
    """So that all is measured of one state of the sources, whatever is written to them meanwhile."""
    with tempfile.TemporaryDirectory(prefix="monosoftmax-codegen-") as folder:
        copy = Path(folder).resolve() / CSRC.name
        shutil.copytree(CSRC, copy, ignore=shutil.ignore_patterns("tests", "cpu", "host"))
        yield copy
