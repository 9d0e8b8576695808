"""The training of one method on one problem, and what came out of it."""

from __future__ import annotations

import copy
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

import monosoftmax as ms

from .methods import METHODS, FreeContexts, build
from .problem import dirichlet, entropy, figures, training_targets
from .settings import BETAS, WARM_UP_STEPS, Cell

#: Points of the curve of the loss that are kept.
_HISTORY = 20
#: Raw parameters of f up to this number are kept themselves, beyond it points of f.
_MOST_PARAMETERS = 1000
_POINTS = 201
_QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate in ``step`` of ``steps``: a linear rise, then a cosine to 0."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    return (1 + math.cos(math.pi * (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS))) / 2


class Trainer:
    """A model, its optimisers, and single steps. Nothing in it is random once it is there."""

    def __init__(self, cell: Cell, method: str, seed: int, lr: float, targets: Tensor) -> None:
        self.cell, self.targets = cell, targets
        self.model = build(method, cell.contexts, cell.words, cell.dim, seed)
        how = METHODS[method]
        groups = ms.parameter_groups(self.model, lr=lr, transform_lr=how.transform_rate(lr))
        by_sgd = [group for group in groups if group["name"] == "transform" and how.optimizer == "sgd"]
        by_adam = [group for group in groups if not any(group is other for other in by_sgd)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(by_adam, betas=BETAS, fused=True)]
        if by_sgd:
            self.optimizers.append(torch.optim.SGD(by_sgd))
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step = 0

    def train_step(self) -> float:
        """One step over all contexts; returns the loss before it."""
        share = rate(self.step, self.cell.steps)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            optimizer.zero_grad()
        loss = self.model.loss(self.targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item()


def train(cell: Cell, method: str, seed: int, lr: float, keep_shape: bool) -> dict[str, Any]:
    """Train ``method`` on the problem of ``seed``, and measure.

    Args:
        cell: the size of the problem, and the number of steps.
        method: a name in ``METHODS``.
        seed: of the targets and of the initial values.
        lr: peak learning rate.
        keep_shape: whether to keep the learned f.

    Returns:
        For JSON: ``figures`` (None where the loss became infinite or NaN, in step ``diverged_at``), the median
        ``seconds_per_step``, ``history`` ([step, KL by the training loss], rounded), ``shape``.
    """
    probabilities = dirichlet(cell.contexts, cell.words, cell.alpha, seed)
    least = entropy(probabilities)
    trainer = Trainer(cell, method, seed, lr, training_targets(probabilities))
    seconds, history = [], []
    noted = {round(point * (cell.steps - 1) / (_HISTORY - 1)) for point in range(_HISTORY)}
    result: dict[str, Any] = {
        "seed": seed,
        "lr": lr,
        "transform_lr": METHODS[method].transform_rate(lr),
        "backend": trainer.model.backend(trainer.targets),
        "entropy": least,
        "figures": None,
    }
    for step in range(cell.steps):
        started = time.process_time()
        loss = trainer.train_step()
        seconds.append(time.process_time() - started)
        if not math.isfinite(loss):
            return {**result, "diverged_at": step, "history": history}
        if step in noted:
            history.append([step, round(loss - least, 5)])
    double = copy.deepcopy(trainer.model).double()
    with torch.no_grad():
        log_q = double.log_prob()
    result["figures"] = figures(probabilities, log_q)
    result["seconds_per_step"] = statistics.median(seconds)
    result["history"] = history
    if keep_shape:
        result["shape"] = shape(trainer.model)
    return result


@torch.no_grad()
def shape(model: FreeContexts) -> dict[str, Any] | None:
    """f and the quantiles of its logits, for pictures; None for a mixture."""
    function = model.transform
    if function is None:
        return None
    logits = model.logits().double().flatten()
    quantiles = np.quantile(logits.numpy(), _QUANTILES).tolist()
    kept: dict[str, Any] = {"quantiles": [[q, round(z, 4)] for q, z in zip(_QUANTILES, quantiles, strict=True)]}
    state = function.state_dict()
    if sum(value.numel() for value in state.values()) <= _MOST_PARAMETERS:
        kept["state"] = {name: _rounded(value) for name, value in state.items()}
    else:
        z = torch.linspace(quantiles[0], quantiles[-1], _POINTS, dtype=torch.float64)
        kept["curve"] = {"z": _rounded(z), "f": _rounded(function(z) - function(z.new_zeros(1)))}
    return kept


def _rounded(values: Tensor) -> Any:
    """As nested lists, to as many digits as a picture shows."""
    return torch.round(values.double(), decimals=6).tolist()
