"""What every test shares: GPU tests skip with a reason, threads are reset, hypothesis has no deadline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("monosoftmax", deadline=None)
settings.load_profile("monosoftmax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch finds no GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _gpu_kernels_on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests with the parameter backend="triton" run its kernels in its interpreter, "cuda" in their host execution."""
    callspec = getattr(request.node, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        from triton_interpreter import interpreting

        with interpreting():
            yield
    elif backend == "cuda":
        from cuda_host import executing

        with executing():
            yield
    else:
        yield
