"""Compiles Triton kernels for GPUs that are not there, and says whether they spill registers."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compiled_without_spills(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    folder: Path,
    num_warps: int = 4,
    aligned: Sequence[str] = (),
) -> str:
    """The PTX or AMD assembly of ``kernel``; an AssertionError where it spills. ``aligned`` are multiples of 16."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): each for name, each in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name in names},
    )
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps})
    if target == "gfx942":
        assembly: str = compiled.asm["amdgcn"]
        assert re.search(r"\.vgpr_spill_count:\s+0\b", assembly)
        return assembly
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [_CUOBJDUMP, "-res-usage", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"\bSTACK:0\b", report.stdout + report.stderr)  # where registers are spilled to
    assembly = compiled.asm["ptx"]
    return assembly
