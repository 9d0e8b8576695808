"""Trained heads: their log-probability matrix before f (softmax of the logits) and after it, on the same contexts."""

from __future__ import annotations

import copy
from typing import Any

import torch

import monosoftmax as ms

from ..language_model import training as language_model_training
from ..synthetic.problem import dirichlet, figures, training_targets
from ..synthetic.settings import Training
from ..synthetic.training import Trainer
from .matrices import centred, describe
from .settings import HEAD_SEEDS, LanguageModelHead


@torch.no_grad()
def synthetic(settings: Training) -> dict[str, Any]:
    """Train a method and describe log Q before and after f; with the singular values for the first seed."""
    cell, keep = settings.cell, settings.seed == HEAD_SEEDS[0]
    probabilities = dirichlet(cell.contexts, cell.words, cell.alpha, settings.seed)
    with torch.enable_grad():
        model = Trainer(settings, training_targets(probabilities)).trained_model()
    after = model.log_prob()
    before = None if model.transform is None else torch.log_softmax(model.logits(), -1)
    found = figures(probabilities, after)
    return {
        "kl": found["kl"],
        "modes": found["modes"],
        "before": None if before is None else describe(before, keep),
        "after": describe(after, keep),
    }


@torch.no_grad()
def language_model(settings: LanguageModelHead) -> dict[str, Any]:
    """Train an LSTM and describe log P of validation contexts before and after f."""
    trained = settings.training
    corpus = language_model_training.prepared(trained)
    trainer = language_model_training.Trainer(corpus, trained, settings.steps)
    with torch.enable_grad():
        trainer.train()
    states = trainer.hidden_states(trained.rank_contexts)[0].double()
    layer = copy.deepcopy(trainer.model.output).double()
    after = layer.log_prob(states)
    before = torch.log_softmax(layer.logits(states), -1) if isinstance(layer, ms.MonotonicSoftmax) else None
    return {
        "tokens": settings.steps * trained.batch_size * trained.length,
        "valid_perplexity": trainer.perplexity("valid"),
        "before": None if before is None else {**describe(before, True), "centred": centred(before)},
        "after": {**describe(after, True), "centred": centred(after)},
    }
