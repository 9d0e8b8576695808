"""How a time is taken: contestants in turn, on a clock that fits the device, medians with quartiles."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Action = Callable[[], object]
#: Begins the turn of an action by name. The result gives its seconds once all turns of the round have begun.
Clock = Callable[[str, Action], Callable[[], float]]
#: Calls of each contestant before the first that counts: the first compiles, allocates and loads code.
WARM_UP_CALLS = 2
#: Calls of each contestant, at most, whose time to issue is taken on a CUDA device.
ISSUED_CALLS = 5
#: Bytes of the buffer that is written between two calls on a CUDA device, in sizes of its L2 cache.
_FLUSHED_CACHES = 3
#: The device waits longer than a call took to issue, by this factor and by these seconds, before it begins the call.
_LEAD, _LEAD_SECONDS = 1.5, 100e-6


def wall_clock(name: str, action: Action) -> Callable[[], float]:
    """Wall time of the call, for the CPU."""
    started = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - started
    del result  # Freeing the gradients is no part of computing them.
    return lambda: seconds


class IssueClock:
    """CPU time that issuing the call to an idle CUDA device takes. A call that waits for the device is timed whole."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, name: str, action: Action) -> Callable[[], float]:
        torch.cuda.synchronize(self._device)
        return wall_clock(name, action)


class DeviceClock:
    """Time between two CUDA events around the call, on a device that has work until all of the call is issued.

    The device sleeps before each call for longer than the call takes to issue, so that the time holds no waiting for
    launches. Then it overwrites its L2 cache. The host waits for nothing until the round ends.
    """

    def __init__(self, device: torch.device, issue_seconds: Mapping[str, float]) -> None:
        """``issue_seconds``: what :class:`IssueClock` measured of each action."""
        properties = torch.cuda.get_device_properties(device)
        self._device, self._issue_seconds = device, issue_seconds
        self._flush = torch.empty(_FLUSHED_CACHES * properties.L2_cache_size // 4, dtype=torch.int32, device=device)
        self._hertz = _cycles_per_second(device)

    def __call__(self, name: str, action: Action) -> Callable[[], float]:
        start, end = _events()
        stream = torch.cuda.current_stream(self._device)
        _sleep(round(self._hertz * (_LEAD * self._issue_seconds[name] + _LEAD_SECONDS)))
        self._flush.zero_()
        start.record(stream)
        result = action()
        end.record(stream)
        del result

        def seconds() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return seconds


def _events() -> tuple[Any, Any]:
    one, other = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    return one, other


def _sleep(cycles: int) -> None:
    """Let the device wait for so many of its cycles."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


def _cycles_per_second(device: torch.device) -> float:
    """Cycles of :func:`_sleep` in a second, measured."""
    cycles = 10_000_000
    start, end = _events()
    _sleep(cycles)
    start.record(torch.cuda.current_stream(device))
    _sleep(cycles)
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return 1e3 * cycles / float(start.elapsed_time(end))


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
            begun: dict[str, Callable[[], float]] = {}
            for name in order.sample(list(samples), len(samples)):
                each(name)
                try:
                    begun[name] = clock(name, actions[name])
                except Exception as error:
                    del samples[name]
                    failed(name, error)
            for name, seconds in begun.items():
                samples[name].append(seconds())
    finally:
        if collecting:
            gc.enable()
    return samples


def measure(
    actions: Mapping[str, Action],
    device: torch.device,
    repeats: int,
    failed: Callable[[str, Exception], None],
    each: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Any]]:
    """:func:`summary` of each action that never raised, with ``host_ms``: None on the CPU, else its time to issue."""
    if device.type == "cpu":
        samples = take_turns(actions, wall_clock, repeats, failed, each)
        return {name: {**summary(seconds), "host_ms": None} for name, seconds in samples.items()}
    issued = take_turns(actions, IssueClock(device), min(repeats, ISSUED_CALLS), failed, each)
    # The longest: a device that wakes too early counts as a slow one.
    clock = DeviceClock(device, {name: max(seconds) for name, seconds in issued.items()})
    samples = take_turns({name: actions[name] for name in issued}, clock, repeats, failed, each)
    return {
        name: {**summary(seconds), "host_ms": 1e3 * statistics.median(issued[name])}
        for name, seconds in samples.items()
    }


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and all samples in seconds. Those of one sample are that sample."""
    values = [1e3 * value for value in samples]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"seconds": list(samples), "median_ms": median, "first_quartile_ms": first, "third_quartile_ms": third}
