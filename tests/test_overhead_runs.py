"""Whole runs of the overhead benchmark from its command line, on logits of a few hundred numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tabulate", reason="the benchmarks need requirements/dev.txt")
pytest.importorskip("matplotlib", reason="the benchmarks need requirements/dev.txt")
pytest.importorskip("tqdm", reason="the benchmarks need requirements/dev.txt")

from benchmarks.overhead import __main__ as command
from benchmarks.overhead import cases, contestants, floors, memory, peers, report, run
from benchmarks.overhead.cases import Case

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference backend")

GIB = 2**30
Results = Callable[[], dict[str, Any]]


@pytest.fixture(autouse=True)
def small_and_unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 64 KiB; and no limit on the memory of the process that runs all the other tests, too."""
    monkeypatch.setitem(floors.COPY_BUFFER_BYTES, "cpu", 2**16)
    monkeypatch.setattr(run, "limit_allocations", lambda extra_bytes: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def arguments(folder: Path) -> list[str]:
    return [
        *("--rows", "4,6", "--classes", "50,90", "--dims", "8", "--modes", "train", "--dtypes", "float32"),
        *("--stds", "1", "--contestants", "plain eager,plif-64 fused,plif-64 reference,mos-4 *"),
        *("--repeats", "3", "--threads", "1", "--without-memory", "--output", str(folder)),
    ]


@pytest.fixture
def results(folder: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    def read() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "results.json").read_text())
        return found

    yield read
    assert not list(folder.glob(".*.part"))


