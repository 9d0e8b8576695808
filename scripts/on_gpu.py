"""Builds, proves and times monosoftmax on the GPU of this machine, in one call, offline, and prints a page of results.

    python scripts/on_gpu.py FOLDER [--seconds 540] [--wheels FOLDER] [--dry-run]

The stages; each has its own limit, within the rest of ``--seconds``:

    build      the extension, in place for the GPU of this machine, unless it exists already
    tests      tests/gpu, and compute-sanitizer (memcheck, racecheck, synccheck) over launches of every kernel family
    variants   python -m benchmarks run overhead --only 'variants/*': other plans and tiles, to choose by measurement
    counters   ncu of the kernels that matter
    overhead   python -m benchmarks run overhead --only 'gpu/*'
    more       the tests of the kernels' own dimensions, with the rest of the time

A stage that fails or runs out of time stops no other stage. Results are in FOLDER, in eight files at most, as soon as
they are known: every line of tests.jsonl and every case and operator of overhead.jsonl at once, run.json and summary.md
after every stage. The exit status is 0 if correctness holds: the build, the tests and the sanitizers ended,
and found nothing.

The stages variants and overhead need numpy, tqdm, filelock and tyro, of what monosoftmax[benchmarks] names, and compare
with Liger and cut-cross-entropy. A machine without a package index lacks most of them. All but numpy are pure Python:
the first two commands, anywhere, bring them along.

    pip download --dest wheels --constraint requirements/dev.txt tyro filelock tqdm
    pip download --dest wheels --no-deps --requirement requirements/peers.txt
    python scripts/on_gpu.py FOLDER --wheels wheels

``--dry-run`` runs the same stages on the CPU, with Triton's interpreter, the host execution of the CUDA kernels, and
tiny shapes. Its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_summary import summarize

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
STAGES = ("tests", "variants", "counters", "overhead", "more")
#: Seconds between SIGTERM and SIGKILL for a process that has run out of time.
_GRACE = 5.0
_USABLE = """
import monosoftmax.triton_kernels
from monosoftmax import backends, info
print(info.collect())
status = backends.available()["cuda"]
raise SystemExit(0 if status.available or {dry_run} else str(status))
"""


@dataclass
class Command:
    """A process of a stage. Its output goes to the log, and also to ``output`` if that is given."""

    name: str
    words: Sequence[str]
    output: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Stage:
    """Commands that run side by side, and their time limit in seconds."""

    name: str
    seconds: float
    commands: list[Command]
    #: Whether this stage decides correctness.
    proves: bool = False


class Run:
    """A run, its folder and its clock."""

    def __init__(self, folder: Path, seconds: float, dry_run: bool) -> None:
        self.folder, self.seconds, self.dry_run = folder, seconds, dry_run
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("log.txt", "run.json", "summary.md", "tests.jsonl", "sanitizers.txt", "ncu.csv", "overhead.jsonl"):
            (folder / name).unlink(missing_ok=True)
        self.log = (folder / "log.txt").open("ab", buffering=0)
        self.record: dict[str, Any] = {"dry_run": dry_run, "machine": machine(), "stages": [], "holds": False}
        self._save()

    def left(self) -> float:
        """The seconds that are left."""
        return self.seconds - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        """Writes ``text`` to the terminal and the log."""
        print(text, flush=True)
        self.log.write(f"{text}\n".encode())

    def execute(self, stage: Stage) -> dict[str, int | None]:
        """Runs a stage, and returns the exit status of each command; None if its time ran out."""
        limit = min(stage.seconds, self.left())
        began = time.monotonic()
        self.say(f"=== [{began - self.started:.0f} s] {stage.name}, at most {max(limit, 0):.0f} s")
        entry: dict[str, Any] = {"name": stage.name, "proves": stage.proves, "limit_s": round(limit, 1), "status": {}}
        self.record["stages"].append(entry)
        if limit < 5:
            entry["status"] = {each.name: "no time left" for each in stage.commands}
            self._save()
            return dict.fromkeys(entry["status"])
        self._save()
        found = self._wait([self._start(each) for each in stage.commands], began + limit)
        for command, status in zip(stage.commands, found, strict=True):
            entry["status"][command.name] = "out of time" if status is None else status
            if status != 0:
                self.say(f"{command.name}: {entry['status'][command.name]}")
        entry["seconds"] = round(time.monotonic() - began, 1)
        self._save()
        return dict(zip((each.name for each in stage.commands), found, strict=True))

    def _start(self, command: Command) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        output = (self.folder / command.output).open("ab", buffering=0) if command.output else self.log
        output.write(f"--- {command.name}: {' '.join(command.words)}\n".encode())
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | command.environment
        process = subprocess.Popen(
            command.words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        return process, output

    def _wait(self, running: list[tuple[subprocess.Popen[bytes], IO[bytes]]], until: float) -> list[int | None]:
        found: list[int | None] = []
        try:
            for process, _ in running:
                try:
                    found.append(process.wait(max(0.1, until - time.monotonic())))
                except subprocess.TimeoutExpired:
                    found.append(None)
                    _end(process)
        finally:
            for process, output in running:
                _end(process)
                if output is not self.log:
                    output.close()
        return found

    def close(self, holds: bool) -> None:
        """Records the verdict, and writes the page."""
        self.record["holds"] = holds
        self._save()

    def _save(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.started, 1)
        write(self.folder / "run.json", json.dumps(self.record, indent=1) + "\n")
        write(self.folder / "summary.md", summarize(self.folder))


def write(path: Path, text: str) -> None:
    """Writes a file in one step, so that a reader finds the old text or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all processes in its session, which it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue


