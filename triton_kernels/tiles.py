"""A row of logits in tiles of [LANES, WIDTH]: a thread holds the WIDTH neighbours that it loads at once, in 16 bytes.

Sums over WIDTH then stay in the thread, and LANES partial sums are left for the end of the row. A position in a row is
column + shift. The shift of a row is the number of columns between the last multiple of 16 bytes and the begin of the
row. ALIGNMENT is what the launcher knows of the rows. ``"aligned"``: each row begins at a multiple of 16 bytes.
``"shifted"``: a row begins anywhere, so that its first tile begins before the row. Full tiles are loaded without a
mask. EDGES tiles are masked: the last one and, in shifted rows, the first one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 16


def width_of(dtype: torch.dtype) -> int:
    """WIDTH: the number of elements in 16 bytes."""
    return _BYTES // dtype.itemsize


def alignment_of(rows: Tensor) -> str:
    """ALIGNMENT of a matrix with columns next to each other."""
    return "aligned" if _place(rows) == (0, 0) else "shifted"


def as_aligned(rows: Tensor, others: Tensor) -> bool:
    """Whether position 0 of a row of ``rows`` is at a multiple of 16 bytes wherever position 0 in ``others`` is."""
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
    """A pointer to position 0 of row number row of the matrix at pointer; ALIGNED: a multiple of 16 bytes."""
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
    """The number of full tiles in a row of length positions. The first full tile is tile number EDGES - 1."""
    return tl.maximum(length // (LANES * WIDTH) - (EDGES - 1), 0)


@triton.jit
def edge_begin(edge, full, EDGES: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The first position of edge tile number ``edge``. The last edge tile comes after the full tiles."""
    return tl.where(edge == EDGES - 1, EDGES - 1 + full, 0) * (LANES * WIDTH)


@triton.jit
def load_full_tile(start, begin, present, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The tile that begins at position begin, in float32; 0 if the row is not ``present``."""
    if start.dtype.element_ty == tl.bfloat16:
        # Loaded as pairs: a bfloat16 is the upper half of its float32, so that one instruction takes it out of a pair.
        half = begin // 2 + tl.arange(0, LANES)[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        pair = tl.load(tl.multiple_of(start.to(tl.pointer_type(tl.int32)), 16) + half, mask=present, other=0)
        low, high = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), (LANES, WIDTH))
    else:
        tile = tl.load(start + positions_from(begin, LANES, WIDTH), mask=present, other=0.0)
        return tile.to(tl.float32)


@triton.jit
def inside_row(begin, shift, length, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of an edge tile are columns. WHOLE: either all WIDTH elements of a thread are, or none."""
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
    """The tile that begins at position begin, in float32, and which of its elements are columns; the others are 0.

    FULL: all elements are columns. ALIGNED: start is at a multiple of 16 bytes.
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
    """The WIDTH columns [LANES] of a tile [LANES, WIDTH], in any order. Each element stays in its thread."""
    if WIDTH == 1:
        return (tl.reshape(tile, (tile.shape[0],)),)
    else:
        left, right = tl.split(tl.reshape(tile, (tile.shape[0], WIDTH // 2, 2)))
        return split_columns(left, WIDTH // 2) + split_columns(right, WIDTH // 2)
