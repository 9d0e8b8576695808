"""A row of logits in tiles of [LANES, WIDTH]: a thread holds the WIDTH neighbours that it loads at once, in 16 bytes.

Sums over WIDTH then stay in the thread, and LANES partial sums are left for the end of the row. A row is counted in
positions: column + shift, where the shift of a row is the number of columns by which it begins after a multiple of 16
bytes. ALIGNMENT says what is known of the rows: ``"aligned"``, each begins at a multiple of 16 bytes; ``"shifted"``,
each begins anywhere, so that the first tile begins before the row. Full tiles, which need no mask, are loaded without;
EDGES tiles, the last and in shifted rows the first, are masked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 16


def width_of(dtype: torch.dtype) -> int:
    """WIDTH: how many elements are 16 bytes."""
    return _BYTES // dtype.itemsize


def alignment_of(rows: Tensor) -> str:
    """ALIGNMENT of a matrix with columns next to each other."""
    return "aligned" if _place(rows) == (0, 0) else "shifted"


def as_aligned(rows: Tensor, others: Tensor) -> bool:
    """Whether position 0 of each row of ``rows`` begins at a multiple of 16 bytes because those of ``others`` do."""
    return _place(rows) == _place(others) and (rows.dtype == others.dtype or _place(rows) == (0, 0))


def _place(rows: Tensor) -> tuple[int, int]:
    return rows.data_ptr() % _BYTES, rows.stride(0) * rows.element_size() % _BYTES


@triton.jit
def row_shift(pointer, row, stride, ALIGNMENT: tl.constexpr):
    """The shift of row number row of the matrix at pointer."""
    if ALIGNMENT == "shifted":
        size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
        return (((pointer + row * stride).to(tl.int64) & 15) // size).to(tl.int32)
    else:
        return 0


@triton.jit
def row_start(pointer, row, stride, shift, ALIGNED: tl.constexpr):
    """A pointer to position 0 of row number row of the matrix at pointer; ALIGNED: that is a multiple of 16 bytes."""
    if ALIGNED:
        return tl.multiple_of(pointer + (row * stride - shift), 16)
    else:
        return pointer + (row * stride - shift)


@triton.jit
def positions_from(begin, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The positions of a tile, [LANES, WIDTH]."""
    return begin + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def full_tiles(length, EDGES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """How many tiles of a row of length positions need no mask; the first begins at (EDGES - 1) tiles."""
    return tl.maximum(length // (LANES * WIDTH) - (EDGES - 1), 0)


@triton.jit
def edge_begin(edge, full, EDGES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Where edge tile number ``edge`` of EDGES begins: the last one after the full tiles."""
    return tl.where(edge == EDGES - 1, EDGES - 1 + full, 0) * (LANES * WIDTH)


@triton.jit
def load_full_tile(start, begin, present, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The tile that begins at position begin, in float32; 0 where not present, which is one for all."""
    if start.dtype.element_ty == tl.bfloat16:
        # As pairs: a bfloat16 is the upper half of its float32, and is taken out of a pair in one instruction.
        half = begin // 2 + tl.arange(0, LANES)[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        pair = tl.load(tl.multiple_of(start.to(tl.pointer_type(tl.int32)), 16) + half, mask=present, other=0)
        low, high = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), (LANES, WIDTH))
    else:
        tile = tl.load(start + positions_from(begin, LANES, WIDTH), mask=present, other=0.0)
        return tile.to(tl.float32)


@triton.jit
def inside_row(begin, shift, length, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Which lanes of an edge tile are columns. WHOLE: the WIDTH elements of a thread are either all or none."""
    if WHOLE:
        first = begin + tl.arange(0, LANES)[:, None] * WIDTH
        return (first < length) & (tl.arange(0, WIDTH)[None, :] >= 0)
    else:
        position = positions_from(begin, LANES, WIDTH)
        return (position >= shift) & (position < length)


@triton.jit
def load_tile(
    start, begin, shift, length,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The tile that begins at position begin, in float32, and which of its lanes are columns; 0 where they are not.

    FULL: all are. ALIGNED: start is at a multiple of 16 bytes.
    """
    position = positions_from(begin, LANES, WIDTH)
    if FULL:
        inside = position >= 0
        if ALIGNED:
            return load_full_tile(start, begin, True, LANES, WIDTH), inside
        else:
            return tl.load(start + position).to(tl.float32), inside
    else:
        inside = inside_row(begin, shift, length, WHOLE, LANES, WIDTH)
        return tl.load(start + position, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def split_columns(tile, WIDTH: tl.constexpr):
    """The WIDTH columns [LANES] of a tile [LANES, WIDTH], in no order; each stays where it is."""
    if WIDTH == 1:
        return (tl.reshape(tile, (tile.shape[0],)),)
    else:
        left, right = tl.split(tl.reshape(tile, (tile.shape[0], WIDTH // 2, 2)))
        return split_columns(left, WIDTH // 2) + split_columns(right, WIDTH // 2)
