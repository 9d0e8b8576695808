"""Running out of memory as an error that names itself, instead of the end of the process."""

from __future__ import annotations

import resource

import torch

from ..machine import process_bytes


def limit_allocations(extra_bytes: int) -> None:
    """Let this process allocate at most ``extra_bytes`` more on the CPU, and raise when it asks for more.

    Linux grants memory that it does not have and kills a process that uses it. With this limit an allocation fails, as
    torch reports, and the run goes on.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = process_bytes("VmData") + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on the CPU or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "bad_alloc")
    )


def one_line(error: BaseException) -> str:
    """What happened, for a cell of a table."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
