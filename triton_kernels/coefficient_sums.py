"""Sums over logits of dL/dy * df/dcoefficient: the gradients of the coefficients.

A program adds up the contributions of its rows. A second stage, in PyTorch, adds up the programs in float64 and in a
fixed order. If the coefficients are a vector, each logit contributes to all of them, and each lane keeps the sums in
registers. If they are a table of K pieces, a logit contributes to the coefficients of its piece, and :func:`regime_of`
chooses by K:

- ``"registers"``: each lane keeps the whole table in registers. It adds the contribution to the piece of the logit,
  and 0 to the other pieces.
- ``"lanes"``: each lane has a table of its own, in memory that is small enough for the L2 cache. No two threads share
  an address, and each thread adds in program order. So no atomics are needed, and sums are the same in every run. This
  holds only if every access to the tables has one layout, in which a lane always belongs to the same thread: a test
  reads the layout from the compiled code.
- ``"global"``: all programs share one table, to which they add by atomics, in an order that changes from run to run.
- ``"written"``: the kernel writes every contribution, and PyTorch adds them up in a fixed order. It takes the place of
  ``"global"`` under ``torch.use_deterministic_algorithms``.

Cost for each logit, with PLIF's two rows, in this order: 5 K instructions; a load, 2 additions and a store of 8 bytes;
2 atomics; 3 stores. The tables of a program's lanes take 8 LANES K bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import entry_at, halves_of, pair_of
from .tiles import split_columns
from .transforms.composed import number_of

#: The most coefficients of a table in registers, and the most pieces of a table of a lane. A loss with all gradients
#: took 61 instructions for each logit with 4 pieces in registers, and 45 with tables of the lanes (PLIF, bf16, sm_90).
#: The traffic of these tables to the L2 cache has not been measured.
_REGISTERS, _LANES = 2, 256


def regime_of(table_rows: int, size: int, deterministic: bool) -> str:
    """How the gradient of ``size`` coefficients, or of a table of ``size`` pieces, is summed."""
    if table_rows * size <= _REGISTERS:
        return "registers"
    if size <= _LANES:
        return "lanes"
    return "written" if deterministic else "global"


@triton.jit
def begin_sums(
    lanes, program,
    size: tl.constexpr, table_rows: tl.constexpr, regime: tl.constexpr, count: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Returns ``count`` sums [LANES] of 0, and the program's part of ``lanes``, which it sets to 0."""
    sums = ()
    for _ in tl.static_range(count):
        sums = sums + (tl.zeros((LANES,), tl.float32),)
    if regime == "lanes":
        entries: tl.constexpr = number_of(size) * (table_rows // 2)
        lanes += program.to(tl.int64) * (entries * LANES)
        for entry in range(entries):
            tl.store(lanes + entry * LANES + tl.arange(0, LANES), tl.zeros((LANES,), tl.int64))
    return sums, lanes


@triton.jit
def add_contributions(
    sums, totals, lanes, z, at_z, weight, index, inside, parameters, elements,
    functions: tl.constexpr, size: tl.constexpr, groups: tl.constexpr, table_rows: tl.constexpr, regime: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Returns ``sums`` with a tile's contributions, weight * df/dcoefficient at the logits z. ``at_z`` is f's point.

    "global" adds the contributions to ``totals`` [table_rows, size]. "written" stores them in ``totals`` [table_rows,
    elements] at ``index``, and their pieces in ``lanes`` [elements]. ``weight`` is 0 where not ``inside``.
    """
    if regime == "registers":
        return _add_to_registers(sums, z, at_z, weight, parameters, functions[3], size, groups, table_rows)
    elif regime == "none":
        return sums
    else:
        terms = functions[3](0, at_z, z, weight, parameters, size)
        if regime == "lanes":
            _add_to_lanes(lanes, terms, at_z[2], number_of(size), LANES, WIDTH)
        else:
            for row in tl.static_range(table_rows):
                if regime == "global":
                    tl.atomic_add(totals + row * number_of(size) + at_z[2], terms[row], mask=inside, sem="relaxed")
                else:
                    tl.store(totals + row * elements + index, terms[row], mask=inside)
            if regime == "written":
                tl.store(lanes + index, at_z[2].to(tl.int64), mask=inside)
        return sums


@triton.jit
def end_sums(
    sums, totals, lanes, program,
    size: tl.constexpr, table_rows: tl.constexpr, regime: tl.constexpr, count: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes the sums over a program's lanes to its row of ``totals`` [programs, coefficients]."""
    for i in tl.static_range(count):
        tl.store(totals + program * count + i, tl.sum(sums[i], 0))
    if regime == "lanes":
        pieces: tl.constexpr = number_of(size)
        partial = totals + program * (table_rows * pieces)
        for pair in tl.static_range(table_rows // 2):
            for piece in range(pieces):
                low, high = halves_of(tl.load(lanes + (pair * pieces + piece) * LANES + tl.arange(0, LANES)))
                tl.store(partial + 2 * pair * pieces + piece, tl.sum(low, 0))
                tl.store(partial + (2 * pair + 1) * pieces + piece, tl.sum(high, 0))


@triton.jit
def _add_to_registers(
    sums, z, at_z, weight, parameters,
    contributions: tl.constexpr, size: tl.constexpr, groups: tl.constexpr, table_rows: tl.constexpr,
):  # fmt: skip
    """Returns ``sums`` with a tile's contributions: to a vector group by group, to a table row by row."""
    updated = ()
    if table_rows > 0:
        terms = contributions(0, at_z, z, weight, parameters, size)
        for row in tl.static_range(table_rows):
            for piece in tl.static_range(number_of(size)):
                here = tl.where(at_z[2] == piece, terms[row], 0.0)
                updated = updated + (sums[row * number_of(size) + piece] + tl.sum(here, 1),)
    else:
        for group in tl.static_range(groups):
            terms = contributions(group, at_z, z, weight, parameters, size)
            for i in tl.static_range(len(terms)):
                updated = updated + (sums[len(updated)] + tl.sum(terms[i], 1),)
    return updated


@triton.jit
def _add_to_lanes(lanes, terms, piece, size: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Adds a tile's contributions to the tables of the lanes. ``terms`` has a [LANES, WIDTH] for each row of a table.

    The WIDTH logits of a lane may lie in the same piece. So they are added one after the other.
    """
    pieces = split_columns(piece, WIDTH)
    of_lane = lanes + tl.arange(0, LANES)
    for pair in tl.static_range(len(terms) // 2):
        first = split_columns(terms[2 * pair], WIDTH)
        second = split_columns(terms[2 * pair + 1], WIDTH)
        for i in tl.static_range(WIDTH):
            entry = entry_at(of_lane + pair * size * LANES, pieces[i], 8 * LANES, tl.int64)
            low, high = halves_of(tl.load(entry))
            tl.store(entry, pair_of(low + first[i], high + second[i]))