def test_a_whole_run(arguments: list[str], folder: Path, results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 0
    found = results()
    assert found["complete"] and found["repeats"] == 3 and found["arguments"] == arguments
    assert len(found["cases"]) == 8
    environment = found["environment"]
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1
    assert {"commit", "processor", "instructions", "compiler", "monosoftmax"} <= set(environment)
    for record in found["cases"]:
        rows = {row["name"]: row for row in record["rows"]}
        assert all(row["status"] == "measured" and len(row["seconds"]) == 3 for row in rows.values())
        fused = rows["plif-64 fused"]
        assert fused["backend"] in ("cpu", "reference")
        assert fused["to_plain_eager"] == pytest.approx(fused["median_ms"] / rows["plain eager"]["median_ms"])
        assert fused["to_floor"] == pytest.approx(fused["median_ms"] / record["floor"]["ms"])
        assert fused["to_plain_compiled"] is None
        assert (fused["to_products"] is None) == (record["case"]["group"] == "logits")
        assert len(record["floor"]["probes"]["copy"]["seconds"]) == 3
    assert {path.name for path in folder.glob("*.png")} == {
        "overhead-logits-train-float32-std1.png",
        "overhead-head-train-float32-std1.png",
    }
    text = (folder / "report.md").read_text()
    assert "overhead-head-train-float32-std1.png" in text and "Incomplete" not in text
    assert all(record["name"] in text for record in found["cases"])
    assert "mos-4 published" in capsys.readouterr().out


def test_results_are_not_overwritten_unasked(
    arguments: list[str], folder: Path, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--group", "logits", "--rows", "4", "--classes", "50"]
    assert command.main(arguments) == 0
    before = results()
    (folder / "overhead-old.png").touch()
    capsys.readouterr()
    assert command.main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert results() == before and (folder / "overhead-old.png").exists()
    assert command.main([*arguments, "--overwrite", "--repeats", "2"]) == 0
    assert results()["repeats"] == 2 and not (folder / "overhead-old.png").exists()


def test_no_cuda_device_is_one_line(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([*arguments, "--device", "cuda"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "finds no CUDA device" in captured.err and captured.out == ""
    assert not folder.exists()


def test_an_interrupted_run_keeps_what_is_finished(
    arguments: list[str], folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = run.Suite._measure

    def interrupted(self: run.Suite, case: Case, names: list[str], position: str) -> dict[str, Any]:
        if position.startswith("2/"):
            raise KeyboardInterrupt
        return measure(self, case, names, position)

    monkeypatch.setattr(run.Suite, "_measure", interrupted)
    assert command.main(arguments) == 130
    assert not results()["complete"] and len(results()["cases"]) == 1
    assert "Incomplete" in (folder / "report.md").read_text()


def test_a_case_too_large_for_the_machine_is_skipped(
    arguments: list[str], results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.machine, "available_bytes", lambda: 5 * GIB)
    assert command.main([*arguments, "--group", "logits", "--rows", "4", "--classes", "50,500000000"]) == 0
    small, large = results()["cases"]
    assert small["skipped"] is None and small["rows"]
    assert "14.9 GiB" in large["skipped"] or "15.2 GiB" in large["skipped"]
    assert "4.8 GiB are free" in large["skipped"] and large["rows"] == []
    assert large["skipped"] in capsys.readouterr().out


def _failing(name: str, error: Exception) -> Callable[..., contestants.Contestant]:
    def prepare(contestant: str, case: Case, inputs: cases.Inputs) -> contestants.Contestant:
        if contestant == name:
            raise error
        return contestants.prepare(contestant, case, inputs)

    return prepare


@pytest.mark.parametrize(
    "error, status, code",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "out of memory", 0),
        (peers.Unavailable("not in this torch"), "not available", 0),
        (ValueError("a bug"), "failed", 1),
    ],
)
def test_a_contestant_that_cannot_run_is_a_row(
    error: Exception,
    status: str,
    code: int,
    arguments: list[str],
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "prepare", _failing("plif-64 reference", error))
    assert command.main([*arguments, "--group", "logits", "--rows", "4", "--classes", "50"]) == code
    rows = {row["name"]: row for row in results()["cases"][0]["rows"]}
    assert rows["plif-64 reference"]["status"] == status and rows["plif-64 reference"]["reason"]
    assert rows["plain eager"]["status"] == rows["plif-64 fused"]["status"] == "measured"
    assert rows["plif-64 reference"]["reason"] in capsys.readouterr().out


def test_a_contestant_that_needs_too_much_is_not_tried(
    arguments: list[str], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "workspace_bytes", lambda name, case: 2**60 if name == "plain eager" else 0)
    assert command.main([*arguments, "--group", "logits", "--rows", "4", "--classes", "50"]) == 0
    rows = {row["name"]: row for row in results()["cases"][0]["rows"]}
    assert rows["plain eager"]["status"] == "skipped" and "are free" in rows["plain eager"]["reason"]
    assert rows["plif-64 fused"]["status"] == "measured" and rows["plif-64 fused"]["to_plain_eager"] is None


def test_a_wrong_result_is_a_failure(
    arguments: list[str], results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(name: str, case: Case, inputs: cases.Inputs) -> contestants.Contestant:
        found = contestants.prepare(name, case, inputs)
        if name == "plif-64 fused":
            return contestants.Contestant(lambda: 1.01 * found.loss(), found.differentiated, found.backend)
        return found

    monkeypatch.setattr(run, "prepare", prepare)
    assert command.main([*arguments, "--group", "logits", "--rows", "4", "--classes", "50"]) == 1
    row = next(row for row in results()["cases"][0]["rows"] if row["status"] == "failed")
    assert row["median_ms"] is None and "disagrees with plif-64" in row["reason"]
    assert "disagrees" in capsys.readouterr().err


def test_peaks_go_into_the_rows(arguments: list[str], results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks(case: Case, names: list[str], threads: int) -> dict[str, int | str]:
        return {name: "its process died" if name == "plain eager" else 3 * 2**20 for name in names}

    monkeypatch.setattr(memory, "peaks", peaks)
    arguments = [argument for argument in arguments if argument != "--without-memory"]
    assert command.main([*arguments, "--group", "logits", "--rows", "4", "--classes", "50"]) == 0
    record = results()["cases"][0]
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["plif-64 fused"]["peak_bytes"] == 3 * 2**20
    assert rows["plain eager"]["peak_problem"] == "its process died"
    table = report.case_table(record, "simple")
    assert "3.0" in table and "plain eager: peak not measured: its process died" in table


def test_ordinary_test_runs_leave_the_benchmarks_out(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]


def test_a_loss_that_is_not_finite_is_a_failure(
    arguments: list[str], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(name: str, case: Case, inputs: cases.Inputs) -> contestants.Contestant:
        found = contestants.prepare(name, case, inputs)
        return contestants.Contestant(lambda: math.nan * found.loss(), found.differentiated, found.backend)

    monkeypatch.setattr(run, "prepare", prepare)
    assert command.main([*arguments, "--group", "logits", "--rows", "4", "--classes", "50"]) == 1
    assert {row["reason"] for row in results()["cases"][0]["rows"]} == {"its loss or a gradient is not finite"}


@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(arguments: list[str], results: Results) -> None:
    arguments = [argument for argument in arguments if argument != "--without-memory"]
    assert command.main([*arguments, "--device", "cuda"]) == 0
    for record in results()["cases"]:
        assert all(row["status"] == "measured" and row["peak_bytes"] is not None for row in record["rows"])


@pytest.mark.slow
def test_the_cases_are_pytest_benchmark_tests() -> None:
    pytest.importorskip("pytest_benchmark", reason="the cases are pytest-benchmark tests")
    root = Path(__file__).parent.parent
    options = "--group head --rows 4 --classes 50 --dims 8 --stds 1 --modes train --contestants 'mos-4 *,plif-* fused'"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "benchmarks/overhead", f"--overhead={options} --repeats 2"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert "3 passed" in done.stdout, done.stdout
