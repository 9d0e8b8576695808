"""What is measured on the trained models: time and memory of the output layer alone, spectrum and logits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from ..resident_set import MeasurementError
from .memory import peaks
from .settings import Settings
from .training import Trainer

TOLERANCES = (1e-3, 1e-4, 1e-5)
#: Contexts whose logits are looked at. Each has one for every word, so that a hundred make millions of logits.
_HISTOGRAM_CONTEXTS = 100
_TIMED_REPEATS, _WARM_UP_REPEATS = 15, 2
#: How many forward and backward passes of each output layer :func:`layer_seconds` does.
TIMED_STEPS = _TIMED_REPEATS + _WARM_UP_REPEATS


def layer_seconds(trainers: Sequence[Trainer]) -> list[float]:
    """Median time of a forward and backward pass of each output layer over a training batch of its own hidden states.

    The layers take turns, so that whatever slows the machine down for a while slows all of them.
    """
    settings = trainers[0].settings
    batches = []
    for trainer in trainers:
        states, targets = trainer.hidden_states(settings.batch_size * settings.length)
        batches.append((states.detach().requires_grad_(), targets))
        trainer.model.train()
    times: list[list[float]] = [[] for _ in trainers]
    for repeat in range(TIMED_STEPS):
        for trainer, (states, targets), seconds in zip(trainers, batches, times, strict=True):
            _synchronize(trainer.device)
            started = time.perf_counter()
            trainer.model.output(states, targets).loss.backward()
            _synchronize(trainer.device)
            if repeat >= _WARM_UP_REPEATS:
                seconds.append(time.perf_counter() - started)
            states.grad = None
            trainer.model.zero_grad()
    return [statistics.median(seconds) for seconds in times]


def layer_bytes(settings: Settings, classes: int) -> tuple[dict[str, int], str | None]:
    """Extra bytes of a training step of each output layer alone; or nothing, and why they cannot be measured."""
    try:
        extra = peaks(
            settings.output,
            rows=settings.batch_size * settings.length,
            dim=settings.dim,
            classes=classes,
            experts=settings.experts,
            dropout=settings.dropout,
            device=settings.device,
            threads=settings.threads,
        )
    except MeasurementError as error:
        return {}, str(error)
    return extra, None


@torch.no_grad()
def spectrum(trainer: Trainer) -> dict[str, Any]:
    """Singular values and effective ranks of the matrix of log-probabilities of the first validation contexts."""
    states, _ = trainer.hidden_states(trainer.settings.rank_contexts)
    values = ms.analysis.spectrum(trainer.model.output.log_prob(states))
    return {
        "contexts": len(states),
        "singular_values": values.tolist(),
        "effective_ranks": {
            f"{tolerance:g}": ms.analysis.effective_rank(values, tolerance) for tolerance in TOLERANCES
        },
    }


def transform(trainer: Trainer) -> ms.transforms.MonotonicTransform | None:
    """f of the output layer; None for a mixture, which has none."""
    function: ms.transforms.MonotonicTransform | None = getattr(trainer.model.output, "transform", None)
    return function


@torch.no_grad()
def logits(trainer: Trainer) -> Tensor:
    """The logits before f in the first validation contexts, (n, V)."""
    values: Tensor = trainer.model.output.logits(trainer.hidden_states(_HISTOGRAM_CONTEXTS)[0])
    return values


def parameters(trainer: Trainer) -> dict[str, int]:
    """Trained numbers in the whole model, and in the output layer without the weight of the embedding."""
    shared = trainer.model.body.embedding.weight
    return {
        "model": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "output_layer_own": sum(
            p.numel() for p in trainer.model.output.parameters() if p.requires_grad and p is not shared
        ),
    }


def backend(trainer: Trainer) -> str:
    """Which backend computes the loss."""
    states = torch.empty(0, trainer.settings.dim, device=trainer.device)
    return ms.backends.explain("linear_cross_entropy", states, transform(trainer)).backend


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
