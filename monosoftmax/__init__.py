"""Learnable monotonic softmax for the output layer of language models: p(x | h) = softmax_x f(<h, w_x>)."""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

from . import (
    analysis,
    autograd,  # noqa: F401, the derivatives of the operators
    backends,
    chunked_head,  # noqa: F401, what the linear_ operators compute
    distilled_head,  # noqa: F401, the same for distillation
    distributed,
    losses,
    row_operators,  # noqa: F401, what the others compute
    transforms,
)
from .distillation import linear_distillation, linear_topk_distillation
from .functional import TokenStatistics, cross_entropy, log_softmax
from .linear import linear_cross_entropy
from .mixtures import MixtureOfContexts, MixtureOfSoftmaxes
from .modules import MonotonicCrossEntropyLoss, MonotonicSoftmax, OutputAndLoss
from .token_log_prob import TokenLogProb, linear_log_prob, linear_token_statistics, log_prob
from .token_loss import linear_token_loss
from .token_loss_head import Tokens
from .training import GradientNorms, clip_grad_norm_, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "GradientNorms",
    "MixtureOfContexts",
    "MixtureOfSoftmaxes",
    "MonotonicCrossEntropyLoss",
    "MonotonicSoftmax",
    "OutputAndLoss",
    "TokenLogProb",
    "TokenStatistics",
    "Tokens",
    "analysis",
    "backends",
    "clip_grad_norm_",
    "cross_entropy",
    "distributed",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_log_prob",
    "linear_token_loss",
    "linear_token_statistics",
    "linear_topk_distillation",
    "log_prob",
    "log_softmax",
    "losses",
    "parameter_groups",
    "transforms",
]


def __getattr__(name: str) -> _Any:
    if name == "integrations":  # which load what they are for
        return _importlib.import_module(f"{__name__}.integrations")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
