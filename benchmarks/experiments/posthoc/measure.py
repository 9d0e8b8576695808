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

    Of each f: mean loss of a token, -log p(target), sum of that by document, and :func:`calibration_bins`.
    """
    found: list[list[Tensor]] = [[] for _ in transforms]
    hits = []
    size = settings.chunk_tokens
    for hidden, target in zip(split.hidden.split(size), split.target.split(size), strict=True):
        logits = hidden @ head.T
        # The likeliest token is the same for all f, as they are increasing.
        largest, likeliest = logits.max(1)
        hits.append(likeliest == target)
        for f, of_chunks in zip(transforms, found, strict=True):
            loss, lse = ms.cross_entropy(logits, target, f, reduction="none", return_lse=True)
            of_chunks.append(torch.stack([loss, (f(largest) - lse).exp().clamp(max=1)]))
    measured = []
    for losses, confidence in (torch.cat(of_chunks, 1) for of_chunks in found):
        sums = torch.bincount(split.document, losses.double(), len(split.documents)).tolist()
        bins = calibration_bins(confidence, torch.cat(hits), settings.bins)
        measured.append({"test_nll": math.fsum(sums) / len(split.target), "document_nll": sums, "bins": bins})
    return measured


def calibration_bins(confidence: Tensor, hit: Tensor, bins: int) -> dict[str, list[float]]:
    """Sums over the tokens of bins (0, 1/B], (1/B, 2/B], ... of the confidence: their number, confidences and hits.

    The confidence (N,) is the probability of the likeliest token; ``hit`` (N,) says whether that was the target.
    """
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    sums = {"tokens": torch.ones_like(confidence), "confidence": confidence, "hits": hit}
    return {name: torch.bincount(place, values.double(), bins).tolist() for name, values in sums.items()}


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
