"""The coefficients of :class:`monosoftmax.transforms.PLIF` [2, K] from its parameter raw_slope [K], and the way back.

    slope_k = min(min_slope + (1 - min_slope) softplus(raw_k), 1e4),   rise_k = width slope_k,   width = 2 bound / K
    value_k = at_centre + sum_{centre <= j < k} rise_j   or   at_centre - sum_{k <= j < centre} rise_j

where 0 lies in piece ``centre``, ``inside`` to the right of its left end, and at_centre = -slope_centre inside. With
upstream gradients s of the slopes and v of the values, the gradient of slope_k is

    s_k - width sum_{i <= k} v_i  (k < centre)   or   s_k + width sum_{i > k} v_i - [k = centre] inside sum_i v_i

``PLIF.coefficients`` is the same formula in PyTorch: one launch for each of two dozen steps. Here each way is a launch.

One program goes through the pieces in blocks: outwards from 0 for the values, from both ends towards 0 for the
gradients. It carries a sum from block to block, so that results are the same in every run. Memory traffic: forward,
raw_slope is read once and the table is written once; backward, 3 K numbers are read and K are written.

Numerics: slopes are computed in the type of raw_slope, as in PyTorch. Sums and values are float64, and each result is
rounded once. Triton rounds a Python float that is given to a kernel to float32; so the launchers pass the bits of each
float64 as an integer (:func:`_bits`). Fused products are off: they would round the slopes in another way than PyTorch.

Hazards: if a piece and all pieces beyond it, as seen from 0, have no upstream gradient, its gradient must be exactly 0,
as Adam would blow up noise. This is why gradients are summed from the ends. The gradient passes the limit of the slopes
where slope <= limit, as in torch.clamp. A raw_slope that is NaN makes its slope and its gradient NaN.
"""

from __future__ import annotations

import struct
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from monosoftmax.transforms.base import SCALE_LIMIT

from .launch import on_device

_LIMIT: tl.constexpr = tl.constexpr(SCALE_LIMIT)

#: torch.nn.functional.softplus is the identity above this.
_LINEAR_ABOVE: tl.constexpr = tl.constexpr(20.0)

_DO_NOT_SPECIALIZE = ["pieces", "centre", "width", "inside", "min_slope", "rest"]


