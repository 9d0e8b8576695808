"""The row kernels that the losses of shared rows call, in plain PyTorch: for f without kernels, and as a reference.

They hold y [n, V] in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..groups import LossOptions, RowResults, TokenStatistics, Transform, Upstream
from ..transforms import MonotonicTransform
from ..transforms.base import arithmetic_dtype


class ReferenceRows:
    """As :class:`monosoftmax.row_kernels.RowKernels`, for a transform that need not be known to kernels."""

    def __init__(self, f: MonotonicTransform, temperature: Tensor | None) -> None:
        self._f, self._temperature = f, temperature

    def _y(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return reference.evaluated(z, self._f, coefficients, self._temperature)

    def cross_entropy(
        self,
        rows: Tensor,
        target: Tensor,
        transform: Transform,
        options: LossOptions,
        upstream: Upstream | None = None,
        row_stats: Tensor | None = None,
        output_mask: Sequence[bool] = (False, False),
        grad_rows: Tensor | None = None,
    ) -> RowResults:
        z, coefficients = rows.detach().to(arithmetic_dtype(rows.dtype)), transform.coefficients.detach()
        if upstream is not None:
            unread = self._unread(target, options, upstream).unsqueeze(1)
            z = torch.where(unread, 0.0, z)
        with torch.set_grad_enabled(any(output_mask)):
            z, coefficients = (each.requires_grad_(any(output_mask)) for each in (z.clone(), coefficients.clone()))
            y = self._y(z, coefficients)
        dense, nothing = target.is_floating_point(), y.new_empty(0)
        q = target.to(y.dtype) if dense else self._of_indices(y, target, options)
        loss, mass = nothing, row_stats[2] if dense and row_stats is not None else q.sum(1)
        if row_stats is None:
            largest, total = _largest_and_total(y.detach())
            row_stats = torch.stack([largest, total])
            gap = torch.where(q == 0, 0.0, q * (largest.unsqueeze(1) - y.detach())).sum(1)
            loss = mass * total.log() + gap
        if not any(output_mask):
            return RowResults(loss, nothing, row_stats, nothing, nothing)
        assert upstream is not None
        largest, total = row_stats[0].unsqueeze(1), row_stats[1].unsqueeze(1)
        distance = torch.where(torch.isneginf(y.detach()), -torch.inf, y.detach() - largest)
        p = distance.exp() / total
        dy = torch.zeros_like(p)
        if upstream.loss is not None:
            dy = dy + upstream.loss.unsqueeze(1) * (mass.unsqueeze(1) * p - q)
        if upstream.lse is not None:
            dy = dy + upstream.lse.unsqueeze(1) * p
        if upstream.entropy is not None:
            finite = torch.where(p == 0, 0.0, distance + row_stats[2].unsqueeze(1))
            dy = dy - upstream.entropy.unsqueeze(1) * p * finite
        dy = torch.where(unread, 0.0, dy)
        dz, d_coefficients = torch.autograd.grad(y, [z, coefficients], dy, allow_unused=True)
        if output_mask[0]:
            grad_rows = torch.empty_like(rows) if grad_rows is None else grad_rows
            grad_rows.copy_(dz)
        d_coefficients = torch.zeros_like(coefficients) if d_coefficients is None else d_coefficients
        return RowResults(loss, nothing, row_stats, nothing if grad_rows is None else grad_rows, d_coefficients)

    @staticmethod
    def _unread(target: Tensor, options: LossOptions, upstream: Upstream) -> Tensor:
        """The rows that may hold anything: ignored ones whose lse and entropy have no gradient."""
        if target.is_floating_point():
            return torch.zeros(len(target), dtype=torch.bool, device=target.device)
        unread = target == options.ignore_index
        for gradient in (upstream.lse, upstream.entropy):
            if gradient is not None:
                unread = unread & (gradient == 0)
        return unread

    @staticmethod
    def _of_indices(y: Tensor, target: Tensor, options: LossOptions) -> Tensor:
        """q [n, V] of class indices; 0 in ignored rows."""
        weight, ignore_index, label_smoothing, _, _ = options
        weight = y.new_ones(y.shape[1]) if weight is None else weight
        valid = target != ignore_index
        q = torch.zeros_like(y).scatter_(1, torch.where(valid, target, 0).unsqueeze(1), 1 - label_smoothing)
        q = (q + label_smoothing / y.shape[1]) * weight
        return torch.where(valid.unsqueeze(1), q, 0.0)

    def token_statistics(
        self, rows: Tensor, target: Tensor, transform: Transform, ignore_index: int
    ) -> TokenStatistics:
        y = self._y(rows.detach().to(arithmetic_dtype(rows.dtype)), transform.coefficients.detach())
        found = reference.token_statistics(rows.detach(), target, self._f, ignore_index, self._temperature)
        largest, total = _largest_and_total(y)
        distance = largest.unsqueeze(1) - y
        mass = (-distance).exp()
        moment = torch.where(mass == 0, 0.0, mass * distance).sum(1) / total
        return TokenStatistics(*found, torch.stack([largest, total, moment]))

    def log_softmax(
        self, rows: Tensor, transform: Transform, dtype: torch.dtype, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y = self._y(rows.detach().to(arithmetic_dtype(rows.dtype)), transform.coefficients.detach())
        largest, total = _largest_and_total(y)
        log_p = (y - largest.unsqueeze(1) - total.log().unsqueeze(1)).to(dtype)
        return log_p if out is None else out.copy_(log_p), torch.stack([largest, total])

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        tensor.mul_(factor)


def _largest_and_total(y: Tensor) -> tuple[Tensor, Tensor]:
    """The largest y of each row, and sum exp(y - largest), which is 0 for a row of -inf."""
    largest = y.amax(1)
    total = (y - largest.unsqueeze(1)).exp().sum(1)
    return largest, torch.where(torch.isneginf(largest), 0.0, total)
