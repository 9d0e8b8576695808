"""Time of the losses and of whole training steps, of all methods in turn, so that a busy machine is so for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.nn import functional as F
from tqdm import tqdm

import monosoftmax as ms

from ..machine import environment
from .methods import METHODS
from .problem import dirichlet, training_targets
from .settings import CORE, LARGER, LEARNING_RATES, MAIN, Cell
from .training import Trainer

#: Linear-Softmax with PyTorch's own loss.
EAGER = "eager"


class _Contestant:
    """A method at its initial values: its loss with all gradients, given the logits, and its training step."""

    def __init__(self, cell: Cell, method: str) -> None:
        targets = training_targets(dirichlet(cell.contexts, cell.words, cell.alpha, 0))
        eager = method == EAGER
        self.trainer = Trainer(cell, "linear" if eager else method, 0, LEARNING_RATES[0], targets)
        model = self.trainer.model
        if eager:
            model.loss = lambda probabilities: F.cross_entropy(model.logits(), probabilities)  # type: ignore[method-assign]
        self.loss: Callable[[], None] | None = None
        if model.transform is None:
            return
        logits = model.logits().detach().requires_grad_()
        transform = None if eager else model.transform

        def loss() -> None:
            value = F.cross_entropy(logits, targets) if eager else ms.cross_entropy(logits, targets, transform)
            logits.grad = None
            model.zero_grad()
            value.backward()

        self.loss = loss


def measure_all() -> list[dict[str, Any]]:
    """All methods in the main cell, whose logits fit in the cache, and the core of them where they do not."""
    return [
        measure(MAIN, (EAGER, *METHODS), rounds=201, warm_up=10),
        measure(LARGER[-1], (EAGER, *CORE), rounds=9, warm_up=2),
    ]


def measure(cell: Cell, methods: Sequence[str], rounds: int, warm_up: int) -> dict[str, Any]:
    """Processor seconds of the loss, forward and backward with all gradients, and of the training step.

    Args:
        cell: the size of the problem.
        methods: contestants; each runs once in every round.
        rounds: how often.
        warm_up: rounds before that, which do not count.

    Returns:
        For JSON; quartiles over the rounds. Mixtures have no ``loss``: theirs is not one function of logits.
    """
    cell = replace(cell, steps=rounds + warm_up)
    contestants = {method: _Contestant(cell, method) for method in methods}
    seconds: dict[str, dict[str, list[float]]] = {method: {"loss": [], "step": []} for method in methods}
    for turn in tqdm(range(cell.steps), unit="round", leave=False):
        for method, contestant in contestants.items():
            for what, action in (("loss", contestant.loss), ("step", contestant.trainer.train_step)):
                if action is None:
                    continue
                started = time.process_time()
                action()
                passed = time.process_time() - started
                if turn >= warm_up:
                    seconds[method][what].append(passed)
    return {
        "cell": cell.to_json(),
        "rounds": rounds,
        "environment": environment(),
        "backends": {
            method: "torch" if method == EAGER else contestant.trainer.model.backend(contestant.trainer.targets)
            for method, contestant in contestants.items()
        },
        "seconds": {
            method: {what: _quartiles(values) for what, values in of.items() if values}
            for method, of in seconds.items()
        },
    }


def _quartiles(values: list[float]) -> list[float]:
    return [round(value, 9) for value in statistics.quantiles(values, n=4)]
