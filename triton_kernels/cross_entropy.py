"""Cross-entropy of f(logits), logits given: the loss of each row, and its gradient from what the loss kernel found.

    loss = sum_j q_j (lse - y_j) + z_loss lse^2,   q_j = (1 - eps) w_t [j = t] + eps / V w_j
    dL/dy_j = g (Q p_j - q_j) + (2 z_loss lse g + h) p_j,   Q = sum_j q_j

for upstream gradients g of the loss and h of lse, as :mod:`monosoftmax.reference` and ``csrc/row/loss.h`` have it.

One program a row. Memory traffic per logit: the loss reads it once; the gradient reads it once and writes once.
Arithmetic is float32, each result is rounded once. A target outside [0, V) that is not ignore_index is read nowhere and
makes its row NaN. Hazards: a lane beyond V must be masked after f, since f(-inf) may be finite; the gradient of the
target's column is formed in float32 before it is rounded, as its two parts cancel where p is next to 1.

No backend uses these yet: the gradients of the coefficients and the one-sweep kernel for training are not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import LOWEST, add_tile, log_of_sum
from .transforms import REGISTRY


@triton.jit
def cross_entropy_kernel(
    input, target, weight, weight_sum, coefficients, loss, lse, row_stats,
    rows, classes, stride, c0, c1, c2, ignore_index, target_share, smooth_share, z_loss,
    value: tl.constexpr, size: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr, return_lse: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """loss, lse [rows] and row_stats [2, rows]; loss is 0 in ignored rows, and lse too unless return_lse."""
    row = tl.program_id(0).to(tl.int64)
    input += row * stride
    t = tl.load(target + row)
    ignored = t == ignore_index
    inside_row = (t >= 0) & (t < classes)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    weighted_y = tl.zeros((), tl.float32)
    reference = tl.zeros((), tl.float32)
    for begin in range(0, classes, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < classes
        z = tl.load(input + column, mask=inside, other=0.0).to(tl.float32)
        y = value(z, coefficients, size, c0, c1, c2)
        largest, total = add_tile(largest, total, y, inside)
        if smooths:
            # Relative to the first tile's largest: the sum of V numbers of the size of y would lose the loss.
            if begin == 0:
                reference = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
            w = tl.load(weight + column, mask=inside, other=0.0) if weighted else 1.0
            weighted_y += tl.sum(tl.where(inside, w * (y - reference), 0.0), 0)
    log_sum = log_of_sum(total)
    row_lse = tl.where(total == 0, float("-inf"), largest + log_sum)

    at = tl.where(inside_row, t, 0)
    target_z = tl.load(input + at).to(tl.float32)
    target_y = value(target_z, coefficients, size, c0, c1, c2)
    mass = target_share * tl.load(weight + at) if weighted else target_share
    row_loss = mass * (log_sum - (target_y - largest))
    if smooths:
        row_loss += smooth_share * (tl.load(weight_sum) * (log_sum + (largest - reference)) - weighted_y)
    row_loss = tl.where(z_loss > 0, row_loss + z_loss * row_lse * row_lse, row_loss)
    row_loss = tl.where(inside_row, row_loss, float("nan"))
    tl.store(loss + row, tl.where(ignored, 0.0, row_loss))
    tl.store(lse + row, row_lse if return_lse else tl.where(ignored, 0.0, row_lse))
    tl.store(row_stats + row, largest)
    tl.store(row_stats + rows + row, total)


@triton.jit
def cross_entropy_backward_kernel(
    grad_loss, grad_lse, input, target, weight, weight_sum, coefficients, row_stats, grad_input,
    rows, classes, stride, grad_stride, c0, c1, c2, ignore_index, target_share, smooth_share, z_loss,
    point: tl.constexpr, size: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr, of_lse: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_input [rows, classes], which may be input. A row that is ignored and whose lse has no gradient is 0."""
    row = tl.program_id(0).to(tl.int64)
    input += row * stride
    grad_input += row * grad_stride
    t = tl.load(target + row)
    ignored = t == ignore_index
    inside_row = (t >= 0) & (t < classes)
    g = tl.where(ignored, 0.0, tl.load(grad_loss + row))
    h = tl.load(grad_lse + row) if of_lse else tl.zeros((), tl.float32)
    largest, total = tl.load(row_stats + row), tl.load(row_stats + rows + row)
    at = tl.where(inside_row, t, 0)
    of_target = g * (target_share * tl.load(weight + at) if weighted else target_share)
    of_weight = g * smooth_share
    of_p = of_target + of_weight * tl.load(weight_sum)
    extra = tl.where(z_loss > 0, h + 2 * g * z_loss * (largest + log_of_sum(total)), h)
    # A row of -inf only has no p: NaN, as its loss.
    inverse = tl.where(total == 0, float("nan"), 1.0 / total)
    inverse = tl.where(inside_row | ignored, inverse, float("nan"))
    absent = ignored & (h == 0)
    for begin in range(0, classes, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < classes
        z = tl.load(input + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(z < LOWEST, LOWEST, z)
        at_z = point(z, coefficients, size, c0, c1, c2)
        p = tl.exp(at_z[0] - largest) * inverse
        q = tl.where(column == t, of_target, 0.0)
        if smooths:
            q += of_weight * tl.load(weight + column, mask=inside, other=0.0) if weighted else of_weight
        gradient = ((of_p * p - q) + extra * p) * at_z[1]
        gradient = tl.where(absent, 0.0, gradient)
        tl.store(grad_input + column, gradient.to(grad_input.dtype.element_ty), mask=inside)


def block_of(classes: int) -> int:
    """Logits in a tile: a row, up to 2048, of which a thread of 8 warps has 8: 16 bytes, where they are bfloat16.

    With 16 logits a thread the spline spills registers on sm_80, sm_100 and sm_120 (Triton 3.7.1).
    """
    return min(2048, max(128, int(triton.next_power_of_2(classes))))


@dataclass(frozen=True)
class Loss:
    """A call: ``coefficients`` and ``constants`` of the transform ``transform``, and the options of the loss.

    ``coefficients`` and ``weight`` are float32 and contiguous. ``block`` columns are a tile; 0 chooses.
    """

    transform: str
    coefficients: Tensor
    constants: Sequence[float] = ()
    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    return_lse: bool = False
    block: int = 0

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """loss [N], lse [N] and row_stats [2, N] of the rows ``input`` [N, V], with columns next to each other."""
        rows = input.shape[0]
        loss, lse, row_stats = (input.new_empty(shape, dtype=torch.float32) for shape in (rows, rows, (2, rows)))
        numbers, options = self._arguments(input)
        if rows:
            cross_entropy_kernel[(rows,)](
                input, target, *self._weights(input), self.coefficients, loss, lse, row_stats,
                rows, input.shape[1], input.stride(0), *numbers,
                value=REGISTRY[self.transform].value, return_lse=self.return_lse, **options,
            )  # fmt: skip
        return loss, lse, row_stats

    def backward(
        self,
        grad_loss: Tensor,
        grad_lse: Tensor | None,
        input: Tensor,
        target: Tensor,
        row_stats: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of ``input``, in ``out``, which may be ``input`` itself, or in new memory."""
        rows = input.shape[0]
        grad_input = torch.empty_like(input) if out is None else out
        numbers, options = self._arguments(input)
        if rows:
            cross_entropy_backward_kernel[(rows,)](
                grad_loss, grad_loss if grad_lse is None else grad_lse, input, target, *self._weights(input),
                self.coefficients, row_stats, grad_input,
                rows, input.shape[1], input.stride(0), grad_input.stride(0), *numbers,
                point=REGISTRY[self.transform].point, of_lse=grad_lse is not None, **options,
            )  # fmt: skip
        return grad_input

    def _weights(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the classes, or what stands in their place and is not read; and their sum."""
        if self.weight is None:
            count = torch.full((1,), input.shape[1], dtype=torch.float32, device=input.device)
            return count, count
        return self.weight, self.weight.sum(dtype=torch.float64).float()

    def _arguments(self, input: Tensor) -> tuple[tuple[float, ...], dict[str, Any]]:
        """The numbers that both kernels end with, and what they are compiled for."""
        classes = input.shape[1]
        c0, c1, c2 = (float(each) for each in (*self.constants, 0.0, 0.0, 0.0)[:3])
        smooth_share = self.label_smoothing / max(classes, 1)
        return (c0, c1, c2, self.ignore_index, 1.0 - self.label_smoothing, smooth_share, float(self.z_loss)), {
            "size": self.coefficients.shape[-1],
            "weighted": self.weight is not None,
            "smooths": self.label_smoothing > 0,
            "BLOCK": self.block or block_of(classes),
            "num_warps": 8,
        }
