"""Build of the extension ``monosoftmax._C``; everything else about the package stands in pyproject.toml.

The extension is built against the torch that this script can import: that of the environment with
``pip install --no-build-isolation``, else the one that pip puts into its build environment. What the machine cannot
build is left out, and the last line of the output says what and why: the CUDA kernels, or the extension as a whole. An
error in compiling is an error. Environment variables:

MONOSOFTMAX_CPP       0 never builds the extension, 1 insists on it
MONOSOFTMAX_CUDA      0 leaves the CUDA kernels out of it, 1 insists on them; unset: they are built where there are nvcc
                      and a CUDA build of torch
TORCH_CUDA_ARCH_LIST  the compute capabilities to compile for, as "8.0;9.0" or "8.0 9.0+PTX"; unset or "native": those
                      of the GPUs that torch finds here, else WIDESPREAD, as far as nvcc knows them
CUDA_HOME             the CUDA toolkit; unset: CUDA_PATH, that of the nvidia-cuda-nvcc wheel, of nvcc on PATH, or
                      /usr/local/cuda
CXX                   the C++ compiler, for nvcc too, where NVCC_CCBIN does not name another one
MAX_JOBS              the number of files to compile at a time; unset: as many as there are cores and memory for
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

try:
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
#: The one file that setuptools compiles itself, and that what is built in is told to.
BINDINGS = "bindings.cpp"
# No -std: torch adds the one that its headers need (C++17 up to 2.9, C++20 for 2.14); our sources are C++17.
# No contraction of a * b + c: the forward and the backward pass must round y = f(z) alike, or a p of exactly 1 would
# not come out as 1. Where a fused operation is wanted, the sources say fma.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", *(["-DMONOSOFTMAX_X86"] if X86 else [])]
# The CUDA sources include nothing of torch's. It compiles them with four macros that hide the operators of half types.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--expt-relaxed-constexpr",
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"),
    *(f"-U__CUDA_NO_HALF_{name}__" for name in ("OPERATORS", "CONVERSIONS")),
    *("-U__CUDA_NO_HALF2_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"),
]
#: What is compiled for where no GPU is visible: what torch's own wheels are compiled for (2.14.1 with CUDA 13.0).
#: Machine code for 8.6 runs on 8.9, that for 10.0 on 10.3; PTX of the last one is there for what comes after it.
WIDESPREAD = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")
#: What compiling one file may take. Measured: up to 0.7 GB by g++ 12 with torch's headers, 0.3 GB by nvcc 13.0.
JOB_BYTES = 3 << 29


class Unavailable(Exception):
    """What is missing here for the CUDA kernels, in one line."""


class Source(NamedTuple):
    """A line of csrc/sources.txt."""

    file: str
    part: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Cuda:
    """What compiles the CUDA kernels, and for what."""

    home: Path
    #: The toolkit's, major.minor.
    version: str
    host_compiler: str
    #: The folder of cuda_runtime.h.
    include: Path
    #: The runtime library, to be linked.
    runtime: Path
    #: Compute capabilities, such as 9.0 or 10.0+PTX.
    architectures: tuple[str, ...]

    def nvcc_flags(self, threads: int = 1) -> list[str]:
        """The flags of nvcc, which works on so many architectures at a time."""
        flags = [*NVCC_FLAGS, "-ccbin", self.host_compiler, "--threads", str(threads)]
        if by_number(self.version) >= (13, 0):
            # As torch's own wheels: the kernels take a fifth of the space. Drivers before 12.4 cannot unpack them.
            flags.append("-compress-mode=size")
        for each in self.architectures:
            number, _, ptx = each.replace(".", "").partition("+")
            kinds = ("sm", "compute") if ptx else ("sm",)
            flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
        return flags


def sources(cuda: bool) -> list[Source]:
    """The sources of the extension for this processor, with or without CUDA, in the order of csrc/sources.txt."""
    parts = {"extension", *(["extension-x86"] if X86 else []), *(["cuda", "extension-cuda"] if cuda else [])}
    lines = (CSRC / "sources.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split() for line in lines if line and not line.startswith("#")]
    return [Source(file, part, tuple(flags)) for file, part, *flags in listed if part in parts]


def wish(variable: str) -> str:
    """An environment variable that is 0, 1 or unset."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SetupError(f"{variable} must be 0, 1 or unset, got {value!r}")
    return value


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


