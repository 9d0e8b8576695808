"""Makes the mistakes of tests/mutations.toml, one at a time, and asks whether a test notices: ``--help``.

Each is made in a copy of the tracked files. In the end the tests that noticed one run without any, and must pass. The
exit status is 0 if every mistake was noticed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent
PYTEST = (sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-rfE")
CMAKE = ("-S", ".", "-B", "build/cpp", "-DCMAKE_BUILD_TYPE=", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
_ENDED = "exit status"
KINDS = ("python", "triton", "cpu", "cuda", "cpp")


class Mutation(NamedTuple):
    """A mistake: ``old``, which occurs once in ``file``, becomes ``new``."""

    name: str
    #: "cpu" builds the extension, "cpp" targets of CMake; the tests of "cuda" build what they need.
    kind: str
    file: str
    old: str
    new: str
    #: Files anywhere in tests/, or all as file::test; for "cpp" targets.
    tests: list[str]
    #: Whether an ordinary run leaves these tests out (tests/tiers.py).
    exhaustive: bool = False


class Outcome(NamedTuple):
    mutation: Mutation
    result: str
    #: The test that failed.
    by: str = ""


class Scratch:
    """The copy of the tracked files, with the tests of any checkout."""

    def __init__(self, folder: Path, tests_of: Path, pytest: list[str]) -> None:
        self.folder, self.pytest = folder, pytest
        shutil.rmtree(folder / "tests", ignore_errors=True)
        for root, paths in ((ROOT, (".", ":!tests")), (tests_of, ("tests",))):
            names = subprocess.check_output(["git", "-C", root, "ls-files", "-z", "--", *paths], text=True).split("\0")
            for source, copy in ((root / name, folder / name) for name in names):
                # What is the same keeps its time, so that it is not built again.
                if source.is_file() and not (copy.is_file() and copy.read_bytes() == source.read_bytes()):
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, copy)
        for library in ROOT.glob("monosoftmax/_C*.so"):
            shutil.copy(library, folder / "monosoftmax")
        # As where it is installed. An editable installation would lead to the sources that it was made of.
        (folder / "monosoftmax" / "triton_kernels").unlink(missing_ok=True)
        (folder / "monosoftmax" / "triton_kernels").symlink_to("../triton_kernels")

    def run(self, *command: str | Path) -> tuple[int, str]:
        """The exit status, and the output."""
        with tempfile.TemporaryDirectory() as cache:  # compiled graphs, which do not know that a derivative has changed
            own = {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
            environment = os.environ | own | {"MONOSOFTMAX_CUDA": "0"}
            result = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    def test(self, kind: str, tests: Sequence[str]) -> tuple[str, list[str]]:
        """Builds and runs ``tests``. Returns what kept it from that, and the tests that failed."""
        status, output = 0, ""
        if kind == "cpu":
            status, output = self.run(sys.executable, "setup.py", "build_ext", "--inplace")
        elif kind == "cpp":
            self.run(PROGRAMS / "cmake", *CMAKE, "-DMONOSOFTMAX_SANITIZE=ON")
            status, output = self.run(PROGRAMS / "cmake", "--build", "build/cpp", "--target", *tests)
        if status:
            return f"error: it does not build: {' '.join(output.split())[-300:]}", []
        if kind == "cpp":
            names = "|".join(f"^{name}$" for name in tests)
            status, output = self.run(PROGRAMS / "ctest", "--test-dir", "build/cpp", "--no-tests=error", "-R", names)
            failed = re.findall(r"^\s*\d+ - (\w+) \(", output, re.MULTILINE)
        else:
            status, output = self.run(*PYTEST, *self.pytest, *tests)
            failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE) if status == 1 else []
            if status not in range(6):  # pytest's own: a kernel's defect ends the process
                failed = [f"{_ENDED} {status}"]
        return ("", failed) if status == 0 or failed else (f"error {status}: {' '.join(output.split())[-300:]}", [])

    def selected(self, mutation: Mutation) -> list[str]:
        """The arguments of pytest. A test named by ``::`` would run for all of its parameters."""
        parts = [each.partition("::") for each in mutation.tests]
        files = sorted({str(next(self.folder.glob(f"tests/**/{file}"), file)) for file, _, _ in parts})
        names = [name for _, _, name in parts if name]
        options = ["--exhaustive"] if mutation.exhaustive else []
        return ["-x", *options, *files, *(["-k", " or ".join(names)] if names else [])]

    def attempt(self, mutation: Mutation) -> Outcome:
        """Makes the mistake, runs its tests, and takes it back."""
        path = self.folder / mutation.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(mutation.old) != 1:
            return Outcome(mutation, f"error: the old text occurs {text.count(mutation.old)} times")
        try:
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            tests = mutation.tests if mutation.kind == "cpp" else self.selected(mutation)
            problem, failed = self.test(mutation.kind, tests)
        finally:
            path.write_text(text, encoding="utf-8")
        return Outcome(mutation, problem or ("caught" if failed else "MISSED"), (failed or [""])[0])

    def attempt_all(self, kind: str, mutations: Sequence[Mutation]) -> list[Outcome]:
        """The outcomes, where no test counts that fails without the mistake, too."""
        outcomes = []
        for mutation in mutations:
            start = time.monotonic()
            outcomes.append(self.attempt(mutation))
            seconds = time.monotonic() - start
            print(f"{seconds:5.0f} s  {mutation.name}: {' '.join(outcomes[-1][1:])}", flush=True)
        tests = sorted({each.by for each in outcomes if each.by and not each.by.startswith(_ENDED)})
        problem, failed = self.test(kind, tests) if tests else ("", [])
        for number, each in enumerate(outcomes):
            if each.by and (problem or each.by in failed):
                outcomes[number] = each._replace(result=problem or "error: the test fails without the mistake, too")
        return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME", help="mistakes whose names contain it")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--tests-of", type=Path, default=ROOT, metavar="FOLDER", help="another checkout, for its tests")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "mutations", metavar="FOLDER")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a table")
    parser.add_argument("pytest", nargs="*", help="after --: arguments of pytest, such as --exhaustive")
    wish = parser.parse_args()
    scratch = Scratch(wish.scratch.resolve(), wish.tests_of.resolve(), wish.pytest)
    listed = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))["mutation"]
    mutations = [each for each in (Mutation(**table) for table in listed) if wish.only in each.name]
    outcomes = []
    for kind in wish.kind or KINDS:
        outcomes += scratch.attempt_all(kind, [each for each in mutations if each.kind == kind])
    bad = [each for each in outcomes if each.result != "caught"]
    rows = [("mistake", "file", "kind", "noticed by"), ("---",) * 4]
    rows += [(each.mutation.name, each.mutation.file, each.mutation.kind, each.by or each.result) for each in outcomes]
    if wish.markdown:
        wish.markdown.write_text("".join(f"| {' | '.join(row)} |\n" for row in rows), encoding="utf-8")
    for each in bad:
        print(f"{each.mutation.name}: {each.result}")
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} mistakes noticed")
    return 1 if bad or not outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())
