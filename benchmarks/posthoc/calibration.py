"""What is measured on held-out tokens: loss by document, calibration, and the spectrum of the log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from .settings import TOLERANCES, EvaluationSettings
from .states import Split


@torch.no_grad()
def evaluate(
    split: Split, head: Tensor, transforms: Mapping[str, MonotonicTransform], settings: EvaluationSettings
) -> dict[str, dict[str, Any]]:
    """The losses and the calibration of p = softmax(f(head h)) for several f, with one product for all of them.

    Args:
        split: hidden states (N, d), targets and documents.
        head: (V, d).
        transforms: f by name. All are increasing, so that the likeliest token is the same for all of them.
        settings: number of bins, and of tokens whose logits there are at a time.

    Returns:
        By name: ``document_nll``, the sum of -log p(target) of each document; ``bins`` of calibration, as
        :func:`calibration_bins` makes them.
    """
    documents = len(split.documents)
    sums = {name: torch.zeros(documents, dtype=torch.float64) for name in transforms}
    confidences: dict[str, list[Tensor]] = {name: [] for name in transforms}
    hits: list[Tensor] = []
    for first in range(0, len(split.target), settings.chunk_tokens):
        part = slice(first, first + settings.chunk_tokens)
        logits, target = split.hidden[part] @ head.T, split.target[part]
        largest, likeliest = logits.max(1)
        hits.append(likeliest == target)
        for name, transform in transforms.items():
            loss, lse = ms.cross_entropy(logits, target, transform, reduction="none", return_lse=True)
            sums[name].index_add_(0, split.document[part], loss.double())
            confidences[name].append((transform(largest) - lse).exp().clamp(max=1))
    hit = torch.cat(hits)
    return {
        name: {
            "document_nll": sums[name].tolist(),
            "bins": calibration_bins(torch.cat(confidences[name]), hit, settings.bins),
        }
        for name in transforms
    }


def calibration_bins(confidence: Tensor, hit: Tensor, bins: int) -> dict[str, list[float]]:
    """Number of tokens, sum of confidences and number of hits in bins (0, 1/B], (1/B, 2/B], ... of the confidence.

    Args:
        confidence: probability of the likeliest token, (N,), in [0, 1].
        hit: whether that token was the target, (N,).
        bins: B.
    """
    place = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    zeros = torch.zeros(bins, dtype=torch.float64)
    return {
        "tokens": zeros.index_add(0, place, torch.ones_like(confidence, dtype=torch.float64)).tolist(),
        "confidence": zeros.index_add(0, place, confidence.double()).tolist(),
        "hits": zeros.index_add(0, place, hit.double()).tolist(),
    }


def calibration_error(bins: Mapping[str, Sequence[float]]) -> float:
    r"""Expected calibration error of the likeliest token.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \left| \mathrm{accuracy}_b - \mathrm{confidence}_b \right|

    with the shares of hits and the mean confidences of the n_b tokens in each bin.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, equation 5.
    """
    gaps = (abs(hits - confidence) for hits, confidence in zip(bins["hits"], bins["confidence"], strict=True))
    return math.fsum(gaps) / math.fsum(bins["tokens"])


def nll(document_nll: Sequence[float], counts: Sequence[int]) -> float:
    """Mean loss of a token."""
    return math.fsum(document_nll) / sum(counts)


@torch.no_grad()
def spectra(
    split: Split, head: Tensor, transforms: Mapping[str, MonotonicTransform], contexts: int
) -> dict[str, dict[str, Any]]:
    """Singular values and effective ranks of the log-probabilities (contexts, V) of each transform, in float64.

    The singular values are the roots of the eigenvalues of log P log P^T, which float64 gives to about 1e-8 of the
    largest: far below what the smallest tolerance asks for, and less work than a singular value decomposition.

    Returns:
        By name: ``contexts``, ``singular_values`` (5 digits), ``effective_ranks`` by tolerance.
    """
    hidden = split.hidden[evenly(len(split.target), contexts)]
    logits = hidden.double() @ head.double().T
    found = {}
    for name, transform in transforms.items():
        log_p = ms.log_softmax(logits, transform)
        values = torch.linalg.eigvalsh(log_p @ log_p.T).clamp(min=0).sqrt().flip(0)
        found[name] = {
            "contexts": len(hidden),
            "singular_values": [float(f"{value:.4e}") for value in values.tolist()],
            "effective_ranks": {f"{size:g}": ms.analysis.effective_rank(values, size) for size in TOLERANCES},
        }
    return found


@torch.no_grad()
def histogram(split: Split, head: Tensor, settings: EvaluationSettings) -> dict[str, Any]:
    """How the logits of the trained model are distributed: all of them, the largest of each context, the targets'."""
    rows = evenly(len(split.target), settings.histogram_contexts)
    logits = split.hidden[rows] @ head.T
    of_target = logits.gather(1, split.target[rows, None]).flatten()
    low, high = settings.histogram_range
    kinds = {"all": logits.flatten(), "largest": logits.amax(1), "target": of_target}
    return {
        "contexts": len(rows),
        "range": [low, high],
        "counts": {name: torch.histc(z, settings.histogram_bins, low, high).tolist() for name, z in kinds.items()},
        "extremes": {name: [z.min().item(), z.max().item()] for name, z in kinds.items()},
        "mean": {name: z.double().mean().item() for name, z in kinds.items()},
        "standard_deviation": {name: z.double().std().item() for name, z in kinds.items()},
    }


def evenly(total: int, count: int) -> Tensor:
    """``count`` of the numbers below ``total`` (all, if it is less), at even distances."""
    count = min(total, count)
    return torch.arange(count) * total // count


def subset(split: Split, count: int) -> Split:
    """``count`` tokens of a split at even distances, from all of its documents."""
    rows = evenly(len(split.target), count)
    return Split(split.hidden[rows], split.target[rows], split.document[rows], split.documents)
