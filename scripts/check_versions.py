"""Runs the tests that depend on torch and Triton with each supported pair of their versions, on the CPU.

The versions are the oldest supported torch, the pinned one (requirements/dev.txt), the newest, and a widespread one
between them. For each, it makes an environment, builds the extension in a copy of the sources, without the CUDA
kernels, and runs the tests of torch.compile, the operators, Triton's interpreter and the host execution of the CUDA
kernels. Environments stay in the folder for the next time. Each takes 7 GB, as PyPI has only CUDA builds of torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Each torch with its Triton, a numpy, and packages that need another version than in requirements/dev.txt. All other
#: versions come from requirements/dev.txt.
VERSIONS = {
    "2.10.0": ("triton==3.6.0", "numpy==2.3.5"),
    "2.11.0": ("triton==3.6.0", "numpy==2.4.6", "setuptools==81.0.0"),
    "2.14.1": ("triton==3.8.0", "numpy==2.4.6"),
}

#: The oldest packages that the integrations support, with the oldest torch. `make test-integrations` has the newest.
INTEGRATIONS = {"2.10.0": ("transformers==5.8.1", "accelerate==1.12.0", "peft==0.19.1")}

#: Other packages for the build and the tests.
TOOLS = ("setuptools", "ninja", "hypothesis", "pytest", "filelock", "jinja2", "pandas", "tabulate")

#: The test files, and an expression that selects from each.
TESTS = (
    (
        "tests/unit/test_operators.py",
        "not slow",
    ),
    ("tests/emulated/test_triton_operators.py tests/emulated/test_triton_interpreter.py", "not slow"),
    ("tests/unit/test_linear_cross_entropy.py tests/unit/test_soft_targets.py", "compile or func or triton"),
    ("tests/unit/test_gradients_ahead.py tests/unit/test_edges.py tests/unit/test_training.py", ""),
    ("tests/unit/test_transform_modules.py tests/unit/test_transform_state.py", ""),
    ("tests/emulated/test_hands_traced.py tests/emulated/test_hands_operands.py", ""),
    ("tests/unit/test_nested_transforms.py", ""),
    ("tests/unit/test_hands_sharded.py tests/emulated/test_hands_parameters.py tests/unit/test_hands_training.py", ""),
    ("tests/unit/test_cross_entropy.py", "triton or cuda"),
    ("tests/experiments/test_overhead.py", "agree"),
)
#: The same for a version with integrations.
OF_INTEGRATIONS = (
    ("tests/integrations/test_models.py tests/integrations/test_trainer.py", "not several"),
    ("tests/integrations/test_peft.py tests/integrations/test_inspection.py", ""),
    ("tests/integrations/test_generation.py tests/integrations/test_serving.py", "not lookup"),
)

#: Files that are not copied to the folder of the build.
LEFT_OUT = ("*.egg-info", "*.o", "*.so", ".*", "__pycache__", "build", "dist", "results")
#: The lines to show of the output of a command that fails.
LAST_LINES = 40


class Failure(Exception):
    """A failed command."""


@dataclass
class Outcome:
    """The outcome for one version."""

    packages: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def right(self) -> bool:
        return not self.problem and self.failed == 0 and self.passed > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    versions = supported()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", choices=versions, metavar="VERSION", help=", ".join(versions))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/versions", help="(%(default)s)")
    options = parser.parse_args(arguments)
    outcomes: dict[str, Outcome] = {}
    for version in options.only or versions:
        outcome = outcomes[version] = Outcome(" ".join(each.partition(";")[0] for each in versions[version][:2]))
        start = time.monotonic()
        try:
            check(version, versions[version], options.folder.resolve() / version, outcome)
        except Failure as failure:
            outcome.problem = str(failure)
            print(outcome.problem)
        outcome.seconds = time.monotonic() - start
    print(f"\n{'torch':8} {'with':30} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for version, each in outcomes.items():
        counts = f"{each.passed:7} {each.failed:7} {each.skipped:8} {each.seconds:8.0f}"
        print(f"{version:8} {each.packages:30} {counts} {'' if each.right else 'FAILED'}".rstrip())
    return 0 if all(each.right for each in outcomes.values()) else 1


def pins(*names: str) -> list[str]:
    """The lines of requirements/dev.txt for packages of these names."""
    lines = (ROOT / "requirements/dev.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def supported() -> dict[str, tuple[str, ...]]:
    """The versions of torch, in order, each with its packages."""
    [pinned] = pins("torch")
    found = {**VERSIONS, pinned.partition("==")[2]: (*pins("triton", "numpy"),)}
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def check(version: str, packages: Sequence[str], folder: Path, outcome: Outcome) -> None:
    """Runs all steps for one version."""
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "env/bin/python"
    named = [each.partition("==")[0] for each in packages]
    tools = [each for each in TOOLS if each not in named]
    integrations = INTEGRATIONS.get(version, ())
    wanted = "\n".join((f"torch=={version}", *packages, *pins(*tools), *integrations))
    stamp = folder / "installed.txt"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        say(version, "an environment")
        venv.create(folder / "env", with_pip=True, clear=True)
        (folder / "wanted.txt").write_text(wanted, encoding="utf-8")
        run(python, "-m", "pip", "install", "--quiet", "-r", folder / "wanted.txt", cwd=folder)
        stamp.write_text(wanted, encoding="utf-8")
    say(version, "the extension")
    tree = copy(folder / "tree")
    # torch.compile caches code of our derivatives, and does not see that the derivatives changed.
    shutil.rmtree(tree / "build/inductor", ignore_errors=True)
    install = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", ".")
    run(python, *install, cwd=tree, MONOSOFTMAX_CPP="1", MONOSOFTMAX_CUDA="0")
    for number, (files, selection) in enumerate(TESTS + (OF_INTEGRATIONS if integrations else ())):
        say(version, files)
        report = folder / f"tests-{number}.xml"
        command = (python, "-m", "pytest", "-q", "-p", "no:logging", f"--junit-xml={report}", "-k", selection)
        report.unlink(missing_ok=True)
        try:
            run(*command, *files.split(), cwd=tree)
        except Failure as failure:
            if not report.exists():
                raise
            print(failure)
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped = int(suite.get("skipped", 0))
            outcome.failed += failed
            outcome.skipped += skipped
            outcome.passed += int(suite.get("tests", 0)) - failed - skipped


def copy(tree: Path) -> Path:
    """Copies the sources anew. Compiled files of an earlier run stay, to be used again for unchanged sources."""
    tree.mkdir(exist_ok=True)
    for each in tree.iterdir():
        if each.is_dir() and each.name != "build":
            shutil.rmtree(each)
        elif each.name != "build":
            each.unlink()
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
    return tree


def say(version: str, what: str) -> None:
    """Prints the name of a step."""
    print(f"--- torch {version}: {what}", flush=True)


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Runs a command, without the settings of an activated environment.

    Raises:
        Failure: the command fails.
    """
    settings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cwd / "build/inductor"), **environment}
    settings.pop("PYTHONPATH", None)
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        lines = re.sub(r"^DEBUG .*\n", "", result.stdout, flags=re.MULTILINE).splitlines()
        raise Failure("\n".join((" ".join(map(str, command)), "[...]", *lines[-LAST_LINES:])))


if __name__ == "__main__":
    sys.exit(main())
