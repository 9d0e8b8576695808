"""The recompute head: the losses of rows of an LM head whose logits are in no memory, only in registers.

    z = input linear_weight^T + linear_bias,   y = f(z),   and the loss of y as in :mod:`.cross_entropy`

A program has a block of BN rows and a split of the classes, which it goes through in tiles of BV. For each of its rows
and every WIDTH-th column, a thread keeps the largest y and sum exp(y - largest) so far. This costs one exponential for
each logit, and threads exchange nothing before the end of the split. Then PyTorch merges the splits:

    largest = max_s largest_s,   total = sum_s total_s exp(largest_s - largest)

Memory: 3 or 4 float32 for each row and split. Traffic: every tile reads (BN + BV) d numbers. GROUP row blocks take
turns on the same classes, so that most reads hit the L2 cache: memory is read once for input, and once for
linear_weight for every GROUP row blocks. Arithmetic: products in the operands' type (float32 is not cut to TF32),
summed in float32. Nothing is rounded before the loss, which is thus closer to the truth than a loss of logits in
bfloat16. The result is the same in every run.

Hazards: a column beyond V is masked after f, since f(-inf) may be finite. A target outside [0, V) that is not
ignore_index makes its row NaN. Ignored rows may hold anything, and a block of ignored rows costs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from monosoftmax.groups import Head

from .arithmetic import decay, exp
from .head_tiles import (
    HeadTile,
    column_parts,
    described,
    forward_tile,
    has_descriptors,
    load_targets,
    logits_tile,
    place_of,
)
from .launch import RowLoss, multiprocessors, on_device
from .rows import LOWEST_FLOAT
from .transforms.composed import load_parameters

#: The least number of programs for each multiprocessor, if there are classes enough.
_PROGRAMS = 4


@triton.jit(do_not_specialize=["rows", "classes", "splits", "ignore_index"])
def linear_cross_entropy_kernel(
    input, linear_weight, linear_bias, target, weight, coefficients, temperature, row_stats, target_y, weighted_y,
    rows, classes, features, input_stride, weight_stride, splits,
    c0, c1, c2, scale, cap, ignore_index,
    functions: tl.constexpr, size: tl.constexpr, has_bias: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr,
    every_row: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Writes row_stats [splits, 2, rows], target_y and, where labels are smoothed, weighted_y [splits, rows].

    target_y is -inf where another split has the target. ``every_row``: compute the row_stats of ignored rows, too.
    """
    row_blocks = tl.cdiv(rows, BN)
    row_block, split = place_of(tl.program_id(0), row_blocks, splits, GROUP)
    row = row_block * BN
    r = row.to(tl.int64) + tl.arange(0, BN)
    parameters = load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions, size)
    at, ignored = load_targets(target, r, rows, classes, ignore_index)
    tiles = tl.cdiv(classes, BV)
    first, last = split * tiles // splits, (split + 1) * tiles // splits
    if not every_row:
        last = tl.where(tl.min(ignored.to(tl.int32), 0) == 1, first, last)
    WIDTH: tl.constexpr = BV // PARTS
    largest = tl.full((BN, WIDTH), LOWEST_FLOAT, tl.float32)
    total = tl.zeros((BN, WIDTH), tl.float32)
    of_target = tl.zeros((BN, WIDTH), tl.float32)
    gaps = tl.zeros((BN, WIDTH), tl.float32)
    for tile in range(first, last):
        begin = tile * BV
        logits = logits_tile(
            input, linear_weight, row, begin, rows, classes, features, features, input_stride, weight_stride,
            DESCRIPTORS, BN, BV, BD,
        )  # fmt: skip
        parts = column_parts(logits, PARTS)
        for part in tl.static_range(PARTS):
            column = begin + part * WIDTH + tl.arange(0, WIDTH)
            inside = column < classes
            z = parts[part]
            if has_bias:
                z += tl.load(linear_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            y = functions[1](z, parameters, size)
            # After f: f(-inf) may be finite.
            y = tl.where(inside[None, :], y, float("-inf"))
            distance = y - largest
            e = decay(distance)
            total = tl.where(distance > 0, total * e + 1.0, total + e)
            largest = tl.maximum(largest, y)
            of_target = tl.where(column[None, :] == at[:, None], y, of_target)
            if smooths:
                w = 1.0
                if weighted:
                    w = tl.load(weight + column, mask=inside, other=0.0)[None, :]
                gaps += tl.where(inside[None, :], w * y, 0.0)
    row_largest = tl.max(largest, 1)
    # ``+ 0.0``: as in rows.py. The lanes that share a row write its total to one address, and must agree on it.
    row_total = tl.sum(total * exp(largest - row_largest[:, None]) + 0.0, 1)
    stored = r < rows
    has_target = (at >= first * BV) & (at < last * BV)
    row_stats += split * (2 * rows.to(tl.int64)) + r
    tl.store(row_stats, row_largest, mask=stored)
    tl.store(row_stats + rows, row_total, mask=stored)
    of_split = split * rows.to(tl.int64) + r
    tl.store(target_y + of_split, tl.where(has_target, tl.sum(of_target, 1), float("-inf")), mask=stored)
    if smooths:
        tl.store(weighted_y + of_split, tl.sum(gaps, 1), mask=stored)


def recompute_forward(
    head: Head,
    loss: RowLoss,
    *,
    tile: HeadTile | None = None,
    splits: int | None = None,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and row_stats of the rows of a head.

    ``linear_weight`` has the type of ``input``; their rows may lie anywhere. ``tile``, ``splits`` and ``descriptors``
    follow from the device where they are not given.
    """
    input, linear_weight = unit_columns(head.input), unit_columns(head.linear_weight)
    assert input.dtype == linear_weight.dtype and input.shape[1] == linear_weight.shape[1]
    (rows, features), classes, bias = input.shape, linear_weight.shape[0], head.linear_bias
    tile = forward_tile(loss, input) if tile is None else tile
    descriptors = has_descriptors(input.device, input, linear_weight) if descriptors is None else descriptors
    row_blocks, tiles = triton.cdiv(rows, tile.BN), triton.cdiv(classes, tile.BV)
    splits = splits_of(row_blocks, tiles, input.device) if splits is None else min(splits, tiles)
    row_stats = input.new_empty((splits, 2, rows), dtype=torch.float32)
    target_y, weighted_y = (row_stats.new_empty((splits, rows)) for _ in range(2))
    if rows > 0:
        with on_device(input):
            linear_cross_entropy_kernel[(row_blocks * splits,)](
                input=described(input, tile.BN, tile.BD, descriptors),
                linear_weight=described(linear_weight, tile.BV, tile.BD, descriptors),
                linear_bias=row_stats if bias is None else bias.contiguous(), has_bias=bias is not None,
                row_stats=row_stats, target_y=target_y, weighted_y=weighted_y, rows=rows, classes=classes,
                features=features, input_stride=input.stride(0), weight_stride=linear_weight.stride(0), splits=splits,
                every_row=loss.options.return_lse, DESCRIPTORS=descriptors,
                **loss.arguments(torch.float32, row_stats), **tile.arguments(),
            )  # fmt: skip
    return _merge_splits(row_stats, target_y, weighted_y, loss, classes)


def _merge_splits(
    row_stats: Tensor, target_y: Tensor, weighted_y: Tensor, loss: RowLoss, classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and row_stats [2, N] from what the kernel writes. lse is 0 in ignored rows unless ``return_lse``."""
    target, (weight, ignore_index, label_smoothing, z_loss, return_lse) = loss.target, loss.options
    largest = row_stats[:, 0].amax(0)
    total = (row_stats[:, 1] * (row_stats[:, 0] - largest).exp()).sum(0)
    log_sum = torch.where(total == 0, torch.nan, total.log())
    lse = torch.where(total == 0, -torch.inf, largest + log_sum)
    valid, ignored = (target >= 0) & (target < classes), target == ignore_index
    losses = (1.0 - label_smoothing) * (log_sum - (target_y.amax(0) - largest))
    if weight is not None:
        losses = losses * weight[torch.where(valid, target, 0)]
    if loss.smooths:
        weights = classes if weight is None else weight.sum(dtype=torch.float64).float()
        losses = losses + label_smoothing / classes * (weights * (log_sum + largest) - weighted_y.sum(0))
    if z_loss > 0:
        losses = losses + z_loss * lse.square()
    losses = torch.where(ignored, 0.0, torch.where(valid, losses, torch.nan))
    return losses, lse if return_lse else torch.where(ignored, 0.0, lse), torch.stack((largest, total))


def splits_of(row_blocks: int, tiles: int, device: torch.device) -> int:
    """The number of splits of the vocabulary, which gives each multiprocessor a few programs."""
    return int(min(tiles, triton.cdiv(_PROGRAMS * multiprocessors(device), max(1, row_blocks))))


def unit_columns(matrix: Tensor) -> Tensor:
    """The matrix with its columns next to each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
