"""The cases of a CPU for ``pytest benchmarks/overhead --benchmark-only -k 'quick and plif-64' --benchmark-compare``.

For one contestant over time. ``python -m benchmarks run overhead`` compares contestants, since they take turns there.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch

from .cases import make_inputs
from .contestants import Unavailable, prepare
from .presets import Timing, timings

pytest.importorskip("pytest_benchmark", reason="the cases are pytest-benchmark tests")
_inputs = lru_cache(1)(make_inputs)
_CASES = [(name, timing, each) for name, timing in timings() if timing.device == "cpu" for each in timing.contestants]


@pytest.mark.parametrize(("unit", "timing", "name"), _CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_overhead(benchmark: Any, unit: str, timing: Timing, name: str) -> None:
    try:
        contestant = prepare(name, timing.case, _inputs(timing.case, torch.device("cpu")))
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = unit
    benchmark.pedantic(contestant.step, rounds=5, warmup_rounds=2)
