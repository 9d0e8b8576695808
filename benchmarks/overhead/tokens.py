"""The groups ``tokens`` (log p and entropy under a soft cap), ``forward_kl`` and ``jsd`` (distillation).

Their contestants: ``plain eager`` and ``plain compiled`` hold the logits, ``plain trl`` does what TRL does with them,
``soft_cap linear_log_prob`` and ``soft_cap linear_token_loss``, on a GPU by backend, are ours, and so are
``identity fused``, ``identity cuda`` and ``identity triton`` of distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms

from .cases import Group

GROUPS: tuple[Group, ...] = ("tokens", "forward_kl", "jsd")
CAP = 30.0
#: Of input, weight and target.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def names(group: Group, on_gpu: bool) -> list[str]:
    """The contestants, baselines first."""
    backends, plain = ("cuda", "triton") if on_gpu else (), ["plain eager", "plain compiled"]
    if group != "tokens":
        return [*plain, *(f"identity {form}" for form in ("fused", *backends))]
    ours = ["soft_cap linear_log_prob", "soft_cap linear_token_loss"]
    return [*plain, "plain trl", *ours, *(f"{each} {backend}" for each in ours for backend in backends)]


def weighted(log_prob: Tensor | None, entropy: Tensor | None, a: Tensor, e: Tensor) -> Tensor:
    """A loss with the upstream gradients -a of log p and e of the entropy: all its terms are positive, none cancel."""
    assert log_prob is not None and entropy is not None
    return (e * entropy - a * log_prob).sum()


def plain(group: Group, form: str, fixed: tuple[Tensor, ...]) -> Loss:
    """The loss in plain PyTorch, on logits held in full."""

    def of_tokens(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = CAP * torch.tanh(F.linear(input, weight) / CAP)
        return weighted(*(_as_in_trl if form == "trl" else _log_prob_and_entropy)(logits, target), *fixed)

    def divergence(input: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        log_p, log_q = F.linear(input, weight).log_softmax(-1), F.linear(*fixed).log_softmax(-1)
        if group == "forward_kl":
            return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
        one, other = (F.kl_div(log_m, each, reduction="batchmean", log_target=True) for each in (log_p, log_q))
        return (one + other) / 2

    return of_tokens if group == "tokens" else divergence


def fused(group: Group, operation: str, fixed: tuple[Tensor, ...], **given: Any) -> Loss:
    """The loss by the function ``operation`` of the package; ``given`` are its transform and backend."""

    def of_log_prob(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found = ms.linear_log_prob(input, weight, target, **given)
        return weighted(found.log_prob, found.entropy, *fixed)

    def of_token_loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        def loss_fn(tokens: Any, a: Tensor, e: Tensor) -> Tensor:
            return weighted(tokens.log_prob, tokens.entropy, a, e)

        return ms.linear_token_loss(loss_fn, input, weight, target, per_token=fixed, **given)

    def of_distillation(input: Tensor, weight: Tensor, _: Tensor) -> Tensor:
        kind: Any = group
        return ms.linear_distillation(input, weight, *fixed, divergence=kind, backend=given["backend"])

    known = {"linear_log_prob": of_log_prob, "linear_token_loss": of_token_loss, "linear_distillation": of_distillation}
    return known[operation]


def _log_prob_and_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    return log_p.gather(1, target.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def _as_in_trl(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As TRL 1.10.0.dev0 does, of four sequences: selective_log_softmax, entropy_from_logits (trl/trainer/utils.py).

    Commit f2cd577 of July 2026, which has gradients of the entropy where GRPO has a bonus for it. log p is found
    sequence by sequence, and from log_softmax in types narrower than float32; the entropy of 128 rows at a time.
    """
    parts = math.gcd(4, len(target))
    sequences, index = logits.unflatten(0, (parts, -1)), target.reshape(parts, -1, 1)
    if logits.dtype in (torch.float32, torch.float64):
        lse = torch.stack([each.logsumexp(-1) for each in sequences])
        log_prob = sequences.gather(-1, index) - lse.unsqueeze(-1)
    else:
        pairs = zip(sequences, index, strict=True)
        log_prob = torch.stack([each.log_softmax(-1).gather(-1, chosen) for each, chosen in pairs])
    chunks = (each.log_softmax(-1) for each in logits.split(128))
    return log_prob.flatten(), torch.cat([-(each.exp() * each).sum(-1) for each in chunks])
