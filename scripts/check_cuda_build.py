"""Builds monosoftmax with its CUDA kernels, on a machine with or without a GPU, and checks the result.

It makes a new environment in a temporary folder, with the packages in requirements/cuda.txt (a CUDA build of torch and
nvcc). There it installs the package from its source distribution, with warnings of nvcc as errors, and checks

- that ``python -m monosoftmax.info`` says that the CUDA kernels are built, and names the device for them;
- that every kernel file left machine code for each architecture in the extension, and PTX for each +PTX;
- that the extension has every function for CUDA tensors;
- that losses and gradients are right, on the CPU, and on the GPU if there is one.

Then it removes the folder. It needs 12 GB there (TMPDIR names another place), a C++ compiler, and some minutes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED_GB = 12
#: The lines to show of the output of a command that fails.
LAST_LINES = 40
BUILT = ("*.egg-info", "*.o", "*.so", ".*_cache", ".git", ".venv*", "__pycache__", "build", "dist")


class Failure(Exception):
    """A failed check or a failed command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--if-possible", action="store_true", help="where the disk is too small, say so and succeed")
    parser.add_argument("--keep", action="store_true", help="leave the folder there, and say where it is")
    parser.add_argument("--architectures", default="8.0;9.0;10.0+PTX", help="TORCH_CUDA_ARCH_LIST (%(default)s)")
    # This script calls itself with this option, in the new environment.
    parser.add_argument("--only-compute", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only_compute:
        check_results()
        return 0
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free / 1e9
    if free < NEEDED_GB:
        verdict = "skipped" if options.if_possible else "failed"
        print(f"{verdict}: needs {NEEDED_GB} GB free, there are {free:.1f} ({place})")
        return 0 if options.if_possible else 1
    # A CI system that stops this script gets its disk space back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(tempfile.mkdtemp(prefix="monosoftmax-cuda-"))
    try:
        check(folder, options.architectures)
    except Failure as failure:
        print(f"failed: {failure}")
        return 1
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    print("the CUDA build is right")
    return 0


def check(folder: Path, architectures: str) -> None:
    """Runs all steps in the docstring of this file, in an empty folder."""
    with step("an environment with what requirements/cuda.txt pins"):
        venv.create(folder / "env", with_pip=True)
        python = folder / "env/bin/python"
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--no-cache-dir")
        run(*pip, "--quiet", "-r", ROOT / "requirements/cuda.txt", cwd=folder)
    with step("the source distribution"):
        tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*BUILT))
        run(python, "-c", f"import setuptools.build_meta as backend; backend.build_sdist({str(folder)!r})", cwd=tree)
        shutil.rmtree(tree)
        [archive] = folder.glob("monosoftmax-*.tar.gz")
    with step(f"building and installing it for {architectures}"):
        settings = {"MONOSOFTMAX_CPP": "1", "MONOSOFTMAX_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
        werror = {"NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Werror all-warnings"}
        options = ("--verbose", "--no-build-isolation", "--no-deps", "--no-index")
        said = run(*pip, *options, archive, cwd=folder, **settings, **werror)
        print(expect(r"monosoftmax is built with its CUDA kernels.*", said))
    with step("what it finds here"):
        said = run(python, "-m", "monosoftmax.info", cwd=folder)
        kernels = expect(r"cuda: built, .*", said)
        print(kernels)
        if re.search(r"^GPUs +none", said, re.MULTILINE) and not kernels.startswith("cuda: built, no device"):
            raise Failure(f"there is no GPU, so this should be 'cuda: built, no device'\n{said}")
    with step("the device code"):
        [library] = folder.glob("env/lib/python*/site-packages/monosoftmax/_C.*.so")
        [inspector] = folder.glob("env/lib/python*/site-packages/nvidia/*/bin/cuobjdump")
        listed = run(inspector, "--list-elf", "--list-ptx", library, cwd=folder)
        print(check_device_code(listed, architectures), f"in {library.stat().st_size / 1e6:.1f} MB")
    with step("operators, losses and gradients"):
        said = run(python, Path(__file__).resolve(), "--only-compute", cwd=folder)
        print(*re.findall(r"^registered for .*$|^\w+: like torch.*$", said, re.MULTILINE), sep="\n")


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Prints the name of a step, and its time."""
    print(f"--- {what}", flush=True)
    start = time.monotonic()
    yield
    print(f"    {time.monotonic() - start:.0f} s", flush=True)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command, and returns its output on both streams.

    Raises:
        Failure: the command fails.
    """
    # All temporary files go to the folder with enough free space. Settings of an activated environment are removed.
    settings = {**os.environ, "TMPDIR": str(cwd), **environment}
    settings.pop("PYTHONPATH", None)
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        # A compiler's warnings can fill thousands of lines.
        lines = result.stdout.splitlines()
        errors = [line for line in lines[:-LAST_LINES] if re.search(r"\b(error|fatal)\b", line)]
        raise Failure("\n".join((shlex.join(map(str, command)), *errors[:LAST_LINES], "[...]", *lines[-LAST_LINES:])))
    return result.stdout


def expect(pattern: str, text: str) -> str:
    """Returns the match in ``text``, which must exist."""
    found = re.search(pattern, text)
    if found is None:
        raise Failure(f"nothing matches {pattern!r} in\n{text}")
    return found[0]


def check_device_code(listed: str, architectures: str) -> str:
    """Summarizes the output of ``cuobjdump --list-elf --list-ptx``, which must have exactly the requested code."""
    names = [word.replace(".", "").partition("+") for word in architectures.replace(";", " ").split()]
    wanted = {("ELF", number) for number, *_ in names} | {("PTX", number) for number, _, ptx in names if ptx}
    found = collections.Counter(re.findall(r"^(ELF|PTX) file .*\.sm_(\w+)\.(?:cubin|ptx)$", listed, re.MULTILINE))
    lines = (ROOT / "csrc/sources.txt").read_text(encoding="utf-8").splitlines()
    files = sum(line.split()[1:2] == ["cuda"] for line in lines if not line.startswith("#"))
    if found != {each: files for each in wanted}:
        raise Failure(f"{files} files of kernels should each leave {sorted(wanted)}, there are\n{listed}")
    return f"{files} files of kernels: " + ", ".join(f"{kind} for sm_{number}" for kind, number in sorted(found))


def check_results() -> None:
    """Checks, in the new environment, the CUDA functions, and compares results with torch and the reference."""
    import torch
    from torch.nn.functional import cross_entropy

    import monosoftmax as ms
    from monosoftmax.row_kernels import RowKernels

    kernels = getattr(ms.backends.extension, "cuda", None)
    functions = [name for name in vars(RowKernels) if inspect.isfunction(getattr(RowKernels, name)) and name[0] != "_"]
    absent = [name for name in functions if not hasattr(kernels, name)]
    if absent or not functions:
        raise Failure(f"the extension lacks these functions for CUDA tensors: {absent}")
    print("for CUDA tensors:", ", ".join(functions))

    def outcome(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    variants: tuple[dict[str, Any], ...] = ({}, {"reduction": "sum", "label_smoothing": 0.1})
    shapes = ((torch.float32, 33, 1003), (torch.bfloat16, 64, 4096), (torch.float64, 5, 40))
    for backend in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        worst = 0.0
        for dtype, rows, columns in shapes if backend == "cpu" else shapes[:2]:
            torch.manual_seed(0)
            logits = (3 * torch.randn(rows, columns)).to(backend, dtype).requires_grad_()
            target = torch.randint(columns, (rows,), device=backend)
            target[1] = -100
            plif = ms.transforms.PLIF(64).to(backend)
            inputs = (logits, *plif.parameters())
            for settings in variants:
                # torch's loss has the dtype of its logits, our loss is at least float32.
                wide = logits.to(torch.promote_types(dtype, torch.float32))
                results = (
                    *outcome(ms.cross_entropy(logits, target, backend=backend, **settings), logits),
                    *outcome(ms.cross_entropy(logits, target, plif, backend=backend, **settings), *inputs),
                )
                right = (
                    *outcome(cross_entropy(wide, target, **settings), logits),
                    *outcome(ms.cross_entropy(logits, target, plif, backend="reference", **settings), *inputs),
                )
                for result, expected in zip(results, right, strict=True):
                    scale = expected.double().abs().max().item()
                    tolerance = 1e-2 if result.dtype == torch.bfloat16 else 1e-4
                    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * scale)
                    worst = max(worst, (result.double() - expected.double()).abs().max().item() / scale)
        print(f"{backend}: like torch and the reference, to {worst:.1e} of the largest number")


if __name__ == "__main__":
    sys.exit(main())