def examine_cuda() -> Cuda:
    """What the CUDA kernels can be built with here: all that could stop nvcc is found out before it has work.

    Raises:
        Unavailable: something is missing.
        SetupError: TORCH_CUDA_ARCH_LIST cannot be meant so.
    """
    requested = requested_architectures()
    if torch.version.cuda is None:
        kind = "a CPU build" if torch.version.hip is None else "a build for ROCm"
        raise Unavailable(f"torch {torch.__version__} is {kind}")
    nvcc, host_compiler = find_nvcc(), find_host_compiler()
    release = re.search(r"release (\d+)(\.\d+)", ask(nvcc, "--version"))
    if release is None:
        raise Unavailable(f"{nvcc} --version names no release")
    major, version = release[1], release[1] + release[2]
    if major != torch.version.cuda.partition(".")[0]:
        raise Unavailable(
            f"{nvcc} is of CUDA {version}, torch {torch.__version__} of CUDA {torch.version.cuda}, and the major "
            "versions must be the same: name the other toolkit in CUDA_HOME"
        )
    # nvcc may be a wrapper somewhere else, so it has to say itself where the toolkit is.
    who = f"{nvcc} with the host compiler {host_compiler!r}"
    plan = ask(nvcc, "--dryrun", "-ccbin", host_compiler, "-c", "-x", "cu", os.devnull, what=who)
    home = Path(planned(plan, "TOP") or Path(nvcc).resolve().parents[1]).resolve()
    header = find_file(home, option_values(planned(plan, "INCLUDES"), "-I"), ("include",), ("cuda_runtime.h",))
    runtimes = ("libcudart.so", f"libcudart.so.{major}")
    runtime = find_file(home, option_values(planned(plan, "LIBRARIES"), "-L"), ("lib64", "lib"), runtimes)
    listed = re.findall(r"^compute_(\d+)(\d)$", ask(nvcc, "--list-gpu-arch"), re.MULTILINE)
    known = sorted((f"{tens}.{ones}" for tens, ones in listed), key=by_number)
    chosen = choose_architectures(requested, known, version)
    cuda = Cuda(home, version, host_compiler, header.parent, runtime, chosen)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text(
            "#include <cuda_runtime.h>\n__global__ void probe() {}\nvoid launch() { probe<<<1, 1>>>(); }\n"
        )
        what = f"{who}, compiling an empty kernel for {' '.join(chosen)},"
        ask(nvcc, *cuda.nvcc_flags(), "-c", str(probe), "-o", str(probe.with_suffix(".o")), what=what)
    return cuda


def find_nvcc() -> str:
    """The first nvcc in the order that the head of this file gives."""
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
    """What nvcc compiles host code with: the C++ compiler of all other files, without a cache before it."""
    if named := os.environ.get("NVCC_CCBIN"):
        return named
    words = shlex.split(get_cxx_compiler())
    return next((word for word in words if Path(word).name not in ("ccache", "sccache")), words[0])


def ask(*command: str, what: str = "") -> str:
    """What a command prints on both streams.

    Raises:
        Unavailable: it does not run, or fails; ``what`` says for people what was tried.
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


def planned(plan: str, name: str) -> str:
    """A setting in what ``nvcc --dryrun`` prints, or nothing."""
    found = re.search(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
    return found[1].strip() if found else ""


def option_values(flags: str, option: str) -> list[Path]:
    """The folders that these flags name with ``option``."""
    return [Path(word.removeprefix(option)) for word in shlex.split(flags) if word.startswith(option)]


def find_file(home: Path, folders: list[Path], usual: tuple[str, ...], names: tuple[str, ...]) -> Path:
    """The first file of one of these names, in the folders that nvcc names or the usual ones of a toolkit."""
    for folder in (*folders, *(home / each for each in usual)):
        for name in names:
            if (folder / name).is_file():
                return (folder / name).resolve()
    raise Unavailable(f"the CUDA toolkit in {home} has no {names[0]}: complete it, or name another one in CUDA_HOME")


def by_number(capability: str) -> tuple[int, int]:
    """The order of compute capabilities."""
    major, minor = capability.split(".")
    return int(major), int(minor)


def requested_architectures() -> tuple[str, ...] | None:
    """What TORCH_CUDA_ARCH_LIST lists; nothing where it is native; None where it is unset."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    words = [word for word in re.split(r"[;\s]+", text) if word]
    if not words or words == ["native"]:
        return tuple(words[:0]) if words else None
    for word in words:
        # There is code for one architecture only (a), or for its family (f), from a certain one on.
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", word)
        if match is None or by_number(match[1]) < {"a": (9, 0), "f": (10, 0), "": (0, 0)}[match[2]]:
            raise SetupError(
                f"TORCH_CUDA_ARCH_LIST={text!r}: {word!r} is not a compute capability such as 8.0, 9.0a or 10.0+PTX; "
                "semicolons or spaces stand between them"
            )
    return tuple(dict.fromkeys(words))


