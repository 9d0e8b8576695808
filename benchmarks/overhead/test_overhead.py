"""The cases as pytest-benchmark tests: ``pytest benchmarks/overhead --benchmark-only -k 'quick and plif-64'``.

It finishes one contestant before the next begins: compare runs over time with it (``--benchmark-compare``). Contestants
with each other compare best in turns, as ``python -m benchmarks run overhead`` runs them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from .cases import Case, make_inputs
from .contestants import prepare
from .peers import Unavailable
from .presets import timings

pytest.importorskip("pytest_benchmark", reason="the cases are pytest-benchmark tests")
_inputs = lru_cache(1)(make_inputs)


@pytest.mark.parametrize(
    ("case", "device", "name"),
    [
        pytest.param(timing.case, timing.device, name, id=f"{unit}, {name}")
        for unit, timing in timings()
        if timing.device in ("cpu", "cuda" if torch.cuda.is_available() else "")
        for name in timing.contestants
    ],
)
def test_overhead(benchmark: Any, case: Case, device: str, name: str) -> None:
    try:
        contestant = prepare(name, case, _inputs(case, torch.device(device)))
    except Unavailable as reason:
        pytest.skip(str(reason))

    def step() -> None:
        contestant.step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
