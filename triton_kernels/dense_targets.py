"""Losses of f(logits) against a target of all classes: cross-entropy with class probabilities, and divergences.

    "probabilities"  sum_j c_j (lse - y_j) + z_loss lse^2,   c_j = ((1 - eps) q_j + eps / V) w_j
    "forward_kl", "reverse_kl", "jsd": as :meth:`monosoftmax.row_kernels.RowKernels.divergence` has them, from log q

The losses have the row_stats largest, sum_j exp(y_j - largest) and a third number: C = sum_j c_j (with q for c in the
forward KL), or R = sum_j p_j (log p_j - log q_j), with m for q in "jsd". From these follow the gradients

    dL/dy_j = g (C p_j - c_j) + (2 z_loss lse g + h) p_j,   or   g p_j (log p_j - log q_j - R), times 1 - beta in "jsd"

As in :mod:`.cross_entropy` one kernel computes the losses, the gradients from row_stats, or both, and a program takes
every num_programs-th row, or one row if it keeps no sums. Memory traffic for each logit: the losses read it and its
target once; where p is the first factor, the logit once more from a cache, since log p needs the whole row. A gradient
reads both and writes once; after the losses it reads both from a cache.

Numerics: float32; each result is rounded once. Gaps largest - y_j, not y_j, are summed, and so no large number hides
the loss. Each lane counts its gaps from its own largest y so far. When that rises, the sum grows by the rise times the
lane's C. A term whose first factor is 0 is 0, also where its logarithm is infinite: the products are selected, not
masked by 0. In "jsd" log p - log m is formed from u = log q - log p + log(beta / (1 - beta)), as
-log(1 - beta) - softplus(u): neither p nor q underflows, and no large logarithms cancel.

Hazards: as :mod:`.cross_entropy`. No row is ignored. The target's rows may begin at another place than those of the
logits: then its tiles are loaded by elements. grad_input may be input: a thread reads a logit before it overwrites it,
and the sums between two sweeps of a row end in a barrier.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from monosoftmax.groups import LossOptions, RowResults, Transform, Upstream

from .arithmetic import decay, exp, log1p
from .coefficient_sums import add_contributions, begin_sums, end_sums
from .launch import (
    Call,
    Sums,
    as_read,
    launch_options,
    on_device,
    reads_again,
    registers_of,
    rows_of,
    tile_arguments,
)
from .rows import LOWEST, LOWEST_FLOAT, log_of_sum, lse_of, scan_row
from .tiles import as_aligned, edge_begin, full_tiles, load_tile, positions_from, row_shift, row_start
from .transforms.composed import load_parameters

PROBABILITIES = "probabilities"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@triton.jit(do_not_specialize=["rows", "classes", "stride", "target_stride", "grad_stride", "grad_loss_stride"])
def dense_target_kernel(
    input, target, weight, coefficients, temperature, grad_loss, grad_lse, factor,
    loss, lse, row_stats, grad_input, totals, lanes,
    rows, classes, stride, target_stride, grad_stride, grad_loss_stride,
    c0, c1, c2, scale, cap, target_share, smooth_share, z_loss, beta, log_beta, log_rest,
    functions: tl.constexpr, size: tl.constexpr, groups: tl.constexpr, table_rows: tl.constexpr,
    regime: tl.constexpr, count: tl.constexpr,
    kind: tl.constexpr, losses: tl.constexpr, gradient: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr,
    of_lse: tl.constexpr, has_z_loss: tl.constexpr, has_factor: tl.constexpr,
    ALIGNMENT: tl.constexpr, TARGET_ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr, EDGES: tl.constexpr,
    WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``losses``: write loss, lse and row_stats [3, rows]; otherwise row_stats are read. The rest is as in
    :func:`.cross_entropy.cross_entropy_kernel`. ``log_beta`` and ``log_rest`` are log(beta) and log(1 - beta).
    """
    program = tl.program_id(0)
    parameters = load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions, size)
    sums, lanes = begin_sums(lanes, program, size, table_rows, regime, count, LANES)
    of_q: tl.constexpr = (kind == "probabilities") | (kind == "forward_kl")
    third_stats = row_stats + 2 * rows.to(tl.int64)
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
        targets = row_start(target, row, target_stride, shift, TARGET_ALIGNED)
        full = full_tiles(length, EDGES, LANES, WIDTH)
        if losses:
            if of_q:
                largest, total, third, row_loss = _scan_with_masses(
                    start, targets, weight - shift, shift, length, parameters, target_share, smooth_share,
                    functions[1], size, kind, weighted, smooths, TARGET_ALIGNED, EDGES, WHOLE, LANES, WIDTH,
                )  # fmt: skip
                row_loss += third * log_of_sum(total)
            else:
                largest, total, _ = scan_row(
                    start, shift, length, parameters, row_stats, 0.0, functions[1], size, False, False, EDGES, WHOLE,
                    LANES, WIDTH,
                )  # fmt: skip
                third, row_loss = _divergences_from_p(
                    start, targets, shift, length, parameters, largest, log_of_sum(total), log_beta, log_rest,
                    functions[1], size, kind, TARGET_ALIGNED, EDGES, WHOLE, LANES, WIDTH,
                )  # fmt: skip
                third /= total
                row_loss = beta * row_loss + (1.0 - beta) * third if kind == "jsd" else third
            row_lse = lse_of(largest, total)
            if has_z_loss:
                row_loss += z_loss * row_lse * row_lse
            # A row of -inf only has no distribution.
            tl.store(loss + row, tl.where(total == 0, float("nan"), row_loss))
            tl.store(lse + row, row_lse)
            tl.store(row_stats + row, largest)
            tl.store(row_stats + rows + row, total)
            tl.store(third_stats + row, third)
        else:
            largest, total = tl.load(row_stats + row), tl.load(row_stats + rows + row)
            third = tl.load(third_stats + row)
        if gradient | (regime != "none"):
            g = tl.load(grad_loss + row * grad_loss_stride)
            if has_factor:
                g *= tl.load(factor)
            log_sum = log_of_sum(total)
            extra = tl.load(grad_lse + row) if of_lse else 0.0
            if has_z_loss:
                extra += 2.0 * g * z_loss * (largest + log_sum)
            inverse = tl.where(total == 0, float("nan"), 1.0 / total)
            of_p = g * inverse
            if of_q:
                of_p *= third
            if kind == "jsd":
                of_p *= 1.0 - beta
            extra *= inverse
            output = row_start(grad_input, row, grad_stride, shift, OUT_ALIGNED) if gradient else grad_input
            for tile in range(full):
                begin = (tile + EDGES - 1) * (LANES * WIDTH)
                position = positions_from(begin, LANES, WIDTH)
                z, at_z, dy, inside = _gradient_of_y(
                    start, targets, weight - shift, begin, shift, length, parameters, g, target_share, smooth_share,
                    largest, log_sum, third, of_p, extra, log_beta, log_rest,
                    functions, size, kind, weighted, smooths, of_lse | has_z_loss,
                    True, TARGET_ALIGNED, WHOLE, LANES, WIDTH,
                )  # fmt: skip
                if gradient:
                    tl.store(output + position, (dy * at_z[1]).to(grad_input.dtype.element_ty))
                sums = add_contributions(
                    sums, totals, lanes, z, at_z, dy, row * classes + (position - shift), inside, parameters,
                    rows * classes.to(tl.int64), functions, size, groups, table_rows, regime, LANES, WIDTH,
                )  # fmt: skip
            for edge in range(EDGES):
                begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
                position = positions_from(begin, LANES, WIDTH)
                z, at_z, dy, inside = _gradient_of_y(
                    start, targets, weight - shift, begin, shift, length, parameters, g, target_share, smooth_share,
                    largest, log_sum, third, of_p, extra, log_beta, log_rest,
                    functions, size, kind, weighted, smooths, of_lse | has_z_loss,
                    False, TARGET_ALIGNED, WHOLE, LANES, WIDTH,
                )  # fmt: skip
                if gradient:
                    tl.store(output + position, (dy * at_z[1]).to(grad_input.dtype.element_ty), mask=inside)
                sums = add_contributions(
                    sums, totals, lanes, z, at_z, dy, row * classes + (position - shift), inside, parameters,
                    rows * classes.to(tl.int64), functions, size, groups, table_rows, regime, LANES, WIDTH,
                )  # fmt: skip
    end_sums(sums, totals, lanes, program, size, table_rows, regime, count, LANES)


