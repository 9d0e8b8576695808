"""The recompute head, backward: gradients of input, linear_weight, linear_bias and of f's coefficients.

    dz = dL/dy f'(z)   (dL/dy: :mod:`.cross_entropy`),   dinput = dz linear_weight,   dlinear_weight = dz^T input

A program has a tile of logits [BN, BV]. It forms the logits again and, part by part, dz from them and row_stats. Then,
for d in blocks of BD, it forms the two products of dz, and adds them to float32 gradients by atomics. So the order of
additions, and the last bits of every gradient, change from run to run. The chunked head
(:mod:`monosoftmax.chunked_head`) is deterministic.

Traffic: a tile reads (BN + BV) d numbers twice, mostly from the L2 cache, and adds as many float32 in the L2 cache. For
d = 4096 and tiles of 128 x 128, this is 4 MiB of atomics for 16384 logits. The chunked head needs no atomics, and is
the better one where its chunk of logits fits into memory and few tiles can be left out. Memory: the gradients, a
float32 copy of the gradient of input, and up to 16 MiB for the sums of the coefficients. Nothing grows with N V.

Tiles left out: if all |dz_ij| of a tile are <= filter_eps |g_i|, where g_i is the upstream gradient of row i's loss,
the tile costs no products and no atomics. The error is then at most filter_eps sum_j |g_i| |linear_weight_jk| in the
gradient of input_ik, and filter_eps sum_i |g_i| |input_ik| in that of linear_weight_jk. With filter_eps = 0 there is no
error: only tiles of zeros are left out. The gradients of linear_bias and of the coefficients have no error in any case.

Numerics: as :mod:`.cross_entropy`. For the products dz is rounded to the operands' type. float16 may round it to 0, so
that the caller must scale the upstream gradients (:func:`monosoftmax.float16.float16_shift`). A row without a
distribution makes its own gradient and all of linear_weight's gradient NaN, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from monosoftmax.groups import Head, HeadGradients, Upstream

from .arithmetic import exp
from .head_tiles import (
    HeadTile,
    backward_tile,
    column_parts,
    described,
    has_descriptors,
    join_columns,
    load_targets,
    load_tile,
    logits_tile,
    place_of,
)
from .launch import RowLoss, as_read, on_device, warp_size
from .linear_cross_entropy import unit_columns
from .rows import LOWEST, log_of_sum
from .transforms.composed import load_parameters, number_of

#: The most slots (tables of sums for the coefficients), and the most numbers in all slots together.
_SLOTS, _NUMBERS = 1024, 2**22


@triton.jit(do_not_specialize=["rows", "classes", "grad_loss_stride", "ignore_index"])
def linear_cross_entropy_backward_kernel(
    input, linear_weight, linear_bias, target, weight, weight_sum, coefficients, temperature, grad_loss, grad_lse,
    row_stats, grad_input, grad_weight, grad_bias, totals,
    rows, classes, features, input_stride, weight_stride, grad_loss_stride,
    c0, c1, c2, scale, cap, ignore_index, target_share, smooth_share, z_loss, filter_eps,
    functions: tl.constexpr, size: tl.constexpr, groups: tl.constexpr, table_rows: tl.constexpr,
    need_input: tl.constexpr, need_weight: tl.constexpr, need_bias: tl.constexpr, need_coefficients: tl.constexpr,
    has_bias: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr, of_lse: tl.constexpr,
    has_z_loss: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds to grad_input [rows, features], grad_weight [classes, features] and grad_bias [classes], all float32.

    Adds to totals [SLOTS, coefficients], too. Each program has one of the slots, since atomics to one address wait for
    each other. Contributions to a vector are summed over the tile first, contributions to a table logit by logit.
    """
    WIDTH: tl.constexpr = BV // PARTS
    dtype: tl.constexpr = input.dtype if DESCRIPTORS else input.dtype.element_ty
    program = tl.program_id(0)
    row_block, tile = place_of(program, tl.cdiv(rows, BN), tl.cdiv(classes, BV), GROUP)
    row, begin = row_block * BN, tile * BV
    r = row.to(tl.int64) + tl.arange(0, BN)
    parameters = load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions, size)
    at, ignored = load_targets(target, r, rows, classes, ignore_index)
    g = tl.load(grad_loss + r * grad_loss_stride, mask=~ignored, other=0.0)
    extra = tl.load(grad_lse + r, mask=r < rows, other=0.0) if of_lse else tl.zeros((BN,), tl.float32)
    present = ~ignored | (extra != 0)
    largest = tl.load(row_stats + r, mask=present, other=0.0)
    total = tl.load(row_stats + rows + r, mask=present, other=1.0)
    if has_z_loss:
        extra += 2.0 * g * z_loss * (largest + log_of_sum(total))
    of_target = g * target_share
    if weighted:
        of_target *= tl.load(weight + tl.maximum(at, 0))
    of_weight = g * smooth_share
    of_p = of_target
    if smooths:
        of_p += of_weight * (tl.load(weight_sum) if weighted else classes * 1.0)
    # A row of -inf only has no p: its gradient is NaN, as its loss is.
    inverse = tl.where((total == 0) | ~((at >= 0) | ignored), float("nan"), 1.0 / total)
    of_p *= inverse
    extra *= inverse
    negligible = filter_eps * tl.abs(g)
    # A block of rows that have no gradient costs no product.
    length = tl.where(tl.max(present.to(tl.int32), 0) == 1, features, 0)
    logits = logits_tile(
        input, linear_weight, row, begin, rows, classes, features, length, input_stride, weight_stride,
        DESCRIPTORS, BN, BV, BD,
    )  # fmt: skip
    parts = column_parts(logits, PARTS)
    gradients = ()
    beyond = tl.zeros((LANES,), tl.int32)
    sums = ()
    if need_coefficients & (table_rows == 0):
        for _ in tl.static_range(number_of(size)):
            sums = sums + (tl.zeros((LANES,), tl.float32),)
    table = totals + (program % SLOTS) * (number_of(size) * (table_rows if table_rows > 0 else 1))
    for part in tl.static_range(PARTS):
        column = begin + part * WIDTH + tl.arange(0, WIDTH)
        inside = column < classes
        z = parts[part]
        if has_bias:
            z += tl.load(linear_bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        z = tl.where(present[:, None], tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL), 0.0)
        at_z = functions[2](z, parameters, size)
        e = exp(at_z[0] - largest[:, None])
        # In float32, and in this order, as the two parts cancel where p is next to 1.
        dy = e * of_p[:, None] - tl.where(column[None, :] == at[:, None], of_target[:, None], 0.0)
        if smooths:
            q = of_weight[:, None]
            if weighted:
                # Of the last class beyond it: a mask took registers that there are not.
                q *= tl.load(weight + tl.minimum(column, classes - 1))[None, :]
            dy -= q
        if of_lse | has_z_loss:
            dy += e * extra[:, None]
        dy = tl.where(inside[None, :] & present[:, None], dy, 0.0)
        dz = dy * at_z[1]
        if need_bias:
            tl.atomic_add(grad_bias + column, tl.sum(dz, 0), mask=inside, sem="relaxed")
        rounded = dz.to(dtype)
        gradients = gradients + (rounded,)
        # Counted from the rounded gradient, so that it is needed here. If only the products needed it, LLVM would move
        # the rounding of all parts behind the branch of the products, where they take more registers than there are.
        beyond += of_lanes(tl.where(tl.abs(rounded.to(tl.float32)) <= negligible[:, None], 0, 1), LANES)
        if need_coefficients:
            if table_rows > 0:
                terms = functions[3](0, at_z, z, dy, parameters, size)
                for i in tl.static_range(table_rows):
                    tl.atomic_add(table + i * number_of(size) + at_z[2], terms[i], mask=dy != 0, sem="relaxed")
            else:
                updated = ()
                for group in tl.static_range(groups):
                    terms = functions[3](group, at_z, z, dy, parameters, size)
                    for i in tl.static_range(len(terms)):
                        updated = updated + (sums[len(updated)] + of_lanes(terms[i], LANES),)
                sums = updated
    for i in tl.static_range(len(sums)):
        tl.atomic_add(table + i, tl.sum(sums[i], 0), sem="relaxed")
    if tl.max(beyond, 0) > 0:
        dz_tile = join_columns(gradients)
        if need_input:
            into = grad_input + r[:, None] * features
            for d in range(0, features, BD):
                k = d + tl.arange(0, BD)
                w = load_tile(linear_weight, begin, d, classes, features, weight_stride, DESCRIPTORS, BV, BD)
                product = tl.dot(dz_tile, w, input_precision="ieee")
                tl.atomic_add(
                    into + k[None, :], product, mask=present[:, None] & (k < features)[None, :], sem="relaxed"
                )
        if need_weight:
            transposed = tl.trans(dz_tile)
            c = begin + tl.arange(0, BV)
            into = grad_weight + c.to(tl.int64)[:, None] * features
            for d in range(0, features, BD):
                k = d + tl.arange(0, BD)
                x = load_tile(input, row, d, rows, features, input_stride, DESCRIPTORS, BN, BD)
                product = tl.dot(transposed, x, input_precision="ieee")
                mask = (c < classes)[:, None] & (k < features)[None, :]
                tl.atomic_add(into + k[None, :], product, mask=mask, sem="relaxed")


