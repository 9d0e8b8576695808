"""Learnable monotonic softmax for the output layer of language models: p(x | h) = softmax_x f(<h, w_x>)."""

from __future__ import annotations

from . import (
    analysis,
    autograd,  # noqa: F401, the derivatives of the operators
    backends,
    chunked_head,  # noqa: F401, what the linear_ operators compute
    row_operators,  # noqa: F401, what the others compute
    transforms,
)
from .functional import cross_entropy, linear_cross_entropy, log_softmax
from .mixtures import MixtureOfContexts, MixtureOfSoftmaxes
from .modules import MonotonicCrossEntropyLoss, MonotonicSoftmax, OutputAndLoss
from .ops import TokenStatistics
from .token_log_prob import TokenLogProb, linear_log_prob, linear_token_statistics, log_prob
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
    "analysis",
    "backends",
    "clip_grad_norm_",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_token_statistics",
    "log_prob",
    "log_softmax",
    "parameter_groups",
    "transforms",
]
