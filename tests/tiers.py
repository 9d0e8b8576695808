"""Selects the tests of an ordinary run. tests/conftest.py registers this file as a plugin.

The mark ``grid`` says that the parameters of a test hardly interact, so that a part of their combinations finds what
all of them find. An ordinary run takes a part

* in which each pair of values of two parameters occurs, on the CPU,
* in which each value of a parameter occurs, for each emulated backend, since a case takes seconds there.

``@pytest.mark.grid(1)`` asks for each value and ``grid(2)`` for each pair, whatever the test runs on.
:func:`covering` makes the part. It repeatedly takes the combination with the most pairs that do not occur yet, and the
first of several such combinations. So the part depends on nothing but the parameters and their order.

An ordinary run also leaves out the tests with the mark ``slow``. ``--slow`` runs these, ``--exhaustive`` everything.
A test that the command line names (``tests/unit/test_edges.py::test_no_classes[cpu]``) always runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

#: Values of parameters that are the names of backends with an emulator.
EMULATED = ("triton", "cuda")


def mostly_slow(values: Iterable[Any], usual: Collection[Any]) -> list[Any]:
    """Gives those of the values of a parameter, or the tuples of several, that are not ``usual`` the mark ``slow``."""
    arguments = [(each, each if isinstance(each, tuple) else (each,)) for each in values]
    return [each if each in usual else pytest.param(*given, marks=pytest.mark.slow) for each, given in arguments]


def covering(cases: Sequence[Sequence[str]], strength: int) -> list[int]:
    """Selects ``cases``, by number, that contain each combination of ``strength`` values that ``cases`` contain."""
    open_ = [set(combinations(enumerate(case), min(strength, len(case)))) for case in cases]
    taken = []
    while any(open_):
        best = max(range(len(open_)), key=lambda number: len(open_[number]))
        taken.append(best)
        done = set(open_[best])
        for each in open_:
            each -= done
    return sorted(taken)


def backend_of(item: pytest.Item) -> str | None:
    """Returns the emulated backend that a parameter of the test names."""
    callspec = getattr(item, "callspec", None)
    values = [] if callspec is None else callspec.params.values()
    return next((value for value in values if isinstance(value, str) and value in EMULATED), None)


def is_emulated(item: pytest.Item) -> bool:
    """Whether the test runs GPU kernels on the CPU. Those of tests/gpu are marked one by one."""
    if "gpu" in item.keywords:
        return False
    return item.path.parent.name == "emulated" or backend_of(item) is not None


def mark(item: pytest.Item) -> None:
    """Gives the test the mark of its tier, if it has one of its own."""
    if is_emulated(item):
        item.add_marker(pytest.mark.emulated)
    elif item.path.parent.name == "unit" and not any(map(item.get_closest_marker, ("seconds", "slow", "alone"))):
        item.add_marker(pytest.mark.check)


def left_out(items: Iterable[pytest.Item], also_slow: bool) -> list[pytest.Item]:
    """Returns the tests that an ordinary run does without; ``also_slow`` leaves out parts of grids only."""
    grids: dict[tuple[str, str | None], list[pytest.Item]] = {}
    slow = []
    for item in items:
        if item.get_closest_marker("slow") and not also_slow:
            slow.append(item)
        elif item.get_closest_marker("grid") and hasattr(item, "callspec"):
            backend = backend_of(item) if is_emulated(item) else None
            grids.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    thinned = []
    for of_a_test in grids.values():
        strength = (*of_a_test[0].get_closest_marker("grid").args, 1 if is_emulated(of_a_test[0]) else 2)[0]
        # The values of an item: one id for each parametrize, also of one with several arguments.
        taken = set(covering([item.callspec._idlist for item in of_a_test], strength))
        thinned += [item for number, item in enumerate(of_a_test) if number not in taken]
    return slow + thinned


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Runs after -k and -m, so that the part covers what they select."""
    named = any("::" in argument for argument in config.args)
    if config.getoption("--exhaustive") or named:
        return
    out = left_out(items, config.getoption("--slow"))
    config.hook.pytest_deselected(items=out)
    unwanted = set(map(id, out))
    items[:] = [item for item in items if id(item) not in unwanted]