@triton.jit
def of_lanes(tile, LANES: tl.constexpr):
    """Partial sums of a tile, [LANES]. Each thread adds up its own elements, in any order."""
    parts = tl.reshape(tile, (LANES, tile.shape[0] * tile.shape[1] // LANES), can_reorder=True)
    return tl.sum(parts, 1)


def recompute_backward(
    head: Head,
    loss: RowLoss,
    upstream: Upstream,
    row_stats: Tensor,
    output_mask: Sequence[bool],
    *,
    filter_eps: float = 0.0,
    tile: HeadTile | None = None,
    descriptors: bool | None = None,
) -> HeadGradients:
    """The gradients that ``output_mask`` asks for, in the order of :class:`monosoftmax.groups.HeadGradients`.

    The gradient of input has the type of input. The gradients of linear_weight and linear_bias are float32.
    ``filter_eps`` leaves out tiles: see the top of this file.
    """
    input, linear_weight = unit_columns(head.input), unit_columns(head.linear_weight)
    assert input.dtype == linear_weight.dtype and input.shape[1] == linear_weight.shape[1]
    (rows, features), classes, bias = input.shape, linear_weight.shape[0], head.linear_bias
    need_input, need_weight, need_bias, need_coefficients = output_mask
    call = loss.call
    sums_coefficients = need_coefficients and call.size > 0
    tile = backward_tile(call, input) if tile is None else tile
    programs = triton.cdiv(rows, tile.BN) * triton.cdiv(classes, tile.BV)
    numbers = call.size * max(call.functions.table_rows, 1)
    slots = max(1, min(_SLOTS, programs, _NUMBERS // max(1, numbers)))

    def zeros(needed: bool, *shape: int) -> Tensor:
        return input.new_zeros(shape if needed else 0, dtype=torch.float32)

    grad_input, grad_weight = zeros(need_input, rows, features), zeros(need_weight, classes, features)
    grad_bias, totals = zeros(need_bias, classes), zeros(need_coefficients, slots, numbers)
    if programs > 0 and (need_input or need_weight or need_bias or sums_coefficients):
        row_stats, upstream = row_stats.contiguous(), as_read(upstream, row_stats)
        descriptors = has_descriptors(input.device, input, linear_weight) if descriptors is None else descriptors
        with on_device(input):
            linear_cross_entropy_backward_kernel[(programs,)](
                input=described(input, tile.BN, tile.BD, descriptors),
                linear_weight=described(linear_weight, tile.BV, tile.BD, descriptors),
                linear_bias=row_stats if bias is None else bias.contiguous(), has_bias=bias is not None,
                row_stats=row_stats, grad_input=grad_input, grad_weight=grad_weight, grad_bias=grad_bias, totals=totals,
                rows=rows, classes=classes, features=features, input_stride=input.stride(0),
                weight_stride=linear_weight.stride(0), filter_eps=filter_eps, need_input=need_input,
                need_weight=need_weight, need_bias=need_bias, need_coefficients=sums_coefficients,
                DESCRIPTORS=descriptors, SLOTS=slots, LANES=tile.warps * warp_size(input.device),
                **loss.arguments(torch.float32, row_stats),
                **loss.gradient_arguments(classes, upstream, row_stats), **tile.arguments(),
            )  # fmt: skip
    grad_coefficients = call.gradient(totals) if need_coefficients else call.coefficients.new_empty(0)
    return HeadGradients(grad_input.to(input.dtype), grad_weight, grad_bias, grad_coefficients)
