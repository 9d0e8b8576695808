"""Finds the CUDA toolkit for setup.py, and tries it out before the build starts.

It is a file of its own so that tests can import it. setup.py puts this folder on ``sys.path``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from setuptools.errors import SetupError
from torch.utils import cpp_extension

#: The architectures if torch finds no GPU, the same as in torch's own wheels (2.14.1 with CUDA 13.0). Machine code for
#: 8.6 runs on 8.9, machine code for 10.0 runs on 10.3, and the driver compiles the PTX of the last one for newer GPUs.
WIDESPREAD = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
PROBE = "#include <cuda_runtime.h>\n__global__ void probe() {}\nvoid launch() { probe<<<1, 1>>>(); }\n"


class Unavailable(Exception):
    """Says in one line what is missing for the CUDA kernels."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that compiles a kernel on this machine."""

    home: Path
    #: Major and minor version, such as 13.0.
    version: str
    #: The folder of cuda_runtime.h.
    include: Path
    #: The shared library of the CUDA runtime.
    runtime: Path
    #: Compute capabilities, such as 9.0 or 10.0+PTX.
    architectures: tuple[str, ...]
    #: The flags of nvcc for this machine and these architectures.
    nvcc_flags: tuple[str, ...]


def find_toolkit(flags: Sequence[str]) -> Toolkit:
    """Finds a CUDA toolkit for this torch and compiles an empty kernel with it.

    Args:
        flags: the flags of nvcc that the kernels need on every machine.

    Raises:
        Unavailable: something is missing.
        SetupError: TORCH_CUDA_ARCH_LIST is wrong.
    """
    if torch.version.cuda is None:
        kind = "a CPU build" if torch.version.hip is None else "a build for ROCm"
        raise Unavailable(f"torch {torch.__version__} is {kind}")
    nvcc, host_compiler = find_nvcc(), find_host_compiler()
    release = re.search(r"release ((\d+)\.\d+)", ask(nvcc, "--version"))
    if release is None:
        raise Unavailable(f"{nvcc} --version names no release")
    version, major = release.groups()
    if major != torch.version.cuda.partition(".")[0]:
        raise Unavailable(
            f"{nvcc} is of CUDA {version}, torch {torch.__version__} of CUDA {torch.version.cuda}, and the major "
            "versions must be the same: name the other toolkit in CUDA_HOME"
        )
    # nvcc on PATH may be a script that calls the nvcc of a toolkit elsewhere. Its plan says where the toolkit is.
    who = f"{nvcc} with the host compiler {host_compiler!r}"
    plan = ask(nvcc, "--dryrun", "-ccbin", host_compiler, "-c", "-x", "cu", os.devnull, what=who)
    home = Path(setting(plan, "TOP") or Path(nvcc).resolve().parents[1]).resolve()
    header = find_file(home, [*folders(plan, "INCLUDES", "-I"), home / "include"], "cuda_runtime.h")
    libraries = [*folders(plan, "LIBRARIES", "-L"), home / "lib64", home / "lib"]
    # Wheels have no file without the major version.
    runtime = find_file(home, libraries, "libcudart.so", f"libcudart.so.{major}")

    architectures, gencode = choose_architectures(ask(nvcc, "--list-gpu-arch"), version)
    # As in torch's own wheels: kernels take a fifth of the space. Drivers before 12.4 cannot unpack them.
    compression = ["-compress-mode=size"] if int(major) >= 13 else []
    found = ("-ccbin", host_compiler, *compression, *gencode)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text(PROBE)
        what = f"{who}, compiling an empty kernel for {' '.join(architectures)},"
        ask(nvcc, *flags, *found, "-c", str(probe), "-o", str(probe.with_suffix(".o")), what=what)
    return Toolkit(home, version, include=header.parent, runtime=runtime, architectures=architectures, nvcc_flags=found)


