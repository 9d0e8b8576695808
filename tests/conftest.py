"""What every test shares: tiers, the device of a backend, the skips of GPU tests, threads, hypothesis' deadline."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import tiers
import torch
from hands import on
from hypothesis import settings

import monosoftmax as ms

settings.register_profile("monosoftmax", deadline=None)
settings.load_profile("monosoftmax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate", action="store_true", help="run the tests of tests/gpu on the CPU: small shapes, under emulators"
    )
    parser.addoption(
        "--exhaustive", action="store_true", help="run whole grids, and the tests marked slow (tests/tiers.py)"
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too, but grids in part")
    parser.addoption("--record", metavar="FILE", help="add a line of JSON for each test, as soon as it ends")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(tiers)
    if "PYTEST_XDIST_WORKER" in os.environ:
        # There are as many workers as cores.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    path = config.getoption("--record")
    if path and not hasattr(config, "workerinput"):  # of several processes, the one that the others report to
        config.pluginmanager.register(_Record(Path(path)))


class _Record:
    """What became of each test, in a file that is whole at any moment."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            lines = report.longreprtext.splitlines()
            line["why"] = " ".join(each[1:].strip() for each in lines if each.startswith("E "))[:400] or lines[-1:]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        tiers.mark(item)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords and not (config.getoption("--emulate") and "emulated" in item.keywords):
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def where_it_runs(backend: str) -> AbstractContextManager[Any]:
    """While it lasts, ``backend`` takes new tensors: those of the GPU where there is one, else of the CPU, emulated."""
    if torch.cuda.is_available():
        status = ms.backends.available()[backend]
        if not status.available:
            pytest.skip(status.detail)
        return torch.device("cuda")
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    return on(backend)


@pytest.fixture(autouse=True)
def _on_the_device_of_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests with the parameter backend="triton" or "cuda" make their tensors where that backend runs."""
    callspec = getattr(request.node, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend not in ("triton", "cuda"):
        yield
        return
    with where_it_runs(backend):
        yield
