"""Lists versions, the machine, the backends and what is missing: ``python -m monosoftmax.info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import __version__, _installation, backends

#: Packages that parts of monosoftmax or its benchmarks use if they are installed.
_OPTIONAL = ("triton", "numpy", "matplotlib", "tabulate", "tqdm")


def collect() -> dict[str, Any]:
    """All values that the command prints, in types that ``json`` can write.

    ``folder`` is the folder of the package. ``extension`` has the settings that the C++ extension was built with, or
    None if it is missing or cannot be used; ``backends`` has the reason, ``extension_file`` the path. ``kernels`` tells
    which kernels of the extension run here. ``compiler`` is the path of the C++ compiler for a build now, or None.
    """
    extension = backends.extension
    built = None if extension is None else dict(extension.build_info())
    return {
        "monosoftmax": __version__,
        "folder": str(_installation.FOLDER),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in _OPTIONAL},
        "compiler": shutil.which(_compiler()),
        "extension": built,
        "extension_file": None if extension is None else extension.__file__,
        "kernels": {
            "cuda": _cuda_kernels(built),
            "cpu": "not built" if extension is None else extension.cpu_capability(),
        },
        "backends": {
            name: {"available": status.available, "detail": status.detail}
            for name, status in backends.available().items()
        },
    }


def render(info: Mapping[str, Any]) -> str:
    """Turns the values of :func:`collect` into text for people."""
    extension, compiler = info["extension"], info["compiler"]
    built = "not in use, see the cpu backend"
    if extension is not None:
        built = _pairs({name: value for name, value in extension.items() if not name.startswith("cuda")})
        folder = os.path.dirname(info["extension_file"])
        if folder != info["folder"]:
            built += f", of the package in {folder}, which has the same Python files"
    rows = {
        "monosoftmax": f"{info['monosoftmax']} in {info['folder']}",
        "Python": info["python"],
        "torch": info["torch"],
        "platform": info["platform"],
        "CPU": f"{info['cpu_capability']} (as torch names it), {info['threads']} threads",
        "GPUs": ", ".join(info["gpus"]) or "none that torch can use",
        "packages": _pairs({name: version or "not installed" for name, version in info["packages"].items()}),
        "C++ extension": built,
        "kernels": "; ".join(f"{name}: {what}" for name, what in info["kernels"].items()),
        "C++ compiler": compiler or f"not found: there is no {_compiler()} (environment variable CXX, else c++)",
    }
    lines = [f"{name:<14} {text}" for name, text in rows.items()]
    lines += ["", "backends"]
    for name, status in info["backends"].items():
        lines.append(f"  {name:<10} {'available' if status['available'] else 'not available':<14} {status['detail']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: prints the text, or with ``--json`` the values."""
    parser = argparse.ArgumentParser(
        prog="python -m monosoftmax.info", description="What monosoftmax finds here, and what is missing."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    info = collect()
    print(json.dumps(info, indent=2) if parser.parse_args(arguments).json else render(info))


def _cuda_kernels(built: Mapping[str, Any] | None) -> str:
    """Whether the extension has CUDA kernels and there is a device for them."""
    if built is None:
        return "not built"
    if built["cuda"] is None:
        return f"not built ({built['cuda_problem']})"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    return f"built, {device} (CUDA {built['cuda']}, for {built['cuda_architectures']})"


def _compiler() -> str:
    # The same rule as in torch.utils.cpp_extension, which is slow to import.
    return (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    main()