def machine() -> dict[str, Any]:
    """The versions of the software, and the device."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    gpus: list[str] = []
    if smi := shutil.which("nvidia-smi"):
        result = subprocess.run([smi, f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        gpus = result.stdout.strip().splitlines() if result.returncode == 0 else []
    versions = {}
    for name in ("torch", "triton", "numpy"):
        code = f"import {name}; print({name}.__version__)"
        versions[name] = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.strip() or None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "gpus": gpus,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit or None,
        **versions,
    }


def import_from(wheels: Path, folder: Path) -> None:
    """Unpacks ``wheels`` to ``folder``, and makes them importable for the commands."""
    words = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*words, "--target", str(folder), *sorted(map(str, wheels.glob("*.whl")))], check=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def build(run: Run) -> bool:
    """Makes the package importable, with its extension. Returns whether it is."""
    usable = Command("usable", [PYTHON, "-c", _USABLE.format(dry_run=run.dry_run)])
    if run.execute(Stage("build: what is there", 60, [usable]))["usable"] == 0:
        return True
    # An existing extension is used, if it is for this Python, torch and GPU.
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--no-build-isolation", "--no-deps"]
    pip += ["--no-index", "--editable", str(ROOT)]
    brought = Command("install", pip, environment={"MONOSOFTMAX_CPP": "0"})
    run.execute(Stage("build: install without compiling", 60, [brought]))
    if run.execute(Stage("build: what was brought along", 60, [usable]))["usable"] == 0:
        return True
    whole = Command("build", [*pip, "-v"], environment={"MONOSOFTMAX_CPP": "1", "MONOSOFTMAX_CUDA": "1"})
    run.execute(Stage("build: compile", 240, [whole], proves=True))
    return run.execute(Stage("build: what came of it", 60, [usable], proves=True))["usable"] == 0


def proofs(run: Run) -> Stage:
    """tests/gpu and the sanitizers."""
    emulate = ["--emulate"] if run.dry_run else []
    workers = min(16, os.cpu_count() or 1)
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--numprocesses={workers}", "-m", "gpu"]
    record = f"--record={run.folder / 'tests.jsonl'}"
    # cuBLAS needs this in heads, under deterministic algorithms.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    commands = [Command("tests", [*pytest, record, *emulate, "tests/gpu"], environment=environment)]
    launches = [PYTHON, "tests/gpu/launches.py", "sanitize"]
    if run.dry_run:
        commands.append(Command("launches", launches, "sanitizers.txt"))
    elif tool := shutil.which("compute-sanitizer"):
        for name in ("memcheck", "racecheck", "synccheck"):
            for backend in ("cuda", "triton"):
                # Without torch's own kernels. Triton's kernels have no common name.
                only = ["--kernel-name", "kernel_substring=monosoftmax"] if backend == "cuda" else []
                words = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "5", *only, *launches, backend]
                alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                commands.append(Command(f"{name} {backend}", words, "sanitizers.txt", alone))
    else:
        commands.append(Command("compute-sanitizer is not here", ["false"]))
    return Stage("tests and sanitizers", 330 if run.dry_run else 135, commands, proves=True)


def overhead(run: Run) -> Stage:
    """The figures of the losses and heads."""
    return Stage("overhead", 190, [_benchmark(run, "overhead", "dry/*" if run.dry_run else "gpu/*")])


def variants(run: Run) -> Stage:
    """Other plans and tiles."""
    preset, limit = ("dry-variants", 300) if run.dry_run else ("variants", 75)
    return Stage("variants", limit, [_benchmark(run, "variants", f"{preset}/*")])


def _benchmark(run: Run, name: str, only: str) -> Command:
    words = [PYTHON, "-m", "benchmarks", "run", "overhead", "--only", only, "--results", str(run.folder)]
    return Command(name, words)


def counters(run: Run, folder: Path) -> list[Stage]:
    """ncu's counters of the kernels."""
    launches = [PYTHON, "tests/gpu/launches.py", "count"]
    if run.dry_run:
        return [Stage("counters", 60, [Command("launches", launches)])]
    ncu = shutil.which("ncu")
    if ncu is None:
        return [Stage("counters", 60, [Command("ncu is not here", ["false"])])]
    report = str(folder / "kernels")
    # "none" leaves the clocks unchanged.
    words = [ncu, "--clock-control", "none", "--set", "full", "--force-overwrite", "--export", report]
    words += ["--kernel-name", "regex:cross_entropy", *launches]
    table = [ncu, "--import", f"{report}.ncu-rep", "--page", "details", "--csv"]
    return [
        Stage("counters", 60, [Command("ncu", words)]),
        Stage("counters: table", 20, [Command("ncu table", table, "ncu.csv")]),
    ]


