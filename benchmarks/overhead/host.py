"""What a call costs beside its arithmetic, in CPU time.

On 6 x 40 logits the arithmetic is next to nothing: what is left is Python, checks, the choice of a backend and
autograd. Every call is timed in turn with the others in one run, and beside the call of torch that it stands for.
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import monosoftmax as ms

from .contestants import linear_then_cross_entropy


def measure(rounds: int = 15, calls: int = 200) -> dict[str, dict[str, float]]:
    """Microseconds on one thread of each call (``call``) and of torch's own (``torch``), by name: medians of rounds."""
    generator = torch.Generator().manual_seed(0)
    logits, hidden, weight = (
        torch.randn(size, generator=generator).requires_grad_() for size in ((6, 40), (6, 8), (40, 8))
    )
    target = torch.randint(40, (6,), generator=generator)
    losses = (
        (ms.cross_entropy, F.cross_entropy, (logits, target)),
        (ms.linear_cross_entropy, linear_then_cross_entropy, (hidden, weight, target)),
    )
    transforms = ("", ()), (", PLIF", (ms.transforms.PLIF(),))
    timers = {}
    for (ours, plain, given), (f, transform), backward in itertools.product(losses, transforms, (False, True)):
        name = ours.__name__ + f + ", backward" * backward
        for key, loss, arguments in (("call", ours, given + transform), ("torch", plain, given)):
            names = {"loss": loss, "given": arguments}
            timers[name, key] = Timer("loss(*given)" + ".backward()" * backward, globals=names, timer=time.process_time)
    found = [{key: timer.timeit(calls).median for key, timer in timers.items()} for _ in range(rounds)]
    medians = {key: 1e6 * statistics.median(each[key] for each in found) for key in timers}
    return {name: {key: medians[name, key] for key in ("call", "torch")} for name, _ in timers}
