"""NVIDIA's machine code (SASS), whichever compiler it comes from: resources and instructions of the kernels of a cubin.

Triton's wheel has the two tools that read a cubin.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..engine.experiment import ExperimentError

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SECTION = re.compile(r"\s*\.section\s+(?:\.text\.([^,\s]+))?")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WIDTH = re.compile(r"\.(8|16|32|64|128|256)\b|\.[US](8|16)\b")

#: Matrix products of a warp, of a warp group (wgmma) and of a processor's tensor memory (tcgen05).
MATRIX = frozenset(f"{kind}MMA" for kind in "HIDQO") | {"HGMMA", "QGMMA", "IGMMA"}
MATRIX |= {f"UTC{kind}MMA" for kind in "HQIO"}


class ToolError(ExperimentError):
    """A tool is missing or fails, or wrote what this package cannot read."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a listing."""

    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def access_bytes(self) -> int:
        """How many bytes a thread loads or stores."""
        found = _WIDTH.search(self.opcode)
        return 4 if found is None else int(found[1] or found[2]) // 8


@dataclass(frozen=True)
class Program:
    """A kernel of a cubin. ``stack``, ``local``: bytes of a thread's own memory; ``shared``: bytes of a block."""

    registers: int
    stack: int
    local: int
    shared: int
    instructions: tuple[Instruction, ...]


def read_cubin(cubin: Path) -> dict[str, Program]:
    """The kernels of a cubin, by their symbols."""
    resources = _RESOURCES.findall(run(_tool("cuobjdump"), "-res-usage", str(cubin)))
    listing = parse_listing(run(_tool("nvdisasm"), "-c", str(cubin)))
    found = {}
    for name, registers, stack, shared, local in resources:
        if name not in listing:
            raise ToolError(f"nvdisasm lists no instructions of {name}")
        found[name] = Program(int(registers), int(stack), int(local), int(shared), tuple(listing[name]))
    if set(found) != set(listing):
        raise ToolError(f"cuobjdump reports no resources of {sorted(set(listing) - set(found))}")
    return found


def parse_listing(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each function that ``nvdisasm -c`` lists."""
    functions: dict[str, list[Instruction]] = {}
    function: list[Instruction] | None = None
    for line in listing.splitlines():
        if found := _INSTRUCTION.match(line):
            if function is not None:
                function.append(Instruction(found[2], found[3], found[1] or ""))
        elif found := _SECTION.match(line):
            function = functions.setdefault(found[1], []) if found[1] else None
    if not any(functions.values()):
        raise ToolError("no instructions in the listing")
    return functions


def run(*command: str, text: str | None = None) -> str:
    """The standard output of a command."""
    result = subprocess.run(command, input=text, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        raise ToolError(f"{' '.join(command)} failed:\n{result.stderr}{result.stdout[-2000:]}")
    return result.stdout


@cache
def _tool(name: str) -> str:
    triton = importlib.util.find_spec("triton")
    folder = "" if triton is None or triton.origin is None else str(Path(triton.origin).parent / "backends/nvidia/bin")
    found = shutil.which(name, path=os.pathsep.join([folder, os.environ.get("PATH", "")]))
    if found is None:
        raise ToolError(f"{name} is not installed: pip install triton, which has it")
    return found