def more_tests(run: Run) -> Stage:
    """The tests of the kernels' own dimensions, which use a device if there is one."""
    workers = min(16, os.cpu_count() or 1)
    words = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--numprocesses={workers}", "-m", "not slow"]
    words += ["--exhaustive", f"--record={run.folder / 'tests.jsonl'}", "--timeout=60"] if not run.dry_run else []
    files = ["unit/test_cross_entropy.py", "emulated/test_triton_operators.py", "emulated/test_triton_cross_entropy.py"]
    files = [f"tests/{each}" for each in files]
    chosen = ["tests/emulated/test_triton_operators.py"] if run.dry_run else files
    return Stage(
        "more tests", max(5.0, run.left() - 8), [Command("more tests", [*words, "-k", "cuda or triton", *chosen])]
    )


@contextmanager
def ended_politely() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that the processes of a stage end, too."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--seconds", type=float, default=540, help="for all of it (%(default)g)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, under emulators")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to import from")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, help="stages after the build")
    options = parser.parse_args(arguments)
    run = Run(options.folder.resolve(), options.seconds, options.dry_run)
    if not run.record["machine"]["gpus"] and not run.dry_run:
        parser.exit(2, "error: nvidia-smi finds no GPU here; --dry-run goes through the stages on the CPU\n")
    with ended_politely(), tempfile.TemporaryDirectory() as temporary:
        if options.wheels is not None:
            import_from(options.wheels, Path(temporary) / "wheels")
        holds = build(run)
        if holds:
            if "tests" in options.only:
                holds = set(run.execute(proofs(run)).values()) == {0}
            if "variants" in options.only:
                run.execute(variants(run))
            if "counters" in options.only:
                for stage in counters(run, Path(temporary)):
                    run.execute(stage)
            if "overhead" in options.only:
                run.execute(overhead(run))
            if "more" in options.only:
                # These tests may run out of time.
                holds = set(run.execute(more_tests(run)).values()) <= {0, None} and holds
        shutil.rmtree(run.folder / ".work", ignore_errors=True)  # locks of the benchmarks
        run.close(holds)
    print((run.folder / "summary.md").read_text(encoding="utf-8"), end="")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
