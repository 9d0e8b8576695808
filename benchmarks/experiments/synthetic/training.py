"""The problem, the training of one method on it, and how closely the result matches the targets."""

from __future__ import annotations

import copy
import math
import statistics
import time
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

import monosoftmax as ms

from ...engine.experiment import ExperimentError, Measured
from .methods import METHODS, FreeContexts, build
from .settings import Training

TOLERANCES = (1e-3, 1e-4, 1e-5)
_TOP = 5
#: Raw parameters of f up to this number are kept themselves, beyond it points of f.
_MOST_PARAMETERS = 1000
_POINTS = 201
_QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


def dirichlet(contexts: int, words: int, alpha: float, seed: int) -> Tensor:
    """Target distributions P, one for each context, from a symmetric Dirichlet distribution.

    Gamma variables of a small shape underflow, so their logarithms are drawn: log G(a) = log G(a + 1) + log(U) / a.

    Returns:
        (contexts, words), float64, rows that sum to 1. Values below the smallest double are 0.

    Source: Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000, section 6.
    """
    random = np.random.default_rng(seed)
    larger = np.log(random.standard_gamma(alpha + 1, (contexts, words)))
    # 1 - U lies in (0, 1], so that its logarithm is finite.
    log_gamma = larger + np.log1p(-random.random((contexts, words))) / alpha
    return torch.from_numpy(np.exp(log_gamma - logsumexp(log_gamma, axis=1, keepdims=True)))


def training_targets(probabilities: Tensor) -> Tensor:
    """P in float32, for the loss. What is not a normal number there is 0: arithmetic on the others is slow."""
    single = probabilities.float()
    return torch.where(single >= torch.finfo(torch.float32).tiny, single, 0.0)


def figures(probabilities: Tensor, log_q: Tensor) -> dict[str, Any]:
    """How closely Q matches P.

    Args:
        probabilities, log_q: P and log Q, (N, M), float64.

    Returns:
        ``kl``, the mean KL(P || Q) in nats; ``modes``, the share of contexts whose most probable word is that of P;
        ``top5``, the mean share of P's five most probable words among Q's five; ``ranks``, the effective ranks of
        log Q by tolerance.
    """
    # A word with p = 0 adds nothing, even where log q is -inf.
    cross = torch.where(probabilities > 0, probabilities * log_q, 0.0).sum(1)
    gap = torch.xlogy(probabilities, probabilities).sum(1) - cross
    top = min(_TOP, probabilities.shape[1])
    wanted, found = probabilities.topk(top).indices, log_q.topk(top).indices
    shared = (wanted.unsqueeze(2) == found.unsqueeze(1)).sum((1, 2))
    spectrum = ms.analysis.spectrum(log_q)
    return {
        "kl": gap.mean().item(),
        "modes": (probabilities.argmax(1) == log_q.argmax(1)).double().mean().item(),
        "top5": (shared.double() / top).mean().item(),
        "ranks": {f"{tolerance:g}": ms.analysis.effective_rank(spectrum, tolerance) for tolerance in TOLERANCES},
    }


class Diverged(ExperimentError):
    """The loss of ``step`` is infinite or NaN."""

    def __init__(self, method: str, step: int) -> None:
        super().__init__(f"{method}: the loss of step {step} is not finite")
        self.step = step


class Trainer:
    """A model, its optimisers, and single steps. Nothing in it is random once it is there."""

    def __init__(self, settings: Training, targets: Tensor) -> None:
        self.settings, self.targets = settings, targets
        cell, how = settings.cell, METHODS[settings.method]
        self.model = build(settings.method, cell.contexts, cell.words, cell.dim, settings.seed)
        groups = ms.parameter_groups(self.model, lr=settings.lr, transform_lr=how.transform_rate(settings.lr))
        by_sgd = [group for group in groups if group["name"] == "transform" and how.sgd]
        by_adam = [group for group in groups if group["name"] != "transform" or not how.sgd]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(by_adam, betas=settings.betas, fused=True)]
        if by_sgd:
            self.optimizers.append(torch.optim.SGD(by_sgd))
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.step = 0
        #: Processor time of each step of :meth:`trained_model`.
        self.seconds: list[float] = []

    def rate(self, step: int) -> float:
        """The share of the peak learning rate: a linear rise, then a cosine to 0."""
        rise, steps = self.settings.warm_up_steps, self.settings.cell.steps
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2

    def train_step(self) -> float:
        """One step over all contexts; returns the loss before it."""
        share = self.rate(self.step)
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

    def trained_model(self) -> FreeContexts:
        """The model in float64 after all steps.

        Raises:
            Diverged: the loss became infinite or NaN.
        """
        while self.step < self.settings.cell.steps:
            started = time.process_time()
            loss = self.train_step()
            self.seconds.append(time.process_time() - started)
            if not math.isfinite(loss):
                raise Diverged(self.settings.method, self.step - 1)
        return copy.deepcopy(self.model).double()


def train(settings: Training, keep_shape: bool = False) -> Measured:
    """Train and measure; with the learned f, if asked for."""
    cell = settings.cell
    probabilities = dirichlet(cell.contexts, cell.words, cell.alpha, settings.seed)
    trainer = Trainer(settings, training_targets(probabilities))
    backend = trainer.model.backend(trainer.targets)
    try:
        model = trainer.trained_model()
    except Diverged as error:
        found: dict[str, Any] = {"diverged_at": error.step}
    else:
        with torch.no_grad():
            found = figures(probabilities, model.log_prob())
        kept = shape(trainer.model) if keep_shape else None
        if kept is not None:
            found["shape"] = kept
    return Measured(found, {"step_seconds": statistics.median(trainer.seconds), "backend": backend})


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
