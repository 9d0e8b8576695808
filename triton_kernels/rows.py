"""What the kernels over rows share: the log-sum-exp of a row that arrives in tiles.

As on the CPU (``csrc/row``), a row is described by its largest y and sum exp(y - largest), not by lse alone, which
carries the rounding of a large number into every p. Each lane of a tile (:mod:`.tiles`) has its own largest y and sum
until the row ends: that costs one more exponential for WIDTH logits, and spares what threads would tell each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp, log
from .tiles import edge_begin, full_tiles, inside_row, load_full_tile, positions_from

#: Logits below this are taken for it where gradients are formed: their probability is 0 as that of -inf is, and the
#: products of a gradient of 0 with what the coefficients' gradients need of z stay 0.
LOWEST: tl.constexpr = tl.constexpr(-1e30)

_LOWEST_FLOAT: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def add_tile(largest, total, y):
    """(largest, total) [LANES] with the tile y [LANES, WIDTH].

    -inf contributes 0. NaN and +inf make the total NaN: the maximum may drop NaN, the sum does not, nor inf - inf.
    """
    new = tl.maximum(largest, tl.max(y, 1))
    return new, total * exp(largest - new) + tl.sum(exp(y - new[:, None]), 1)


@triton.jit
def scan_row(
    input, shift, length, parameters, weight, reference,
    value: tl.constexpr, size: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr,
    EDGES: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """largest, total and, where labels are smoothed, sum_j w_j (y_j - reference) of a row.

    ``input`` points to position 0 of the row, ``weight`` to column 0 of the weights.
    """
    # Not -inf, so that no lane ever forms inf - inf.
    largest = tl.full((LANES,), _LOWEST_FLOAT, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weighted_y = tl.zeros((LANES,), tl.float32)
    full = full_tiles(length, EDGES, LANES, WIDTH)
    for tile in range(full):
        begin = (tile + EDGES - 1) * (LANES * WIDTH)
        position = positions_from(begin, LANES, WIDTH)
        y = value(load_full_tile(input, begin, True, LANES, WIDTH), parameters, size)
        largest, total = add_tile(largest, total, y)
        if smooths:
            gap = y - reference
            weighted_y += tl.sum(tl.load(weight + (position - shift)) * gap if weighted else gap, 1)
    for edge in range(EDGES):
        begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
        position = positions_from(begin, LANES, WIDTH)
        inside = inside_row(begin, shift, length, WHOLE, LANES, WIDTH)
        y = value(tl.load(input + position, mask=inside, other=0.0).to(tl.float32), parameters, size)
        # After f: f(-inf) may be finite.
        largest, total = add_tile(largest, total, tl.where(inside, y, float("-inf")))
        if smooths:
            w = tl.load(weight + (position - shift), mask=inside, other=0.0) if weighted else 1.0
            weighted_y += tl.sum(tl.where(inside, w * (y - reference), 0.0), 1)
    row_largest = tl.max(largest, 0)
    # ``+ 0.0``: a product that went into the first addition would differ from lane to lane, and so would the total.
    return row_largest, tl.sum(total * exp(largest - row_largest) + 0.0, 0), tl.sum(weighted_y, 0)


@triton.jit
def log_of_sum(total):
    """log(total); NaN for the total 0 of a row of -inf only, which has no distribution."""
    return tl.where(total == 0, float("nan"), log(total))


@triton.jit
def lse_of(largest, total):
    """log-sum-exp of a row: -inf where all of it is."""
    return tl.where(total == 0, float("-inf"), largest + log(total))
