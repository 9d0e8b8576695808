"""The CUDA sources compiled for GPUs that are not there: by nvcc, without a driver.

The figures are those of the compiler that is installed. Nothing is run, and nothing here says how long a kernel takes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from . import sass
from .cuda_control_flow import ControlFlow, NaturalLoop
from .cuda_devices import DEVICES
from .cuda_loops import Kind, find_kinds
from .cuda_source import CSRC

TARGETS = tuple(DEVICES)

#: Those that setup.py gives nvcc, but for the targets and the host's. --fmad=false: as -ffp-contract=off there.
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr")
#: Has the compiler note where the code comes from; the code is the same.
_LINES = "-lineinfo"

MISSING = (
    "nvcc is not installed: pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime "
    "nvidia-cuda-cccl, or set CUDA_HOME"
)

_RESOURCES = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?"
)
_ARGUMENT = re.compile(r"^(?:void )?monosoftmax::cuda::(?:\(anonymous namespace\)::)?(\w+)(?:<(.*)>)?\(.*\)$")


class CudaError(Exception):
    """A tool is missing or fails, or wrote what this package cannot read."""


@dataclass(frozen=True)
class KernelName:
    """A kernel, and the parameters of its template in order, without namespaces; none if it is no template."""

    kernel: str
    parameters: tuple[str, ...]

    @property
    def _first(self) -> str:
        return self.parameters[0] if self.parameters else ""

    @property
    def transform(self) -> str:
        """The class of the transform, such as Plif; empty where there is none."""
        found = re.match(r"(?:Table|Vector)Transform<(\w+)", self._first)
        return "" if found is None else found[1]

    @property
    def table_in_shared_memory(self) -> bool | None:
        """None of transforms without a table."""
        found = re.match(r"TableTransform<.*, (true|false)>$", self._first)
        return None if found is None else found[1] == "true"

    @property
    def width(self) -> int:
        """Logits that a thread takes through the transform at once."""
        found = re.match(r"Pack<float, (\d+)>$", self.parameters[1]) if len(self.parameters) > 1 else None
        return 1 if found is None else int(found[1])

    @property
    def sums(self) -> str:
        """NoSums, VectorSums, LaneSums or WarpSums; empty of a kernel without gradients."""
        return next((each.partition("<")[0] for each in self.parameters if re.match(r"\w+Sums\b", each)), "")

    @property
    def element(self) -> str:
        """The type of the logits."""
        return next((each for each in self.parameters if each in ELEMENTS.values()), "")

    @property
    def resident(self) -> bool:
        """Whether a row is kept on chip."""
        return self.kernel == "cross_entropy_gradient_kernel" and self.parameters[-1] == "true"

    def __str__(self) -> str:
        table = {None: "", True: ", table in shared memory", False: ", table in global memory"}
        what = self.kernel.removesuffix("_kernel").replace("_", " ")
        if self.kernel == "cross_entropy_gradient_kernel":
            what = f"{what}, {'resident' if self.resident else 'reread'}"
        parts = [what]
        parts += [self.sums] * bool(self.sums)
        who = self.transform or self._first
        return f"{who + ': ' if who else ''}{', '.join(parts)}{table[self.table_in_shared_memory]}"


#: The types of logits, by what reports call them.
ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float"}


@dataclass(frozen=True)
class Kernel:
    """A kernel as it was compiled. Bytes of ``stack`` and ``spills`` are a thread's; ``shared`` is static memory."""

    name: KernelName
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    function: sass.Function

    @cached_property
    def flow(self) -> ControlFlow:
        """The blocks of its machine code."""
        return ControlFlow(self.function)

    @cached_property
    def kinds(self) -> dict[NaturalLoop, Kind | None]:
        """What its loops pass over."""
        return find_kinds(self.flow)

    @property
    def local_accesses(self) -> int:
        """Instructions that access the memory of a thread's own."""
        return len(self.function.matching(sass.is_spill))

    @property
    def async_copies(self) -> int:
        """Copies from global to shared memory that do not go through registers."""
        return len(self.function.matching(lambda each: each.name == "LDGSTS"))


def sources(csrc: Path = CSRC) -> list[Path]:
    """The CUDA sources: those that ``sources.txt`` has for ``cuda``, or all that there are while it has none."""
    lines = [line.split() for line in (csrc / "sources.txt").read_text(encoding="utf-8").splitlines()]
    named = [csrc / line[0] for line in lines if len(line) > 1 and line[1] == "cuda" and line[0].endswith(".cu")]
    return named or sorted((csrc / "cuda").glob("*.cu"))


