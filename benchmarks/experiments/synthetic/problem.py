"""The problem: random target distributions, and how closely a matrix of log-probabilities matches them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

import monosoftmax as ms

TOLERANCES = (1e-3, 1e-4, 1e-5)
_TOP = 5


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


def entropy(probabilities: Tensor) -> float:
    """Mean entropy of the rows, in nats: the least that the cross entropy can be."""
    return -torch.xlogy(probabilities, probabilities).sum(1).mean().item()


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
