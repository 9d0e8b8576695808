"""The machine and the sources that a unit runs on: what its figures may depend on beside its settings."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import monosoftmax as ms


def processor() -> str:
    """The model of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit() -> str | None:
    """The git commit of this file's work tree, with a mark where it was changed; None outside of git."""
    if shutil.which("git") is None:
        return None
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
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
