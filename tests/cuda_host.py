"""The CUDA kernels on the CPU: builds the host execution of ``csrc/cuda`` as a Python module, and imports it.

A fiber stands for each CUDA thread (``csrc/cuda/host``). The submodule ``cuda`` of the module has the functions of
``monosoftmax._C.cuda``, for CPU tensors; :mod:`monosoftmax.backends` offers them while the module is among Python's
modules: see :func:`executing`.
Needs a C++20 compiler and no CUDA.

The build takes a minute. So the module is kept in a cache, by a hash of everything that it is made of: another checkout
of the same sources takes it from there. The cache is ``$MONOSOFTMAX_CACHE/cuda-host``, or
``~/.cache/monosoftmax/cuda-host``. The objects stay in ``build/``, so that a change compiles what it changes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

_ROOT = Path(__file__).parents[1]
_CSRC = _ROOT / "csrc"
_NAME = "monosoftmax_cuda_host"
#: What includes torch.
_WITH_TORCH = ("operators.cpp", "without_rows.cpp", "host/torch_device.cpp", "host/python_module.cpp")
#: -O1 compiles in two thirds of the time of -O2, and the tests take as long.
_FLAGS = (
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
)
#: The number of modules that stay in the cache: that of this commit, and of some others.
_KEPT = 8

#: GPUs by their capability: multiprocessors (few, so that blocks have many rows) and shared memory of a block.
DEVICES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
_MULTIPROCESSORS = 2


@functools.cache
def module() -> ModuleType:
    """Imports the module from the cache, which it builds it into if necessary."""
    library = cache() / hash_of_sources() / f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        _build_into(library)
    os.utime(library.parent)  # it is in use: see _forget_old
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def cache() -> Path:
    """Returns the folder of the modules, one folder for each hash."""
    return Path(os.environ.get("MONOSOFTMAX_CACHE") or Path.home() / ".cache/monosoftmax") / "cuda-host"


def hash_of_sources() -> str:
    """Hashes all that the module is made of: sources with their headers, flags, and the versions of its tools."""
    made_of = hashlib.sha256()
    for path in sorted(_CSRC.rglob("*")):
        relative = path.relative_to(_CSRC)
        if path.is_file() and relative.parts[0] != "tests":
            made_of.update(f"{relative} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    compiler = _run(*_compiler(), "--version")
    made_of.update(f"{compiler} {_FLAGS} {_WITH_TORCH} {torch.__version__} {torch.version.git_version}".encode())
    made_of.update(sys.version.encode())
    return made_of.hexdigest()[:32]


def _build_into(library: Path) -> None:
    """Compiles what is not compiled yet, and links. An object is called after the hash of its preprocessed source."""
    folder = _ROOT / "build" / f"cuda-host-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of pytest may be at it
        if library.exists():
            return
        with tempfile.TemporaryDirectory(dir=folder) as temporary, ThreadPoolExecutor(os.cpu_count()) as threads:
            preprocessed = list(threads.map(functools.partial(_preprocess, folder=Path(temporary)), _sources()))
            assert library.parent.name == hash_of_sources(), "a source has changed during the build"
            objects = list(threads.map(functools.partial(_compile, folder=folder), preprocessed))
            built = Path(temporary) / library.name
            torch_lib = Path(torch.__file__).parent / "lib"
            libraries = ("-ltorch_cpu", "-ltorch", "-lc10", "-ltorch_python")
            _run(*_compiler(), "-shared", *objects, "-o", built, f"-L{torch_lib}", *libraries)
            library.parent.mkdir(parents=True, exist_ok=True)
            copy = library.with_suffix(f".{os.getpid()}")
            shutil.copy(built, copy)
            copy.replace(library)  # whole, or not there
        for each in set(folder.iterdir()) - {*objects, folder / "lock"}:
            each.unlink()  # of other sources
    _forget_old(library.parent.parent)


def _sources() -> list[Path]:
    """The files that take the compiler longest come first."""
    cuda = _CSRC / "cuda"
    with_torch = [cuda / name for name in _WITH_TORCH]
    others = {*cuda.glob("*.cu"), cuda / "plan.cpp", *(cuda / "host").glob("*.cpp")} - {*with_torch}
    return [*with_torch, *sorted(others, key=lambda path: (path.suffix != ".cu", path))]


def _preprocess(path: Path, folder: Path) -> Path:
    more = _torch_flags() if str(path.relative_to(_CSRC / "cuda")) in _WITH_TORCH else ["-x", "c++"]
    result = folder / f"{path.name}.ii"
    _run(*_compiler(), *_FLAGS, *more, "-E", path, "-o", result)
    return result


def _compile(preprocessed: Path, folder: Path) -> Path:
    made_of = f"{_run(*_compiler(), '--version')} {_FLAGS}".encode() + preprocessed.read_bytes()
    result = folder / f"{preprocessed.stem}-{hashlib.sha256(made_of).hexdigest()[:32]}.o"
    if not result.exists():
        compiled = preprocessed.with_suffix(".o")
        warnings = ["-Wno-missing-field-initializers"] if b"/torch/" in made_of else []
        _run(*_compiler(), *_FLAGS, *warnings, "-c", preprocessed, "-o", compiled)
        compiled.replace(result)
    return result


def _compiler() -> list[str]:
    return shlex.split(get_cxx_compiler())


def _torch_flags() -> list[str]:
    includes = [word for path in (*include_paths(), sysconfig.get_path("include")) for word in ("-isystem", path)]
    return [*includes, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def _run(*command: str | Path) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


def _forget_old(modules: Path) -> None:
    """Leaves the modules that were used last."""
    by_use = sorted(modules.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in by_use[_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def executing(capability: int = 90, multiprocessors: int = _MULTIPROCESSORS, **wishes: Any) -> Iterator[Any]:
    """While it lasts, the cuda backend takes CPU tensors, as a GPU of such a capability would.

    ``wishes``: what the plans are tuned to (``csrc/cuda/plan.h``, Tuning).
    """
    host = module()
    host.set_device(capability, multiprocessors, DEVICES[capability], **wishes)
    host.set_order("forward")
    before = sys.modules.get(_NAME)
    sys.modules[_NAME] = host
    try:
        yield host
    finally:
        if before is None:
            del sys.modules[_NAME]
