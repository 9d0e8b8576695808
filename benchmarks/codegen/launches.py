"""What the package launches: each launch is taken down instead of executed, and compiled for a target from that.

So nothing of a kernel's arguments, tiles or options is described a second time: the launchers choose them, and Triton's
own binder makes of the arguments what it makes of them on a GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton import knobs
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .triton_targets import Compiled, compile_source, compiling_for


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    #: By name, the options of the compiler among them.
    named: Mapping[str, Any]

    @property
    def values(self) -> dict[str, Any]:
        """The kernel's arguments by name."""
        parameters = self.kernel.signature.parameters
        own = {name: each for name, each in self.named.items() if name in parameters}
        bound = inspect.Signature(list(parameters.values())).bind(*self.arguments, **own)
        bound.apply_defaults()
        return dict(bound.arguments)

    def compile_for(self, target: str) -> Compiled:
        """As :class:`JITFunction` would compile it at its first launch on ``target``."""
        with compiling_for(target) as active:
            named = {**self.named, "debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
            *_, backend, bind = self.kernel.create_binder()
            bound, specialization, options = bind(*self.arguments, **named)
            options, signature, constants, attributes = self.kernel._pack_args(
                backend, named, bound, specialization, options
            )
            assert active.backend == backend.target.backend
            return compile_source(ASTSource(self.kernel, signature, constants, attributes), target, options.__dict__)


def launches_of(action: Callable[[], object]) -> list[Launch]:
    """The launches that ``action`` makes, none of which is executed: what it computes is of no meaning."""
    with _taking_down() as launches:
        action()
    return launches


@contextmanager
def _taking_down() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def take_down(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(Launch(self, arguments, named))

    with mock.patch.object(JITFunction, "run", take_down):
        yield launches
