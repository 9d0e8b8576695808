"""What is measured on held-out tokens: loss by document, calibration, and the spectrum of the log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from .settings import Evaluation
from .states import Split

#: Shares of the squared spectrum that an effective rank leaves out.
TOLERANCES = (1e-3, 1e-4, 1e-5)


@torch.no_grad()
def evaluate(
    split: Split, head: Tensor, transforms: Sequence[MonotonicTransform], settings: Evaluation
) -> list[dict[str, Any]]:
    """The losses and the calibration of p = softmax(f(head h)) for several increasing f, with one product for all.

    Args:
        split, head: hidden states (N, d), targets and documents; (V, d).
        transforms: the likeliest token is the same for all of them, as they are increasing.
        settings: number of bins, and of tokens whose logits there are at a time.

    Returns:
        For each f: ``nll``, the mean loss of a token; ``document_nll``, the sum of -log p(target) of each document;
        ``bins``, as :func:`calibration_bins` makes them.
    """
    sums = [torch.zeros(len(split.documents), dtype=torch.float64) for _ in transforms]
    confidences: list[list[Tensor]] = [[] for _ in transforms]
    hits: list[Tensor] = []
    for first in range(0, len(split.target), settings.chunk_tokens):
        part = slice(first, first + settings.chunk_tokens)
        logits, target = split.hidden[part] @ head.T, split.target[part]
        largest, likeliest = logits.max(1)
        hits.append(likeliest == target)
        for transform, losses, confidence in zip(transforms, sums, confidences, strict=True):
            loss, lse = ms.cross_entropy(logits, target, transform, reduction="none", return_lse=True)
            losses.index_add_(0, split.document[part], loss.double())
            confidence.append((transform(largest) - lse).exp().clamp(max=1))
    hit = torch.cat(hits)
    return [
        {
            "nll": math.fsum(losses.tolist()) / len(split.target),
            "document_nll": losses.tolist(),
            "bins": calibration_bins(torch.cat(confidence), hit, settings.bins),
        }
        for losses, confidence in zip(sums, confidences, strict=True)
    ]


def calibration_bins(confidence: Tensor, hit: Tensor, bins: int) -> dict[str, list[float]]:
    """Sums over the tokens of bins (0, 1/B], (1/B, 2/B], ... of the confidence: their number, confidences and hits.

    The confidence (N,) is the probability of the likeliest token; ``hit`` (N,) says whether that was the target.
    """
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    sums = {"tokens": torch.ones_like(confidence), "confidence": confidence, "hits": hit}
    zeros = torch.zeros(bins, dtype=torch.float64)
    return {name: zeros.index_add(0, place, values.double()).tolist() for name, values in sums.items()}


@torch.no_grad()
def spectrum(split: Split, head: Tensor, transform: MonotonicTransform, contexts: int) -> dict[str, Any]:
    """Singular values and effective ranks of the log-probabilities (contexts, V), in float64.

    They are the roots of the eigenvalues of log P log P^T, which float64 gives to about 1e-8 of the largest: far below
    what the smallest tolerance asks for, and less work than a singular value decomposition. Only those at the places
    :func:`kept` are returned, with 5 digits.
    """
    hidden = split.subset(contexts).hidden
    log_p = ms.log_softmax(hidden.double() @ head.double().T, transform)
    values = torch.linalg.eigvalsh(log_p @ log_p.T).clamp(min=0).sqrt().flip(0)
    return {
        "singular_values": [float(f"{values[place - 1].item():.4e}") for place in kept(len(hidden))],
        "effective_ranks": {f"{size:g}": ms.analysis.effective_rank(values, size) for size in TOLERANCES},
    }


def kept(count: int) -> list[int]:
    """The places, from 1 to ``count``, of the singular values that are stored: dense enough for logarithmic axes."""
    return sorted({round(count ** (step / 400)) for step in range(401)})


@torch.no_grad()
def histogram(split: Split, head: Tensor, settings: Evaluation) -> dict[str, Any]:
    """How the logits of the trained model are distributed: all of them, the largest of each context, the targets'."""
    split = split.subset(settings.histogram_contexts)
    logits = split.hidden @ head.T
    of_target = logits.gather(1, split.target[:, None]).flatten()
    low, high = settings.histogram_range
    kinds = {"all": logits.flatten(), "largest": logits.amax(1), "target": of_target}
    return {
        "contexts": len(logits),
        "range": [low, high],
        "counts": {name: torch.histc(z, settings.histogram_bins, low, high).tolist() for name, z in kinds.items()},
        "extremes": {name: [z.min().item(), z.max().item()] for name, z in kinds.items()},
        "mean": {name: z.double().mean().item() for name, z in kinds.items()},
        "standard_deviation": {name: z.double().std().item() for name, z in kinds.items()},
    }
