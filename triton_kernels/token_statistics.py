"""Statistics of each token under softmax(f(logits)): log p of the target, entropy, argmax, lse, rank of the target.

    entropy = log(sum_j e_j) + spread,   spread = sum_j e_j (largest - y_j) / sum_j e_j,   e_j = exp(y_j - largest)

f is increasing, so that the argmax and the rank of y are the argmax and the rank of the logits. From the row_stats
largest, sum_j e_j and spread :mod:`.cross_entropy` computes the gradient of the entropy. Each row has a program. Memory
traffic for each logit: one read from memory, two from a cache. Hazards: as :mod:`.cross_entropy`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp
from .rows import LOWEST, log_of_sum, lse_of, scan_row
from .tiles import edge_begin, full_tiles, load_tile, positions_from, row_shift, row_start
from .transforms.composed import load_parameters

_NOWHERE: tl.constexpr = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["rows", "classes", "stride", "ignore_index"])
def token_statistics_kernel(
    input, target, coefficients, temperature, log_prob, entropy, argmax, lse, rank, row_stats,
    rows, classes, stride, c0, c1, c2, scale, cap, ignore_index,
    functions: tl.constexpr, size: tl.constexpr,
    ALIGNMENT: tl.constexpr, EDGES: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes log_prob, entropy, argmax, lse and rank [rows], and row_stats [3, rows]."""
    row = tl.program_id(0).to(tl.int64)
    parameters = load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions, size)
    shift = row_shift(input, row, stride, ALIGNMENT)
    length = classes + shift
    start = row_start(input, row, stride, shift, True)
    t = tl.load(target + row)
    ignored = t == ignore_index
    valid = (t >= 0) & (t < classes)
    target_z = tl.load(start + (tl.where(valid, t, 0) + shift)).to(tl.float32)
    largest, total, _ = scan_row(
        start, shift, length, parameters, entropy, 0.0, functions[1], size, False, False, EDGES, WHOLE, LANES, WIDTH
    )
    full = full_tiles(length, EDGES, LANES, WIDTH)
    # The largest logit, the number of logits above the target's, and sum_j e_j (largest - y_j).
    state = (
        tl.full((LANES,), float("-inf"), tl.float32), tl.zeros((LANES,), tl.int32), tl.zeros((LANES,), tl.float32)
    )  # fmt: skip
    for tile in range(full):
        begin = (tile + EDGES - 1) * (LANES * WIDTH)
        z, inside = load_tile(start, begin, shift, length, True, True, WHOLE, LANES, WIDTH)
        state = _with_tile(state, z, inside, target_z, largest, parameters, functions, size)
    for edge in range(EDGES):
        begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
        z, inside = load_tile(start, begin, shift, length, False, True, WHOLE, LANES, WIDTH)
        state = _with_tile(state, z, inside, target_z, largest, parameters, functions, size)
    best, larger, gaps = state
    largest_z = tl.max(best, 0)
    first = tl.full((LANES,), _NOWHERE, tl.int32)
    for tile in range(full):
        begin = (tile + EDGES - 1) * (LANES * WIDTH)
        z, inside = load_tile(start, begin, shift, length, True, True, WHOLE, LANES, WIDTH)
        first = tl.minimum(first, _first_place(z == largest_z, begin, LANES, WIDTH))
    for edge in range(EDGES):
        begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
        z, inside = load_tile(start, begin, shift, length, False, True, WHOLE, LANES, WIDTH)
        first = tl.minimum(first, _first_place(inside & (z == largest_z), begin, LANES, WIDTH))
    # If no logit equals the largest one, the row has a NaN. Then the place has no meaning, but is kept a class.
    place = tl.minimum(tl.min(first, 0), length - 1) - shift
    log_sum = log_of_sum(total)
    log_p = (functions[1](target_z, parameters, size) - largest) - log_sum
    log_p = tl.where(valid, log_p, float("nan"))
    tl.store(log_prob + row, tl.where(ignored, 0.0, log_p))
    spread = tl.sum(gaps, 0) / total
    tl.store(entropy + row, log_sum + spread)
    tl.store(argmax + row, place.to(tl.int64))
    tl.store(lse + row, lse_of(largest, total))
    tl.store(row_stats + row, largest)
    tl.store(row_stats + rows + row, total)
    tl.store(row_stats + 2 * rows.to(tl.int64) + row, spread)
    tl.store(rank + row, tl.where(valid & ~ignored, tl.sum(larger, 0), -1).to(tl.int64))


@triton.jit
def _with_tile(state, z, inside, target_z, largest, parameters, functions: tl.constexpr, size: tl.constexpr):
    best, larger, gaps = state
    best = tl.maximum(best, tl.max(tl.where(inside, z, float("-inf")), 1))
    larger += tl.sum((inside & (z > target_z)).to(tl.int32), 1)
    gap = largest - functions[1](tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL), parameters, size)
    # Under a steep f it may be inf in spite of LOWEST: 0 times a finite gap is 0.
    gap = tl.minimum(gap, -LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return best, larger, gaps + tl.sum(tl.where(inside, exp(-gap) * gap, 0.0), 1)


@triton.jit
def _first_place(found, begin, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The first position in each lane where ``found`` is true; _NOWHERE if there is none."""
    return tl.min(tl.where(found, positions_from(begin, LANES, WIDTH), _NOWHERE), 1)