def compile_source(source: Path, target: str) -> list[Kernel]:
    """The kernels of a source, for a target."""
    with tempfile.TemporaryDirectory(prefix="monosoftmax-codegen-") as folder:
        cubin = Path(folder, source.stem).with_suffix(".cubin")
        report = run(nvcc(), *FLAGS, _LINES, f"-arch={target}", "-Xptxas", "-v", "-cubin", "-o", cubin, source).stderr
        listing = run(_nvdisasm(), "-c", "-gi", cubin).stdout
    return read_kernels(report, listing, target)


def read_kernels(report: str, listing: str, target: str) -> list[Kernel]:
    """The kernels that ptxas reports on, with their machine code."""
    functions = sass.parse(listing)
    resources = {name: [int(each or 0) for each in numbers] for name, *numbers in _RESOURCES.findall(report)}
    if set(resources) != set(functions):
        raise CudaError(f"ptxas reports on {len(resources)} kernels, the listing has {len(functions)}:\n{report}")
    kernels = []
    for symbol, name in _kernel_names(functions).items():
        stack, stores, loads, registers, shared = resources[symbol]
        kernels.append(Kernel(name, target, registers, stack, stores + loads, shared, functions[symbol]))
    return kernels


def parse_name(demangled: str) -> KernelName:
    """A kernel's name, from what c++filt prints."""
    found = _ARGUMENT.match(demangled)
    if found is None:
        raise CudaError(f"not the name of one of the package's kernels: {demangled}")
    if found[2] is None:
        return KernelName(found[1], ())
    arguments = re.sub(r"\bmonosoftmax::(?:cuda::)?", "", found[2]).replace(" >", ">")
    return KernelName(found[1], tuple(_split(arguments)))


def is_installed() -> bool:
    """Whether there is an nvcc, and a disassembler."""
    return _find_nvcc() is not None and _find_nvdisasm() is not None


def nvcc() -> str:
    """The compiler that is used."""
    found = _find_nvcc()
    if found is None:
        raise CudaError(MISSING)
    return found


@cache
def nvcc_version() -> str:
    """Such as 13.0.88."""
    found = re.search(r"\bV(\d+[.\d]*)", run(nvcc(), "--version").stdout)
    return "unknown" if found is None else found[1]


@cache
def include_folders() -> tuple[str, ...]:
    """Where the compiler has its headers."""
    report = run(nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull).stderr
    return tuple(re.findall(r'#\$ INCLUDES="-I([^"]+)"', report))


def run(*command: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """A tool's output; an error where it fails."""
    result = subprocess.run([str(each) for each in command], input=text, capture_output=True, text=True)
    if result.returncode != 0:
        raise CudaError(f"{' '.join(map(str, command))} failed:\n{result.stderr}{result.stdout[-2000:]}")
    return result


def _find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wheel = Path(sysconfig.get_path("purelib"), "nvidia")
    folders = [Path(home, "bin")] if home else []
    folders += [Path("/usr/local/cuda/bin"), *sorted(wheel.glob("cu*/bin"), reverse=True), wheel / "cuda_nvcc" / "bin"]
    path = os.pathsep.join([str(folders[0])] * bool(home) + [os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("nvcc", path=path)


def _nvdisasm() -> str:
    found = _find_nvdisasm()
    if found is None:
        raise CudaError("nvdisasm is not installed: pip install triton, which has one, or nvidia-cuda-nvdisasm")
    return found


def _find_nvdisasm() -> str | None:
    """Triton's, whose version the package pins; else one that is found."""
    triton = importlib.util.find_spec("triton")
    folders = [] if triton is None or triton.origin is None else [Path(triton.origin).parent / "backends/nvidia/bin"]
    compiler = _find_nvcc()
    folders += [] if compiler is None else [Path(compiler).resolve().parent]
    return shutil.which("nvdisasm", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def _kernel_names(symbols: Iterable[str]) -> Mapping[str, KernelName]:
    listed = list(symbols)
    demangled = run("c++filt", text="\n".join(listed)).stdout.splitlines()
    return {symbol: parse_name(each) for symbol, each in zip(listed, demangled, strict=True)}


def _split(arguments: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in arguments:
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [each.strip() for each in parts]
