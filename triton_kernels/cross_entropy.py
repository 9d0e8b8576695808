"""Cross-entropy of f(logits), logits given: the losses of rows, the gradients of their logits and of f's coefficients.

    loss = sum_j q_j (lse - y_j) + z_loss lse^2,   q_j = (1 - eps) w_t [j = t] + eps / V w_j
    dL/dy_j = g (Q p_j - q_j) + (2 z_loss lse g + h) p_j - e p_j ((y_j - largest) + M),   Q = sum_j q_j

for upstream gradients g of the loss, h of lse and e of the entropy, as :mod:`monosoftmax.reference` and
``csrc/row/loss.h`` have it. M = sum_j p_j (largest - y_j), the spread, comes from :mod:`.token_statistics`.

One kernel has three uses: it computes the losses; or the gradients, from the row_stats of an earlier call; or both. A
program takes every num_programs-th row, or one row if it keeps no sums. Memory traffic for each logit: the losses read
it once. A gradient reads it once and writes once. Both together read it once from memory and once more from a cache.
Arithmetic is float32, and each result is rounded once. A target outside [0, V) that is not ignore_index is not used as
an index, and makes its row NaN.

Hazards: a lane beyond V is masked after f, since f(-inf) may be finite. The gradient of the target's column is formed
in float32, as its two parts cancel where p is next to 1. Rows that are ignored may hold anything: they are not loaded,
and their gradient is 0. grad_input may be input. Then each thread reads a logit before it overwrites this logit. The
target's logit is read by all threads, before a barrier, and overwritten by one thread, after the barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp
from .coefficient_sums import add_contributions, begin_sums, end_sums
from .rows import LOWEST, log_of_sum, lse_of, scan_row
from .tiles import edge_begin, full_tiles, inside_row, load_full_tile, positions_from, row_shift, row_start
from .transforms.composed import load_parameters


@triton.jit(do_not_specialize=["rows", "classes", "stride", "grad_stride", "grad_loss_stride", "ignore_index"])
def cross_entropy_kernel(
    input, target, weight, weight_sum, coefficients, temperature, grad_loss, grad_lse, grad_entropy, factor,
    loss, lse, row_stats, grad_input, totals, lanes,
    rows, classes, stride, grad_stride, grad_loss_stride,
    c0, c1, c2, scale, cap, ignore_index, target_share, smooth_share, z_loss,
    functions: tl.constexpr, size: tl.constexpr, groups: tl.constexpr, table_rows: tl.constexpr,
    regime: tl.constexpr, count: tl.constexpr,
    losses: tl.constexpr, return_lse: tl.constexpr, gradient: tl.constexpr,
    weighted: tl.constexpr, smooths: tl.constexpr, of_lse: tl.constexpr, of_entropy: tl.constexpr,
    has_z_loss: tl.constexpr, has_factor: tl.constexpr,
    ALIGNMENT: tl.constexpr, OUT_ALIGNED: tl.constexpr, EDGES: tl.constexpr, WHOLE: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See :mod:`.launch` for the arguments.

    ``losses``: scan the rows, and write loss, lse and row_stats. ``gradient``: write grad_input. ``has_factor``:
    multiply grad_loss by factor; if factor is 1, do nothing, since grad_input has the result already. ``regime`` other
    than "none": sum the contributions to f's coefficients.
    """
    program = tl.program_id(0)
    parameters = load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions, size)
    sums, lanes = begin_sums(lanes, program, size, table_rows, regime, count, LANES)
    all_weights = tl.load(weight_sum) if weighted & smooths else classes * 1.0
    # Without sums to keep, a program has one row.
    end, step = program + 1, 1
    if regime != "none":
        end, step = rows, tl.num_programs(0)
    if has_factor:
        end = tl.where(tl.load(factor) == 1.0, program, end)
    for row_number in range(program, end, step):
        row = tl.full((), 0, tl.int64) + row_number
        shift = row_shift(input, row, stride, ALIGNMENT)
        length = classes + shift
        start = row_start(input, row, stride, shift, True)
        t = tl.load(target + row)
        ignored = t == ignore_index
        valid = (t >= 0) & (t < classes)
        at = tl.where(valid, t, 0).to(tl.int32)
        has_target = valid & ~ignored
        if losses:
            largest, total = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
            row_loss, row_lse = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
            if return_lse | ~ignored:
                of_target = functions[1](tl.load(start + (at + shift)).to(tl.float32), parameters, size)
                # Subtracted from every y: in a sum of V numbers of the size of y, rounding would hide the loss.
                reference = tl.where(tl.abs(of_target) < float("inf"), of_target, 0.0)
                largest, total, gaps = scan_row(
                    start, shift, length, parameters, weight, reference,
                    functions[1], size, weighted, smooths, EDGES, WHOLE, LANES, WIDTH,
                )  # fmt: skip
                row_lse = lse_of(largest, total)
                log_sum = log_of_sum(total)
                mass = target_share * tl.load(weight + at) if weighted else target_share
                row_loss = mass * (log_sum - (of_target - largest))
                if smooths:
                    all_gaps = all_weights * (log_sum + (largest - reference)) - gaps
                    row_loss += smooth_share * all_gaps
                if has_z_loss:
                    row_loss += z_loss * row_lse * row_lse
                row_loss = tl.where(valid, row_loss, float("nan"))
                row_loss = tl.where(ignored, 0.0, row_loss)
            if gradient & (LANES <= 64):
                # All threads must have read the target's logit before one overwrites it. With more than one warp, the
                # sums above end in a barrier already.
                tl.debug_barrier()
            tl.store(row_stats + row, largest)
            tl.store(row_stats + rows + row, total)
            tl.store(loss + row, row_loss)
            tl.store(lse + row, row_lse)
        else:
            largest, total = tl.load(row_stats + row), tl.load(row_stats + rows + row)
        if gradient | (regime != "none"):
            g = tl.where(ignored, 0.0, tl.load(grad_loss + row * grad_loss_stride))
            if has_factor:
                g *= tl.load(factor)
            extra = tl.load(grad_lse + row) if of_lse else 0.0
            present = ~ignored | (extra != 0)
            spread, of_spread = 0.0, 0.0
            if of_entropy:
                of_spread = tl.load(grad_entropy + row)
                present |= of_spread != 0
                spread = tl.load(row_stats + 2 * rows.to(tl.int64) + row)
            if has_z_loss:
                extra += 2.0 * g * z_loss * (largest + log_of_sum(total))
            mass = target_share * tl.load(weight + at) if weighted else target_share
            of_target = tl.where(ignored, 0.0, g * mass)
            of_weight = g * smooth_share
            of_p = of_target
            if smooths:
                of_p += of_weight * all_weights
            # A row of -inf only has no p: its gradient is NaN, as its loss is. A row that is not present has the
            # gradient 0 * p, for which p must be finite.
            inverse = tl.where((total == 0) | ~(valid | ignored), float("nan"), 1.0 / total)
            inverse = tl.where(present, inverse, 0.0)
            largest = tl.where(present, largest, 0.0)
            of_p *= inverse
            extra = tl.where(present, extra * inverse, 0.0)
            if of_entropy:
                spread, of_spread = tl.where(present, spread, 0.0), of_spread * inverse
            target_position = tl.where(has_target, at + shift, -1)
            full = full_tiles(length, EDGES, LANES, WIDTH)
            output = grad_input
            if gradient:
                output = row_start(grad_input, row, grad_stride, shift, OUT_ALIGNED)
            for tile in range(full):
                begin = (tile + EDGES - 1) * (LANES * WIDTH)
                position = positions_from(begin, LANES, WIDTH)
                z = load_full_tile(start, begin, present, LANES, WIDTH)
                w = 0.0
                if smooths:
                    w = of_weight * tl.load(weight + (position - shift)) if weighted else of_weight
                z, at_z, dy = _gradient_of_y(
                    z, target_position - begin, parameters, largest, of_p, extra, of_target, w, spread, of_spread,
                    functions, size, smooths, of_lse | has_z_loss, of_entropy, LANES, WIDTH,
                )  # fmt: skip
                if gradient:
                    tl.store(output + position, (dy * at_z[1]).to(grad_input.dtype.element_ty))
                sums = add_contributions(
                    sums, totals, lanes, z, at_z, dy, row * classes + (position - shift), position >= 0, parameters,
                    rows * classes.to(tl.int64), functions, size, groups, table_rows, regime, LANES, WIDTH,
                )  # fmt: skip
            for edge in range(EDGES):
                begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
                position = positions_from(begin, LANES, WIDTH)
                inside = inside_row(begin, shift, length, WHOLE, LANES, WIDTH)
                z = tl.load(start + position, mask=inside & present, other=0.0).to(tl.float32)
                w = 0.0
                if smooths:
                    w = of_weight
                    if weighted:
                        w *= tl.load(weight + (position - shift), mask=inside, other=0.0)
                z, at_z, dy = _gradient_of_y(
                    z, target_position - begin, parameters, largest, of_p, extra, of_target, w, spread, of_spread,
                    functions, size, smooths, of_lse | has_z_loss, of_entropy, LANES, WIDTH,
                )  # fmt: skip
                if gradient:
                    tl.store(output + position, (dy * at_z[1]).to(grad_input.dtype.element_ty), mask=inside)
                sums = add_contributions(
                    sums, totals, lanes, z, at_z, tl.where(inside, dy, 0.0), row * classes + (position - shift),
                    inside, parameters, rows * classes.to(tl.int64), functions, size, groups, table_rows, regime,
                    LANES, WIDTH,
                )  # fmt: skip
    end_sums(sums, totals, lanes, program, size, table_rows, regime, count, LANES)


@triton.jit
def _gradient_of_y(
    z, target_place, parameters, largest, of_p, extra, of_target, w, spread, of_spread,
    functions: tl.constexpr, size: tl.constexpr, smooths: tl.constexpr, has_extra: tl.constexpr,
    of_entropy: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Returns z, raised to LOWEST at least, f's point there, and dL/dy.

    ``of_p``, ``extra`` and ``of_spread`` are divided by the row's sum already. ``target_place`` is a position in the
    tile.
    """
    z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    at_z = functions[2](z, parameters, size)
    e = exp(at_z[0] - largest)
    q = tl.where(positions_from(0, LANES, WIDTH) == target_place, of_target, 0.0)
    if smooths:
        q += w
    dy = e * of_p - q
    if has_extra:
        dy += e * extra
    if of_entropy:
        # Where e is 0, y may be -inf in spite of LOWEST, under a steep f.
        dy -= tl.where(e == 0, 0.0, e * of_spread * ((at_z[0] - largest) + spread))
    return z, at_z, dy
