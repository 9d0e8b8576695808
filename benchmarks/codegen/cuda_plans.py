"""What the package's planner and NVIDIA's occupancy calculator say: two C++ programs, built when they are asked.

``plans.cpp`` is the planner itself (``csrc/cuda/plan.cpp``); ``occupancy.cpp`` is CUDA's ``cuda_occupancy.h``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .cuda_devices import DEVICES, Device
from .cuda_source import CSRC
from .cuda_targets import CudaError, include_folders, run

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PlanRequest:
    """As in ``csrc/cuda/plan.h``."""

    transform: str
    size: int
    rows: int
    classes: int
    element_bytes: int
    losses: bool
    gradient: bool
    coefficients: bool
    weighted_smoothing: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Plan:
    """As in ``csrc/cuda/plan.h``."""

    rows: str
    sums: str
    table_in_shared_memory: bool
    atomic: bool
    blocks: int
    cluster: int
    threads: int
    shared_bytes: int

    @property
    def team(self) -> int:
        """Threads that share a row."""
        return self.threads * self.cluster


@dataclass(frozen=True)
class Launch:
    """What the occupancy of a kernel follows from."""

    registers: int
    static_shared: int
    dynamic_shared: int
    threads: int


@dataclass(frozen=True)
class Programs:
    """The two programs."""

    folder: Path

    def plans(self, requests: Sequence[PlanRequest], target: str) -> list[Plan]:
        """The plans for a GPU."""
        device = DEVICES[target]
        lines = [
            [
                each.transform, each.size, each.rows, each.classes, each.element_bytes, each.losses, each.gradient,
                each.coefficients, each.weighted_smoothing, each.deterministic, device.capability,
                device.multiprocessors, device.shared_of_block, device.shared_of_multiprocessor,
            ]
            for each in requests
        ]  # fmt: skip
        return [_plan(line) for line in self._ask("plans", lines)]

    def blocks(self, launches: Sequence[Launch], device: Device) -> list[int]:
        """How many blocks a multiprocessor can have at once."""
        major, minor = divmod(device.capability, 10)
        lines = [
            [
                major, minor, device.threads_of_multiprocessor, device.registers_of_multiprocessor,
                device.shared_of_multiprocessor, device.shared_of_block, device.reserved, device.multiprocessors,
                each.registers, each.static_shared, each.dynamic_shared, each.threads,
            ]
            for each in launches
        ]  # fmt: skip
        return [int(line) for line in self._ask("occupancy", lines)]

    def _ask(self, program: str, lines: Sequence[Sequence[object]]) -> list[str]:
        text = "".join(" ".join(str(int(x) if isinstance(x, bool) else x) for x in line) + "\n" for line in lines)
        answers = run(self.folder / program, text=text).stdout.splitlines()
        if len(answers) != len(lines):
            raise CudaError(f"{program}: {len(answers)} answers to {len(lines)} questions")
        return answers


@contextmanager
def programs(csrc: Path = CSRC) -> Iterator[Programs]:
    """Builds the programs, with the planner of some sources, for as long as it lasts."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(command[0]) is None:
        raise CudaError(f"there is no C++ compiler {command[0]!r}: install g++, or name one in CXX")
    with tempfile.TemporaryDirectory(prefix="monosoftmax-codegen-") as folder:
        options = [*command, "-std=c++17", "-O1"]
        includes = [each for folder in include_folders() for each in ("-isystem", folder)]
        run(*options, "-I", csrc, _HERE / "plans.cpp", csrc / "cuda" / "plan.cpp", "-o", Path(folder, "plans"))
        run(*options, *includes, _HERE / "occupancy.cpp", "-o", Path(folder, "occupancy"))
        yield Programs(Path(folder))


def _plan(line: str) -> Plan:
    rows, sums, *numbers = line.split()
    table, atomic, blocks, cluster, threads, shared = map(int, numbers)
    return Plan(rows, sums, bool(table), bool(atomic), blocks, cluster, threads, shared)
