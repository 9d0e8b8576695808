"""What is measured on a trained model."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from .training import Trainer, document_tokens

TOLERANCES = (1e-3, 1e-4, 1e-5)
#: Coefficients of f are stored up to this many: published PLIF has 100,000 of them.
_MOST_COEFFICIENTS = 1000
#: Contexts whose logits are looked at. Each has one for every word, so that a hundred make millions of logits.
_LOGIT_CONTEXTS = 100
_TIMED_REPEATS, _WARM_UP_REPEATS = 15, 2


def table_figures(trainer: Trainer, keep_spectrum: bool) -> dict[str, Any]:
    """What the tables of a study have of a training; of seed 0 also what its pictures show.

    Args:
        trainer: at its end.
        keep_spectrum: whether the singular values are kept, of seed 0.
    """
    losses = {split: trainer.document_losses(split) for split in ("valid", "test")}
    settings = trainer.settings
    counts = {
        split: sum(document_tokens(trainer.corpus.splits[split], settings.batch_size, settings.evaluation_tokens))
        for split in losses
    }
    figures: dict[str, Any] = {
        "perplexity": {split: math.exp(math.fsum(each) / counts[split]) for split, each in losses.items()},
        "losses": losses["test"],
        "parameters": parameters(trainer),
    }
    if settings.seed == 0:
        found = spectrum(trainer)
        if not keep_spectrum:
            del found["singular_values"]
        figures |= found | _function(trainer)
    return figures


def parameters(trainer: Trainer) -> int:
    """Trained numbers in the whole model."""
    return sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


@torch.no_grad()
def spectrum(trainer: Trainer) -> dict[str, Any]:
    """Singular values and effective ranks of the matrix of log-probabilities of the first validation contexts."""
    states, _ = trainer.hidden_states(trainer.settings.rank_contexts)
    values = ms.analysis.spectrum(trainer.model.output.log_prob(states))
    return {
        "effective_ranks": {f"{tol:g}": ms.analysis.effective_rank(values, tol) for tol in TOLERANCES},
        # For a picture; five digits are more than it shows.
        "singular_values": [float(f"{value:.5g}") for value in values.tolist()],
    }


def transform(trainer: Trainer) -> ms.transforms.MonotonicTransform | None:
    """f of the output layer; None for a mixture, which has none."""
    function: ms.transforms.MonotonicTransform | None = getattr(trainer.model.output, "transform", None)
    return function


@torch.no_grad()
def logits(trainer: Trainer) -> Tensor:
    """The logits before f in the first validation contexts, (n, V)."""
    values: Tensor = trainer.model.output.logits(trainer.hidden_states(_LOGIT_CONTEXTS)[0])
    return values


def _function(trainer: Trainer) -> dict[str, Any]:
    """The parameters of f, where there are not more than can be looked at, and the range of the logits before it."""
    function = transform(trainer)
    if function is None:
        return {}
    state = function.state_dict()
    if not 0 < sum(value.numel() for value in state.values()) <= _MOST_COEFFICIENTS:
        return {}
    values = logits(trainer)
    return {
        "transform": {name: value.tolist() for name, value in state.items()},
        "logits": [values.min().item(), values.max().item()],
    }


def layer_seconds(trainers: list[Trainer]) -> list[float]:
    """Median time of a forward and backward pass of each output layer over a training batch of its own hidden states.

    The layers take turns, so that whatever slows the machine down for a while slows all of them.
    """
    batches = []
    for trainer in trainers:
        states, targets = trainer.hidden_states(trainer.settings.batch_size * trainer.settings.length)
        batches.append((states.detach().requires_grad_(), targets))
        trainer.model.train()
    times: list[list[float]] = [[] for _ in trainers]
    for repeat in range(_TIMED_REPEATS + _WARM_UP_REPEATS):
        for trainer, (states, targets), seconds in zip(trainers, batches, times, strict=True):
            started = time.perf_counter()
            trainer.model.output(states, targets).loss.backward()
            if repeat >= _WARM_UP_REPEATS:
                seconds.append(time.perf_counter() - started)
            states.grad = None
            trainer.model.zero_grad()
    return [statistics.median(seconds) for seconds in times]
