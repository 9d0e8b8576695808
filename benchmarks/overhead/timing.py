"""How a time is taken: contestants in turn, on a clock that waits for the device, medians with quartiles."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Action = Callable[[], object]
#: Calls of each contestant before the first that counts: the first compiles, allocates and loads code.
WARM_UP_CALLS = 2


class Clock:
    """Seconds that an action takes: wall time on the CPU; on a CUDA device, the time between two events around it.

    The device is idle when the first event is recorded, so that its time includes waiting for the launches of the
    action's own kernels, as in a program that is bound by them, but nothing of the action before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, action: Action) -> float:
        if self.device.type == "cuda":
            return self._device_seconds(action)
        started = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - started
        del result  # Freeing the gradients is no part of computing them.
        return seconds

    def _device_seconds(self, action: Action) -> float:
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self.device)
        torch.cuda.synchronize(self.device)
        start.record(stream)
        result = action()
        end.record(stream)
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3


def take_turns(
    actions: Mapping[str, Action],
    clock: Clock,
    repeats: int,
    failed: Callable[[str, Exception], None],
    each: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of ``repeats`` calls of each action, in rounds: whatever slows the machine for a while slows all of them.

    Every round has an order of its own, so that none always finds the caches as the same other one left them. The order
    is the same on every run.

    Args:
        actions: by name; already warmed up.
        clock: takes the time.
        repeats: number of rounds.
        failed: is told of an action that raises and what; that action takes no further turns.
        each: is told the name before each turn.

    Returns:
        The samples of every action that never raised, in the order of ``actions``.
    """
    samples: dict[str, list[float]] = {name: [] for name in actions}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name in order.sample(list(samples), len(samples)):
                each(name)
                try:
                    samples[name].append(clock(actions[name]))
                except Exception as error:
                    del samples[name]
                    failed(name, error)
    finally:
        if collecting:
            gc.enable()
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and all samples in seconds. Those of one sample are that sample."""
    values = [1e3 * value for value in samples]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"seconds": list(samples), "median_ms": median, "first_quartile_ms": first, "third_quartile_ms": third}
