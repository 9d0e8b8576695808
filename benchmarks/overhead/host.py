"""What a call costs beside its arithmetic, in CPU time.

On 6 x 40 logits the arithmetic is next to nothing: what is left is Python, checks, the choice of a backend and
autograd. Every call is timed in turn with the others in one run, and beside the call of torch that it stands for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import monosoftmax as ms


def measure(rounds: int = 15, calls: int = 200) -> dict[str, dict[str, float]]:
    """Microseconds on one thread of each call (``call``) and of torch's own (``torch``), by name: medians of rounds."""
    generator = torch.Generator().manual_seed(0)
    logits, hidden, weight = (
        torch.randn(size, generator=generator).requires_grad_() for size in ((6, 40), (6, 8), (40, 8))
    )
    target = torch.randint(40, (6,), generator=generator)
    plif = ms.transforms.PLIF()

    def plain(from_hidden: bool) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight) if from_hidden else logits, target)

    losses: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for suffix, f in (("", None), (", PLIF", plif)):
        losses[f"cross_entropy{suffix}"] = {
            "call": lambda f=f: ms.cross_entropy(logits, target, f),  # type: ignore[misc]
            "torch": lambda: plain(False),
        }
        losses[f"linear_cross_entropy{suffix}"] = {
            "call": lambda f=f: ms.linear_cross_entropy(hidden, weight, target, f),  # type: ignore[misc]
            "torch": lambda: plain(True),
        }
    timers = {}
    for name, pair in losses.items():
        for key, loss in pair.items():
            names = {"loss": loss, "backward": torch.autograd.backward}
            timers[name, key] = Timer("loss()", globals=names, timer=time.process_time)
            timers[f"{name}, backward", key] = Timer("backward(loss())", globals=names, timer=time.process_time)
    found: dict[tuple[str, str], list[float]] = {each: [] for each in timers}
    for _ in range(rounds):
        for each, timer in timers.items():
            found[each].append(1e6 * timer.timeit(calls).median)
    medians: dict[str, dict[str, float]] = {}
    for (name, key), seconds in found.items():
        medians.setdefault(name, {})[key] = statistics.median(seconds)
    return medians
