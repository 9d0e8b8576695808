"""Peak memory of one step of a contestant beyond its inputs and its gradients, and running out of memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from .cases import Case, make_inputs
from .contestants import Contestant, Unavailable, prepare

#: glibc keeps freed blocks in its arenas unless they were mapped, and it raises that threshold as a program runs: with
#: a fixed one, every large tensor is mapped when it is made and gone when it is freed.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def cpu_peak(case: Case, name: str) -> int | None:
    """The extra bytes of a step of a contestant on the CPU; None where it ends in an error.

    They are the growth of the resident set, in a process of its own, to its peak, which Linux lets a process reset.
    """
    # Forked from a process that has loaded torch, but has neither threads nor tensors.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(1, mp_context=context)
    with suppress(Exception), mock.patch.dict(os.environ, _ENVIRONMENT), pool:
        return pool.submit(_peak, case, name, torch.get_num_threads()).result()
    return None


def cuda_peak(contestant: Contestant) -> int:
    """The extra bytes of a step of a warmed-up contestant on the current CUDA device."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = contestant.step()
    return torch.cuda.max_memory_allocated() - before - _bytes_of(results[1:])


@contextmanager
def limited(device: torch.device) -> Iterator[None]:
    """While it lasts, this process can take the memory that is free now, and gets an error when it asks for more.

    Linux grants memory that it does not have, and kills a process that uses it.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if device.type == "cpu":
        limit = _kib("/proc/self/status", "VmData") + round(0.95 * _kib("/proc/meminfo", "MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit * 1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def describe(error: BaseException) -> str:
    """What happened, for a cell of a table."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"not available: {first}" if isinstance(error, Unavailable) else f"failed: {type(error).__name__}: {first}"


def _peak(case: Case, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    with limited(device):
        contestant = prepare(name, case, make_inputs(case, device))
        # A first step loads the code. Compiled code is for one shape, so that it runs on the shape to be measured; all
        # else runs on two rows, so that a workspace which is kept from call to call is counted.
        small = replace(case, rows=min(case.rows, 2))
        compiled = name.endswith(("compiled", "cut-cross-entropy"))
        (contestant if compiled else prepare(name, small, make_inputs(small, device))).step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = _kib("/proc/self/status", "VmHWM")
        results = contestant.step()
        return 1024 * (_kib("/proc/self/status", "VmHWM") - before) - _bytes_of(results[1:])


def _bytes_of(gradients: Sequence[torch.Tensor]) -> int:
    return sum(each.numel() * each.itemsize for each in gradients)


def _kib(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
