"""log softmax of f(logits): the log-probabilities of rows, and the gradients of their logits and of f's coefficients.

    log p_j = (y_j - largest) - log(sum_k exp(y_k - largest))
    dL/dy_j = G_j - p_j sum_k G_k

for upstream gradients G. Memory traffic for each logit: log p reads it once from memory and once from a cache, and
writes once. The gradient reads G twice (once from a cache) and the logit once, and writes once. Arithmetic is float32,
and each result is rounded once. Hazards: as :mod:`.cross_entropy`, and log p may overwrite the logits in the same way:
a thread writes the elements that it has read. A row of -inf only has no distribution and is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import exp
from .coefficient_sums import add_contributions, begin_sums, end_sums
from .rows import LOWEST, log_of_sum, scan_row
from .tiles import (
    edge_begin,
    full_tiles,
    inside_row,
    load_full_tile,
    load_tile,
    positions_from,
    row_shift,
    row_start,
)
from .transforms.composed import load_parameters


@triton.jit(do_not_specialize=["rows", "classes", "stride", "out_stride"])
def log_softmax_kernel(
    input, coefficients, temperature, output, row_stats, rows, classes, stride, out_stride, c0, c1, c2, scale, cap,
    functions: tl.constexpr, size: tl.constexpr,
    ALIGNMENT: tl.constexpr, OUT_ALIGNED: tl.constexpr, EDGES: tl.constexpr, WHOLE: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes output [rows, classes] and row_stats [2, rows]. Each row has a program."""
    row = tl.program_id(0).to(tl.int64)
    parameters = load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions, size)
    shift = row_shift(input, row, stride, ALIGNMENT)
    length = classes + shift
    start = row_start(input, row, stride, shift, True)
    out = row_start(output, row, out_stride, shift, OUT_ALIGNED)
    largest, total, _ = scan_row(
        start, shift, length, parameters, row_stats, 0.0, functions[1], size, False, False, EDGES, WHOLE, LANES, WIDTH
    )
    tl.store(row_stats + row, largest)
    tl.store(row_stats + rows + row, total)
    log_sum = log_of_sum(total)
    full = full_tiles(length, EDGES, LANES, WIDTH)
    for tile in range(full):
        begin = (tile + EDGES - 1) * (LANES * WIDTH)
        y = functions[1](load_full_tile(start, begin, True, LANES, WIDTH), parameters, size)
        log_p = (y - largest) - log_sum
        tl.store(out + positions_from(begin, LANES, WIDTH), log_p.to(output.dtype.element_ty))
    for edge in range(EDGES):
        begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
        position = positions_from(begin, LANES, WIDTH)
        inside = inside_row(begin, shift, length, WHOLE, LANES, WIDTH)
        y = functions[1](tl.load(start + position, mask=inside, other=0.0).to(tl.float32), parameters, size)
        log_p = (y - largest) - log_sum
        tl.store(out + position, log_p.to(output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "classes", "stride", "grad_stride", "out_stride"])
