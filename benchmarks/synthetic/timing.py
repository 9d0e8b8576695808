"""Time of the losses and of whole training steps, of all methods in turn, so that a busy machine is so for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch.nn import functional as F
from tqdm import tqdm

import monosoftmax as ms

from ..machine import environment
from .methods import METHODS
from .problem import dirichlet, training_targets
from .settings import LEARNING_RATES, MAIN, Cell
from .training import Trainer

#: Rounds, each of which runs every contestant once, for a cell of the main size.
_ROUNDS, _WARM_UP_ROUNDS = 201, 10
#: Linear-Softmax with PyTorch's own loss.
EAGER = "eager"
TIMED = Cell(MAIN.contexts, MAIN.words, MAIN.dim, MAIN.alpha, _ROUNDS + _WARM_UP_ROUNDS, (0,))


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


def measure(cell: Cell = TIMED, methods: tuple[str, ...] = (EAGER, *METHODS)) -> dict[str, Any]:
    """Seconds of the loss, forward and backward with all gradients, and of the training step, for each method.

    Returns:
        For JSON; quartiles over the rounds. Mixtures have no ``loss``: theirs is not one function of logits.
    """
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
                if turn >= _WARM_UP_ROUNDS:
                    seconds[method][what].append(passed)
    return {
        "cell": cell.to_json(),
        "rounds": cell.steps - _WARM_UP_ROUNDS,
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
