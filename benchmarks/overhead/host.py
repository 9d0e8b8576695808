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

    calls_of: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "cross_entropy": (lambda: ms.cross_entropy(logits, target), lambda: plain(False)),
        "cross_entropy, PLIF": (lambda: ms.cross_entropy(logits, target, plif), lambda: plain(False)),
        "linear_cross_entropy": (lambda: ms.linear_cross_entropy(hidden, weight, target), lambda: plain(True)),
        "linear_cross_entropy, PLIF": (
            lambda: ms.linear_cross_entropy(hidden, weight, target, plif),
            lambda: plain(True),
        ),
    }
    timers: dict[tuple[str, str], Timer] = {}
    for name, pair in calls_of.items():
        for key, loss in zip(("call", "torch"), pair, strict=True):
            for suffix, statement in (("", "loss()"), (", backward", "loss().backward()")):
                timers[name + suffix, key] = Timer(statement, globals={"loss": loss}, timer=time.process_time)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for (name, key), timer in timers.items():
            found.setdefault(name, {}).setdefault(key, []).append(1e6 * timer.timeit(calls).median)
    return {name: {key: statistics.median(each) for key, each in pair.items()} for name, pair in found.items()}
