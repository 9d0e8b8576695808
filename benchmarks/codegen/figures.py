"""What is compiled and what it takes: the same description and the same figures for every compiler.

All figures are facts of machine code. None is a time: nothing is run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .cubin import MATRIX, Instruction, Program

_KIB = 1024
_WARP = 32
#: A multiprocessor's registers, and its parts, each of which has its own.
_REGISTERS, _PARTS = 64 * _KIB, 4

#: A histogram of accesses: bytes that a thread accesses at once, and the instructions that do; the widest first.
Accesses = tuple[tuple[int, int], ...]
_WIDTHS = {"wide": 16, "single": 2}


@dataclass(frozen=True)
class Device:
    """Limits of a multiprocessor, from the table "Technical Specifications per Compute Capability" of the CUDA guide.

    Shared memory is in bytes. ``reserved`` is the driver's part of each block.
    """

    product: str
    threads: int
    blocks: int
    shared: int
    reserved: int = _KIB
    matrix: str = "HMMA"


#: The targets, by the compilers' names for them.
DEVICES = {
    "sm_75": Device("T4", 1024, 16, 64 * _KIB, reserved=0),
    "sm_80": Device("A100", 2048, 32, 164 * _KIB),
    "sm_86": Device("RTX 3090", 1536, 16, 100 * _KIB),
    "sm_89": Device("RTX 4090", 1536, 24, 100 * _KIB),
    "sm_90": Device("H100", 2048, 32, 228 * _KIB, matrix="HGMMA"),
    "sm_100": Device("B200", 2048, 32, 228 * _KIB, matrix="UTCHMMA"),
    "sm_103": Device("B300", 2048, 32, 228 * _KIB, matrix="UTCHMMA"),
    "sm_120": Device("RTX 5090", 1536, 24, 100 * _KIB),
}
AMD = "gfx942"
AMD_SHARED = 64 * _KIB

_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store|atomic)_(\w+)", re.M)
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
_AMD_CODE = re.compile(r"^\s+[a-z]+_\w+", re.M)


@dataclass(frozen=True)
class Kernel:
    """What is compiled. ``operator`` and ``variant`` are the words of the report."""

    compiler: str
    transform: str
    operator: str
    dtype: str = "bf16"
    variant: str = ""

    def __str__(self) -> str:
        what = ", ".join(each for each in (self.operator, self.variant) if each)
        return f"{self.transform + ': ' if self.transform else ''}{what}{f' ({self.dtype})' if self.dtype else ''}"


@dataclass(frozen=True)
class Figures:
    """What a kernel takes on a target."""

    registers: int
    #: Bytes of a thread's own memory, for spilled registers and arrays, and the instructions that access it.
    local: int
    local_accesses: int
    #: Bytes of a block. Without the dynamic part of CUDA kernels, which csrc/cuda/plan.cpp chooses.
    shared: int
    threads: int
    #: Blocks that a multiprocessor has room for at once, by registers, shared memory and threads; None for AMD.
    blocks: int | None
    #: Of global memory; copies to shared memory are loads.
    loads: Accesses
    stores: Accesses
    async_copies: int
    atomics: int
    #: Names of the matrix instructions, and how many are those of the target's own matrix unit.
    matrix: tuple[str, ...]
    products: int
    #: Instructions of the code, each once however often it is executed.
    code: int

    def value(self, name: str) -> float | None:
        """A figure by its name; ``wide_`` loads or stores are those of 16 bytes, ``single_`` ones of two."""
        width, _, kind = name.partition("_")
        return dict(getattr(self, kind)).get(_WIDTHS[width], 0) if width in _WIDTHS else getattr(self, name)


@dataclass(frozen=True)
class Measurement:
    """A kernel as it was compiled for a target."""

    kernel: Kernel
    target: str
    figures: Figures


def of_nvidia(program: Program, target: str, threads: int, shared: int | None = None) -> Figures:
    """The figures of a kernel for NVIDIA, in blocks of ``threads`` with ``shared`` bytes, or what the code has."""
    if shared is None:
        # From sm_90 on cuobjdump adds the driver's part, where there is any.
        shared = program.shared - (DEVICES[target].reserved if program.shared and int(target[3:]) >= 90 else 0)
    # Before asynchronous copies ptxas writes loads that no thread executes.
    code = [each for each in program.instructions if each.predicate != "@!PT"]
    return Figures(
        registers=program.registers,
        local=program.stack + program.local,
        local_accesses=sum(each.name in ("LDL", "STL") for each in code),
        shared=shared,
        threads=threads,
        blocks=blocks_at_once(DEVICES[target], program.registers, shared, threads),
        loads=_histogram(each for each in code if each.name in ("LDG", "LDGSTS")),
        stores=_histogram(each for each in code if each.name == "STG"),
        async_copies=sum(each.name == "LDGSTS" for each in code),
        atomics=sum(each.name in ("ATOMG", "ATOM", "REDG", "RED") for each in code),
        matrix=tuple(sorted({each.name for each in code} & MATRIX)),
        products=sum(each.name == DEVICES[target].matrix for each in code),
        code=sum(each.name != "NOP" for each in code),
    )


def of_amd(assembly: str, threads: int, shared: int) -> Figures:
    """The figures of a kernel for AMD, from its assembly."""

    def number(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.M)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found[1])

    accesses: dict[str, Counter[int]] = {"load": Counter(), "store": Counter(), "atomic": Counter()}
    for kind, width in _AMD_ACCESS.findall(assembly):
        accesses[kind][_AMD_BYTES.get(width, 1)] += 1
    products = len(re.findall(r"^\s+v_mfma_", assembly, re.M))
    return Figures(
        registers=number("vgpr_count"),
        local=max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count")),
        local_accesses=len(re.findall(r"^\s+scratch_(?:load|store)_", assembly, re.M)),
        shared=shared,
        threads=threads,
        blocks=None,
        loads=_sorted(accesses["load"]),
        stores=_sorted(accesses["store"]),
        async_copies=0,
        atomics=accesses["atomic"].total(),
        matrix=("v_mfma",) if products else (),
        products=products,
        code=len(_AMD_CODE.findall(assembly)),
    )


def blocks_at_once(device: Device, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor has room for, as NVIDIA's ``cuda_occupancy.h`` computes it."""
    warps = _round_up(threads, _WARP) // _WARP
    of_warp = _round_up(registers * _WARP, 256)
    of_block = _round_up(shared + device.reserved, 128 if device.reserved else 256)
    by_registers = _PARTS * (_REGISTERS // _PARTS // of_warp) // warps
    by_shared = device.shared // of_block if of_block else device.blocks
    return min(device.blocks, device.threads // (warps * _WARP), by_registers, by_shared)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _histogram(accesses: Iterable[Instruction]) -> Accesses:
    return _sorted(Counter(each.access_bytes for each in accesses))


def _sorted(widths: Counter[int]) -> Accesses:
    return tuple(sorted(widths.items(), reverse=True))
