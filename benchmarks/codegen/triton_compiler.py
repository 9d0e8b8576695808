"""The Triton kernels, compiled by Triton for GPUs that are not there.

Each kernel is launched by the package itself. The launch is taken down instead of executed, and compiled from that. So
the launchers choose arguments, tiles and options here, as they do on a GPU.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import triton_calls
from .cubin import Program, read_cubin
from .figures import AMD, Figures, Kernel, Measurement, of_amd, of_nvidia

NAME = "triton"
MAIN_TARGET = "sm_90"
#: NVIDIA's A100, H100, B200 and RTX 50, AMD's MI300.
GPUS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)} | {AMD: GPUTarget("hip", AMD, 64)}
TARGETS = tuple(GPUS)


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target; ``program`` is the machine code, None for AMD."""

    figures: Figures
    program: Program | None


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
        """Compiles as :class:`JITFunction` does at the first launch on ``target``."""
        with _compiling_for(target):
            named = {**self.named, "debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
            *_, backend, bind = self.kernel.create_binder()
            bound, specialization, options = bind(*self.arguments, **named)
            options, signature, constants, attributes = self.kernel._pack_args(
                backend, named, bound, specialization, options
            )
            source = ASTSource(self.kernel, signature, constants, attributes)
            compiled = triton.compile(source, target=GPUS[target], options=options.__dict__)
        shared, threads = compiled.metadata.shared, compiled.metadata.num_warps * GPUS[target].warp_size
        if target == AMD:
            return Compiled(of_amd(compiled.asm["amdgcn"], threads, shared), None)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            program = read_cubin(Path(file.name))[compiled.metadata.name]
        return Compiled(of_nvidia(program, target, threads, shared), program)


def version() -> str:
    """The compiler, whose wheel has the assembler, too."""
    return f"Triton {triton.__version__}"


def work(targets: tuple[str, ...] = TARGETS) -> list[tuple[Kernel, str]]:
    """What is compiled: every kernel for the main target, and the costly ones for every target.

    Of the others so many that each transform, operator, type and variant meets each target in one of them.
    """
    found: list[tuple[Kernel, str]] = []
    met: set[tuple[str, str]] = set()
    for kernel in triton_calls.kernels():
        words = (kernel.transform, kernel.operator, kernel.dtype, kernel.variant)
        new = {target: {(word, target) for word in words} - met for target in TARGETS if target != MAIN_TARGET}
        wanted = [*new] if triton_calls.is_costly(kernel) else [max(new, key=lambda target: len(new[target]))]
        wanted = [target for target in wanted if new[target] or triton_calls.is_costly(kernel)]
        found += [(kernel, target) for target in (MAIN_TARGET, *wanted)]
        met.update(*(new[target] for target in wanted))
    return [each for each in found if each[1] in targets]


def measure(kernel: Kernel, target: str) -> list[Measurement]:
    """One kernel, as it is compiled for a target."""
    return [Measurement(kernel, target, launch_of(kernel, target).compile_for(target).figures)]


def launch_of(kernel: Kernel, target: str) -> Launch:
    """The launch of a kernel, as the package makes it on ``target``."""
    with triton_calls.as_on(target, GPUS[target].warp_size):
        launches = launches_of(triton_calls.call_of(kernel))
    # By deterministic algorithms the second one adds up what the first one wrote.
    return launches[-1 if "deterministic" in kernel.variant else 0]


def launches_of(action: Callable[[], object]) -> list[Launch]:
    """The launches that ``action`` makes. None is executed: what it computes has no meaning."""
    launches: list[Launch] = []

    def take_down(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append(Launch(self, arguments, named))

    with mock.patch.object(JITFunction, "run", take_down):
        action()
    return launches


class _Driver:
    """Stands in for the driver of a target: it says which one is active."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def _compiling_for(target: str) -> Iterator[None]:
    """Makes ``target`` the active one, which device functions ask for, and Triton's cache a new one.

    Triton's cache does not see that a global constexpr has another value: what was compiled earlier may be stale.
    """
    before = driver._active
    with tempfile.TemporaryDirectory(prefix="monosoftmax-codegen-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        driver.set_active(_Driver(GPUS[target]))
        try:
            yield
        finally:
            driver._active = before
