"""Time of the losses and of whole training steps, of all methods in turn, so that a busy machine is so for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch.nn import functional as F
from torch.utils.benchmark import Measurement, Timer

import monosoftmax as ms

from ...engine.experiment import Measured
from .settings import EAGER, LEARNING_RATES, Timing, Training
from .training import Trainer, dirichlet, training_targets


def measure(settings: Timing) -> Measured:
    """Processor seconds of the loss, forward and backward with all gradients, and of the training step.

    Returns:
        Times: ``seconds``, by method and ``loss`` or ``step``, quartiles over the rounds, and ``backends`` by method.
        Mixtures have no ``loss``: theirs is not one function of logits.
    """
    # A timer warms up with two steps for each that it times.
    cell = replace(settings.cell, steps=3 * settings.rounds)
    targets = training_targets(dirichlet(cell.contexts, cell.words, cell.alpha, 0))
    actions: dict[tuple[str, str], Callable[[], Any]] = {}
    backends = {}
    for method in settings.methods:
        eager = method == EAGER
        trainer = Trainer(Training(cell, "linear" if eager else method, 0, LEARNING_RATES[0]), targets)
        model, backends[method] = trainer.model, "torch" if eager else trainer.model.backend(targets)
        if eager:
            model.loss = lambda targets, model=model: F.cross_entropy(model.logits(), targets)  # type: ignore
        if model.transform is not None:
            actions[method, "loss"] = _loss(trainer, eager)
        actions[method, "step"] = trainer.train_step
    timers = {key: Timer("act()", globals={"act": act}, timer=time.process_time) for key, act in actions.items()}
    rounds = [{key: timer.timeit(1) for key, timer in timers.items()} for _ in range(settings.rounds)]
    seconds: dict[str, dict[str, list[float]]] = {method: {} for method in settings.methods}
    for method, what in timers:
        (merged,) = Measurement.merge(each[method, what] for each in rounds)
        seconds[method][what] = np.quantile(merged.times, (0.25, 0.5, 0.75)).round(9).tolist()
    return Measured({}, {"seconds": seconds, "backends": backends})


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