def log_softmax_backward_kernel(
    grad_output, input, coefficients, temperature, row_stats, grad_input, totals, lanes,
    rows, classes, stride, grad_stride, out_stride, c0, c1, c2, scale, cap,
    functions: tl.constexpr, size: tl.constexpr, groups: tl.constexpr, table_rows: tl.constexpr,
    regime: tl.constexpr, count: tl.constexpr, gradient: tl.constexpr,
    ALIGNMENT: tl.constexpr, GRAD_ALIGNED: tl.constexpr, OUT_ALIGNED: tl.constexpr,
    EDGES: tl.constexpr, WHOLE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``gradient``: write grad_input [rows, classes]. ``regime`` other than "none": sum the contributions.

    A program has one row, or every num_programs-th row if it keeps sums.
    """
    program = tl.program_id(0)
    parameters = load_parameters(coefficients, temperature, c0, c1, c2, scale, cap, functions, size)
    sums, lanes = begin_sums(lanes, program, size, table_rows, regime, count, LANES)
    end, step = program + 1, 1
    if regime != "none":
        end, step = rows, tl.num_programs(0)
    for row_number in range(program, end, step):
        row = tl.full((), 0, tl.int64) + row_number
        shift = row_shift(input, row, stride, ALIGNMENT)
        length = classes + shift
        start = row_start(input, row, stride, shift, True)
        upstream = row_start(grad_output, row, grad_stride, shift, GRAD_ALIGNED)
        out = row_start(grad_input, row, out_stride, shift, OUT_ALIGNED) if gradient else grad_input
        largest, total = tl.load(row_stats + row), tl.load(row_stats + rows + row)
        inverse = tl.where(total == 0, float("nan"), 1.0 / total)
        full = full_tiles(length, EDGES, LANES, WIDTH)
        upstream_sums = tl.zeros((LANES,), tl.float32)
        for tile in range(full):
            begin = (tile + EDGES - 1) * (LANES * WIDTH)
            g, _ = load_tile(upstream, begin, shift, length, True, GRAD_ALIGNED, WHOLE, LANES, WIDTH)
            upstream_sums += tl.sum(g, 1)
        for edge in range(EDGES):
            begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
            g, _ = load_tile(upstream, begin, shift, length, False, GRAD_ALIGNED, WHOLE, LANES, WIDTH)
            upstream_sums += tl.sum(g, 1)
        of_p = tl.sum(upstream_sums, 0) * inverse
        for tile in range(full):
            begin = (tile + EDGES - 1) * (LANES * WIDTH)
            z, inside = load_tile(start, begin, shift, length, True, True, WHOLE, LANES, WIDTH)
            g, _ = load_tile(upstream, begin, shift, length, True, GRAD_ALIGNED, WHOLE, LANES, WIDTH)
            z, at_z, dy = _gradient_of_y(z, g, inside, parameters, largest, of_p, functions, size)
            position = positions_from(begin, LANES, WIDTH)
            if gradient:
                tl.store(out + position, (dy * at_z[1]).to(grad_input.dtype.element_ty))
            sums = add_contributions(
                sums, totals, lanes, z, at_z, dy, row * classes + (position - shift), inside, parameters,
                rows * classes.to(tl.int64), functions, size, groups, table_rows, regime, LANES, WIDTH,
            )  # fmt: skip
        for edge in range(EDGES):
            begin = edge_begin(edge, full, EDGES, LANES, WIDTH)
            z, inside = load_tile(start, begin, shift, length, False, True, WHOLE, LANES, WIDTH)
            g, _ = load_tile(upstream, begin, shift, length, False, GRAD_ALIGNED, WHOLE, LANES, WIDTH)
            z, at_z, dy = _gradient_of_y(z, g, inside, parameters, largest, of_p, functions, size)
            position = positions_from(begin, LANES, WIDTH)
            if gradient:
                tl.store(out + position, (dy * at_z[1]).to(grad_input.dtype.element_ty), mask=inside)
            sums = add_contributions(
                sums, totals, lanes, z, at_z, dy, row * classes + (position - shift), inside, parameters,
                rows * classes.to(tl.int64), functions, size, groups, table_rows, regime, LANES, WIDTH,
            )  # fmt: skip
    end_sums(sums, totals, lanes, program, size, table_rows, regime, count, LANES)


@triton.jit
def _gradient_of_y(z, g, inside, parameters, largest, of_p, functions: tl.constexpr, size: tl.constexpr):
    """Returns z, raised to LOWEST at least, f's point there, and dL/dy, which is 0 where not ``inside``.

    ``of_p`` is divided by the row's sum already.
    """
    z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    at_z = functions[2](z, parameters, size)
    return z, at_z, tl.where(inside, g - of_p * exp(at_z[0] - largest), 0.0)
