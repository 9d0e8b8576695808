"""Builds the extension ``monosoftmax._C``; pyproject.toml has everything else about the package.

The extension is built against the torch that this script can import: the environment's torch with
``pip install --no-build-isolation``, else the torch that pip puts into its build environment. If the machine cannot
build the CUDA kernels or the whole extension, the script leaves them out, and the last line of the output says so and
gives the reason. An error in compiling is an error. Environment variables:

MONOSOFTMAX_CPP       0 never builds the extension, 1 insists on it
MONOSOFTMAX_CUDA      0 leaves out the CUDA kernels, 1 insists on them; unset: they are built if there are nvcc and a
                      CUDA build of torch
TORCH_CUDA_ARCH_LIST  the compute capabilities to compile for, as torch reads them: "8.0;9.0+PTX", "Hopper" or "native";
                      unset: the GPUs that torch finds, else cuda_toolkit.WIDESPREAD without those nvcc does not know
CUDA_HOME             the CUDA toolkit; unset: CUDA_PATH, the toolkit of the nvidia-cuda-nvcc wheel, of nvcc on PATH, or
                      /usr/local/cuda
CXX                   the C++ compiler, for nvcc too unless NVCC_CCBIN names another one
MAX_JOBS              the number of files to compile at a time; unset: ninja decides
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

# Build backends put no source folder on sys.path.
sys.path.append(str(Path(__file__).resolve().parent / "scripts"))
try:
    import cuda_toolkit
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    torch = None
    BuildExtension, CppExtension = build_ext, Extension

X86 = platform.machine().lower() in ("x86_64", "amd64")
CSRC = Path("csrc")
# No -std: torch adds the one that its headers need (C++17 up to 2.9, C++20 for 2.14); our sources are C++17.
# No contraction of a * b + c: the forward and the backward pass must round y = f(z) in the same way, otherwise a p of
# exactly 1 would not come out as 1. The sources write fma where they want it.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", *(["-DMONOSOFTMAX_X86"] if X86 else [])]
# torch hides the operators of half types with four macros; the CUDA sources use the operators.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--expt-relaxed-constexpr",
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"),
    *(f"-U__CUDA_NO_HALF_{name}__" for name in ("OPERATORS", "CONVERSIONS")),
    *("-U__CUDA_NO_HALF2_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"),
]


class Source(NamedTuple):
    """A line of csrc/sources.txt, without the column of the build."""

    file: str
    flags: tuple[str, ...]


def sources(cuda: bool) -> list[Source]:
    """Reads the files of the extension on this processor from csrc/sources.txt, with or without CUDA."""
    parts = {"extension", *(["extension-x86"] if X86 else []), *(["cuda", "extension-cuda"] if cuda else [])}
    lines = (CSRC / "sources.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split() for line in lines if line and not line.startswith("#")]
    return [Source(file, tuple(flags)) for file, part, *flags in listed if part in parts]


def wish(variable: str) -> str:
    """Reads an environment variable that is 0, 1 or unset."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{variable} must be 0, 1 or unset, got {value!r}")
    return value


def job_limit() -> int | None:
    """Reads MAX_JOBS, which torch passes to ninja."""
    value = os.environ.get("MAX_JOBS", "")
    if value and not re.fullmatch("[1-9][0-9]*", value):
        raise SetupError(f"MAX_JOBS must be a number from 1 on, got {value!r}")
    return int(value) if value else None


