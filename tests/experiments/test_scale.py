"""The simulator of scale: what it counts, beside processes that exchange values; its link; its fits; its report."""

from __future__ import annotations

import gc
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import monosoftmax as ms
from benchmarks.overhead.memory import _ENVIRONMENT, _kib
from benchmarks.scale import compute, counting
from benchmarks.scale.command import Options, scale
from benchmarks.scale.counting import Counts, count
from benchmarks.scale.links import Link
from benchmarks.scale.step import LAYOUTS, Layout, Shape, prepare
from monosoftmax.distributed import problem
from monosoftmax.distributed.collectives import Collective
from monosoftmax.functional import for_kernels
from monosoftmax.groups import RowResults, Upstream
from monosoftmax.row_kernels import row_kernels

#: Large enough for tensors to count beside what a process takes anyway. Shares and chunks are uneven.
SHAPE = Shape(tokens=601, classes=12_001, features=512, devices=2)

#: What torch's own operators of collectives exchange, whoever calls them: the operator, and bytes.
Dispatched = list[tuple[str, int]]


class _Dispatched(TorchDispatchMode):
    found: Dispatched

    def __enter__(self) -> Any:
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.found.append((func.__name__, sum(each.nbytes for each in args[0])))
        return func(*args, **(kwargs or {}))


def _rank(folder: Path, rank: int, shape: Shape) -> dict[Layout, tuple[Counts, Dispatched]]:
    """What a process exchanges and holds: by the growth of its resident set, to the peak."""
    torch.set_num_threads(1)
    init = f"file://{folder}/store"
    dist.init_process_group("gloo", init, timedelta(seconds=120), world_size=shape.devices, rank=rank)
    for layout in LAYOUTS:
        with _Dispatched():
            prepare(replace(shape, tokens=8, classes=64), layout)()  # loads the code
    found: dict[Layout, tuple[Counts, Dispatched]] = {}
    first = _kib("/proc/self/status", "VmRSS")
    for layout in LAYOUTS:
        # A thread of gloo lets go of what it has summed when it comes to it.
        until = time.monotonic() + 10
        while (before := _kib("/proc/self/status", "VmRSS")) > first + 4096 and time.monotonic() < until:
            gc.collect()
            time.sleep(0.01)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        step = prepare(shape, layout)
        with ms.distributed.traffic() as collectives, _Dispatched() as dispatched:
            step()
        peak = 1024 * (_kib("/proc/self/status", "VmHWM") - before)
        found[layout] = Counts(collectives, peak), dispatched.found
        del step
    dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.seconds
@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_counts_are_those_of_processes_that_exchange_values(devices: int, tmp_path: Path) -> None:
    shape = replace(SHAPE, devices=devices)
    pool = ProcessPoolExecutor(devices, get_context("spawn"))
    with mock.patch.dict(os.environ, _ENVIRONMENT), pool:
        ranks = list(pool.map(_rank, [tmp_path] * devices, range(devices), [shape] * devices))
    for layout in LAYOUTS:
        counted = count(shape, layout)
        for rank in ranks:
            found, dispatched = rank[layout]
            print(layout, found.peak_bytes / 2**20, counted.peak_bytes / 2**20, len(found.collectives))
            assert found.collectives == counted.collectives
            assert dispatched == [("allreduce_.default", each.nbytes) for each in counted.collectives]
            assert found.peak_bytes == pytest.approx(counted.peak_bytes, rel=0, abs=3 * 2**20), layout


def test_kernels_without_values_make_what_kernels_make() -> None:
    transform = for_kernels(ms.transforms.PLIF(64), torch.empty(3, 7))
    upstream, stats = Upstream(torch.ones(3)), torch.ones(2, 3)
    for given in ({}, {"upstream": upstream, "output_mask": (True, True), "row_stats": stats}):
        made = []
        for kernels in (row_kernels("cpu"), counting._Kernels()):
            rows = torch.randn(3, 7)
            more = {**given, "grad_rows": rows} if given else {}
            found = kernels.cross_entropy(rows, torch.tensor([1, 2, 3]), transform, problem.PLAIN, **more)
            made.append([(each.shape, each.dtype, each is rows) for each in RowResults(*found)])
        assert made[0] == made[1]


def test_a_ring() -> None:
    link = Link("", latency_us=10.0, gigabytes_per_second=2.0)
    # Six steps, each of a quarter of 8 MB; three steps, each of all.
    assert link.ms(Collective("sum", "", 2_000_000, 8_000_000, 4)) == pytest.approx(6 * (0.01 + 1.0))
    assert link.ms(Collective("gather", "", 2_000_000, 8_000_000, 4)) == pytest.approx(3 * (0.01 + 4.0))


def test_fits() -> None:
    shapes = [
        Shape(tokens, classes, features, 1) for tokens in (100, 900) for classes in (50, 80) for features in (9, 30)
    ]
    truth = compute.Fit((2e-6, 3e-8, 5e-7), 0.0)
    found = compute.fit([(compute.work(shape, 128), truth.ms(shape, 128)) for shape in shapes])
    assert found.ms_per == pytest.approx(truth.ms_per) and found.largest_error < 1e-6
    # What was measured is found again, and a step that computes the logits again takes longer.
    measured = compute.measured_on_h100()
    shape = Shape(8192, 50_304, 2048, 1, "bfloat16", "cuda")
    assert measured.fits["ahead"].ms(shape) == pytest.approx(8.66234, rel=0.01)
    assert measured.fits["again"].ms(shape) == pytest.approx(8.66234 + 2.82246, rel=0.01)
    small = [replace(each, tokens=8) for each in shapes]
    with mock.patch.multiple(compute, _FITTED=small, _LEFT_OUT=small[-1]):
        here = compute.measured_here(rounds=1)
    assert all(each.ms(SHAPE) > 0 for each in here.fits.values()) and "medians of 1" in here.source


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(classes=(32_000,), features=(4096,), devices=(1, 4), jobs=1, budget_gib=1.0, latency_us=7.0)
    scale(options)
    text = capsys.readouterr().out
    assert "# Scale, simulated" in text and "7 us, 450 GB/s" in text
    one, four = [line.split("|") for line in text.splitlines() if line.startswith("| 32000")][:2]
    assert "(no)" in one[6] and one[13].strip() == "none fits"
    assert "(no)" in four[6] and "(no)" not in four[9] and four[13].strip() == "ahead"
