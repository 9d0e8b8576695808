"""One case: every contestant is checked, then all take turns on the clock of torch or of Triton."""

from __future__ import annotations

import gc
import importlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.benchmark import Timer

from ..engine.experiment import ExperimentError
from . import memory
from .cases import Case, Inputs, bare_products, make_inputs
from .contestants import Contestant, disagreement, fingerprint
from .presets import Timing

Action = Callable[[], object]
#: Seconds of a turn on a CPU, at least; a call that takes longer is timed once a turn, after one that warms up.
_TURN = 0.02
#: Bytes of each of the two buffers of the copy, by the type of the device: many times its last-level cache.
COPY_BYTES = {"cpu": 2**27, "cuda": 2**29}


def measure(timing: Timing, prepare: Callable[[str, Case, Inputs], Contestant]) -> dict[str, Any]:
    """The times of a unit: for each contestant its figures, or its ``status`` where it has none, and floors.

    A floor is the longer of ``memory_ms``, of the least bytes at the bandwidth of a copy, and ``products_ms``, of bare
    matrix products. Data that fits in a cache can be faster than memory. ``four_products_ms`` of the group ``tokens``
    has the product of the logits twice.
    """
    case, kind = timing.case, torch.device("cpu" if timing.device == "emulated" else timing.device)
    on_gpu = kind.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ExperimentError(f"torch {torch.__version__} finds no CUDA device here")
    rows: dict[str, dict[str, Any]] = {name: {} for name in timing.contestants}
    with memory.limited(kind), emulating() if timing.device == "emulated" else nullcontext():
        inputs = make_inputs(case, kind)
        actions = probes(case, inputs)
        known: dict[str, tuple[str, tuple[float, ...]]] = {}
        for name, row in rows.items():
            try:
                contestant = prepare(name, case, inputs)
                found = fingerprint(contestant)
                first, expected = known.setdefault(contestant.function, (name, found))
                if difference := disagreement(case, found, expected):
                    raise ArithmeticError(f"disagrees with {first}: {difference}")
                row["backend"] = contestant.backend
                if on_gpu:
                    row["peak_bytes"] = memory.cuda_peak(contestant)
                actions[name] = contestant.step
            except Exception as error:
                row["status"] = memory.describe(error)
        times = take_turns(actions, kind, timing.rounds)
        del inputs, actions
    torch.compiler.reset()
    gc.collect()
    for name, row in rows.items():
        row |= times.get(name, {})
        if timing.device == "cpu" and "status" not in row:
            row["peak_bytes"] = memory.cpu_peak(case, name)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else timing.device,
        "clock": "triton.testing" if on_gpu else "torch.utils.benchmark",
        "memory_ms": times["copy"]["median_ms"] / (2 * COPY_BYTES[kind.type]) * case.minimum_bytes,
        "products_ms": times.get("products", {}).get("median_ms"),
        "four_products_ms": times.get("four_products", {}).get("median_ms"),
        "contestants": rows,
    }


@contextmanager
def emulating() -> Iterator[None]:
    """While it lasts, the triton and the cuda backend take CPU tensors, as in the tests: to see that a program runs."""
    # The kernels must be loaded before they are interpreted: else they would stay so.
    for module in ("operators", "recompute_head"):
        importlib.import_module(f"monosoftmax.triton_kernels.{module}")
    with mock.patch.object(sys, "path", [str(Path(__file__).parents[2] / "tests"), *sys.path]):
        interpreter, host = (importlib.import_module(name) for name in ("triton_interpreter", "cuda_host"))
    with interpreter.interpreting(), host.executing():
        yield


def take_turns(actions: Mapping[str, Action], device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Median and quartiles in ms of each action, in rounds: what slows the machine for a while slows all of them.

    Every round has an order of its own, so that none always finds the caches as the same other one left them. The order
    is the same on every run. An action that raises takes no further turns, and has a ``status`` in place of times.
    """
    clock = _on_device if device.type == "cuda" else _on_cpu
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in actions}
    found: dict[str, dict[str, Any]] = {}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(samples), len(samples)):
            try:
                samples[name].append(clock(actions[name]))
            except Exception as error:
                del samples[name]
                found[name] = {"status": memory.describe(error)}
    for name, turns in samples.items():
        low, median, high = np.quantile([turn["ms"] for turn in turns], (0.25, 0.5, 0.75)).tolist()
        found[name] = {"median_ms": median, "first_quartile_ms": low, "third_quartile_ms": high}
        if "host_ms" in turns[0]:
            found[name]["host_ms"] = statistics.median(turn["host_ms"] for turn in turns)
    return found


def probes(case: Case, inputs: Inputs) -> dict[str, Action]:
    """The copy, and for heads the products at the case's own shape. Their buffers are written to here, once."""
    source, copied = (torch.ones(COPY_BYTES[inputs.target.device.type] // 4, device=inputs.target.device) for _ in "ab")
    found: dict[str, Action] = {"copy": lambda: copied.copy_(source)}
    if case.dim is not None:
        found["products"] = bare_products(case, inputs)
    if case.group == "tokens":
        found["four_products"] = bare_products(case, inputs, logits_again=True)
    return found


def _on_cpu(action: Action) -> dict[str, float]:
    # What a call returns is freed after the clock has stopped.
    timer = Timer("found = action()", globals={"action": action}, num_threads=torch.get_num_threads())
    return {"ms": 1e3 * timer.blocked_autorange(min_run_time=_TURN).median}


def _on_device(action: Action) -> dict[str, float]:
    """Time on the device, and CPU time to issue the call to an idle device (all of it where the call waits for it).

    Time of a captured graph has no launches. What cannot be captured runs behind an overwritten L2 cache, with them.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    names = {"action": action, "synchronize": torch.cuda.synchronize}
    host = Timer("found = action()", "synchronize()", globals=names, timer=time.perf_counter).timeit(1).median
    try:
        ms = do_bench_cudagraph(action, rep=5, return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize()
        ms = do_bench(action, warmup=5, rep=20, return_mode="median")
    return {"ms": ms, "host_ms": 1e3 * host}
