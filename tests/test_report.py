"""The assembled report: verdicts that follow from the figures, what was not run, and whether it still fits."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy", reason="the benchmarks need requirements/benchmarks.txt")
pytest.importorskip("tabulate", reason="the benchmarks need requirements/benchmarks.txt")
pytest.importorskip("matplotlib", reason="the benchmarks need requirements/benchmarks.txt")

import monosoftmax as ms
from benchmarks.language_model.settings import PRESETS
from benchmarks.language_model.study import Cell, Row
from benchmarks.language_model.study_results import CellResults, RowResults
from benchmarks.posthoc import records as posthoc_records
from benchmarks.posthoc.settings import TRANSFORMS
from benchmarks.rank import run as rank_run
from benchmarks.rank import settings as rank_settings
from benchmarks.report import __main__ as command
from benchmarks.report import document as assembled
from benchmarks.report import evidence as evidence_module
from benchmarks.report.advice import advice, defaults
from benchmarks.report.claim import better, finding, gain, judge, of_all
from benchmarks.report.dispute import DISPUTE
from benchmarks.report.evidence import RESULTS, Evidence, NotRun
from benchmarks.report.paper import PAPER
from benchmarks.statistics import Difference
from benchmarks.synthetic import records as synthetic_records
from benchmarks.synthetic.methods import METHODS
from benchmarks.synthetic.settings import GRID, MAIN, Unit

SEEDS = range(5)
#: Noise by seed: what is the same for two methods goes out of their difference, what is not stays in it.
SHARED, OWN = (0.010, -0.012, 0.004, -0.006, 0.004), (0.0012, -0.0007, 0.0001, -0.0011, 0.0005)
KL = {"linear": 1.36, "temperature": 1.3601, "plif": 1.05, "plif-20-10": 1.06, "plif-200": 1.0502, "mlp": 1.02,
      "sigmoidcap-learned": 0.99, "plif-frozen": 1.4, "published-sgd": 1.3605, "published-frozen": 1.3604,
      "published-adam": 1.02, "mos4": 1.16, "mos15": 1.0, "linear-eq-mos4": 1.32, "linear-eq-mos15": 1.2,
      "sigsoftmax": 1.37, "softcap": 1.28, "gss-published": 1.5, "sigmoidcap": 1.2, "gss": 1.36,
      "softcap-learned": 1.36, "spline": 1.1}  # fmt: skip


def fill_synthetic(results: Path, cell=MAIN, **changed: float) -> None:
    """Results of all methods of a cell, with the mean KL of ``KL`` or ``changed``."""
    for place, (method, mean) in enumerate({**KL, **{n.replace("_", "-"): v for n, v in changed.items()}}.items()):
        unit = Unit(cell, method)

        def run(seed: int, method: str = method, mean: float = mean, place: int = place) -> dict[str, Any]:
            value = mean + SHARED[seed % 5] + (1 + place / 10) * OWN[(seed + place) % 5]
            ranks = {"0.001": 11, "0.0001": 11 if method in ("linear", "temperature") else 100 + place, "1e-05": 250}
            figures = {"kl": value, "modes": 0.95 if mean < 1.1 else 0.4, "top5": 0.5, "ranks": ranks}
            return {"seed": seed, "lr": 0.1, "figures": figures, "environment": 0,
                    "shape": {"quantiles": [[0.001, -9.0], [0.999, 12.5]]}}  # fmt: skip

        record = {"settings": synthetic_records.settings_of(unit), "lr": 0.1, "search": [run(100)],
                  "runs": [run(seed) for seed in SEEDS]}  # fmt: skip
        synthetic_records.write(record, unit, results / "synthetic")


def fill_rank(results: Path) -> None:
    """Trained heads whose rank f raises, but for the published setting."""
    for name in rank_settings.SYNTHETIC_METHODS:
        flat = name in ("linear", "temperature", "published-sgd")
        before = {"ranks": {"0.001": 11, "0.0001": 11, "1e-05": 12}}
        after = {"ranks": {"0.001": 50, "0.0001": 11 if flat else 120, "1e-05": 200}}
        run = {"seed": 0, "before": None if name == "mos4" else before, "after": after}
        rank_run.write(rank_settings.Unit("synthetic", name), results / "rank", [run])


def fill_posthoc(results: Path, plif: float = -0.05) -> None:
    """A trained model: losses of 30 documents, those of PLIF lower by ``plif`` than those of a temperature."""
    tokens = [40 + 3 * number for number in range(30)]
    settings = {"settings": {}, "states": {"digest": "x"}}
    posthoc_records.write(results / "posthoc", "states", {**settings, "test_tokens": tokens})
    for place, name in enumerate(TRANSFORMS):
        shift = {"identity": 0.2, "temperature": 0.0, "plif": plif, "plif_40": plif + 0.01}.get(name, 0.1)
        losses = [n * (3 + 0.1 * (i % 7) + shift + 0.01 * ((i + place) % 3 - 1)) for i, n in enumerate(tokens)]
        test = {"nll": sum(losses) / sum(tokens), "document_nll": losses, "effective_ranks": {"0.0001": 100 + place},
                "bins": {"tokens": [10.0, 30.0], "confidence": [4.0, 24.0], "hits": [5.0, 21.0]}}  # fmt: skip
        record = {**settings, "valid_nll": 3 + shift, "test": test}
        posthoc_records.write(results / "posthoc", posthoc_records.transform_unit(name), record)


def language_model(name: str, **nats: float) -> CellResults:
    """A cell whose rows have these test losses, with a little noise by seed and document."""
    rows = []
    for place, (label, mean) in enumerate(nats.items()):
        label = label.replace("_", "-")
        row = Row(label, label, PRESETS["smoke"])
        runs = {}
        for seed in (0, 1, 2):
            tokens = [30, 50, 20, 60, 40, 70]
            losses = [
                n * (mean + 0.001 * ((seed + place) % 3) + 0.0005 * ((i + place) % 2)) for i, n in enumerate(tokens)
            ]
            perplexity = 2.718281828 ** (sum(losses) / sum(tokens))
            runs[seed] = {"perplexity": {"valid": perplexity, "test": perplexity},
                          "documents": {"test": {"losses": losses, "tokens": tokens}},
                          "spectrum": {"effective_ranks": {"0.0001": 60 + place}}}  # fmt: skip
        chosen = {"lr": 0.01, "transform_lr": 0.003, "tries": [{}], "at_edge": False}
        rows.append(RowResults(row, chosen, runs, (), ()))
    return CellResults(Cell(name, tuple(each.row for each in rows), (0, 1, 2), None, ()), tuple(rows))


@pytest.fixture
def filled(tmp_path: Path) -> Evidence:
    """All there is: figures as the pilot had them, and two cells of language models."""
    results = tmp_path / "results"
    fill_synthetic(results)
    fill_synthetic(results, GRID[0])
    fill_rank(results)
    fill_posthoc(results)
    (results / "overhead").symlink_to(RESULTS / "overhead")
    evidence = Evidence(results)
    evidence.__dict__["cells"] = [
        language_model("first", linear=5.0, temperature=4.9, plif=4.8, plif_frozen=5.1, mos=4.7),
        language_model("second", linear=5.0, temperature=4.9, plif=4.9),
    ]
    return evidence


def verdicts(evidence: Evidence) -> dict[str, str]:
    return {claim.__name__: claim(evidence).verdict for claim in (*PAPER, *DISPUTE)}


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_follow_from_numbers():
    assert [of_all(count, 3, "x").split(":")[0] for count in range(4)] == [
        "**not supported**",
        "**supported in part**",
        "**supported in part**",
        "**supported**",
    ]
    lower = Difference(-0.5, -0.6, -0.4, 0.01, 5)
    assert gain(lower) == "+0.5000 nats [+0.4000, +0.6000], p = 0.010, significant"
    assert better(lower)
    assert not better(Difference(-0.5, -1.1, 0.1, 0.06, 5))
    assert not better(Difference(0.5, 0.4, 0.6, 0.01, 5))
    assert not better(None)


def test_what_is_missing_is_named_with_its_command():
    def missing() -> str:
        raise NotRun("python -m x")

    assert finding(missing) == "Not run: `python -m x`"
    claim = judge("text", "source", (missing, lambda: "found"), missing)
    assert claim.found == ("Not run: `python -m x`", "found")
    assert claim.verdict == "not run: `python -m x`"


# --- claims -----------------------------------------------------------------------------------------------------------


def test_verdicts_follow_from_the_figures(filled: Evidence):
    found = verdicts(filled)
    methods = [name for name in rank_settings.SYNTHETIC_METHODS if name not in ("linear", "temperature", "mos4")]
    assert found["rank_is_raised"].startswith("**supported in part**")
    assert f"{len(methods) - 1} of {len(methods)}" in found["rank_is_raised"]
    assert found["synthetic_improves"].startswith("**supported**")
    assert "6 of 6" in found["synthetic_improves"]
    assert found["language_models_improve"].startswith("**supported in part**")
    assert (
        "over temperature in 1 of 2 cells (over Linear-Softmax in 2, over temperature in 1)"
        in found["language_models_improve"]
    )
    assert found["costs_little"].startswith("**supported**")
    assert found["close_to_mixtures"].startswith("**supported in part**: close in 1 of 2")
    assert "103%" in found["close_to_mixtures"]
    assert found["frozen_is_as_good"].startswith("**not supported**")
    assert found["published_optimiser"].startswith("**supported**: SGD on the published slopes changes nothing")
    assert found["rank_is_not_the_reason"].startswith("**supported")
    assert "a higher rank without a significant gain" in found["rank_is_not_the_reason"]
    assert found["helps_after_the_fact"].startswith("**supported**")


def test_verdicts_turn_with_the_figures(filled: Evidence, monkeypatch: pytest.MonkeyPatch):
    fill_synthetic(filled.results, plif=1.36, mlp=1.36, sigmoidcap_learned=1.36, published_adam=1.3606, plif_frozen=1.0)
    fill_synthetic(filled.results, GRID[0], plif=1.5, mlp=1.36, sigmoidcap_learned=1.36)
    fill_posthoc(filled.results, plif=0.001)
    filled.__dict__["cells"] = [language_model("first", linear=5.0, temperature=4.9, plif=4.95, plif_frozen=4.8)]
    monkeypatch.setattr("benchmarks.report.paper.LITTLE", 1.01)
    found = verdicts(filled)
    assert found["synthetic_improves"].startswith("**not supported**")
    assert found["language_models_improve"].startswith("**not supported**")
    assert found["costs_little"].startswith("**not supported**")
    assert found["frozen_is_as_good"].startswith("**supported**")
    assert found["published_optimiser"].startswith("**not supported**")
    assert "no higher rank without a significant gain" in found["rank_is_not_the_reason"]
    assert found["helps_after_the_fact"].startswith(
        "**not supported**: f alone gains significantly over a temperature: no"
    )
    assert found["helps_after_the_fact"].endswith("over the model as it is: yes")


def test_findings_have_the_stored_figures(filled: Evidence):
    text = "\n".join(found for claim in (*PAPER, *DISPUTE) for found in claim(filled).found)
    kl = filled.figure("sigmoidcap-learned", "kl")
    assert f"sigmoidcap-learned (chosen on the problem of the search) {kl:.3f} and 95 %" in text
    difference = filled.synthetic_difference("plif", "plif-frozen")
    assert f"KL of plif minus plif-frozen: {difference.describe('nats', 4)}." in text
    assert "plif 11 -> 120" in text and "published-sgd 11 -> 11" in text
    assert "first: best transform plif (on validation)" in text
    assert "Expected calibration error: identity 0.1000" in text
    assert re.search(r"Language model first, plif minus plif-frozen: -0\.(30|29).* significant", text)


def test_the_best_transform_is_chosen_where_no_reported_figure_is_from(filled: Evidence):
    assert filled.best_learned() == "sigmoidcap-learned"
    unit = Unit(MAIN, "mlp")
    record = synthetic_records.read(unit, filled.results / "synthetic")
    record["search"][0]["figures"]["kl"] = 0.5
    synthetic_records.write(record, unit, filled.results / "synthetic")
    assert filled.best_learned() == "mlp"
    assert set(filled.learned()) < set(METHODS)
    assert not {"linear", "temperature", "sigsoftmax", "plif-frozen", "mos4", "softcap"} & set(filled.learned())


def test_seeds_that_diverged_are_left_out_of_pairs(filled: Evidence):
    unit = Unit(MAIN, "mlp")
    record = synthetic_records.read(unit, filled.results / "synthetic")
    record["runs"][0]["figures"] = None
    synthetic_records.write(record, unit, filled.results / "synthetic")
    assert filled.synthetic_difference("mlp", "linear").pairs == 4


# --- advice and defaults ----------------------------------------------------------------------------------------------


def test_advice_has_ten_lines_that_follow_from_the_figures(filled: Evidence):
    lines = advice(filled)
    assert len(lines) == 10
    assert not any("Not run" in line for line in lines)
    assert lines[0].startswith("**Language models.** A learned function may help, which these trainings do not settle")
    assert "over both significantly in 1 of 2 cells (first)" in lines[0]
    assert lines[1].startswith("**The control.** Add `Temperature`")
    assert "use sigmoidcap-learned" in lines[2]
    assert "in 0 of 2 synthetic cells: none" in lines[3]
    assert "only softcap, sigmoidcap helped" in lines[5]
    assert "Put plif on its head" in lines[7]

    filled.__dict__["cells"] = filled.cells[:1]
    fill_posthoc(filled.results, plif=0.01)
    lines = advice(filled)
    assert lines[0].startswith("**Language models.** Try plif")
    assert "A fitted temperature is enough" in lines[7]


def test_defaults_are_those_of_the_package(filled: Evidence):
    transform_lr = inspect.signature(ms.parameter_groups).parameters["transform_lr"].default
    rows = {row.name: row for row in defaults(filled)}
    plif = ms.transforms.PLIF()
    assert rows["PLIF(num_pieces)"].value == str(plif.num_pieces)
    assert rows["PLIF(min_slope)"].value == f"{plif.min_slope:g}"
    assert rows["PLIF(num_pieces)"].figures == "Not run: `python -m benchmarks.rank --groups random-d16`"
    assert "[-9.0, 12.5]" in rows["PLIF(bound)"].figures
    rates = next(row for name, row in rows.items() if name.startswith("learning rate"))
    # Those of temperature and plif in both cells; a frozen f has none.
    assert "0.003 in 4" in rates.figures
    assert rates.value == f"{transform_lr:g}"


# --- the document -----------------------------------------------------------------------------------------------------


def test_without_results_every_claim_is_not_run_and_every_command_is_named(tmp_path: Path):
    text = assembled.document(tmp_path / "results")
    rows = [line for line in text.splitlines() if re.match(r"\| \d+\. ", line)]
    assert len(rows) == len(PAPER) + len(DISPUTE)
    assert all("| not run: `python -m benchmarks." in row for row in rows)
    for name in ("synthetic", "rank", "language_model", "posthoc"):
        assert f"python -m benchmarks.{name}" in text
    assert "nan" not in text.lower().split()


def test_check_compares_with_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results = tmp_path / "results"
    fill_rank(results)
    # The sections have tests of their own.
    monkeypatch.setattr(assembled, "_sections", lambda folder: [])
    here = ["--results", str(results)]
    assert command.main([*here, "--check"]) == 1
    assert "REPORT.md is missing" in capsys.readouterr().err
    assert command.main(here) == 0
    assert command.main([*here, "--check"]) == 0
    unit = rank_settings.Unit("synthetic", "plif")
    runs = rank_run.read(unit, results / "rank")["runs"]  # type: ignore[index]
    runs[0]["after"]["ranks"]["0.0001"] = 77
    rank_run.write(unit, results / "rank", runs)
    before = (results / "REPORT.md").read_text()
    capsys.readouterr()
    assert command.main([*here, "--check"]) == 1
    shown = capsys.readouterr().err
    assert "is not what the results give" in shown
    assert "plif 11 -> 77" in shown
    assert (results / "REPORT.md").read_text() == before
    assert not [path for path in results.rglob("*.png")]


@pytest.mark.slow
@pytest.mark.skipif(not (RESULTS / "REPORT.md").is_file(), reason="REPORT.md has not been written yet")
def test_the_report_that_is_committed_is_what_the_results_give():
    assert command.main(["--check"]) == 0
    assert evidence_module.RESULTS == RESULTS


def test_the_readme_quotes_the_report():
    """The advice and the verdicts in the README are the ones of REPORT.md, word for word."""
    root = Path(__file__).parents[1]
    report = (root / "benchmarks" / "results" / "REPORT.md").read_text()
    quoted = (root / "README.md").read_text()
    for heading in ("## Which output layer should I use?", "## Claim by claim"):
        section = report.split(f"{heading}\n", 1)[1].split("\n#", 1)[0].strip()
        assert section in quoted