def choose_architectures(requested: tuple[str, ...] | None, known: list[str], version: str) -> tuple[str, ...]:
    """What to compile for: what is requested, else for the GPUs that are here, else for those in wide use.

    Args:
        requested: as :func:`requested_architectures` returns it.
        known: what nvcc compiles for, ascending.
        version: of nvcc.
    """
    can = f"nvcc {version} compiles for {' '.join(known)}"
    if requested:
        if unknown := [each for each in requested if re.split("[af+]", each)[0] not in known]:
            raise SetupError(f"TORCH_CUDA_ARCH_LIST asks for {' '.join(unknown)}, but {can}")
        return requested
    here = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    if requested is not None and not here:
        raise SetupError("TORCH_CUDA_ARCH_LIST is native, but torch finds no GPU")
    # What nvcc does not know yet runs what the driver makes of the PTX.
    fitting = [[each for each in known if by_number(each) <= gpu] for gpu in here]
    chosen = [each[-1] for each in fitting if each] if here else [each for each in WIDESPREAD if each in known]
    if not chosen:
        wanted = [f"{major}.{minor}" for major, minor in here] or WIDESPREAD
        raise Unavailable(f"{can}, not for {' '.join(wanted)}")
    *first, last = dict.fromkeys(chosen)
    return (*first, f"{last}+PTX")


