"""Triton kernels compiled for GPUs that are not there: by Triton's own compiler and assemblers, without a driver.

The figures are those of the compiler that is installed. Nothing is run, and nothing here says how long a kernel takes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from . import sass

#: What kernels are compiled for: NVIDIA's A100, H100, B200 and RTX 50, AMD's MI300.
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_AMD_LOADS, _AMD_STORES = (rf"^\s+(?:global|buffer)_{each}_(\w+)" for each in ("load", "store"))
_AMD_ATOMICS = re.compile(r"^\s+(?:global|buffer|flat)_atomic_\w+", re.M)
_AMD_MATRIX = re.compile(r"^\s+(v_mfma)_\w+", re.M)
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}


class CodegenError(Exception):
    """What was compiled is not what this package can read."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was compiled for one target, and what it takes there.

    ``spills`` are bytes a thread (NVIDIA: the stack; AMD: scratch memory and spilled vector registers, 4 bytes each).
    Widths are bytes that a thread accesses at once, 0 where it accesses nothing.
    """

    target: str
    kernel: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    load_bytes: int
    store_bytes: int
    atomics: int
    matrix: tuple[str, ...]
    #: PTX, or AMD's assembly.
    assembly: str
    #: The machine code; None for AMD.
    function: sass.Function | None = None

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return self.num_warps * int(TARGETS[self.target].warp_size)


class _Driver:
    """Stands in for the driver of a target: it says which one is active."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def compiling_for(target: str) -> Iterator[GPUTarget]:
    """Makes ``target`` the active one, as the device functions ask for it, and Triton's cache a new one.

    Triton's cache does not notice that a global constexpr has another value: what was compiled earlier may be stale.
    """
    before = driver._active
    with tempfile.TemporaryDirectory(prefix="monosoftmax-codegen-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        driver.set_active(_Driver(TARGETS[target]))
        try:
            yield TARGETS[target]
        finally:
            driver._active = before


def compile_for(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    num_warps: int = 4,
    aligned: Sequence[str] = (),
    **options: Any,
) -> Compiled:
    """``kernel`` as it is compiled for ``target``.

    Args:
        types: the types of the arguments, as Triton writes them (``*bf16``, ``i32``); what has none is a constexpr.
        constants: the values of the constexprs.
        aligned: the arguments that are multiples of 16.
        options: others of the compiler, such as ``num_stages`` or, for NVIDIA, ``maxnreg``.
    """
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): each for name, each in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names},
    )
    with compiling_for(target):
        return compile_source(source, target, {"num_warps": num_warps, **options})


def compile_source(source: ASTSource, target: str, options: Mapping[str, Any]) -> Compiled:
    """What ``source`` is compiled to. The target must be the active one (:func:`compiling_for`)."""
    compiled = triton.compile(source, target=TARGETS[target], options=dict(options))
    metadata = compiled.metadata
    if TARGETS[target].backend == "hip":
        return _of_amd(compiled.asm["amdgcn"], target, metadata)
    resources, function = read_cubin(compiled.asm["cubin"], metadata.name)
    code = function.instructions
    loads, stores = (sass.widest(function.matching(each)) for each in (sass.is_global_load, sass.is_global_store))
    spills = resources["STACK"] + resources["LOCAL"]
    if spills == 0 and any(map(sass.is_spill, code)):
        raise CodegenError(f"{metadata.name} for {target}: local memory is accessed, but no stack is reported")
    return Compiled(
        target=target,
        kernel=metadata.name,
        registers=resources["REG"],
        spills=spills,
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        load_bytes=0 if loads is None else loads.access_bytes,
        store_bytes=0 if stores is None else stores.access_bytes,
        atomics=sum(each.name in sass.ATOMICS for each in code),
        matrix=tuple(sorted({each.name for each in code} & set(sass.MATRIX))),
        assembly=compiled.asm["ptx"],
        function=function,
    )


def read_cubin(cubin: bytes, kernel: str) -> tuple[dict[str, int], sass.Function]:
    """The resources (REG, STACK, SHARED, LOCAL) and the machine code of a kernel, by Triton's tools."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report, listing = _run(("cuobjdump", "-res-usage", file.name), ("nvdisasm", "-c", "-g", file.name))
    for name, *numbers in _RESOURCES.findall(report):
        if name == kernel:
            resources = dict(zip(("REG", "STACK", "SHARED", "LOCAL"), map(int, numbers), strict=True))
            return resources, sass.parse(listing)[kernel]
    raise CodegenError(f"cuobjdump reports no resources of {kernel}:\n{report}")


def _run(*commands: tuple[str, ...]) -> list[str]:
    """What tools write, side by side."""
    running = [
        subprocess.Popen(
            [_TOOLS / tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        for tool, *arguments in commands
    ]
    outputs = [process.communicate() for process in running]
    for process, command, (_, errors) in zip(running, commands, outputs, strict=True):
        if process.returncode != 0:
            raise CodegenError(f"{' '.join(command)} failed:\n{errors}")
    return [output for output, _ in outputs]


def _of_amd(assembly: str, target: str, metadata: Any) -> Compiled:
    def number(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.M)
        if found is None:
            raise CodegenError(f"{metadata.name} for {target}: its assembly has no .{name}")
        return int(found[1])

    def width(pattern: str) -> int:
        found = {match[1] for match in re.finditer(pattern, assembly, re.M)}
        return max((_AMD_BYTES.get(each, 1) for each in found), default=0)

    return Compiled(
        target=target,
        kernel=metadata.name,
        registers=number("vgpr_count"),
        spills=max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count")),
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        load_bytes=width(_AMD_LOADS),
        store_bytes=width(_AMD_STORES),
        atomics=len(_AMD_ATOMICS.findall(assembly)),
        matrix=tuple(sorted(set(_AMD_MATRIX.findall(assembly)))),
        assembly=assembly,
    )
