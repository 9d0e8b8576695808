"""The problem, the training of one method on it, how closely the result matches the targets, and the time it takes."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from timeit import timeit
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms

from ...engine.experiment import Measured
from .methods import METHODS, TRANSFORM_RATE_RATIO, FreeContexts, build
from .settings import EAGER, LEARNING_RATES, Cell, Timing, Training

TOLERANCES = (1e-3, 1e-4, 1e-5)
_BETAS, _WARM_UP_STEPS = (0.9, 0.99), 20
_QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


@lru_cache(maxsize=1)
def problem(cell: Cell, seed: int) -> tuple[Tensor, Tensor]:
    """Target distributions P, one for each context, from a symmetric Dirichlet distribution.

    Gamma variables of a small shape underflow, so their logarithms are drawn: log G(a) = log G(a + 1) + log(U) / a.

    Returns:
        P twice, (N, M), rows that sum to 1: in float64, where values below the smallest double are 0; and in float32
        for the loss, where what is not a normal number is 0: others are slow.

    Source: Marsaglia and Tsang, "A Simple Method for Generating Gamma Variables", 2000, section 6.
    """
    random, shape = np.random.default_rng(seed), (cell.contexts, cell.words)
    larger = np.log(random.standard_gamma(cell.alpha + 1, shape))
    # 1 - U lies in (0, 1], so that its logarithm is finite.
    log_gamma = larger + np.log1p(-random.random(shape)) / cell.alpha
    probabilities = torch.from_numpy(np.exp(log_gamma - logsumexp(log_gamma, axis=1, keepdims=True)))
    single = probabilities.float()
    return probabilities, torch.where(single >= torch.finfo(torch.float32).tiny, single, 0.0)


def figures(probabilities: Tensor, log_q: Tensor) -> dict[str, Any]:
    """How closely Q matches P, from P and log Q, (N, M), float64.

    Returns:
        ``kl``, the mean KL(P || Q) in nats; ``modes``, the share of contexts whose most probable word is that of P;
        ``top5``, the mean share of P's five most probable words among Q's five; ``ranks``, the effective ranks of
        log Q by tolerance.
    """
    # A word with p = 0 adds nothing, even where log q is -inf.
    cross = torch.where(probabilities > 0, probabilities * log_q, 0.0).sum(1)
    gap = torch.xlogy(probabilities, probabilities).sum(1) - cross
    wanted, found = probabilities.topk(5).indices, log_q.topk(5).indices
    shared = (wanted.unsqueeze(2) == found.unsqueeze(1)).sum((1, 2))
    spectrum = ms.analysis.spectrum(log_q)
    return {
        "kl": gap.mean().item(),
        "modes": (probabilities.argmax(1) == log_q.argmax(1)).double().mean().item(),
        "top5": (shared.double() / 5).mean().item(),
        "ranks": {f"{tolerance:g}": ms.analysis.effective_rank(spectrum, tolerance) for tolerance in TOLERANCES},
    }


class Trainer:
    """A model, its problem and optimisers, and single steps. Nothing in it is random once it is there."""

    def __init__(self, settings: Training) -> None:
        self.settings, cell, how = settings, settings.cell, METHODS[settings.method]
        self.probabilities, self.targets = problem(cell, settings.seed)
        self.model = build(settings.method, cell.contexts, cell.words, cell.dim, settings.seed)
        rate = how.transform_lr or TRANSFORM_RATE_RATIO * settings.lr
        groups = ms.parameter_groups(self.model, lr=settings.lr, transform_lr=rate)
        by_sgd = [group for group in groups if how.sgd and group["name"] == "transform"]
        by_adam = [group for group in groups if not how.sgd or group["name"] != "transform"]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(by_adam, betas=_BETAS, fused=True)]
        self.optimizers += [torch.optim.SGD([group]) for group in by_sgd]
        self._peaks = [(group, group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups]
        self.step = 0

    def rate(self, step: int) -> float:
        """The share of the peak learning rate: a linear rise, then a cosine to 0."""
        rise, steps = _WARM_UP_STEPS, self.settings.cell.steps
        fall = (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2
        return (step + 1) / rise if step < rise else fall

    def train_step(self) -> float:
        """One step over all contexts; returns the loss before it."""
        for group, peak in self._peaks:
            group["lr"] = peak * self.rate(self.step)
        self.model.zero_grad()
        loss = self.model.loss(self.targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item()

    def train(self) -> list[float]:
        """All steps, or those until the loss is no number; returns the processor seconds of each."""
        seconds, loss = [], 0.0
        while self.step < self.settings.cell.steps and math.isfinite(loss):
            started = time.process_time()
            loss = self.train_step()
            seconds.append(time.process_time() - started)
        self.diverged = not math.isfinite(loss)
        return seconds


def train(settings: Training, keep_shape: bool = False) -> Measured:
    """Train and measure; with the learned f, if asked for."""
    trainer = Trainer(settings)
    model, backend = trainer.model, trainer.model.backend(trainer.targets)
    times = {"step_seconds": round(statistics.median(trainer.train()), 7), "backend": backend}
    if trainer.diverged:
        return Measured({"diverged_at": trainer.step - 1}, times)
    with torch.no_grad():
        found = figures(trainer.probabilities, copy.deepcopy(model).double().log_prob())
    if keep_shape and model.transform is not None:
        found["shape"] = shape(model)
    return Measured(found, times)


@torch.no_grad()
def shape(model: FreeContexts) -> dict[str, Any]:
    """f and the quantiles of its logits, to as many digits as a picture shows; not for mixtures."""

    def rounded(values: Tensor) -> Any:
        return torch.round(values.double(), decimals=6).tolist()

    function, state = model.transform, model.transform.state_dict()
    quantiles = np.quantile(model.logits().double().numpy(), _QUANTILES).tolist()
    kept: dict[str, Any] = {"quantiles": [[q, round(z, 4)] for q, z in zip(_QUANTILES, quantiles, strict=True)]}
    if sum(value.numel() for value in state.values()) <= 1000:
        return kept | {"state": {name: rounded(value) for name, value in state.items()}}
    # Points of f instead of more numbers than a picture needs.
    z = torch.linspace(quantiles[0], quantiles[-1], 201, dtype=torch.float64)
    return kept | {"curve": {"z": rounded(z), "f": rounded(function(z) - function(z.new_zeros(1)))}}


def time_steps(settings: Timing) -> Measured:
    """Processor seconds of the loss and of training steps: all methods in turn, so that a busy machine is so for all.

    The loss is forward and backward with all gradients, logits and targets given.

    Returns:
        Times: ``seconds``, by method and ``loss`` or ``step``, quartiles over the rounds, and ``backends`` by method.
        Mixtures have no ``loss``: theirs is not one function of logits.
    """
    actions: dict[tuple[str, str], Callable[[], object]] = {}
    backends = {}
    for method in settings.methods:
        trainer = Trainer(Training(settings.cell, "linear" if method == EAGER else method, 0, LEARNING_RATES[0]))
        backends[method] = trainer.model.backend(trainer.targets)
        if method == EAGER:
            trainer.model.loss_of, backends[method] = F.cross_entropy, "torch"
        if trainer.model.transform is not None:
            actions[method, "loss"] = partial(_loss, trainer, trainer.model.logits().detach().requires_grad_())
        actions[method, "step"] = trainer.train_step
    turns = range(settings.rounds + 1)
    rounds = [[timeit(act, timer=time.process_time, number=1) for act in actions.values()] for _ in turns]
    # The first round warms up.
    quartiles = np.quantile(rounds[1:], (0.25, 0.5, 0.75), axis=0).T.round(9).tolist()
    found = dict(zip(actions, quartiles, strict=True))
    seconds = {m: {w: found[m, w] for w in ("loss", "step") if (m, w) in found} for m in settings.methods}
    return Measured({}, {"seconds": seconds, "backends": backends})


def _loss(trainer: Trainer, logits: Tensor) -> None:
    trained = [each for each in trainer.model.transform.parameters() if each.requires_grad]
    torch.autograd.grad(trainer.model.loss_of(logits, trainer.targets), [logits, *trained])
