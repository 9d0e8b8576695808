"""Time of the losses and of whole training steps, of all methods in turn, so that a busy machine is so for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Measurement, Timer

import monosoftmax as ms

from ...engine.experiment import Measured
from .methods import FreeContexts
from .problem import dirichlet, training_targets
from .settings import EAGER, LEARNING_RATES, Timing, Training
from .training import Trainer


def measure(settings: Timing) -> Measured:
    """Processor seconds of the loss, forward and backward with all gradients, and of the training step.

    Returns:
        Times: ``seconds``, by method and ``loss`` or ``step``, quartiles over the rounds, and ``backends`` by method.
        Mixtures have no ``loss``: theirs is not one function of logits.
    """
    cell = settings.cell
    targets = training_targets(dirichlet(cell.contexts, cell.words, cell.alpha, 0))
    timers, backends = {}, {}
    for method in settings.methods:
        eager = method == EAGER
        # A timer warms up with two steps for each that it times.
        cell = replace(cell, steps=3 * settings.rounds)
        trainer = Trainer(Training(cell, "linear" if eager else method, 0, LEARNING_RATES[0]), targets)
        backends[method] = "torch" if eager else trainer.model.backend(targets)
        if eager:
            trainer.model.loss = partial(_eager, trainer.model)  # type: ignore[method-assign]
        if trainer.model.transform is not None:
            timers[method, "loss"] = _timer(_loss(trainer, eager))
        timers[method, "step"] = _timer(trainer.train_step)
    taken: dict[tuple[str, str], list[Measurement]] = {key: [] for key in timers}
    for _ in range(settings.rounds):
        for key, timer in timers.items():
            taken[key].append(timer.timeit(1))
    seconds: dict[str, dict[str, list[float]]] = {method: {} for method in settings.methods}
    for (method, what), each in taken.items():
        (merged,) = Measurement.merge(each)
        seconds[method][what] = np.quantile(merged.times, (0.25, 0.5, 0.75)).round(9).tolist()
    return Measured({}, {"seconds": seconds, "backends": backends})


def _timer(action: Callable[[], Any]) -> Timer:
    return Timer("action()", globals={"action": action}, timer=time.process_time)


def _eager(model: FreeContexts, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.logits(), targets)


def _loss(trainer: Trainer, eager: bool) -> Callable[[], None]:
    """The loss of given logits with all gradients."""
    model, targets = trainer.model, trainer.targets
    logits = model.logits().detach().requires_grad_()

    def loss() -> None:
        value = F.cross_entropy(logits, targets) if eager else ms.cross_entropy(logits, targets, model.transform)
        logits.grad = None
        model.zero_grad()
        value.backward()

    return loss