@triton.jit
def _float64(bits):
    """The float64 of these bits, which are an int32 where they fit into one."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _softplus(x):
    """log(1 + e^x) to relative accuracy, and e^x."""
    e = tl.exp(x)
    # What 1 + e loses of a small e, the quotient gives back.
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
    return tl.where(x > _LINEAR_ABOVE, x, log1p), e


@triton.jit
def _slope(x, min_slope, rest):
    """The slope before its limit, and e^x."""
    softplus, e = _softplus(x)
    return min_slope + rest * softplus, e


@triton.jit
def _limited_slope(raw_slope, k, inside_table, min_slope, rest):
    slope, _ = _slope(tl.load(raw_slope + k, mask=inside_table, other=0.0), min_slope, rest)
    return tl.minimum(slope, _LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def plif_coefficients_kernel(
    raw_slope, coefficients, pieces, centre, width, inside, min_slope, rest, BLOCK: tl.constexpr
):
    """coefficients [2, pieces]. ``width``, ``inside``, ``min_slope`` and ``rest``, 1 - min_slope, are bits."""
    dtype: tl.constexpr = raw_slope.dtype.element_ty
    width, inside = _float64(width), _float64(inside)
    min_slope, rest = _float64(min_slope).to(dtype), _float64(rest).to(dtype)
    values = coefficients + pieces
    at_centre = -_limited_slope(raw_slope, centre, True, min_slope, rest).to(tl.float64) * inside
    tl.store(values + centre, at_centre.to(dtype))
    total = tl.full((), 0.0, tl.float64)
    for begin in range(centre, pieces, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        slope = _limited_slope(raw_slope, k, k < pieces, min_slope, rest)
        tl.store(coefficients + k, slope, mask=k < pieces)
        rise = tl.where(k < pieces, slope.to(tl.float64) * width, 0.0)
        # The value at the right end of a piece is that at the left end of the next one.
        tl.store(values + k + 1, (at_centre + (total + tl.cumsum(rise, 0))).to(dtype), mask=k < pieces - 1)
        total += tl.sum(rise, 0)
    total = tl.full((), 0.0, tl.float64)
    for done in range(0, centre, BLOCK):
        k = centre - 1 - done - tl.arange(0, BLOCK)
        slope = _limited_slope(raw_slope, k, k >= 0, min_slope, rest)
        tl.store(coefficients + k, slope, mask=k >= 0)
        rise = tl.where(k >= 0, slope.to(tl.float64) * width, 0.0)
        tl.store(values + k, (at_centre - (total + tl.cumsum(rise, 0))).to(dtype), mask=k >= 0)
        total += tl.sum(rise, 0)


@triton.jit
def _to_raw_slope(of_slope, x, min_slope, rest):
    """The gradient of raw_slope x from the gradient of its slope."""
    slope, e = _slope(x, min_slope, rest)
    of_softplus = tl.where(slope <= _LIMIT, of_slope.to(x.dtype), 0.0) * rest
    return tl.where(x > _LINEAR_ABOVE, of_softplus, of_softplus * e / (e + 1.0))


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def plif_coefficients_backward_kernel(
    grad_coefficients, raw_slope, grad_raw_slope, pieces, centre, width, inside, min_slope, rest, BLOCK: tl.constexpr
):
    """grad_raw_slope [pieces]; the other arguments as above."""
    dtype: tl.constexpr = raw_slope.dtype.element_ty
    width, inside = _float64(width), _float64(inside)
    min_slope, rest = _float64(min_slope).to(dtype), _float64(rest).to(dtype)
    of_values = grad_coefficients + pieces
    left = tl.full((), 0.0, tl.float64)
    for begin in range(0, centre, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        here = k < centre
        v = tl.load(of_values + k, mask=here, other=0.0).to(tl.float64)
        of_slope = tl.load(grad_coefficients + k, mask=here, other=0.0).to(tl.float64)
        of_slope -= width * (left + tl.cumsum(v, 0))
        x = tl.load(raw_slope + k, mask=here, other=0.0)
        tl.store(grad_raw_slope + k, _to_raw_slope(of_slope, x, min_slope, rest), mask=here)
        left += tl.sum(v, 0)
    right = tl.full((), 0.0, tl.float64)
    for done in range(0, pieces - centre, BLOCK):
        k = pieces - 1 - done - tl.arange(0, BLOCK)
        v = tl.load(of_values + k + 1, mask=(k >= centre) & (k < pieces - 1), other=0.0).to(tl.float64)
        # The centre has more terms, and is stored once, below.
        here = k > centre
        of_slope = tl.load(grad_coefficients + k, mask=here, other=0.0).to(tl.float64)
        of_slope += width * (right + tl.cumsum(v, 0))
        x = tl.load(raw_slope + k, mask=here, other=0.0)
        tl.store(grad_raw_slope + k, _to_raw_slope(of_slope, x, min_slope, rest), mask=here)
        right += tl.sum(v, 0)
    at_centre = left + right + tl.load(of_values + centre).to(tl.float64)
    of_slope = tl.load(grad_coefficients + centre).to(tl.float64) + width * right - inside * at_centre
    of_raw = _to_raw_slope(of_slope, tl.load(raw_slope + centre), min_slope, rest)
    tl.store(grad_raw_slope + centre, of_raw)


def launch_plif_coefficients(raw_slope: Tensor, coefficients: Tensor, bound: float, min_slope: float) -> None:
    """Writes ``coefficients`` [2, K]; ``raw_slope`` [K] is contiguous, float32 or float64."""
    with on_device(raw_slope):
        plif_coefficients_kernel[(1,)](raw_slope, coefficients, **_arguments(raw_slope, bound, min_slope))


def launch_plif_coefficients_backward(
    grad_coefficients: Tensor, raw_slope: Tensor, grad_raw_slope: Tensor, bound: float, min_slope: float
) -> None:
    """Writes ``grad_raw_slope`` [K]; all tensors are contiguous and of one type."""
    with on_device(raw_slope):
        plif_coefficients_backward_kernel[(1,)](
            grad_coefficients, raw_slope, grad_raw_slope, **_arguments(raw_slope, bound, min_slope)
        )


def _arguments(raw_slope: Tensor, bound: float, min_slope: float) -> dict[str, Any]:
    pieces = raw_slope.shape[0]
    width = 2 * bound / pieces
    centre = min(int(bound / width), pieces - 1)
    return {
        "pieces": pieces,
        "centre": centre,
        "width": _bits(width),
        "inside": _bits(bound - centre * width),
        "min_slope": _bits(min_slope),
        "rest": _bits(1 - min_slope),
        # Two sizes: a kernel is compiled for each.
        "BLOCK": 128 if pieces <= 128 else 2048,
        "num_warps": 1 if pieces <= 128 else 8,
        "enable_fp_fusion": False,
    }


def _bits(number: float) -> int:
    """The bits of a float64, as an int64."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
