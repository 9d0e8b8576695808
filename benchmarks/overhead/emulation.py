"""A machine without a GPU in the place of one: proves that a program for a GPU runs, before there is one to run it on.

Triton's interpreter and the host execution of the CUDA kernels are those of the tests. What they take is no time of any
GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .cases import Case

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


def tune_host(**wishes: int) -> None:
    """The counterpart of ``monosoftmax._C.tune_plans`` while :func:`emulating` lasts."""
    cuda_host = sys.modules["cuda_host"]
    cuda_host.module().set_device(90, 2, cuda_host.DEVICES[90], **wishes)


def shrunk(case: Case) -> Case:
    """At most 4 rows, 512 classes and 64 features. The classes keep their remainder by 8, which decides alignment."""
    return replace(
        case,
        rows=max(1, min(4, case.rows // 2048)),
        classes=max(1, min(512, case.classes // 4096 * 8)) + case.classes % 8,
        dim=None if case.dim is None else max(16, min(64, case.dim // 64)),
    )