def examine_machine() -> tuple[str | None, bool]:
    """Returns the missing requirement of the extension, or None, and whether the C++ compiler is clang."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}", False
    if torch is None:
        return "torch is not installed where the build runs (pip install torch, then use --no-build-isolation)", False
    if not any(Path(folder, "ATen", "ATen.h").is_file() for folder in include_paths()):
        return f"torch {torch.__version__} comes without its C++ headers; install a wheel of torch", False
    compiler = get_cxx_compiler()
    probe = "#include <Python.h>\n#include <optional>\n#ifdef __clang__\ncompiler_is_clang\n#endif\n"
    command = [*shlex.split(compiler), "-std=c++17", "-I", sysconfig.get_path("include"), "-x", "c++", "-E", "-"]
    try:
        result = subprocess.run(command, input=probe, capture_output=True, text=True)
    except OSError as error:
        return f"there is no C++ compiler {compiler!r} ({error.strerror}); install g++, or name one in CXX", False
    if result.returncode != 0:
        return f"the C++ compiler {compiler!r} fails on C++17 with Python.h:\n{result.stderr.strip()}", False
    return None, "compiler_is_clang" in result.stdout


def c_string(text: str) -> str:
    """Returns a C++ literal that no shell and no ninja file changes."""
    safe = re.compile(rb"[A-Za-z0-9 _.,:;()/+=-]")
    characters = (bytes([each]) for each in text.encode())
    return '"' + "".join(each.decode() if safe.match(each) else f"\\{each[0]:03o}" for each in characters) + '"'


class BuildKernels(BuildExtension):
    """Extends torch's build_ext: skips parts that the machine cannot build, and gives single files their own flags."""

    #: The last line of the output; empty if no extension was requested.
    outcome: ClassVar[str] = ""

    def finalize_options(self) -> None:
        if self.build_temp is None:
            # pip would take a new folder each time. In a permanent folder, ninja rebuilds only the files of a changed
            # source or header. The name has the version because ninja compares dates: the headers of another torch may
            # be older than the objects.
            version = "none" if torch is None else torch.__version__
            self.build_temp = f"build/temp-{sys.implementation.cache_tag}-torch-{version}"
        super().finalize_options()

    def run(self) -> None:
        cpp, cuda, self.jobs = wish("MONOSOFTMAX_CPP"), wish("MONOSOFTMAX_CUDA"), job_limit()
        missing, self.clang = ("MONOSOFTMAX_CPP=0 says so", False) if cpp == "0" else examine_machine()
        if missing is not None:
            if cpp == "1":
                raise SetupError(f"MONOSOFTMAX_CPP=1, but the C++ extension cannot be built: {missing}")
            if cuda == "1":
                raise SetupError(
                    f"MONOSOFTMAX_CUDA=1, but the C++ extension, with the kernels, cannot be built: {missing}"
                )
            self.extensions = []
            BuildKernels.outcome = (
                f"monosoftmax is installed WITHOUT its C++ extension: {missing}. Calls on the CPU will use the slow "
                "reference backend; `python -m monosoftmax.info` says how to install it again."
            )
            return
        self.toolkit, problem = None, "MONOSOFTMAX_CUDA=0 said so"
        if cuda != "0":
            try:
                self.toolkit = cuda_toolkit.find_toolkit(NVCC_FLAGS)
            except cuda_toolkit.Unavailable as error:
                if cuda == "1":
                    raise SetupError(f"MONOSOFTMAX_CUDA=1, but the CUDA kernels cannot be built: {error}") from error
                problem = str(error)
        if self.toolkit is None:
            self.cuda_flags = [f"-DMONOSOFTMAX_CUDA_PROBLEM={c_string(problem)}"]
            BuildKernels.outcome = f"monosoftmax is built for the CPU, without its CUDA kernels: {problem}"
        else:
            architectures = " ".join(self.toolkit.architectures)
            self.cuda_flags = [
                f"-I{self.toolkit.include}",
                "-DMONOSOFTMAX_CUDA",
                f"-DMONOSOFTMAX_CUDA_TOOLKIT={c_string(self.toolkit.version)}",
                f"-DMONOSOFTMAX_CUDA_ARCHITECTURES={c_string(architectures)}",
            ]
            BuildKernels.outcome = (
                f"monosoftmax is built with its CUDA kernels, for {architectures}, by CUDA {self.toolkit.version} in "
                f"{self.toolkit.home} (torch: CUDA {torch.version.cuda})"
            )
        super().run()

    def build_extension(self, extension: Extension) -> None:
        flags = {"cxx": list(extension.extra_compile_args), "nvcc": []}
        extension.extra_compile_args = flags
        if self.clang:
            # clang's OpenMP calls its own runtime. Next to GNU's runtime, which torch's wheels bring, every thread
            # would do all of the work of a parallel loop.
            self.warn("the C++ extension is built by clang: it will use one thread; CXX=g++ builds it with OpenMP")
        else:
            # Not for the linker: libtorch_cpu brings the OpenMP runtime, and a process should have only one.
            flags["cxx"].append("-fopenmp")
        if self.toolkit is not None:
            cpp_extension.CUDA_HOME = str(self.toolkit.home)
            flags["nvcc"] += [*NVCC_FLAGS, *self.toolkit.nvcc_flags]
            extension.libraries.append("c10_cuda")
            # The shared runtime, which torch uses. A static one would be a second runtime of the process, and torch's
            # checks do not see its errors and attributes of kernels. No rpath: torch is always loaded first, so that
            # the loader knows the name libcudart.so.<major>.
            extension.extra_link_args.append(str(self.toolkit.runtime))

        listed = sources(cuda=self.toolkit is not None)
        # torch gives all files of a call the same flags, so a file with its own flags needs its own call.
        # Without ninja, a call changes the compiler object, so only one call may run at a time.
        with ThreadPoolExecutor(self.jobs if self.use_ninja else 1) as pool:
            special = [each for each in listed if each.flags]
            extension.extra_objects = list(pool.map(lambda source: self.compile_source(extension, source), special))
        # The files above take longest. They do not get these flags, so that another toolkit does not rebuild them.
        flags["cxx"] += self.cuda_flags
        # With CUDA sources from the start, torch would look up CXX in a table of compilers for nvcc. It might refuse a
        # compiler that find_toolkit has tried successfully.
        extension.sources = [str(CSRC / each.file) for each in listed if not each.flags]
        super().build_extension(extension)

    def compile_source(self, extension: Extension, source: Source) -> str:
        """Compiles a file that has its own flags, and returns the object file."""
        [compiled] = self.compiler.compile(
            [str(CSRC / source.file)],
            output_dir=os.path.join(self.build_temp, source.file),
            include_dirs=extension.include_dirs,
            debug=self.debug,
            extra_postargs={each: [*flags, *source.flags] for each, flags in extension.extra_compile_args.items()},
            depends=extension.depends,
        )
        return compiled


if __name__ == "__main__":
    # torch looks for ninja on PATH. pip installs ninja beside Python, and this environment may not be activated.
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    setup(
        # A top-level module named triton_kernels would collide with another project's.
        packages=[
            *find_packages(include=["monosoftmax", "monosoftmax.*"]),
            *(f"monosoftmax.{each}" for each in find_packages(include=["triton_kernels", "triton_kernels.*"])),
        ],
        package_dir={"monosoftmax.triton_kernels": "triton_kernels"},
        ext_modules=[
            CppExtension(
                "monosoftmax._C",
                [str(CSRC / each.file) for each in sources(cuda=False) if not each.flags],
                depends=sorted(str(file) for file in CSRC.rglob("*.*")),
                extra_compile_args=FLAGS,
            )
        ],
        cmdclass={"build_ext": BuildKernels},
    )
    if BuildKernels.outcome:
        print(BuildKernels.outcome)