def count_jobs() -> int:
    """How many files to compile at a time: MAX_JOBS, else as many as there are cores and memory for."""
    limit = os.environ.get("MAX_JOBS", "")
    if limit:
        if not re.fullmatch("[1-9][0-9]*", limit):
            raise SetupError(f"MAX_JOBS must be a number from 1 on, got {limit!r}")
        return int(limit)
    free = [sys.maxsize]
    # A container may be allowed less than the machine has free: version 2 and version 1 of control groups say so.
    for file, pattern, unit in (
        ("/proc/meminfo", r"^MemAvailable: +(\d+) kB$", 1024),
        ("/sys/fs/cgroup/memory.max", r"^(\d+)$", 1),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"^(\d+)$", 1),
    ):
        with contextlib.suppress(OSError):
            free += [int(each) * unit for each in re.findall(pattern, Path(file).read_text(), re.MULTILINE)]
    return max(1, min(len(os.sched_getaffinity(0)), min(free) // JOB_BYTES))


def c_string(text: str) -> str:
    """A literal in C++ that no shell and no ninja file changes."""
    safe = re.compile(rb"[A-Za-z0-9 _.,:;()/+=-]")
    characters = (bytes([each]) for each in text.encode())
    return '"' + "".join(each.decode() if safe.match(each) else f"\\{each[0]:03o}" for each in characters) + '"'


class BuildKernels(BuildExtension):
    """torch's build_ext, which skips what the machine cannot build and gives source files flags of their own."""

    #: What was built, for people; nothing where no extension was asked for.
    outcome: ClassVar[str] = ""

    def finalize_options(self) -> None:
        if self.build_temp is None:
            # pip would take a new folder each time. Here ninja rebuilds what a change of a source or header needs;
            # it would not see an older file of another torch in the place of a newer one, hence the version.
            version = "none" if torch is None else torch.__version__
            self.build_temp = f"build/temp-{sys.implementation.cache_tag}-torch-{version}"
        super().finalize_options()

    def run(self) -> None:
        cpp, cuda = wish("MONOSOFTMAX_CPP"), wish("MONOSOFTMAX_CUDA")
        missing, clang = ("MONOSOFTMAX_CPP=0 says so", False) if cpp == "0" else examine_machine()
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
        self.openmp = not clang
        self.cuda: Cuda | None = None
        problem = "MONOSOFTMAX_CUDA=0 said so"
        if cuda != "0":
            try:
                self.cuda = examine_cuda()
            except Unavailable as error:
                if cuda == "1":
                    raise SetupError(f"MONOSOFTMAX_CUDA=1, but the CUDA kernels cannot be built: {error}") from error
                problem = str(error)
        if self.cuda is None:
            self.built_in = [f"-DMONOSOFTMAX_CUDA_PROBLEM={c_string(problem)}"]
            BuildKernels.outcome = f"monosoftmax is built for the CPU, without its CUDA kernels: {problem}"
        else:
            architectures = " ".join(self.cuda.architectures)
            self.built_in = [
                "-DMONOSOFTMAX_CUDA",
                f"-DMONOSOFTMAX_CUDA_TOOLKIT={c_string(self.cuda.version)}",
                f"-DMONOSOFTMAX_CUDA_ARCHITECTURES={c_string(architectures)}",
            ]
            BuildKernels.outcome = (
                f"monosoftmax is built with its CUDA kernels, for {architectures}, by CUDA {self.cuda.version} in "
                f"{self.cuda.home} (torch: CUDA {torch.version.cuda})"
            )
        super().run()

    def build_extension(self, extension: Extension) -> None:
        if self.openmp:
            # Not for the linker: libtorch_cpu brings the OpenMP runtime, and a process should have one.
            extension.extra_compile_args.append("-fopenmp")
        else:
            # clang's OpenMP calls its own runtime. Next to GNU's, which torch's wheels bring, every thread would do
            # all of the work of a parallel loop.
            self.warn("the C++ extension is built by clang: it will use one thread; CXX=g++ builds it with OpenMP")
        if self.cuda is not None:
            cpp_extension.CUDA_HOME = str(self.cuda.home)
            extension.libraries.append("c10_cuda")
            # The shared runtime, that of torch: a second, static one in the process would have errors and attributes of
            # kernels of its own, which torch's checks do not see. torch is always loaded first, and the loader then
            # goes by the name libcudart.so.<major>: no rpath.
            extension.extra_link_args.append(str(self.cuda.runtime))

        files = [each for each in sources(cuda=self.cuda is not None) if each.file != BINDINGS]
        # Without ninja, torch changes the command of the one compiler object back and forth.
        jobs = count_jobs() if self.use_ninja else 1
        kernels = [each for each in files if each.part == "cuda"]
        threads = 1 + max(0, jobs - len(files)) // max(1, len(kernels))
        # What takes longest first; linked in the order of csrc/sources.txt.
        order = sorted(files, key=lambda each: each.part != "cuda")
        with ThreadPoolExecutor(jobs) as pool:
            compiled = pool.map(lambda each: self.compile_source(extension, each, threads), order)
            objects = dict(zip(order, compiled, strict=True))
        extension.extra_objects = [objects[each] for each in files]
        extension.extra_compile_args += self.built_in
        super().build_extension(extension)

    def compile_source(self, extension: Extension, source: Source, threads: int) -> str:
        """Compiles one file, nvcc working with so many threads, and returns the object file."""
        if source.part == "cuda":
            flags = {"cxx": [], "nvcc": [*self.cuda.nvcc_flags(threads), *source.flags]}
        else:
            cuda = ["-DMONOSOFTMAX_CUDA", f"-I{self.cuda.include}"] if source.part == "extension-cuda" else []
            flags = {"cxx": [*extension.extra_compile_args, *cuda, *source.flags], "nvcc": []}
        [compiled] = self.compiler.compile(
            [str(CSRC / source.file)],
            # A build with ninja has one set of flags, so each file is one.
            output_dir=os.path.join(self.build_temp, source.file),
            macros=extension.define_macros,
            include_dirs=[] if source.part == "cuda" else extension.include_dirs,
            debug=self.debug,
            extra_postargs=flags,
            depends=extension.depends,
        )
        return compiled


if __name__ == "__main__":
    # torch looks for ninja on PATH, and pip installs it beside a Python whose environment need not be activated.
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
                [str(CSRC / BINDINGS)],
                depends=sorted(str(file) for file in CSRC.rglob("*.*")),
                extra_compile_args=FLAGS,
            )
        ],
        cmdclass={"build_ext": BuildKernels},
    )
    if BuildKernels.outcome:
        print(BuildKernels.outcome)
