"""The peak of a process's resident set, which Linux lets the process itself reset and read, and such a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .machine import process_bytes

#: glibc keeps freed blocks in its arenas unless they were mapped, and it raises that threshold as a program runs: with
#: a fixed one, every large tensor is mapped when it is made and gone when it is freed.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
_RESET = Path("/proc/self/clear_refs")


class MeasurementError(Exception):
    """The memory could not be measured, and why."""


def require_support() -> None:
    """Raise :class:`MeasurementError` where the system has no way to measure the peak."""
    if not _RESET.exists():
        raise MeasurementError("the peak of a process's memory can be reset and read on Linux only")


def measured_apart(module: str, specification: Any) -> Any:
    """What ``python -m module SPECIFICATION`` prints in its last line, in JSON, in an environment fit to measure peaks.

    Raises:
        MeasurementError: this system has no way to measure them, or the process failed.
    """
    require_support()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, json.dumps(specification)],
        capture_output=True,
        text=True,
        env={**os.environ, **_ENVIRONMENT},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MeasurementError(f"the process that measures it failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def reset_peak() -> int:
    """Set the peak of this process to what it holds now; returns that, in bytes."""
    _RESET.write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that this process held since :func:`reset_peak`."""
    return process_bytes("VmHWM")
