"""Peak memory of one step of a contestant beyond its inputs and its gradients.

On the CPU each step runs in a process of its own, and what is measured is the growth of the resident set to its peak,
less the bytes of the gradients that the step returns. Run as ``python -m benchmarks.overhead.memory SPECIFICATION``, it
prints one JSON object for each contestant. On a CUDA device it is the peak of what torch's allocator handed out.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..machine import available_bytes
from ..resident_set import measured_apart, peak, reset_peak
from .cases import Case, make_inputs
from .contestants import Contestant, prepare
from .limits import limit_allocations, one_line

#: Forms whose first call on a shape compiles for it.
_COMPILED = ("compiled", "cut-cross-entropy")


def peaks(case: Case, names: Sequence[str], threads: int) -> dict[str, int | str]:
    """The extra bytes of a step of each contestant on the CPU; or, in its place, why they are not known.

    Raises:
        MeasurementError: this system has no way to measure it, or the attempt failed.
    """
    specification = {"case": case.to_json(), "names": list(names), "threads": threads}
    found: dict[str, int | str] = measured_apart(__name__, specification)
    return found


def cuda_peak(contestant: Contestant, device: torch.device) -> int:
    """The extra bytes of a step of a warmed-up contestant on a CUDA device."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = contestant.step()
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before - contestant.gradient_bytes
    del results
    return extra


def _measure(case: Case, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    limit_allocations(available_bytes())
    inputs = make_inputs(case, torch.device("cpu"))
    contestant = prepare(name, case, inputs)
    # A first step loads the code. Compiled code is for one shape, so that it runs on the shape to be measured; all else
    # runs on two rows, so that a workspace which is kept from call to call is counted.
    if name.endswith(_COMPILED):
        contestant.step()
    else:
        small = replace(case, rows=min(case.rows, 2))
        prepare(name, small, make_inputs(small, torch.device("cpu"))).step()
    before = reset_peak()
    results = contestant.step()
    extra = peak() - before - contestant.gradient_bytes
    del results
    return extra


def _report(connection: Connection, case: Case, name: str, threads: int) -> None:
    try:
        connection.send(_measure(case, name, threads))
    except Exception as error:
        connection.send(one_line(error))


def _main(specification: dict[str, Any]) -> None:
    case = Case(**specification["case"])
    found: dict[str, int | str] = {}
    # A process for each contestant, forked from this one, which has loaded torch but has neither threads nor tensors
    # yet: as clean as a new process, without the seconds that loading torch takes.
    context = multiprocessing.get_context("fork")
    for name in specification["names"]:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(sender, case, name, specification["threads"]))
        process.start()
        sender.close()
        try:
            found[name] = receiver.recv()
        except EOFError:
            process.join()
            found[name] = f"its process died with exit code {process.exitcode}"
        process.join()
    print(json.dumps(found))


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
