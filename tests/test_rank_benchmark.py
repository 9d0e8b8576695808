"""The rank benchmark: what it measures, restarts, comparison with stored results, and the report."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from benchmarks import claims
from benchmarks.language_model.budget import Budget
from benchmarks.rank import __main__ as command
from benchmarks.rank import heads, matrices, report, run, settings
from benchmarks.rank.settings import Unit

LINEAR, PLIF = Unit("random-d16", "linear"), Unit("random-d16", "plif-20")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Sizes that take no time, and a folder of results and of locks."""
    monkeypatch.setattr(matrices, "RANDOM_ROWS", 40)
    monkeypatch.setattr(run, "SEEDS", (0, 1))
    monkeypatch.setattr(claims, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(heads, "SYNTHETIC_CELL", settings_of_a_small_cell())
    return tmp_path / "rank"


def settings_of_a_small_cell():
    from benchmarks.synthetic.settings import Cell

    return Cell(30, 25, 4, 0.1, 60, (0,))


# --- what is measured -------------------------------------------------------------------------------------------------


def test_linear_softmax_of_random_factors_has_rank_d_plus_1_and_coarse_random_plifs_have_more(small):
    linear = matrices.random_factors("linear", 4, 0, keep_spectrum=True)
    assert linear["ranks"] == {"0.001": 5, "0.0001": 5, "1e-05": 5}
    assert linear["press"] == {"float64": 5, "float32": 5}
    assert linear["centred"] == {"0.001": 4, "0.0001": 4, "1e-05": 4}
    assert len(linear["singular_values"]) == 40
    coarse, published = (matrices.random_factors(f"plif-{k}", 4, 0, keep_spectrum=False) for k in (10, 100_000))
    assert published["ranks"]["0.0001"] == 5 < coarse["ranks"]["0.0001"]
    # The numerical rank does not tell them apart.
    assert published["press"]["float64"] == coarse["press"]["float64"] == 40
    assert "singular_values" not in coarse


def test_factors_are_the_same_for_every_f_and_different_for_every_seed():
    linear, temperature = (matrices.random_log_p(name, 10, 12, 3, 0) for name in ("linear", "temperature"))
    assert torch.equal(linear, temperature)
    assert not torch.equal(linear, matrices.random_log_p("linear", 10, 12, 3, 1))
    assert linear.dtype == torch.float64
    torch.testing.assert_close(linear.exp().sum(1), torch.ones(10, dtype=torch.float64))
    plif = [matrices.random_log_p("plif-20", 10, 12, 3, 0) for _ in range(2)]
    assert torch.equal(*plif)


def test_large_matrix_has_ranks_up_to_the_number_of_values(monkeypatch):
    for name, value in {"LARGE_CONTEXTS": 60, "LARGE_WORDS": 80, "LARGE_DIM": 4, "LARGE_LEADING": 16}.items():
        monkeypatch.setattr(matrices, name, value)
    monkeypatch.setattr(matrices, "LARGE_EXACT", "sigsoftmax")
    found = matrices.large("sigsoftmax", 0)
    exact = matrices.describe(matrices.random_log_p("sigsoftmax", 60, 80, 4, 0))["ranks"]
    assert found["exact"]["ranks"] == exact
    assert found["ranks"] == {key: rank if rank <= 16 else None for key, rank in exact.items()}
    assert None in found["ranks"].values()
    assert found["ranks"]["0.001"] == exact["0.001"]
    assert len(found["exact"]["relative_errors"]) == len(found["singular_values"]) == 16
    assert min(found["exact"]["relative_errors"]) > -1e-12
    assert found["exact"]["left_out"] <= found["left_out"] + 1e-12
    assert "exact" not in matrices.large("linear", 0)


def test_noise_reproduces_the_published_experiment(monkeypatch):
    monkeypatch.setattr(matrices, "NOISE_ROWS", 200)
    rows = {row["c"]: row for row in matrices.noise()}
    assert list(rows) == list(settings.NOISE_C) == list(settings.NOISE_PUBLISHED)
    for c, row in rows.items():
        for dtype in ("float64", "float32"):
            published = settings.NOISE_PUBLISHED[c] / settings.NOISE_PUBLISHED_ROWS * 200
            assert row[dtype]["press"] == pytest.approx(max(10, published), abs=8)
        assert set(row["float64"]["ranks"].values()) == {10}
    # The closed form of the report has the published figures.
    for c in (1e-20, 1e-22, 1e-23, 1e-24, 1e-25):
        std = c**0.5 / settings.NOISE_PUBLISHED_ROWS
        expected = report._expected(std, settings.NOISE_PUBLISHED_ROWS)
        assert expected == pytest.approx(settings.NOISE_PUBLISHED[c], abs=4)


def test_trained_head_has_low_rank_before_f_and_more_after(small):
    found = heads.synthetic("plif-frozen", 0, keep_spectrum=True)
    assert found["before"]["ranks"]["1e-05"] <= 4 + 2 < found["after"]["ranks"]["1e-05"]
    assert found["before"]["press"]["float64"] == 6
    assert 0 < found["kl"] < 3
    linear = heads.synthetic("linear", 0, keep_spectrum=False)
    assert linear["before"] == linear["after"]
    assert heads.synthetic("mos4", 0, keep_spectrum=False)["before"] is None


def test_language_model_before_and_after_f(monkeypatch):
    from benchmarks.language_model.corpora import prepare

    generator = torch.Generator().manual_seed(0)
    names = [first + second for first in "abcdef" for second in "ghijk"]
    texts = {
        f"text {index}": " ".join(names[int(n)] for n in torch.randint(30, (120,), generator=generator))
        for index in range(60)
    }
    corpus = prepare("toy", "", texts, style="ptb", vocabulary_size=25, min_count=1)
    monkeypatch.setattr(heads.corpora, "load", lambda name, **options: corpus)
    monkeypatch.setattr(heads, "LANGUAGE_MODEL_STEPS", 3)
    monkeypatch.setattr(heads, "LANGUAGE_MODEL_CONTEXTS", 50)
    tiny = heads.replace(heads.LANGUAGE_MODEL, dim=4, hidden=8, batch_size=2, length=10)
    found = heads.language_model("sigsoftmax", tiny)
    assert found["tokens"] == 3 * 2 * 10
    assert len(found["before"]["singular_values"]) == len(found["after"]["singular_values"]) == 25
    assert found["before"]["press"]["float64"] <= 4 + 2 < found["after"]["press"]["float64"]
    # The same weights, and nothing random left: the same figures.
    assert heads.language_model("sigsoftmax", tiny) == found
    assert heads.language_model("mos", tiny)["before"] is None
    assert Budget.of_steps(3).ends == [3]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_are_kept_and_not_done_again(small):
    done = []

    def measured(unit):
        done.append(unit)
        return run.measure(unit)

    assert run.execute([LINEAR, PLIF], small, measured) == 0
    assert done == [LINEAR, PLIF]
    record = run.read(PLIF, small)
    assert [entry["seed"] for entry in record["runs"]] == [0, 1]
    assert [("singular_values" in entry) for entry in record["runs"]] == [True, False]
    assert record["settings"]["dim"] == 16
    assert record["environment"]["torch"] == torch.__version__
    run.path_of(LINEAR, small).unlink()
    assert run.execute([LINEAR, PLIF], small, measured) == 0
    assert done == [LINEAR, PLIF, LINEAR]


def test_units_of_another_process_are_left_out(small):
    with claims.claimed(claims.lock_of(small, str(LINEAR))) as mine:
        assert mine
        # A second open file is another owner of the lock, also within one process.
        assert run.execute([LINEAR, PLIF], small) == 1
    assert run.read(LINEAR, small) is None
    assert run.read(PLIF, small) is not None
    assert run.execute([LINEAR, PLIF], small) == 0


def test_nothing_is_left_of_an_interrupted_unit(small):
    def interrupted(unit):
        if unit == PLIF:
            raise KeyboardInterrupt
        return run.measure(unit)

    with pytest.raises(KeyboardInterrupt):
        run.execute([LINEAR, PLIF], small, interrupted)
    assert [path.name for path in small.rglob("*.*")] == ["linear.json"]


def test_records_of_other_settings_are_refused(small):
    run.execute([LINEAR], small)
    path = run.path_of(LINEAR, small)
    record = json.loads(path.read_text())
    record["settings"]["dim"] = 8
    path.write_text(json.dumps(record))
    with pytest.raises(run.RecordError, match=r"dim: 8 -> 16.*: move it away"):
        run.read(LINEAR, small)
    path.write_text("{")
    with pytest.raises(run.RecordError, match="is not a record of results"):
        run.read(LINEAR, small)


def test_verify_wants_every_bit_on_the_same_machine_only(small):
    run.execute([PLIF], small)
    ((line, good),) = run.verify([PLIF], small)
    assert good
    assert line == "random-d16/plif-20: the same to the last bit"
    path = run.path_of(PLIF, small)
    record = json.loads(path.read_text())
    values = record["runs"][0]["singular_values"]
    values[-1] *= 1 + 1e-12
    path.write_text(json.dumps(record))
    ((line, good),) = run.verify([PLIF], small)
    assert not good
    assert "NOT the same, on the same machine: runs[0].singular_values[39] is" in line
    record["environment"]["processor"] = "another"
    path.write_text(json.dumps(record))
    ((line, good),) = run.verify([PLIF], small)
    assert good
    assert "another machine (processor: another -> " in line
    far = copy.deepcopy(record)
    far["runs"][1]["ranks"]["0.001"] += 10
    path.write_text(json.dumps(far))
    ((line, good),) = run.verify([PLIF], small)
    assert not good
    assert "NOT close: runs[0]" in line
    with pytest.raises(run.RecordError, match=r"linear.json is missing: run python -m benchmarks.rank first"):
        run.verify([LINEAR], small)


def test_every_unit_that_is_verified_is_one():
    assert set(settings.VERIFIED) <= set(settings.units())
    assert len(set(settings.units())) == len(settings.units())
    assert {unit.group for unit in settings.units()} == set(settings.GROUPS)


# --- command and report -----------------------------------------------------------------------------------------------


def test_command_line(small, capsys, monkeypatch):
    monkeypatch.setattr(run, "prepare", lambda threads: None)
    arguments = ["--out", str(small), "--groups", "random-d16"]
    assert command.main([*arguments, "--list"]) == 0
    assert "random-d16/linear" in capsys.readouterr().out
    for wrong, message in (("--groups=x", "must be of random-d16"), ("--threads=0", "must be at least 1, got 0")):
        with pytest.raises(SystemExit):
            settings.parse([wrong])
        assert message in capsys.readouterr().err
    assert command.main([*arguments, "--verify"]) == 1
    assert "is missing" in capsys.readouterr().err


def cells_of(line) -> list[str]:
    """The cells of a row of a table; none for other lines."""
    return [cell.strip() for cell in line.split("|")[1:-1]] if line.startswith("|") else []


def test_report_says_what_the_results_say_and_what_was_not_run(small):
    run.execute([LINEAR, PLIF], small)
    text = report.document(small)
    assert text.startswith("# Ranks")
    first, rest = text.split("### Random factors, d = 64")
    rows = {cells[0]: cells[1:] for cells in map(cells_of, first.splitlines()) if cells}
    assert rows["linear"][1:] == ["17", "17", "17", "17", "17 / 17 / 17"]
    assert rows["sigsoftmax"][0] == "not run"
    runs = run.read(PLIF, small)["runs"]
    assert rows["plif-20"][0] == report.span([entry["ranks"]["0.001"] for entry in runs])
    assert all(cells[1] == "not run" for cells in map(cells_of, rest.splitlines()) if cells and cells[0] == "linear")
    assert "every seed: plif-20. Not: linear." in first
    assert "17 / 17 / 17" in first
    assert (small / "pieces.png").is_file()
    assert "![Spectra of random factors](random.png)" in text
    assert "](rank/random.png)" in report.section(small)
    assert "`python -m benchmarks.rank --groups random-d16,random-d64,noise,large,synthetic,language_model`" in text
    # The report follows from the results alone.
    assert report.document(small) == text
    pictures = {path.name: path.read_bytes() for path in small.glob("*.png")}
    report.document(small)
    assert {path.name: path.read_bytes() for path in small.glob("*.png")} == pictures


def test_spans():
    assert report.span([17, 17]) == "17"
    assert report.span([1, 2, 6]) == "3 (1-6)"
