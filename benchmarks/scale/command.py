"""``python -m benchmarks.scale``: what a head takes by number of devices, simulated."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ..engine.document import render, table
from ..engine.store import RESULTS
from .compute import Measured, measured_here, measured_on_h100
from .counting import Counts, count
from .links import LINKS, Link
from .step import LAYOUTS, Shape

Times = Literal["h100", "here"]
#: How the steps are measured; their type, and the type of the device; and the link unless another one is asked for.
_DEVICES: dict[Times, tuple[Any, str, str, str]] = {
    "h100": (measured_on_h100, "bfloat16", "cuda", "nvlink4"),
    "here": (measured_here, "float32", "cpu", "ethernet100"),
}


@dataclass(frozen=True)
class Options:
    """What is simulated: all combinations of classes, features and devices."""

    classes: tuple[int, ...] = (32_000, 128_256, 262_144)
    features: tuple[int, ...] = (4096, 8192, 16_384)
    devices: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: int = 8192
    """Of one step, of all devices together."""
    times: tuple[Times, ...] = ("h100",)
    """Measured times to start from: those in benchmarks/results/gpu/h100_80gb_hbm3, or of steps that are timed here."""
    link: Literal["nvlink4", "pcie5", "ethernet100"] | None = None
    """Between neighbours of a ring. By default nvlink4 for h100, and ethernet100 for here."""
    latency_us: float | None = None
    """In place of the link's."""
    gigabytes_per_second: float | None = None
    """In place of the link's, in one direction."""
    budget_gib: float = 80.0
    """Memory of a device."""
    state_bytes: int = 12
    """What an optimiser keeps of each weight: 12 are two moments and a copy in float32."""
    jobs: int = 2
    """Processes that count."""
    write: bool = False
    """Write benchmarks/results/scale.md instead of printing it."""

    def shapes(self) -> list[Shape]:
        """The heads, and the one in the middle with other numbers of tokens."""
        found = [Shape(self.tokens, *each) for each in itertools.product(self.classes, self.features, self.devices)]
        classes, features, devices = (each[len(each) // 2] for each in (self.classes, self.features, self.devices))
        return found + [Shape(self.tokens * factor, classes, features, devices) for factor in (1, 4, 16)]

    def link_of(self, preset: str) -> Link:
        name, latency, bandwidth = astuple(LINKS[self.link or preset])
        return Link(
            name,
            latency if self.latency_us is None else self.latency_us,
            bandwidth if self.gigabytes_per_second is None else self.gigabytes_per_second,
        )


def scale(options: Annotated[Options, tyro.conf.arg(name="")] = Options()) -> None:
    """Simulate time and memory of a head by number of devices, whole or with a shared vocabulary.

    Args:
        options: what is simulated.
    """
    sections = [_section(options, each) for each in options.times]
    text = render(Path(__file__).with_name("report.md.jinja"), options=options, sections=sections)
    if not options.write:
        print(text)
        return
    path = RESULTS / "scale.md"
    path.write_text(text + "\n", encoding="utf-8")
    print(os.path.relpath(path))


def _section(options: Options, times: Times) -> dict[str, Any]:
    measure, dtype, kind, preset = _DEVICES[times]
    measured, link = measure(), options.link_of(preset)
    shapes = [replace(each, dtype=dtype, kind=kind) for each in options.shapes()]
    counts = _counted(shapes, options.jobs)
    rows = [_row(each, next(counts), measured, link, options) for each in shapes]
    number = len(shapes) - 3
    shared = [row["fastest"] for row in rows[:number] if row["devices"] > 1]
    return {
        "measured": measured.source,
        "link": link,
        "dtype": dtype,
        "table": table([{key: each for key, each in row.items() if key != "tokens"} for row in rows[:number]]),
        "by_tokens": table(rows[number:]),
        "fastest": ", ".join(f"{name} in {times}" for name, times in Counter(shared).most_common()),
        "cases": len(shared),
    }


def _counted(shapes: Sequence[Shape], jobs: int) -> Iterator[list[Counts]]:
    """For each shape, the counts of each layout."""
    work = [each for shape in shapes for each in itertools.product((shape,), LAYOUTS)]
    if jobs == 1:
        counts = list(itertools.starmap(count, work))
    else:
        # Spawned: torch has threads, which do not survive a fork.
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            counts = list(pool.map(count, *zip(*work, strict=True), chunksize=3))
    return (counts[start : start + len(LAYOUTS)] for start in range(0, len(counts), len(LAYOUTS)))


def _row(shape: Shape, counts: Sequence[Counts], measured: Measured, link: Link, options: Options) -> dict[str, Any]:
    row: dict[str, Any] = {"V": shape.classes, "d": shape.features, "devices": shape.devices, "tokens": shape.tokens}
    ms: dict[str, float] = {}
    for layout, counted in zip(LAYOUTS, counts, strict=True):
        here = shape.of_device(layout)
        compute, exchange = measured.fits[layout].ms(here), sum(map(link.ms, counted.collectives))
        memory = (counted.peak_bytes + options.state_bytes * here.classes * here.features) / 2**30
        fits = memory <= options.budget_gib
        row |= {f"{layout}: compute": _short(compute), f"{layout}: link": _short(exchange)}
        row[f"{layout}: GiB"] = f"{memory:,.2f}" if fits else f"{memory:,.2f} (no)"
        if fits:
            ms[layout] = compute + exchange
    return row | {"fastest": min(ms, key=ms.__getitem__, default="none fits")}


def _short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
