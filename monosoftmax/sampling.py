"""Samples from softmax(f(z) / temperature): the class with the largest y plus noise, after Gumbel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .transforms import MonotonicTransform


def perturbed_argmax(
    logits: Tensor, transform: MonotonicTransform, temperature: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    r"""The largest :math:`y_j - \log E_j` of each row, and its class; the E_j are independent and exponential.

    The class has the distribution softmax(y), and so it has where the largest of several parts of a row is taken. The
    noise is in float64: in float32 E has 24 bits, too few for classes with p of 1e-6.
    """
    y = reference.transformed(logits.detach(), transform, temperature).double()
    noise = torch.empty_like(y).exponential_(generator=generator)
    largest, place = (y - noise.log_()).max(1)
    return largest, place
