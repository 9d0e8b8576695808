"""Build of the C++ extension ``monosoftmax._C``; everything else about the package stands in pyproject.toml.

The extension is built against the torch that this script can import: that of the environment with
``pip install --no-build-isolation``, else the one that pip puts into its build environment. Where it cannot be built
because something is missing on the machine, the package installs without it and says so; an error in compiling it is
an error. The environment variable ``MONOSOFTMAX_CPP`` decides otherwise: 0 never builds it, 1 insists on it.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    torch = None
    BuildExtension, CppExtension = build_ext, Extension

X86 = platform.machine().lower() in ("x86_64", "amd64")
CSRC = Path("csrc")
# No -std: torch adds the one that its headers need (C++17 up to 2.9, C++20 for 2.14); our sources are C++17.
# No contraction of a * b + c: the forward and the backward pass must round y = f(z) alike, or a p of exactly 1 would
# not come out as 1. Where a fused operation is wanted, the sources say fma.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", *(["-DMONOSOFTMAX_X86"] if X86 else [])]


def sources() -> dict[tuple[str, ...], list[str]]:
    """The sources of the extension for this processor, by the flags of their own, in the order of csrc/sources.txt."""
    groups: dict[tuple[str, ...], list[str]] = {(): []}
    for line in (CSRC / "sources.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            file, part, *flags = line.split()
            if part == "extension" or (part == "extension-x86" and X86):
                groups.setdefault(tuple(flags), []).append(str(CSRC / file))
    return groups


def examine_machine() -> tuple[str | None, bool]:
    """What is missing here for the extension, if anything, and whether the C++ compiler is clang."""
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


class BuildKernels(BuildExtension):
    """torch's build_ext, which skips what the machine cannot build and gives source files flags of their own."""

    def finalize_options(self) -> None:
        if self.build_temp is None:
            # pip would take a new folder each time. Here ninja rebuilds what a change of a source or header needs;
            # it would not see an older file of another torch in the place of a newer one, hence the version.
            version = "none" if torch is None else torch.__version__
            self.build_temp = f"build/temp-{sys.implementation.cache_tag}-torch-{version}"
        super().finalize_options()

    def run(self) -> None:
        wish = os.environ.get("MONOSOFTMAX_CPP", "")
        if wish not in ("", "0", "1"):
            raise SetupError(f"MONOSOFTMAX_CPP must be 0, 1 or unset, got {wish!r}")
        missing, clang = ("MONOSOFTMAX_CPP=0 says so", False) if wish == "0" else examine_machine()
        if missing is None:
            self.openmp = not clang
            super().run()
            return
        if wish == "1":
            raise SetupError(f"MONOSOFTMAX_CPP=1, but the C++ extension cannot be built: {missing}")
        self.extensions = []
        self.warn(
            f"monosoftmax is installed WITHOUT its C++ extension: {missing}. Calls on the CPU will use the slow "
            "reference backend; see `python -m monosoftmax.info`."
        )

    def build_extension(self, extension: Extension) -> None:
        if self.openmp:
            # Not for the linker: libtorch_cpu brings the OpenMP runtime, and a process should have one.
            extension.extra_compile_args.append("-fopenmp")
        else:
            # clang's OpenMP calls its own runtime. Next to GNU's, which torch's wheels bring, every thread would do
            # all of the work of a parallel loop.
            self.warn("the C++ extension is built by clang: it will use one thread; CXX=g++ builds it with OpenMP")

        def compile_group(flags: tuple[str, ...], files: list[str]) -> Any:
            return self.compiler.compile(
                files,
                output_dir=os.path.join(self.build_temp, Path(files[0]).stem) if flags else self.build_temp,
                macros=extension.define_macros,
                include_dirs=extension.include_dirs,
                debug=self.debug,
                extra_postargs=[*extension.extra_compile_args, *flags],
                depends=extension.depends,
            )

        # A build with ninja has one set of flags, so each group of sources is one; the groups run side by side.
        groups = sources()
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", len(groups)))) as pool:
            _, *own = pool.map(compile_group, groups.keys(), groups.values())
        extension.extra_objects = [file for objects in own for file in objects]
        super().build_extension(extension)


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
            sources()[()],
            depends=[str(file) for file in (CSRC / "sources.txt", *sorted(CSRC.rglob("*.h")))],
            extra_compile_args=FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
