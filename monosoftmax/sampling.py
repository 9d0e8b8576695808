"""Samples from softmax(f(z) / temperature): the class with the largest y plus noise, after Gumbel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .head_products import chunk_rows
from .transforms import MonotonicTransform


def perturbed_argmax(
    logits: Tensor, transform: MonotonicTransform, temperature: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    r"""The largest :math:`y_j - \log E_j` of each row, and its class; the E_j are independent and exponential.

    The class has the distribution softmax(y), and so it has where the largest of several parts of a row is taken. The
    noise is in float64: in float32 E has 24 bits, too few for classes with p of 1e-6. It exists for a chunk of rows.
    """
    largest = logits.new_empty(logits.shape[0], dtype=torch.float64)
    place = torch.empty_like(largest, dtype=torch.int64)
    size = chunk_rows(logits.shape[1], torch.float64, logits.device.type)
    for start in range(0, logits.shape[0], size):
        rows = slice(start, start + size)
        y = reference.transformed(logits[rows].detach(), transform, temperature).double()
        noise = torch.empty_like(y).exponential_(generator=generator)
        largest[rows], place[rows] = (y - noise.log_()).max(1)
    return largest, place
