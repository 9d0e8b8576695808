"""What the kernels over rows share: the log-sum-exp of a row that arrives in tiles.

As on the CPU (``csrc/row``), a row is described by its largest y and sum exp(y - largest). lse alone would carry the
rounding of a large number into every p. Each lane of a tile (:mod:`.tiles`) keeps its own largest y and sum until the
row ends. This costs one more exponential for WIDTH logits, and saves an exchange between threads in every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp, log
from .tiles import edge_begin, full_tiles, inside_row, load_full_tile, positions_from

#: The kernels of gradients raise every logit to at least this number. The probability of such a logit is 0, as that of
#: -inf is, and its contribution to the coefficients, a product of 0 and z, is 0, too: with z = -inf it would be NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)

#: Where a largest y starts: not -inf, so that no lane ever forms inf - inf.
LOWEST_FLOAT: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def add_tile(largest, total, y):
    """Adds the tile y [LANES, WIDTH] to (largest, total) [LANES].

    -inf contributes 0. NaN and +inf make the total NaN: the maximum may drop a NaN, but the sum keeps it, and for +inf
    the sum has inf - inf.
    """
    new = tl.maximum(largest, tl.max(y, 1))
    return new, total * exp(largest - new) + tl.sum(exp(y - new[:, None]), 1)


@triton.jit
def scan_row(
    input, shift, length, parameters, weight, reference,
    value: tl.constexpr, size: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr,
    EDGES: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Computes largest and total of a row and, where labels are smoothed, sum_j w_j (y_j - reference).

    ``input`` points to position 0 of the row, ``weight`` to column 0 of the weights.
    """
    largest = tl.full((LANES,), LOWEST_FLOAT, tl.float32)
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
    # Without ``+ 0.0`` the compiler may fuse the product with the first addition of the sum. Which operand is fused
    # differs from lane to lane, and the lanes would have different totals.
    return row_largest, tl.sum(total * exp(largest - row_largest) + 0.0, 0), tl.sum(weighted_y, 0)


@triton.jit
def log_of_sum(total):
    """log(total); NaN for the total 0 of a row of -inf only, which has no distribution."""
    return tl.where(total == 0, float("nan"), log(total))


@triton.jit
def lse_of(largest, total):
    """log-sum-exp of a row: -inf where all of it is."""
    return tl.where(total == 0, float("-inf"), largest + log(total))
