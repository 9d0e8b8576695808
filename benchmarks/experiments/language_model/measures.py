"""What is measured on a trained model."""

from __future__ import annotations

import math
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


def table_figures(trainer: Trainer, keep_spectrum: bool) -> dict[str, Any]:
    """What the tables of a study have of a training at its end; of seed 0 also what its pictures show."""
    figures: dict[str, Any] = {"perplexity": {}, "parameters": parameters(trainer)}
    for split in ("valid", "test"):
        figures["losses"] = trainer.document_losses(split)
        words = sum(document_tokens(trainer.corpus.splits[split], trainer.settings))
        figures["perplexity"][split] = math.exp(math.fsum(figures["losses"]) / words)
    if trainer.settings.seed == 0:
        figures |= spectrum(trainer)
        if not keep_spectrum:
            del figures["singular_values"]
        state = getattr(trainer.model.output, "transform", torch.nn.Identity()).state_dict()
        if 0 < sum(value.numel() for value in state.values()) <= _MOST_COEFFICIENTS:
            figures["transform"] = {name: value.tolist() for name, value in state.items()}
            figures["logits"] = [each.item() for each in logits(trainer).aminmax()]
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


@torch.no_grad()
def logits(trainer: Trainer) -> Tensor:
    """The logits before f in the first validation contexts, (n, V)."""
    return trainer.model.output.logits(trainer.hidden_states(_LOGIT_CONTEXTS)[0])
