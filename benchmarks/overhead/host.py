"""``python -m benchmarks.overhead.host``: what a call costs beside its arithmetic, in CPU time.

On 6 x 40 logits the arithmetic is next to nothing: what is left is Python, checks, the choice of a backend and
autograd. Every call is timed in turn with the others in one run, and beside the call of torch that it stands for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms


class HostCost(NamedTuple):
    """Microseconds of CPU time of a call, and of torch's own call: medians of the rounds."""

    call: float
    torch: float

    @property
    def beyond(self) -> float:
        return self.call - self.torch


def measure(rounds: int = 15, calls: int = 200) -> dict[str, HostCost]:
    """The cost of each call, by its name, on one thread."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 40, generator=generator).requires_grad_()
    hidden = torch.randn(6, 8, generator=generator).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    target = torch.randint(40, (6,), generator=generator)
    plif = ms.transforms.PLIF()

    def head(transform: ms.transforms.MonotonicTransform | None) -> Tensor:
        return ms.linear_cross_entropy(hidden, weight, target, transform)

    def plain(from_hidden: bool) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight) if from_hidden else logits, target)

    losses: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "cross_entropy": (lambda: ms.cross_entropy(logits, target), lambda: plain(False)),
        "cross_entropy, PLIF": (lambda: ms.cross_entropy(logits, target, plif), lambda: plain(False)),
        "linear_cross_entropy": (lambda: head(None), lambda: plain(True)),
        "linear_cross_entropy, PLIF": (lambda: head(plif), lambda: plain(True)),
    }
    pairs: dict[str, Sequence[Callable[[], object]]] = dict(losses)
    for name, pair in losses.items():
        pairs[f"{name}, backward"] = [lambda loss=loss: torch.autograd.backward(loss()) for loss in pair]  # type: ignore[misc]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in pairs}
    try:
        for number in range(rounds + 1):
            for name, pair in pairs.items():
                for call, found in zip(pair, seconds[name], strict=True):
                    start = time.process_time()
                    for _ in range(calls):
                        call()
                    if number > 0:  # the first round warms up
                        found.append((time.process_time() - start) / calls * 1e6)
    finally:
        torch.set_num_threads(threads)
    return {name: HostCost(*(statistics.median(each) for each in found)) for name, found in seconds.items()}


def main() -> None:
    """Print the figures."""
    print(f"torch {torch.__version__}, {ms.backends.available()['cpu'].detail.replace('threads', 'threads, 1 used')}")
    print(f"{'6 x 40, CPU time, us':38s} {'call':>7s} {'torch':>7s} {'beyond':>7s} {'ratio':>6s}")
    for name, cost in measure().items():
        print(f"{name:38s} {cost.call:7.1f} {cost.torch:7.1f} {cost.beyond:7.1f} {cost.call / cost.torch:6.1f}")


if __name__ == "__main__":
    main()
