"""A machine without a GPU in the place of one: proves that a program for a GPU runs, before there is one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TESTS = Path(__file__).parents[2] / "tests"
#: The kernels must be loaded before they are interpreted: else they would stay so.
_KERNELS = ("monosoftmax.triton_kernels.operators", "monosoftmax.triton_kernels.recompute_head")


@contextmanager
def emulating() -> Iterator[None]:
    """While it lasts, the triton and the cuda backend take CPU tensors."""
    for module in _KERNELS:
        importlib.import_module(module)
    sys.path.insert(0, str(_TESTS))
    try:
        interpreter, host = (importlib.import_module(name) for name in ("triton_interpreter", "cuda_host"))
    finally:
        sys.path.remove(str(_TESTS))
    with interpreter.interpreting(), host.executing():
        yield
