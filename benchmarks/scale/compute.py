"""How long a device computes: a fit to steps that somebody has measured on one device.

A step of N rows in so many chunks takes a N V + b N V d + c chunks V d: the row kernels, the products, and what a chunk
adds to the gradient of the weight. Nothing else is assumed, so that what a host takes to issue a step is left out.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

from ..engine.environment import processor
from ..engine.runner import deterministic
from ..engine.store import RESULTS
from .step import Layout, Shape, fake_devices, prepare

H100 = RESULTS / "gpu" / "h100_80gb_hbm3" / "time.jsonl"
_FITTED = [Shape(256, classes, features, 1) for classes in (2048, 8192) for features in (256, 1024)]
_ROWS_IN_CHUNK = (128, 256)
#: A larger step, which shows how far the fit carries.
_LEFT_OUT = Shape(128, 16_384, 2048, 1)

#: N V, N V d and chunks V d of a step, and its ms.
Point = tuple[tuple[float, float, float], float]


class Fit(NamedTuple):
    """a, b and c in ms, and the largest relative distance of the fit from a measured time."""

    ms_per: tuple[float, ...]
    largest_error: float

    def ms(self, shape: Shape, rows_in_chunk: int = 0) -> float:
        """The time for the tokens and classes of one device."""
        return sum(a * b for a, b in zip(self.ms_per, work(shape, rows_in_chunk), strict=True))


class Measured(NamedTuple):
    """Fits, and what they were fitted to."""

    fits: dict[Layout, Fit]
    source: str


def work(shape: Shape, rows_in_chunk: int = 0) -> tuple[float, float, float]:
    """N V, N V d and chunks V d."""
    chunks = math.ceil(shape.tokens / (rows_in_chunk or shape.rows_in_chunk))
    weights = shape.classes * shape.features
    return shape.tokens * shape.classes, shape.tokens * weights, chunks * weights


def fit(points: Sequence[Point]) -> Fit:
    """The least squares of relative distances. No part takes less than nothing."""
    import numpy as np
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    rows, times = np.array([row for row, _ in points]), np.array([ms for _, ms in points])
    scale = rows.max(0)  # the columns are of very different sizes
    found = nnls(rows / scale / times[:, None], np.ones(len(points)))[0] / scale
    return Fit(tuple(found.tolist()), float(np.abs(rows @ found / times - 1).max()))


def measured_on_h100(path: Path = H100) -> Measured:
    """Fits to the one head that an H100 has been timed with."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ms = {line["name"]: line["ms"] for line in lines if line["group"] == "head" and line["status"] == "ok"}
    shape = Shape(8192, 50_304, 2048, 1, "bfloat16", "cuda")
    ahead: list[Point] = [((0.0, work(shape)[1], 0.0), ms["three products"])]
    # Without chunk_rows that run took 4096.
    for rows, words in ((1024, "chunk_rows=1024"), (4096, "chunked"), (8192, "chunk_rows=8192")):
        ahead.append((work(shape, rows), ms[f"cuda plif-64 {words} train"]))
    # A step that computes the logits again is one without gradients and one with them.
    without = ms["one product"], *[ms["cuda plif-64 chunked loss"]] * 3
    whole, again = fit(ahead), fit([(row, time + more) for (row, time), more in zip(ahead, without, strict=True)])
    source = (
        "NVIDIA H100 80GB HBM3, monosoftmax.linear_cross_entropy of N = 8192, V = 50304, d = 2048, bfloat16, PLIF of "
        "64 pieces, in chunks of 1024, 4096 and 8192 rows, and its bare products "
        f"(gpu/{path.parent.name}/{path.name}). The time with four products is that of a step and of a loss alone. The "
        f"fits are within {_percent(whole, again)} of these times. But all of them are of one V and d, and none is of "
        "monosoftmax.distributed."
    )
    return Measured({"whole": whole, "ahead": whole, "again": again}, source)


def measured_here(rounds: int = 3) -> Measured:
    """Fits to steps that take turns on one thread of this machine, in CPU time: others may use the machine, too."""
    steps = [*itertools.product(_FITTED, _ROWS_IN_CHUNK), (_LEFT_OUT, _LEFT_OUT.tokens)]
    layouts: tuple[Layout, ...] = ("ahead", "again")
    with fake_devices(1), deterministic(1, algorithms=False):
        actions = {(layout, each): prepare(each[0], layout, "cpu", each[1]) for layout in layouts for each in steps}
        for action in actions.values():
            action()
        timers = {
            key: Timer("step()", globals={"step": step}, timer=time.process_time) for key, step in actions.items()
        }
        found = [{key: 1e3 * timer.timeit(1).median for key, timer in timers.items()} for _ in range(rounds)]
    ms = {key: statistics.median(each[key] for each in found) for key in actions}
    fits = {layout: fit([(work(*each), ms[layout, each]) for each in steps[:-1]]) for layout in layouts}
    beyond = [f"{ms[layout, steps[-1]] / fits[layout].ms(*steps[-1]):.2f}" for layout in layouts]
    most = _FITTED[-1]
    source = (
        f"one core of {processor()}, torch {torch.__version__}, steps of {most.tokens} rows, up to V = {most.classes} "
        f"and d = {most.features}, float32, PLIF of 64 pieces, medians of {rounds}. The fits are within "
        f"{_percent(*fits.values())} of these times. A step with V = {_LEFT_OUT.classes}, d = {_LEFT_OUT.features}, "
        f"which they have not seen, took {' and '.join(beyond)} times what they say."
    )
    return Measured({"whole": fits["ahead"], **fits}, source)


def _percent(*fits: Fit) -> str:
    return f"{max(each.largest_error for each in fits):.1%}"
