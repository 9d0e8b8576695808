"""Trained heads: their log-probability matrix before f (softmax of the logits) and after it, on the same contexts."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch

import monosoftmax as ms

from ..language_model import corpora
from ..language_model.budget import Budget
from ..language_model.settings import PRESETS, Settings
from ..language_model.training import Trainer as LanguageModelTrainer
from ..synthetic.problem import dirichlet, figures, training_targets
from ..synthetic.settings import MAIN, Cell
from ..synthetic.training import Trainer
from .matrices import describe
from .settings import (
    LANGUAGE_MODEL_CONTEXTS,
    LANGUAGE_MODEL_OUTPUTS,
    LANGUAGE_MODEL_SEED,
    LANGUAGE_MODEL_STEPS,
    SYNTHETIC_LR,
    SYNTHETIC_SEEDS,
    SYNTHETIC_STEPS,
)

SYNTHETIC_CELL: Cell = replace(MAIN, steps=SYNTHETIC_STEPS, seeds=SYNTHETIC_SEEDS)
LANGUAGE_MODEL = replace(
    PRESETS["demo"],
    vocabulary_size=4000,
    output=LANGUAGE_MODEL_OUTPUTS,
    dim=32,
    hidden=64,
    experts=3,
    seeds=(LANGUAGE_MODEL_SEED,),
    rank_contexts=LANGUAGE_MODEL_CONTEXTS,
    time_limit=None,
    threads=1,
)


def synthetic(method: str, seed: int, keep_spectrum: bool) -> dict[str, Any]:
    """Train ``method`` on the main cell of benchmarks.synthetic and describe log Q before and after f.

    Raises:
        ArithmeticError: the loss became infinite or NaN.
    """
    cell = SYNTHETIC_CELL
    probabilities = dirichlet(cell.contexts, cell.words, cell.alpha, seed)
    trainer = Trainer(cell, method, seed, SYNTHETIC_LR, training_targets(probabilities))
    for step in range(cell.steps):
        loss = trainer.train_step()
        if not math.isfinite(loss):
            raise ArithmeticError(f"synthetic/{method}, seed {seed}: the loss of step {step} is {loss}")
    double = copy.deepcopy(trainer.model).double()
    with torch.no_grad():
        after = double.log_prob()
        before = None if double.transform is None else torch.log_softmax(double.logits(), -1)
    found = figures(probabilities, after)
    return {
        "seed": seed,
        "kl": found["kl"],
        "modes": found["modes"],
        "before": None if before is None else describe(before, keep_spectrum),
        "after": describe(after, keep_spectrum),
    }


def synthetic_settings() -> dict[str, Any]:
    """What the figures of :func:`synthetic` depend on beside the seed, for JSON."""
    return {"cell": SYNTHETIC_CELL.to_json(), "lr": SYNTHETIC_LR}


def language_model_settings() -> dict[str, Any]:
    """What the figures of :func:`language_model` depend on, for JSON."""
    settings = LANGUAGE_MODEL.to_json()
    for name in ("output", "epochs", "minutes", "validations", "evaluation_tokens"):
        del settings[name]
    return {**settings, "steps": LANGUAGE_MODEL_STEPS}


def language_model(output: str, settings: Settings = LANGUAGE_MODEL) -> dict[str, Any]:
    """Train a small LSTM with the layer ``output`` and describe log P of validation contexts before and after f.

    Raises:
        CorpusError: the corpus is not installed.
        Diverged: the loss became infinite or NaN.
    """
    corpus = corpora.load(
        settings.corpus,
        style=settings.text_style,
        vocabulary_size=settings.vocabulary_size,
        min_count=settings.min_count,
    )
    trainer = LanguageModelTrainer(corpus, settings, output, LANGUAGE_MODEL_SEED, Budget.of_steps(LANGUAGE_MODEL_STEPS))
    trainer.train(1, lambda: False, lambda words, loss: None)
    states, _ = trainer.hidden_states(LANGUAGE_MODEL_CONTEXTS)
    layer = copy.deepcopy(trainer.model.output).double()
    with torch.no_grad():
        states = states.double()
        after = layer.log_prob(states)
        before = torch.log_softmax(layer.logits(states), -1) if isinstance(layer, ms.MonotonicSoftmax) else None
    return {
        "seed": LANGUAGE_MODEL_SEED,
        "tokens": trainer.tokens,
        "valid_perplexity": trainer.perplexity("valid", settings.evaluation_tokens),
        "before": None if before is None else describe(before, True),
        "after": describe(after, True),
    }
