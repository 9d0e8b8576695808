"""What a step exchanges and holds, found by running it: under torch's fake process group, on tensors without values.

So shapes of any size are counted as they are, in milliseconds, and nothing is counted by hand. The step takes the path
of a GPU. Only the row kernels are stood in for: their results are made, and nothing is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import monosoftmax as ms
from monosoftmax.distributed import problem
from monosoftmax.distributed.collectives import Collective
from monosoftmax.groups import LossOptions, RowResults, Transform

from .step import Layout, Shape, fake_devices, prepare


class Counts(NamedTuple):
    """What one device exchanges in a step, and the bytes of all tensors that it holds at a time, operands included."""

    collectives: list[Collective]
    peak_bytes: int


def count(shape: Shape, layout: Layout) -> Counts:
    """The counts of the first device, which has as many classes and tokens as any."""
    with fake_devices(shape.devices), _without_values(), ms.distributed.traffic() as collectives, Memory() as memory:
        prepare(shape, layout, "meta")()
    return Counts(collectives, memory.peak_bytes)


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts, adds up the bytes of the tensors that operators make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key)
            self.peak_bytes = max(self.peak_bytes, sum(self._alive.values()))


class _Kernels:
    """Row kernels that make their results, without values; tests compare these with those of kernels that compute."""

    def cross_entropy(
        self, rows: Tensor, target: Tensor, transform: Transform, options: LossOptions, **given: Any
    ) -> RowResults:
        like, nothing = transform.coefficients, transform.coefficients.new_empty(0)
        needs_rows, needs_coefficients = given.get("output_mask", (False, False))
        first = given.get("row_stats") is None
        return RowResults(
            loss=like.new_empty(len(rows)) if first else nothing,
            lse=like.new_empty(len(rows)) if first else nothing,
            row_stats=like.new_empty(2, len(rows)) if first else nothing,
            grad_rows=given["grad_rows"] if needs_rows else nothing,
            grad_coefficients=torch.empty_like(like) if needs_coefficients else nothing,
        )

    def scale_(self, tensor: Tensor, factor: Tensor) -> None: ...


@contextmanager
def _without_values() -> Iterator[None]:
    """While it lasts, the functions of monosoftmax.distributed take tensors on the device ``meta``."""
    # Only the reference backend takes them.
    with mock.patch.object(problem, "ReferenceRows", lambda *_: _Kernels()):
        yield
