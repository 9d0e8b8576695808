"""The CUDA kernels on the CPU: builds the host execution of ``csrc/cuda`` as a Python module, and imports it.

A fiber stands for each CUDA thread (``csrc/cuda/host``). The submodule ``cuda`` of the module has the functions of
``monosoftmax._C.cuda``, for CPU tensors; :mod:`monosoftmax.backends` offers them while the module is among Python's
modules: see :func:`executing`.
Needs a C++20 compiler and no CUDA.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.cpp_extension import get_cxx_compiler, include_paths

_ROOT = Path(__file__).parents[1]
_CSRC = _ROOT / "csrc"
_NAME = "monosoftmax_cuda_host"

#: GPUs by their capability: multiprocessors (few, so that blocks have many rows) and shared memory of a block.
DEVICES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 120: 99 << 10}
_MULTIPROCESSORS = 2


@functools.cache
def module() -> ModuleType:
    """The module, built where a source is newer than it."""
    folder = _ROOT / "build" / f"cuda-host-torch-{torch.__version__}"
    library = folder / f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_rules(library), encoding="utf-8")
    ninja = shutil.which("ninja", path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    assert ninja is not None, "ninja is not installed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of pytest may be at it
        result = subprocess.run([ninja, "-C", folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


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


def _rules(library: Path) -> str:
    includes = " ".join(f"-isystem {path}" for path in (*include_paths(), sysconfig.get_path("include")))
    torch_lib = Path(torch.__file__).parent / "lib"
    flags = "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror"
    # What a designated initialiser leaves out is zero, as it should be.
    torch_flags = (
        f"{includes} -Wno-missing-field-initializers -D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    )
    with_torch = ("operators.cpp", "without_rows.cpp", "host/torch_device.cpp", "host/python_module.cpp")
    sources = {_CSRC / "cuda" / name: torch_flags for name in with_torch}
    others = [*(_CSRC / "cuda").glob("*.cu"), _CSRC / "cuda/plan.cpp", *(_CSRC / "cuda/host").glob("*.cpp")]
    for path in sorted(others):
        sources.setdefault(path, "-x c++")
    compiler = " ".join(map(shlex.quote, shlex.split(get_cxx_compiler())))
    lines = [
        "rule compile",
        f"  command = {compiler} {flags} $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -L{torch_lib} -ltorch_cpu -ltorch -lc10 -ltorch_python",
    ]
    objects = []
    for path, more in sources.items():
        objects.append(f"{path.name}.o")
        lines += [f"build {objects[-1]}: compile {path}", f"  more = {more}"]
    lines += [f"build {library}: link {' '.join(objects)}", f"default {library}", ""]
    return "\n".join(lines)