@triton.jit
def _masses(
    given, weight, position, inside, target_share, smooth_share,
    kind: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """c_j of a tile of targets, 0 where not ``inside``. ``weight`` points to position 0."""
    if kind == "forward_kl":
        mass = exp(given)
    else:
        mass = given
        if smooths:
            mass = target_share * mass + smooth_share
        if weighted:
            mass *= tl.load(weight + position) if FULL else tl.load(weight + position, mask=inside, other=0.0)
    return mass if FULL else tl.where(inside, mass, 0.0)


@triton.jit
def _scan_with_masses(
    start, targets, weight, shift, length, parameters, target_share, smooth_share,
    value: tl.constexpr, size: tl.constexpr, kind: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr,
    TARGET_ALIGNED: tl.constexpr, EDGES: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """largest, total, C and sum_j c_j (largest - y_j) of a row, with c_j log q_j added in the forward KL."""
    state = (
        tl.full((LANES,), LOWEST_FLOAT, tl.float32), tl.zeros((LANES,), tl.float32),
        tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32),
    )  # fmt: skip
    full = full_tiles(length, EDGES, LANES, WIDTH)
    for tile in range(full):
        begin = (tile + EDGES - 1) * (LANES * WIDTH)
        z, inside = load_tile(start, begin, shift, length, True, True, WHOLE, LANES, WIDTH)
        given, _ = load_tile(targets, begin, shift, length, True, TARGET_ALIGNED, WHOLE, LANES, WIDTH)
        mass = _masses(
            given, weight, positions_from(begin, LANES, WIDTH), inside, target_share, smooth_share,
            kind, weighted, smooths, True,
        )  # fmt: skip
        state = _add_masses(state, value(z, parameters, size), mass, given, kind)
    for edge in range(EDGES):
        begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
        z, inside = load_tile(start, begin, shift, length, False, True, WHOLE, LANES, WIDTH)
        given, _ = load_tile(targets, begin, shift, length, False, TARGET_ALIGNED, WHOLE, LANES, WIDTH)
        mass = _masses(
            given, weight, positions_from(begin, LANES, WIDTH), inside, target_share, smooth_share,
            kind, weighted, smooths, False,
        )  # fmt: skip
        # After f: f(-inf) may be finite.
        y = tl.where(inside, value(z, parameters, size), float("-inf"))
        state = _add_masses(state, y, mass, given, kind)
    largest, total, masses, gaps = state
    row_largest = tl.max(largest, 0)
    gaps += _raised(masses, row_largest - largest)
    # ``+ 0.0``: as in scan_row.
    row_total = tl.sum(total * exp(largest - row_largest) + 0.0, 0)
    return row_largest, row_total, tl.sum(masses, 0), tl.sum(gaps, 0)


@triton.jit
def _add_masses(state, y, mass, given, kind: tl.constexpr):
    """The sums of the lanes with a tile, relative to the lane's largest y so far."""
    largest, total, masses, gaps = state
    new = tl.maximum(largest, tl.max(y, 1))
    distance = y - new[:, None]
    terms = given - distance if kind == "forward_kl" else -distance
    gaps += _raised(masses, new - largest) + tl.sum(tl.where(mass == 0, 0.0, mass * terms), 1)
    total = total * exp(largest - new) + tl.sum(exp(distance), 1)
    # ``+ 0.0``: where the masses are a tile as it was loaded, Triton 3.7 would keep their sums in another layout, and
    # fails on an assertion of its own, since they are used twice.
    return new, total, masses + tl.sum(mass + 0.0, 1), gaps


@triton.jit
def _raised(masses, rise):
    """What a sum of gaps grows by; 0 for a lane without masses, whose largest y is none."""
    return tl.where(masses == 0, 0.0, masses * rise)


@triton.jit
def _divergences_from_p(
    start, targets, shift, length, parameters, largest, log_sum, log_beta, log_rest,
    value: tl.constexpr, size: tl.constexpr, kind: tl.constexpr,
    TARGET_ALIGNED: tl.constexpr, EDGES: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """R times total and, in "jsd", sum_j q_j (log q_j - log m_j) of a row."""
    state = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    full = full_tiles(length, EDGES, LANES, WIDTH)
    for tile in range(full):
        begin = (tile + EDGES - 1) * (LANES * WIDTH)
        z, inside = load_tile(start, begin, shift, length, True, True, WHOLE, LANES, WIDTH)
        given, _ = load_tile(targets, begin, shift, length, True, TARGET_ALIGNED, WHOLE, LANES, WIDTH)
        distance = value(tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL), parameters, size) - largest
        state = _add_divergences(state, distance, given, inside, log_sum, log_beta, log_rest, kind)
    for edge in range(EDGES):
        begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
        z, inside = load_tile(start, begin, shift, length, False, True, WHOLE, LANES, WIDTH)
        given, _ = load_tile(targets, begin, shift, length, False, TARGET_ALIGNED, WHOLE, LANES, WIDTH)
        distance = value(tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL), parameters, size) - largest
        state = _add_divergences(state, distance, given, inside, log_sum, log_beta, log_rest, kind)
    return tl.sum(state[0], 0), tl.sum(state[1], 0)


