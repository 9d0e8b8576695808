"""The cases of the suite as pytest-benchmark tests: ``pytest benchmarks/overhead --overhead='--preset must'``.

pytest-benchmark finishes one contestant before the next begins: compare runs of one contestant over time with it
(``--benchmark-autosave``, ``--benchmark-compare``). Contestants with each other compare best in turns, as
``python -m benchmarks.overhead`` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .cases import Case, Inputs, make_inputs
from .contestants import prepare
from .limits import is_out_of_memory
from .peers import Unavailable
from .settings import Run
from .timing import WARM_UP_CALLS

pytest.importorskip("pytest_benchmark", reason="the cases are pytest-benchmark tests")


@pytest.fixture(scope="module")
def inputs(case: Case, run: Run) -> Iterator[Inputs]:
    yield make_inputs(case, run.device)
    torch.compiler.reset()


def test_overhead(benchmark: Any, case: Case, contestant_name: str, inputs: Inputs, run: Run) -> None:
    try:
        contestant = prepare(contestant_name, case, inputs)
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = str(case)
    benchmark.extra_info.update(
        case=case.to_json(), contestant=contestant_name, backend=contestant.backend, note=contestant.note
    )

    def step() -> None:
        contestant.step()
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)

    def setup() -> None:
        contestant.reset()

    try:
        benchmark.pedantic(step, setup=setup, rounds=run.repeats, warmup_rounds=WARM_UP_CALLS)
    except Exception as error:
        if is_out_of_memory(error):
            pytest.skip("out of memory")
        raise