def find_nvcc() -> str:
    """Finds nvcc in the folders that setup.py's docstring lists, in that order."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if nvcc := shutil.which("nvcc", path=os.path.join(home, "bin")):
                return nvcc
            raise Unavailable(f"there is no nvcc in the folder bin of {variable}={home}")
    wheel = Path(torch.__file__).parents[1] / "nvidia" / f"cu{torch.version.cuda.partition('.')[0]}" / "bin"
    for path in (str(wheel), None, "/usr/local/cuda/bin"):
        if nvcc := shutil.which("nvcc", path=path):
            return nvcc
    raise Unavailable("there is no nvcc, neither on PATH nor in /usr/local/cuda: CUDA_HOME can name a CUDA toolkit")


def find_host_compiler() -> str:
    """Returns the compiler of host code: the C++ compiler of the other files, without ccache in front of it."""
    if named := os.environ.get("NVCC_CCBIN"):
        return named
    words = shlex.split(cpp_extension.get_cxx_compiler())
    return next((word for word in words if Path(word).name not in ("ccache", "sccache")), words[0])


def ask(*command: str, what: str = "") -> str:
    """Returns the output of a command on both streams.

    Raises:
        Unavailable: the command does not run, or fails; ``what`` describes the attempt in the message.
    """
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run ({error.strerror})") from error
    if result.returncode != 0:
        lines = result.stdout.strip().splitlines() or [f"exit status {result.returncode}"]
        telling = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1])
        raise Unavailable(f"{what or shlex.join(command)} fails: {telling.strip()}")
    return result.stdout


def setting(plan: str, name: str) -> str:
    """Reads a setting from the output of ``nvcc --dryrun``; empty if it is missing."""
    found = re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
    return found[1].strip() if found else ""


def folders(plan: str, name: str, option: str) -> list[Path]:
    """Reads the folders that a setting of ``nvcc --dryrun`` names with ``option``."""
    return [Path(word.removeprefix(option)) for word in shlex.split(setting(plan, name)) if word.startswith(option)]


def find_file(home: Path, places: Sequence[Path], *names: str) -> Path:
    """Finds the first file that has one of these names."""
    for path in (place / name for place in places for name in names):
        if path.is_file():
            return path.resolve()
    raise Unavailable(f"the CUDA toolkit in {home} has no {names[0]}: complete it, or name another one in CUDA_HOME")


def choose_architectures(listing: str, version: str) -> tuple[tuple[str, ...], list[str]]:
    """Returns the compute capabilities to compile for, in ascending order, and nvcc's flags for them.

    Args:
        listing: the output of ``nvcc --list-gpu-arch``.
        version: the version of nvcc.
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    known = [(int(major), int(minor)) for major, minor in re.findall(r"^compute_(\d+)(\d)$", listing, re.MULTILINE)]
    supported = [f"{major}.{minor}" for major, minor in sorted(known)]
    flags = architecture_flags(supported)
    ptx = {flag.partition("code=compute_")[2] for flag in flags}
    numbers = re.findall(r"code=sm_(\d+)(\d)(a?)", " ".join(flags))
    architectures = tuple(
        f"{major}.{minor}{suffix}" + ("+PTX" if f"{major}{minor}{suffix}" in ptx else "")
        for major, minor, suffix in sorted(numbers, key=lambda number: (int(number[0]), number))
    )
    wanted = [re.split("[a+]", each)[0] for each in architectures]
    if unknown := [each for each in wanted if each not in supported]:
        problem = f"nvcc {version} compiles for {' '.join(supported)}, not for {' '.join(unknown)}"
        if wish:
            raise SetupError(f"TORCH_CUDA_ARCH_LIST={wish!r}: {problem}")
        raise Unavailable(f"{problem}: TORCH_CUDA_ARCH_LIST can name what to compile for")
    return architectures, flags


def architecture_flags(supported: Sequence[str]) -> list[str]:
    """Returns the flags of nvcc that torch derives from TORCH_CUDA_ARCH_LIST, or else from the GPUs that it finds."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wish in ("", "native") and torch.cuda.device_count() == 0:
        if wish:
            raise SetupError("TORCH_CUDA_ARCH_LIST is native, but torch finds no GPU")
        # torch has no default for a machine without a GPU.
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(each for each in WIDESPREAD if each in supported) + "+PTX"
    try:
        return cpp_extension._get_cuda_arch_flags()
    except ValueError as error:
        example = "it takes compute capabilities such as 8.0;9.0a;10.0+PTX"
        raise SetupError(f"TORCH_CUDA_ARCH_LIST={wish!r}: {error}; {example}") from error
