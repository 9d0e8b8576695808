"""The kernels over rows of logits: what each fused backend offers to the operators.

A table is a module: ``monosoftmax._C.cpu``, ``monosoftmax._C.cuda`` or ``monosoftmax.triton_kernels.operators``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .groups import LossOptions, RowResults, Transform, Upstream


class RowKernels(Protocol):
    """``rows`` [N, V] have any row stride, and columns next to each other. No function changes its arguments, or waits
    for a device, but for what it says.
    """

    def cross_entropy(
        self,
        rows: Tensor,
        target: Tensor,
        transform: Transform,
        options: LossOptions,
        upstream: Upstream | None,
        row_stats: Tensor | None,
        output_mask: tuple[bool, bool],
        grad_rows: Tensor | None,
    ) -> RowResults:
        """Losses of rows, and the gradients that ``output_mask`` asks for: of rows, and of the coefficients.

        Args:
            rows: [N, V].
            target: [N] int64, or class probabilities [N, V] of any floating type.
            transform: f.
            options: of the loss.
            upstream: the gradients of what is returned; needed where the mask asks for one.
            row_stats: of an earlier call with the same arguments, which computed the losses; None computes them.
            output_mask: which gradients are computed.
            grad_rows: where the gradient of rows is written; ``rows`` itself, or None for new memory.
        """

    def token_statistics(
        self, rows: Tensor, target: Tensor, transform: Transform, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """log p(target), entropy, argmax, lse, and rank of the target (how many logits are larger), each [N].

        In an ignored row log p is 0 and the rank is -1.
        """

    def log_softmax(self, rows: Tensor, transform: Transform, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """log p [N, V] of type ``dtype``, and row_stats [2, N]."""

    def log_softmax_backward(
        self,
        grad_output: Tensor,
        rows: Tensor,
        transform: Transform,
        row_stats: Tensor,
        output_mask: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """The gradients of rows and of the coefficients; empty where the mask does not ask for them."""

    def plif_coefficients(self, raw_slope: Tensor, bound: float, min_slope: float) -> Tensor:
        """The table [2, K] of :class:`monosoftmax.transforms.PLIF`, of the type of ``raw_slope`` [K]."""

    def plif_coefficients_backward(
        self, grad_coefficients: Tensor, raw_slope: Tensor, bound: float, min_slope: float
    ) -> Tensor:
        """The gradient of ``raw_slope`` [K]."""

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiply a contiguous ``tensor`` by the 0-dim ``factor``, unless that is 1. Of devices that do not tell."""
