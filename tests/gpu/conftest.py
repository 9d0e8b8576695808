"""The tests of this folder run on a GPU, and with ``--emulate`` on the CPU: the same code, on small shapes.

    python -m pytest tests/gpu -n 16            on a machine with a GPU
    python -m pytest tests/gpu --emulate        anywhere: Triton's interpreter, the host execution of the CUDA kernels

Tests marked ``emulated`` run in both ways; the others ask for what only a device has.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    if config.getoption("--emulate"):
        # The interpreter takes a second for each: a third of them has every transform and every shape.
        cases = [item for item in items if item.nodeid.partition("[")[2].startswith("triton-") and _is_case(item)]
        left_out = {id(item) for i, item in enumerate(cases) if i % 3}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
        items[:] = [item for item in items if id(item) not in left_out]


def _is_case(item: pytest.Item) -> bool:
    return "test_as_close_to_the_truth_as_pytorch" in item.nodeid


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _the_same_numbers() -> None:
    torch.manual_seed(0)
