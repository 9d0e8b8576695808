"""The losses of rows whose columns are shared out among devices: no kernels of their own.

Each device has the logits of some of the classes, the :class:`.launch.Shard` of its :class:`.launch.RowLoss`.
:func:`shard_forward` gives a few numbers for each row. Gathered from all devices and stacked, :func:`merge_shards`
turns them into the losses and the row_stats of whole rows, from which :func:`shard_backward` computes the gradient of
each device's logits. The caller sums the gradients of f's coefficients over the devices, and moves the tensors between
them: ``torch.distributed.all_gather`` of 3 or 4 numbers for each row is enough.

    largest = max_s largest_s,   total = sum_s total_s exp(largest_s - largest)
"""

from __future__ import annotations

import torch
from torch import Tensor

from monosoftmax.groups import LossOptions, RowResults, Upstream

from .launch import RowLoss, ShardResults, Sums, launch_cross_entropy


def shard_forward(rows: Tensor, loss: RowLoss) -> ShardResults:
    """What the logits ``rows`` of the classes of ``loss.shard`` contribute. Without label smoothing weighted_y is 0."""
    stats = rows.new_empty((2, rows.shape[0]), dtype=torch.float32)
    target_y = torch.empty_like(stats[0])
    results = ShardResults(stats, target_y, torch.empty_like(target_y) if loss.smooths else torch.zeros_like(target_y))
    launch_cross_entropy(rows, loss, None, results, Sums(loss.call, rows, False))
    return results


def merge_shards(
    shards: ShardResults, target: Tensor, options: LossOptions, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [N], lse [N] and row_stats [2, N] of whole rows, from :class:`.launch.ShardResults` that were stacked.

    lse is 0 in ignored rows unless ``options.return_lse``.
    """
    row_stats, target_y, weighted_y = shards
    largest = row_stats[:, 0].amax(0)
    total = (row_stats[:, 1] * (row_stats[:, 0] - largest).exp()).sum(0)
    log_sum = torch.where(total == 0, torch.nan, total.log())
    lse = torch.where(total == 0, -torch.inf, largest + log_sum)
    valid, ignored = (target >= 0) & (target < classes), target == options.ignore_index
    at = torch.where(valid, target, 0)
    mass = 1.0 - options.label_smoothing if options.weight is None else (
        (1.0 - options.label_smoothing) * options.weight[at]
    )  # fmt: skip
    loss = mass * (log_sum - (target_y.amax(0) - largest))
    if options.label_smoothing > 0:
        weights = classes if options.weight is None else options.weight.sum(dtype=torch.float64).float()
        loss = loss + options.label_smoothing / classes * (weights * (log_sum + largest) - weighted_y.sum(0))
    if options.z_loss > 0:
        loss = loss + options.z_loss * lse.square()
    loss = torch.where(ignored, 0.0, torch.where(valid, loss, torch.nan))
    return loss, lse if options.return_lse else torch.where(ignored, 0.0, lse), torch.stack((largest, total))


def shard_backward(
    rows: Tensor,
    loss: RowLoss,
    row_stats: Tensor,
    upstream: Upstream,
    need_coefficients: bool,
    grad_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the shard's logits, in ``grad_rows`` where it is given, and its part of the coefficients'.

    ``row_stats`` are those of whole rows.
    """
    grad_rows = torch.empty_like(rows) if grad_rows is None else grad_rows
    sums, empty = Sums(loss.call, rows, need_coefficients), rows.new_empty(0)
    launch_cross_entropy(rows, loss, upstream, RowResults(empty, empty, row_stats, grad_rows, empty), sums)
    return grad_rows, sums.total()
