"""The report: verdicts that follow from the figures, what is missing, and whether it is what the results give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import COMMANDS
from benchmarks.engine.statistics import Difference
from benchmarks.engine.store import RESULTS, Store
from benchmarks.report.document import document
from benchmarks.report.synthetic import SyntheticEvidence
from benchmarks.report.words import better, of_all, span

LOWER = Difference(-0.02, -0.03, -0.01, 0.001, 5)
HIGHER = Difference(0.02, 0.01, 0.03, 0.001, 5)
UNSURE = Difference(-0.02, -0.05, 0.01, 0.2, 5)


def test_a_gain_is_a_lower_loss() -> None:
    assert [better(each) for each in (LOWER, HIGHER, UNSURE, None)] == [True, False, False, False]
    assert span({"a": LOWER, "b": HIGHER}) == "-0.0200 to +0.0200"


@pytest.mark.parametrize(("count", "word"), [(0, "not supported"), (2, "supported in part"), (3, "supported")])
def test_verdicts_in_words(count: int, word: str) -> None:
    assert of_all(count, 3, "it holds") == f"**{word}**: it holds in {count} of 3"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the stored synthetic results, which a test may change."""
    (tmp_path / "synthetic.jsonl").write_bytes((RESULTS / "synthetic.jsonl").read_bytes())
    return tmp_path


def evidence(results: Path) -> SyntheticEvidence:
    return SyntheticEvidence(Store("synthetic", results).results())


def change(results: Path, name: str, **figures: float) -> None:
    """Other figures for the units whose names begin with ``name``."""
    path = results / "synthetic.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line.get("unit", "").startswith(name):
            line["figures"] |= figures
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_synthetic_evidence_follows_the_figures(results: Path) -> None:
    before = evidence(results)
    assert before.best_learned() == "gss" and before.grid_counts("plif") == (15, 0, 0)
    assert "sigsoftmax" not in before.useful_fixed()
    change(results, "n400-m300-d10-alpha0.1/spline/search-lr0.1", kl=0.5)
    change(results, "n400-m300-d10-alpha0.1/plif/seed", kl=2.0)
    change(results, "n400-m300-d10-alpha0.1/sigsoftmax/seed", kl=1.0)
    after = evidence(results)
    assert after.best_learned() == "spline"
    assert after.grid_counts("plif") == (14, 0, 1)
    assert "sigsoftmax" in after.useful_fixed()
    assert after.share("sigsoftmax", "mos15") == pytest.approx(
        (before.mean("linear", "kl") - 1.0) / (before.mean("linear", "kl") - before.mean("mos15", "kl"))
    )


def test_diverged_trainings_are_left_out(results: Path) -> None:
    path = results / "synthetic.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line.get("unit") == "n400-m300-d10-alpha0.1/plif/seed3":
            line["figures"] = {"diverged_at": 7}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = evidence(results)
    assert len(found.values("plif", "kl")) == 4
    assert found.difference("plif", "linear").pairs == 4


def test_what_is_missing_is_named_by_its_command(tmp_path: Path) -> None:
    text = document(tmp_path, tmp_path / "pictures")
    assert "Claims are judged when all results are there. Next: `python -m benchmarks run synthetic`." in text
    for name in ("synthetic", "rank", "language_model", "posthoc"):
        assert f"python -m benchmarks run {name}" in text


@pytest.mark.slow
def test_the_stored_report_is_what_the_results_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS.main(["report", "--check"]) == 0, capsys.readouterr().err
