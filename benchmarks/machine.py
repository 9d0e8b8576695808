"""The machine and the sources that a benchmark runs on, for its report, and how much memory there is to run in."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import monosoftmax as ms

_CGROUP = Path("/sys/fs/cgroup")


def processor() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def commit() -> str | None:
    """The git commit of this file's work tree, with a mark where it was changed; None outside of git."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Versions, sources and machine, without its name, of a program that computes on the CPU."""
    return {
        "monosoftmax": ms.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def machine_changes(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs, as ``name: there -> here``, of what must be the same for figures that are so bit for bit.

    The sources may differ: whether they give the same figures is what a comparison is for.
    """
    names = ("processor", "instructions", "system", "torch", "threads")
    return [f"{name}: {there.get(name)} -> {here.get(name)}" for name in names if there.get(name) != here.get(name)]


def compiler() -> str | None:
    """Name and version of the C++ compiler on PATH, which torch.compile uses on a CPU; None where there is none."""
    path = shutil.which("c++")
    if path is None:
        return None
    lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    return lines[0] if lines else path


def available_bytes() -> int:
    """Bytes that this process can still allocate without swapping: of the system, and of its control group (v2)."""
    free = _bytes_in("/proc/meminfo", "MemAvailable")
    if free is None:
        raise OSError("/proc/meminfo has no MemAvailable: the free memory is known on Linux only")
    limit = _CGROUP / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        used = int((_CGROUP / "memory.current").read_text())
        # What files take in the cache is given back when a program asks for memory.
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, int(limit.read_text()) - used + int(cached.get("inactive_file", 0)))
    return max(0, free)


def process_bytes(name: str) -> int:
    """A size in ``/proc/self/status``, such as VmHWM (peak resident set) or VmData (private writable memory)."""
    size = _bytes_in("/proc/self/status", name)
    if size is None:
        raise OSError(f"/proc/self/status has no {name}")
    return size


def _bytes_in(path: str, name: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
