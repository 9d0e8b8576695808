"""Compiles configurations for targets, in one process or two, and takes down what a report and the budgets need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from tqdm import tqdm

from .configurations import Configuration
from .figures import counts_of, row_of
from .peers import Peer
from .triton_targets import TARGETS

#: The target that budgets of registers and instructions are stated for.
MAIN_TARGET = "sm_90"


@dataclass(frozen=True)
class Measurement:
    """What a kernel takes on a target. Counts are thread instructions per element; None where they are not known."""

    configuration: Configuration | Peer
    target: str
    kernel: str
    registers: int
    spills: int
    shared: int
    threads: int
    load_bytes: int
    store_bytes: int
    atomics: int
    matrix: tuple[str, ...]
    #: Of the loops over full tiles, and of a whole row: see :mod:`.figures`.
    main: float | None = None
    whole: float | None = None
    #: Bytes of the row that the narrowest of those loops loads at once.
    main_load_bytes: int | None = None


def measure_one(configuration: Configuration | Peer, target: str) -> Measurement:
    """The measurement of one configuration for one target."""
    launch = configuration.launch(target)
    compiled = launch.compile_for(target)
    row = configuration.row(launch) if isinstance(configuration, Peer) else row_of(launch)
    counts = None if row is None or compiled.function is None else counts_of(compiled, row)
    return Measurement(
        configuration=configuration,
        target=target,
        kernel=compiled.kernel,
        registers=compiled.registers,
        spills=compiled.spills,
        shared=compiled.shared,
        threads=compiled.threads,
        load_bytes=compiled.load_bytes,
        store_bytes=compiled.store_bytes,
        atomics=compiled.atomics,
        matrix=compiled.matrix,
        main=None if counts is None else counts.main,
        whole=None if counts is None else counts.whole,
        main_load_bytes=None if counts is None else counts.load_bytes,
    )


def measure(
    configurations: Sequence[Configuration | Peer],
    targets: Sequence[str] = tuple(TARGETS),
    jobs: int = 1,
) -> list[Measurement]:
    """Every configuration for every target; of peers, for :data:`MAIN_TARGET` only. ``jobs`` processes do it."""
    work = [
        (configuration, target)
        for configuration in configurations
        for target in (targets if isinstance(configuration, Configuration) else (MAIN_TARGET,))
    ]
    bar = tqdm(total=len(work), desc="compile", leave=False, disable=None)
    with bar:
        found = []
        for measurement in _each(work, jobs):
            found.append(measurement)
            bar.update()
    return found


def _each(work: Sequence[tuple[Configuration | Peer, str]], jobs: int) -> Iterator[Measurement]:
    if jobs == 1:
        yield from (measure_one(*each) for each in work)
        return
    # Spawned: torch and LLVM have threads, which do not survive a fork.
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(measure_one, *zip(*work, strict=True), chunksize=4)
