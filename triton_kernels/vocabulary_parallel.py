"""The losses of rows whose columns are shared out among devices: no kernels of their own.

Each device has the logits of some of the classes, a :class:`.launch.Shard`. :func:`shard_forward` gives a few numbers a
row; gathered from all devices and stacked, :func:`merge_shards` makes of them the losses, and the row_stats of whole
rows, with which :func:`shard_backward` gives each device the gradient of its logits. Gradients of f's coefficients are
to be summed over the devices. How tensors travel is the caller's: ``torch.distributed.all_gather`` of 3 or 4 numbers a
row is enough.

    largest = max_s largest_s,   total = sum_s total_s exp(largest_s - largest)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Call, LossOptions, RowResults, Shard, Sums, Upstream, launch_cross_entropy, smooths


def shard_forward(
    call: Call, input: Tensor, target: Tensor, options: LossOptions, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """row_stats [2, N] of the shard, the target's y (-inf where another shard has it), and sum_j w_j y_j [N].

    ``target`` counts the classes of all shards, and ``options.weight`` has the weights of all. The last is 0 without
    label smoothing.
    """
    results = RowResults.empty(input, partial=True)
    launch_cross_entropy(call, input, target, options, results, losses=True, return_lse=True, shard=shard)
    weighted_y = results.weighted_y if smooths(options) else torch.zeros_like(results.weighted_y)
    return results.row_stats, results.target_y, weighted_y


def merge_shards(
    row_stats: Tensor,
    target_y: Tensor,
    weighted_y: Tensor,
    target: Tensor,
    options: LossOptions,
    classes: int,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [N], lse [N] and row_stats [2, N] of whole rows, from [shards, ...] of what :func:`shard_forward` gave.

    lse is 0 in ignored rows unless ``return_lse``.
    """
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
    if smooths(options):
        weights = classes if options.weight is None else options.weight.sum(dtype=torch.float64).float()
        loss = loss + options.label_smoothing / classes * (weights * (log_sum + largest) - weighted_y.sum(0))
    if options.z_loss > 0:
        loss = loss + options.z_loss * lse.square()
    loss = torch.where(ignored, 0.0, torch.where(valid, loss, torch.nan))
    return loss, lse if return_lse else torch.where(ignored, 0.0, lse), torch.stack((largest, total))


def shard_backward(
    call: Call,
    input: Tensor,
    target: Tensor,
    options: LossOptions,
    shard: Shard,
    row_stats: Tensor,
    upstream: Upstream,
    need_coefficients: bool,
    grad_input: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the shard's logits, in ``grad_input`` where it is given, and its part of the coefficients'.

    ``row_stats`` are those of whole rows.
    """
    grad_input = torch.empty_like(input) if grad_input is None else grad_input
    sums = Sums(call, input, need_coefficients)
    results = RowResults.empty(input[:0])._replace(row_stats=row_stats)
    launch_cross_entropy(call, input, target, options, results, upstream, grad_input, sums, losses=False, shard=shard)
    return grad_input, sums.total()
