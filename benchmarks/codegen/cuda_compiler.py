"""The CUDA kernels, compiled by nvcc for GPUs that are not there, with the flags of the extension.

A source file has some forty kernels: one for each transform, way to keep a row and way to sum. Their figures are those
of the largest block, without the dynamic shared memory that csrc/cuda/plan.cpp chooses: tests of csrc/cuda/host hold
the sum of both to what a GPU has.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from .cubin import ToolError, read_cubin, run
from .figures import DEVICES, Kernel, Measurement, of_nvidia

NAME = "cuda"
MAIN_TARGET = "sm_90"
TARGETS = tuple(DEVICES)
ROOT = Path(__file__).parents[2]

MISSING = (
    "nvcc is not installed: pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime "
    "nvidia-cuda-cccl, or set CUDA_HOME"
)

#: kMostThreads of the sources.
MOST_THREADS = 256

#: Targets by the type of logits in a file's name: all types for the main target, bfloat16 for each family of targets,
#: and one type for each member of a family. Other files are compiled for all.
_TARGETS_OF = {
    "bfloat16": ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120"),
    "half": ("sm_86", "sm_90", "sm_103"),
    "float": ("sm_75", "sm_89", "sm_90"),
}

_DTYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}
_NAME = re.compile(r"(?:void )?monosoftmax::cuda::(?:\(anonymous namespace\)::)?(\w+)_kernel(?:<(.*)>)?\(")


def version() -> str:
    """The compiler and its flags."""
    found = re.search(r"\bV(\d+[.\d]*)", run(nvcc(), "--version"))
    return f"nvcc {'unknown' if found is None else found[1]} ({' '.join(flags())})"


def work(targets: tuple[str, ...] = TARGETS) -> list[tuple[Path, str]]:
    """What is compiled: source files, each for some of the targets."""
    return [(source, target) for source in sources() for target in _targets_of(source) if target in targets]


def sources() -> list[Path]:
    """The files that ``csrc/sources.txt`` has for nvcc."""
    lines = [line.split() for line in (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").splitlines()]
    return [ROOT / "csrc" / line[0] for line in lines if line[1:2] == ["cuda"] and line[0].endswith(".cu")]


def measure(source: Path, target: str) -> list[Measurement]:
    """The kernels of a source file, as they are compiled for a target."""
    with tempfile.TemporaryDirectory(prefix="monosoftmax-codegen-") as folder:
        cubin = Path(folder, "kernels.cubin")
        run(nvcc(), *flags(), f"-arch={target}", "-cubin", "-o", str(cubin), str(source))
        programs = read_cubin(cubin)
    names = run("c++filt", text="\n".join(programs)).splitlines()
    return [
        Measurement(parse_name(name), target, of_nvidia(program, target, MOST_THREADS))
        for name, program in zip(names, programs.values(), strict=True)
    ]


def parse_name(demangled: str) -> Kernel:
    """What a kernel is, from its name and the parameters of its template, as ``c++filt`` prints them."""
    found = _NAME.match(demangled)
    if found is None:
        raise ToolError(f"not the name of one of the package's kernels: {demangled}")
    operator, parameters = found[1].replace("_", " "), re.sub(r"\bmonosoftmax::(?:cuda::)?", "", found[2] or "")
    # Transforms take packs of floats, whatever the type of the logits is.
    packed = re.sub(r"Pack<float, \d+>", "Pack", parameters)
    transform = re.search(r"(?:Table|Vector)Transform<(\w+)", packed)
    element = re.search(r"\b(__nv_bfloat16|__half|float)\b", packed)
    table = re.search(r"TableTransform<\w+, Pack, (true|false)>", packed)
    sums = re.search(r"\b(\w+Sums)\b", packed)
    variant = []
    if operator == "cross entropy gradient":
        variant.append("resident" if packed.endswith("true") else "reread")
    if sums is not None:
        variant.append(sums[1])
    if table is not None:
        variant.append(f"table in {'shared' if table[1] == 'true' else 'global'} memory")
    dtype = "" if element is None else _DTYPES[element[1]]
    return Kernel(NAME, "" if transform is None else transform[1], operator, dtype, ", ".join(variant))


@cache
def flags() -> tuple[str, ...]:
    """Those that setup.py gives nvcc, but for the host compiler's, and those against macros of torch's."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            assert isinstance(node.value, ast.List)
            return tuple(str(each.value) for each in node.value.elts if isinstance(each, ast.Constant))
    raise ToolError("setup.py has no list NVCC_FLAGS")


@cache
def static_bytes() -> int:
    """The static shared memory that csrc/cuda/plan.cpp leaves to a kernel."""
    text = (ROOT / "csrc" / "cuda" / "plan.cpp").read_text(encoding="utf-8")
    found = re.search(r"kStaticBytes = (\d+)", text)
    if found is None:
        raise ToolError("csrc/cuda/plan.cpp has no kStaticBytes")
    return int(found[1])


def nvcc() -> str:
    """The compiler."""
    found = find_nvcc()
    if found is None:
        raise ToolError(MISSING)
    return found


@cache
def find_nvcc() -> str | None:
    """The compiler in CUDA_HOME, of the path, where CUDA is installed, or of the wheels; None if there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wheels = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin"), reverse=True)
    folders = [str(Path(home, "bin"))] if home else []
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, wheels)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def _targets_of(source: Path) -> tuple[str, ...]:
    return _TARGETS_OF.get(source.stem.rpartition("_")[2], TARGETS)
