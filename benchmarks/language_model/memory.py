"""Peak memory of a training step of an output layer alone, measured in a process of its own.

Run as ``python -m benchmarks.language_model.memory SPECIFICATION``, it prints numbers of bytes: the peak during one
forward and backward pass over a training batch, above what there was before it: input, parameters and their gradients.
On the CPU that is the growth of the resident set to its high-water mark, which Linux lets a process reset; on a CUDA
device it is what torch allocated.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..resident_set import measured_apart, peak, reset_peak
from .models import output_layer


def how(device: str) -> str:
    """How the memory is measured, in a few words for a report."""
    if device.startswith("cuda"):
        return "growth of torch's allocated CUDA memory to its peak"
    return "growth of the resident set (VmHWM) to its peak, in a process of its own"


def peaks(
    outputs: Sequence[str],
    *,
    rows: int,
    dim: int,
    classes: int,
    experts: int,
    dropout: float,
    device: str,
    threads: int,
) -> dict[str, int]:
    """The extra bytes of a training step of each output layer on ``rows`` hidden states of width ``dim``.

    Raises:
        MeasurementError: this system has no way to measure it, or the attempt failed.
    """
    shape = {
        "rows": rows,
        "dim": dim,
        "classes": classes,
        "experts": experts,
        "dropout": dropout,
        "device": device,
        "threads": threads,
    }
    specification = [{"output": output, **shape} for output in outputs]
    return dict(zip(outputs, measured_apart(__name__, specification), strict=True))


def _measure(specification: dict[str, Any]) -> int:
    return _measure_layer(**specification)


def _measure_layer(
    output: str, rows: int, dim: int, classes: int, experts: int, dropout: float, device: str, threads: int
) -> int:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = output_layer(output, dim, classes, experts, dropout).to(device)
    states = torch.randn(rows, dim, device=device, requires_grad=True)
    targets = torch.randint(classes, (rows,), device=device)
    # A first step on two rows: loads the code and allocates the gradients, but nothing of the size to be measured.
    layer(states[:2], targets[:2]).loss.backward()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        layer(states, targets).loss.backward()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = reset_peak()
    layer(states, targets).loss.backward()
    return peak() - before


if __name__ == "__main__":
    # A process for each layer, forked from this one, which has loaded torch but has neither threads nor tensors yet:
    # as clean as a new process, without the seconds that loading torch takes.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(_measure, json.loads(sys.argv[1]), chunksize=1)))
