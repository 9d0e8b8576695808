"""Options of ``pytest benchmarks/overhead``, and its parameters: every contestant of every case of a preset."""

from __future__ import annotations

import shlex

import pytest
import torch

from ..machine import available_bytes
from .limits import limit_allocations
from .run import RunError, use_device
from .settings import PRESETS, Run, parse

#: Options that say where results go and what is measured beside time: pytest-benchmark has its own.
_WITHOUT_EFFECT = {"--output", "--overwrite", "--without-memory"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--overhead",
        default="--preset quick",
        help=f"arguments of python -m benchmarks.overhead, such as '--preset must' (of {', '.join(PRESETS)})",
    )


@pytest.fixture(scope="session")
def run(pytestconfig: pytest.Config) -> Run:
    run = _run(pytestconfig)
    torch.set_num_threads(run.threads)
    if run.device.type == "cpu":
        limit_allocations(available_bytes())
    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contestant_name"} <= set(metafunc.fixturenames):
        plan = _run(metafunc.config).plan()
        metafunc.parametrize(
            ("case", "contestant_name"),
            [pytest.param(case, name, id=f"{case}, {name}") for case, names in plan.items() for name in names],
            scope="module",
        )


def _run(config: pytest.Config) -> Run:
    arguments: str = config.getoption("--overhead")
    # Patterns of contestants have spaces in them: quotes keep those together.
    words = shlex.split(arguments)
    refused = _WITHOUT_EFFECT.intersection(words)
    if refused:
        raise pytest.UsageError(f"--overhead: {refused.pop()} has no effect under pytest")
    run = parse(words)
    try:
        use_device(run.device)
    except RunError as error:
        raise pytest.UsageError(str(error)) from None
    return run
