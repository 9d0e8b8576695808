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

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from . import memory
from .cases import Case, Inputs, make_inputs
from .contestants import Contestant, disagreement, fingerprint
from .presets import Timing

Action = Callable[[], object]
#: Seconds of a turn on a CPU, at least; a call that takes longer is timed once a turn, after one that warms up.
_TURN = 0.02
#: Bytes of each of the two buffers of the copy, by the type of the device: many times its last-level cache.
COPY_BYTES = {"cpu": 2**27, "cuda": 2**29}
_TESTS = Path(__file__).parents[2] / "tests"


def measure(timing: Timing, prepare: Callable[[str, Case, Inputs], Contestant]) -> dict[str, Any]:
    """The times of a unit: floors, and for each contestant its figures, or its ``status`` where it has none.

    ``prepare`` makes a contestant of its name, the case, and the inputs.
    """
    case, kind = timing.case, torch.device("cpu" if timing.device == "emulated" else timing.device)
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise LookupError(f"torch {torch.__version__} finds no CUDA device here")
    rows: dict[str, dict[str, Any]] = {name: {} for name in timing.contestants}
    with memory.limited(kind), emulating() if timing.device == "emulated" else nullcontext():
        inputs = make_inputs(case, kind)
        actions = probes(case, inputs)
        known: dict[str, tuple[str, tuple[float, ...]]] = {}
        for name in rows:
            try:
                contestant = prepare(name, case, inputs)
                found = fingerprint(contestant)
                first, expected = known.setdefault(contestant.function, (name, found))
                if difference := disagreement(case, found, expected):
                    raise ArithmeticError(f"disagrees with {first}: {difference}")
                rows[name]["backend"] = contestant.backend
                if kind.type == "cuda":
                    rows[name]["peak_bytes"] = memory.cuda_peak(contestant)
            except Exception as error:
                rows[name]["status"] = memory.describe(error)
            else:
                actions[name] = contestant.step
        medians = {}
        for name, summary in take_turns(actions, kind, timing.rounds).items():
            medians[name] = summary.get("median_ms")
            if name in rows:
                rows[name] |= summary
        del inputs, actions
    torch.compiler.reset()
    gc.collect()
    if timing.device == "cpu":
        for name, peak in memory.peaks(case, [name for name, row in rows.items() if "status" not in row]).items():
            rows[name]["peak_bytes"] = peak if isinstance(peak, int) else None
    clock = "triton.testing" if kind.type == "cuda" else "torch.utils.benchmark"
    model = torch.cuda.get_device_name() if kind.type == "cuda" else timing.device
    return {"device": model, "clock": clock, **floors(case, kind, medians), "contestants": rows}


@contextmanager
def emulating() -> Iterator[None]:
    """While it lasts, the triton and the cuda backend take CPU tensors, as in the tests: to see that a program runs."""
    # The kernels must be loaded before they are interpreted: else they would stay so.
    for module in ("operators", "recompute_head"):
        importlib.import_module(f"monosoftmax.triton_kernels.{module}")
    sys.path.insert(0, str(_TESTS))
    try:
        interpreter, host = (importlib.import_module(name) for name in ("triton_interpreter", "cuda_host"))
    finally:
        sys.path.remove(str(_TESTS))
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
        times = [turn["ms"] for turn in turns]
        low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
        found[name] = {"median_ms": median, "first_quartile_ms": low, "third_quartile_ms": high}
        if "host_ms" in turns[0]:
            found[name]["host_ms"] = statistics.median(turn["host_ms"] for turn in turns)
    return found


def probes(case: Case, inputs: Inputs) -> dict[str, Action]:
    """The copy, and for the head the products at the case's own shape. Their buffers are written to here, once."""
    device = inputs.target.device
    source, copied = (torch.ones(COPY_BYTES[device.type] // 4, device=device) for _ in range(2))
    found: dict[str, Action] = {"copy": lambda: copied.copy_(source)}
    if case.dim is not None:
        found["products"] = _products(case, *(operand.detach() for operand in inputs.operands))
    return found


def floors(case: Case, device: torch.device, ms: Mapping[str, float]) -> dict[str, float | None]:
    """Milliseconds that the least bytes take at the bandwidth of the copy, and those of the products.

    The longer of the two is the floor of a case. Data that fits in a cache can be faster than memory.
    """
    per_byte = ms["copy"] / (2 * COPY_BYTES[device.type])
    return {"memory_ms": per_byte * case.minimum_bytes, "products_ms": ms.get("products")}


def _products(case: Case, input: Tensor, weight: Tensor) -> Action:
    """logits = x W^T and, in ``train``, dx = g W and dW = g^T x with the logits in the place of g."""
    logits = input.new_zeros(case.rows, case.classes)
    if case.mode == "no-grad":
        return lambda: torch.mm(input, weight.T, out=logits)
    grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)

    def products() -> None:
        torch.mm(input, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_input)
        torch.mm(logits.T, input, out=grad_weight)

    return products


def _timer(action: Action, **options: Any) -> Timer:
    # What a call returns is freed after the clock has stopped.
    names = {"action": action, "synchronize": torch.cuda.synchronize}
    return Timer("found = action()", globals=names, num_threads=torch.get_num_threads(), **options)


def _on_cpu(action: Action) -> dict[str, float]:
    return {"ms": 1e3 * _timer(action).blocked_autorange(min_run_time=_TURN).median}


def _on_device(action: Action) -> dict[str, float]:
    """Time on the device, and CPU time to issue the call to an idle device (all of it where the call waits for it).

    Of a graph that was captured of the call, so that no launch is waited for; of the call itself, behind an overwritten
    L2 cache, where it cannot be captured: then what the host is late with counts.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    host = _timer(action, setup="synchronize()", timer=time.perf_counter).timeit(1).median
    try:
        ms = do_bench_cudagraph(action, rep=5, return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize()
        ms = do_bench(action, warmup=5, rep=20, return_mode="median")
    return {"ms": ms, "host_ms": 1e3 * host}
