"""What the recompute head's kernels share: tiles of logits that exist in registers only.

A tile [BN, BV] is the product of BN rows of input and BV rows of linear_weight, summed over d in float32. f and the
loss, which follow, take several times as many registers as the logits. So the kernels apply them to the column parts of
a tile, one after the other (:func:`column_parts`). Applied to a whole tile of 128 x 128, PLIF spilled 2000 bytes of
each thread (sm_90).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Call, RowLoss


@triton.jit
def load_tile(
    source, row, column, rows, columns, stride, DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The tile [ROWS, COLUMNS] at (row, column) of a matrix; 0 beyond the rows and columns of the matrix.

    DESCRIPTORS: source is a tensor descriptor, not a pointer.
    """
    if DESCRIPTORS:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        pointers = source + r.to(tl.int64)[:, None] * stride + c[None, :]
        return tl.load(pointers, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def logits_tile(
    input, linear_weight, row, column, rows, classes, features, length, input_stride, weight_stride,
    DESCRIPTORS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The logits [BN, BV] at (row, column), without bias, summed over ``length`` of the ``features``."""
    z = tl.zeros((BN, BV), tl.float32)
    for d in range(0, length, BD):
        x = load_tile(input, row, d, rows, features, input_stride, DESCRIPTORS, BN, BD)
        w = load_tile(linear_weight, column, d, classes, features, weight_stride, DESCRIPTORS, BV, BD)
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
    return z


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """The PARTS (a power of two) column parts of a tile, from left to right. No element changes its register."""
    if PARTS == 1:
        return (tile,)
    else:
        halves = tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        return column_parts(left, PARTS // 2) + column_parts(right, PARTS // 2)


@triton.jit
def join_columns(parts):
    """The inverse of :func:`column_parts`."""
    if len(parts) == 1:
        return parts[0]
    else:
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            halves = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 2, 1))
            joined = joined + (tl.reshape(halves, (halves.shape[0], 2 * halves.shape[2])),)
        return join_columns(joined)


@triton.jit
def place_of(program, row_blocks, others, GROUP: tl.constexpr):
    """(row block, other) of a program. GROUP row blocks take turns, so that they read the same weights together."""
    per_group = GROUP * others
    first = program // per_group * GROUP
    members = tl.minimum(row_blocks - first, GROUP)
    rest = program % per_group
    return first + rest % members, rest // members


@triton.jit
def load_targets(target, r, rows, classes, ignore_index):
    """For rows r: the target, or -1 if it is ignored or not a class; whether it is ignored."""
    t = tl.load(target + r, mask=r < rows, other=ignore_index)
    ignored = t == ignore_index
    return tl.where((t >= 0) & (t < classes) & ~ignored, t, -1).to(tl.int32), ignored


class HeadTile(NamedTuple):
    """A tile of BN rows, BV classes and BD features, its column PARTS, and the warps and pipeline stages of a launch.

    ``registers`` is the limit for a thread, 0 for none. Without a limit ptxas may spill a few bytes to stay below 128.
    """

    BN: int
    BV: int
    BD: int
    PARTS: int
    warps: int
    stages: int
    registers: int = 0

    def arguments(self) -> dict[str, Any]:
        """The constants and compiler options of a kernel."""
        sizes = {"BN": self.BN, "BV": self.BV, "BD": self.BD, "PARTS": self.PARTS, "GROUP": GROUP}
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return sizes | options | ({"maxnreg": self.registers} if self.registers else {})


def _tiles(rows: dict[tuple[str, str], tuple[int, ...]]) -> dict[tuple[str, str], HeadTile]:
    return {key: HeadTile(*row) for key, row in rows.items()}


#: The number of row blocks whose programs take turns: they read a tile of linear_weight while the L2 cache has it.
GROUP = 8

#: The tiles for bfloat16 and float16, by family and by the registers that a transform needs. The table has the largest
#: number of registers of a thread, and KiB of shared memory, with Triton 3.7.1 and bfloat16, of nine transforms without
#: options and with all of them. Nothing spills, and all products are the family's matrix instructions
#: (benchmarks/codegen compiles them).
#:
#:            forward light  heavy          backward light heavy
#:   sm_80    221    48      255    48      255    56      255    56
#:   sm_90    250   192      191   128      209   112      255   112
#:   sm_100   210   192      162   128      184    96      184    96
#:   sm_120   180    64      184    64      255    48      180    48
#:   gfx942   178    64      312    32      436    32      424    32
#:
#: Larger tiles spilled 24 to 232 bytes: 128 x 256 on sm_90 with smoothed labels, 128 x 128 backward on sm_80 and
#: sm_120. If a part is narrower than the columns that the warps share, every warp computes all of it.
FORWARD = _tiles(
    {
        ("sm_80", "light"): (128, 128, 32, 8, 8, 4),
        ("sm_80", "heavy"): (128, 128, 32, 8, 8, 4),
        ("sm_90", "light"): (128, 256, 64, 16, 8, 4),
        ("sm_90", "heavy"): (128, 128, 64, 8, 8, 4),
        ("sm_100", "light"): (128, 256, 64, 8, 8, 4),
        ("sm_100", "heavy"): (128, 128, 64, 8, 8, 4),
        ("sm_120", "light"): (128, 128, 64, 8, 8, 3),
        ("sm_120", "heavy"): (128, 128, 64, 8, 8, 3),
        ("gfx942", "light"): (128, 128, 64, 8, 8, 2),
        ("gfx942", "heavy"): (64, 128, 64, 8, 4, 2),
    }
)
BACKWARD = _tiles(
    {
        ("sm_80", "light"): (64, 128, 32, 4, 8, 3, 255),
        ("sm_80", "heavy"): (64, 128, 32, 8, 8, 3),
        ("sm_90", "light"): (128, 128, 64, 16, 8, 3),
        ("sm_90", "heavy"): (128, 128, 64, 16, 8, 3),
        ("sm_100", "light"): (128, 128, 64, 8, 8, 3),
        ("sm_100", "heavy"): (128, 128, 64, 16, 8, 3),
        ("sm_120", "light"): (64, 128, 32, 4, 8, 2, 255),
        ("sm_120", "heavy"): (64, 128, 32, 8, 8, 2),
        ("gfx942", "light"): (64, 128, 32, 8, 4, 2),
        ("gfx942", "heavy"): (64, 128, 32, 8, 4, 2),
    }
)
#: The tile for float32. NVIDIA GPUs have no matrix instructions for float32: products are fused multiply-adds.
FLOAT32 = HeadTile._make((64, 64, 16, 4, 8, 2, 255))


def family_of(device: torch.device) -> str:
    """The row of the tables for a device. Triton's interpreter takes the row of the oldest family."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, "sm_80")


def forward_tile(loss: RowLoss, input: Tensor) -> HeadTile:
    """The tile of the losses. Tables are heavy, and so are the sums for smoothed labels."""
    return _tile(FORWARD, loss.call.functions.table_rows > 0 or loss.smooths, input)


def backward_tile(call: Call, input: Tensor) -> HeadTile:
    """The tile of the gradients. Tables are heavy, and so are vectors that are too long for registers."""
    return _tile(BACKWARD, call.functions.table_rows > 0 or call.size > 8, input)


def _tile(table: dict[tuple[str, str], HeadTile], heavy: bool, input: Tensor) -> HeadTile:
    family = family_of(input.device)
    if input.dtype == torch.float32:
        return FLOAT32._replace(warps=4, registers=0) if family == "gfx942" else FLOAT32
    return table[family, "heavy" if heavy else "light"]


def has_descriptors(device: torch.device, *matrices: Tensor) -> bool:
    """Whether the device loads tiles by descriptors, and these matrices can have one."""
    if family_of(device) not in ("sm_90", "sm_100", "sm_120"):
        return False
    return all(
        each.data_ptr() % 16 == 0 and each.stride(0) * each.element_size() % 16 == 0 and each.numel() > 0
        for each in matrices
    )


def described(matrix: Tensor, rows: int, columns: int, descriptors: bool) -> Any:
    """The kernels' argument for a matrix: a descriptor of tiles [rows, columns], or the matrix itself."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if descriptors else matrix