@triton.jit
def _add_divergences(state, distance, given, inside, log_sum, log_beta, log_rest, kind: tl.constexpr):
    of_p, of_q = state
    ratio, of_q_ratio = _log_ratios(distance - log_sum, given, log_beta, log_rest, kind)
    e = exp(distance)
    of_p += tl.sum(tl.where(inside & (e != 0), e * ratio, 0.0), 1)
    if kind == "jsd":
        q = exp(given)
        of_q += tl.sum(tl.where(inside & (q != 0), q * of_q_ratio, 0.0), 1)
    return of_p, of_q


@triton.jit
def _log_ratios(log_p, log_q, log_beta, log_rest, kind: tl.constexpr):
    """log p - log q; in "jsd" log p - log m and log q - log m."""
    if kind == "jsd":
        u = (log_q - log_p) + (log_beta - log_rest)
        rest = log1p(decay(u))
        return -(log_rest + (tl.maximum(u, 0.0) + rest)), -(log_beta + (tl.maximum(-u, 0.0) + rest))
    else:
        return log_p - log_q, 0.0


@triton.jit
def _gradient_of_y(
    start, targets, weight, begin, shift, length, parameters, g, target_share, smooth_share,
    largest, log_sum, third, of_p, extra, log_beta, log_rest,
    functions: tl.constexpr, size: tl.constexpr, kind: tl.constexpr, weighted: tl.constexpr, smooths: tl.constexpr,
    has_extra: tl.constexpr, FULL: tl.constexpr, TARGET_ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Loads a tile. Returns z, raised to LOWEST at least, f's point there, dL/dy, and which elements are columns.

    ``of_p`` and ``extra`` are divided by the row's sum already. dL/dy is 0 where there is no column.
    """
    z, inside = load_tile(start, begin, shift, length, FULL, True, WHOLE, LANES, WIDTH)
    given, _ = load_tile(targets, begin, shift, length, FULL, TARGET_ALIGNED, WHOLE, LANES, WIDTH)
    z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    at_z = functions[2](z, parameters, size)
    distance = at_z[0] - largest
    e = exp(distance)
    if (kind == "probabilities") | (kind == "forward_kl"):
        position = positions_from(begin, LANES, WIDTH)
        mass = _masses(given, weight, position, inside, target_share, smooth_share, kind, weighted, smooths, FULL)
        dy = e * of_p - g * mass
        if has_extra:
            dy += e * extra
    else:
        ratio, _ = _log_ratios(distance - log_sum, given, log_beta, log_rest, kind)
        dy = tl.where(e == 0, 0.0, e * of_p * (ratio - third))
    return z, at_z, dy if FULL else tl.where(inside, dy, 0.0), inside


class DenseLoss(NamedTuple):
    """A loss of rows against ``target`` [N, V], of a ``kind`` of this file; ``beta`` is that of "jsd"."""

    target: Tensor
    call: Call
    kind: str
    beta: float
    options: LossOptions

    @classmethod
    def of_probabilities(cls, target: Tensor, transform: Transform, options: LossOptions) -> DenseLoss:
        """Cross-entropy with class probabilities."""
        if options.weight is not None:
            options = options._replace(weight=options.weight.contiguous())
        return cls(_unit_columns(target), Call.of(transform), PROBABILITIES, 0.5, options)

    @classmethod
    def divergence(cls, log_target: Tensor, transform: Transform, kind: str, beta: float) -> DenseLoss:
        """A divergence from exp(log_target)."""
        if kind not in DIVERGENCES:
            raise ValueError(f"monosoftmax: kind={kind!r} is none of {', '.join(DIVERGENCES)}")
        if kind != "jsd":
            beta = 0.5  # not read
        options = LossOptions(None, -100, 0.0, 0.0, return_lse=True)
        return cls(_unit_columns(log_target), Call.of(transform), kind, beta, options)

    def arguments(self, rows: Tensor, upstream: Upstream, unused: Tensor) -> dict[str, Any]:
        """The arguments of the kernel that follow from the loss. ``unused`` stands for a tensor that is not read."""
        weight, _, label_smoothing, z_loss, _ = self.options
        grad_loss, grad_lse, factor, _ = upstream
        assert grad_loss is not None
        functions = self.call.functions
        return self.call.arguments(rows.dtype) | {
            "target": self.target,
            "target_stride": self.target.stride(0),
            "weight": unused if weight is None else weight,
            "weighted": weight is not None,
            "target_share": 1.0 - label_smoothing,
            "smooth_share": label_smoothing / rows.shape[1],
            "smooths": label_smoothing > 0,
            "z_loss": float(z_loss),
            "has_z_loss": z_loss > 0,
            "kind": self.kind,
            "beta": float(self.beta),
            "log_beta": math.log(self.beta),
            "log_rest": math.log1p(-self.beta),
            "grad_loss": grad_loss,
            "grad_loss_stride": int(grad_loss.dim() > 0),
            "grad_lse": unused if grad_lse is None else grad_lse,
            "of_lse": grad_lse is not None,
            "factor": unused if factor is None else factor,
            "has_factor": factor is not None,
            "groups": functions.groups(self.call.size),
            "table_rows": functions.table_rows,
        }


def launch_dense_target(
    rows: Tensor, loss: DenseLoss, upstream: Upstream | None, results: RowResults, sums: Sums
) -> None:
    """Fills in ``sums`` and those of ``results`` that are not empty; row_stats without losses are read instead.

    Without ``upstream`` there are losses only. The gradient of rows may be written over ``rows``.
    """
    if rows.shape[0] == 0:
        return
    upstream = None if upstream is None else as_read(upstream, rows)
    empty = rows.new_empty(0)
    if reads_again(rows, results, sums):
        launch_dense_target(rows, loss, upstream, results._replace(grad_rows=empty), sums)
        results, sums = results._replace(loss=empty), Sums(loss.call, rows, False)
    for chunk, part in sums.launches():
        if chunk is None:
            _launch(rows, loss, upstream, results, part)
            continue
        assert upstream is not None
        stats = RowResults(empty, empty, results.row_stats[:, chunk].contiguous(), empty, empty)
        _launch(rows[chunk], loss._replace(target=loss.target[chunk]), rows_of(upstream, chunk), stats, part)


def _launch(rows: Tensor, loss: DenseLoss, upstream: Upstream | None, results: RowResults, sums: Sums) -> None:
    (count, classes), unused = rows.shape, results.row_stats
    losses, gradient = results.loss.numel() > 0, results.grad_rows.numel() > 0
    of_rows = (results.loss, results.lse) if losses else (unused, unused)
    grad_rows = results.grad_rows if gradient else rows
    tile = tile_arguments(rows, grad_rows, sums.most_lanes)
    registers = registers_of(loss.call.functions.table_rows, upstream is not None)
    with on_device(rows):
        dense_target_kernel[(sums.programs,)](
            input=rows, rows=count, classes=classes, stride=rows.stride(0), loss=of_rows[0], lse=of_rows[1],
            losses=losses, row_stats=results.row_stats, grad_input=grad_rows, grad_stride=grad_rows.stride(0),
            gradient=gradient, TARGET_ALIGNED=as_aligned(loss.target, rows),
            **loss.arguments(rows, Upstream(unused) if upstream is None else upstream, unused), **sums.arguments(),
            **tile, **launch_options(tile["LANES"], registers, rows.device),
        )  # fmt: skip


def _unit_columns(matrix: Tensor) -> Tensor:
    """The matrix with its columns next to each other."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
