"""The peak of a process's resident set, which Linux lets the process itself reset and read."""

from __future__ import annotations

from pathlib import Path

from .machine import process_bytes

#: What a process whose peak is measured needs in its environment. glibc keeps freed blocks in its arenas unless they
#: were mapped, and it raises that threshold as a program runs: fixed, every large tensor is mapped when it is made and
#: gone when it is freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
_RESET = Path("/proc/self/clear_refs")


class MeasurementError(Exception):
    """The memory could not be measured, and why."""


def require_support() -> None:
    """Raise :class:`MeasurementError` where the system has no way to measure the peak."""
    if not _RESET.exists():
        raise MeasurementError("the peak of a process's memory can be reset and read on Linux only")


def reset_peak() -> int:
    """Set the peak of this process to what it holds now; returns that, in bytes."""
    _RESET.write_text("5")
    return peak()


def peak() -> int:
    """The most bytes that this process held since :func:`reset_peak`."""
    return process_bytes("VmHWM")
