"""Studies of language models: which runs there are, that they are claimed, resumed and repeated, and the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tabulate", reason="the benchmarks need requirements/benchmarks.txt")
pytest.importorskip("matplotlib", reason="the benchmarks need requirements/benchmarks.txt")
pytest.importorskip("tqdm", reason="the benchmarks need requirements/benchmarks.txt")

from benchmarks.claims import claimed
from benchmarks.language_model import __main__ as command
from benchmarks.language_model import corpora, measurements, models, settings, study_report, study_run, training
from benchmarks.language_model.budget import Budget
from benchmarks.language_model.corpora import Corpus
from benchmarks.language_model.run import Interrupted
from benchmarks.language_model.study import Row, Search, Study, StudyError, Try, load_study, next_try, read_result
from benchmarks.language_model.study_results import CellResults, RowResults, compare, read_cell
from benchmarks.language_model.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference backend")

SEARCH = {"lr": [0.01, 0.03], "transform_lr": [0.01, 0.003], "refinements": 1, "seeds": [9], "epochs": 0.3}
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "defaults": {
        "corpus": "wiki",
        "vocabulary_size": None,
        "min_count": 1,
        "model": "lstm",
        "dim": 8,
        "hidden": 12,
        "layers": 1,
        "heads": 2,
        "experts": 2,
        "dropout": 0.2,
        "batch_size": 4,
        "length": 6,
        "epochs": 0.6,
        "validations": 2,
        "rank_contexts": 20,
    },
    "verify": {"output": "plif", "seed": 0, "epochs": 0.3},
    "cells": [
        {
            "name": "one",
            "seeds": [0, 1],
            "outputs": ["linear", "temperature", {"output": "linear", "label": "linear, wide", "dim": 9}],
            "comparisons": [["linear, wide", "linear"]],
        },
        {"name": "two", "model": "transformer", "seeds": [0], "search": SEARCH, "outputs": ["linear", "plif"]},
    ],
}


def _never() -> bool:
    return False


def _ignore(words: int, loss: float) -> None:
    pass


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    source = random.Random(0)
    known = [f"{a}{b}{c}" for a in "bdkt" for b in "aeiou" for c in "nrs"]
    documents = {
        f"document {i}": "\n".join(" ".join(source.choices(known, k=9)) + " ." for _ in range(source.randint(1, 4)))
        for i in range(80)
    }
    return corpora.prepare("wiki", "0" * 64, documents, style="cased", vocabulary_size=None, min_count=1)


@pytest.fixture
def invented(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """The corpus that studies get, whatever they ask for."""
    monkeypatch.setattr(study_run, "prepared", lambda settings: corpus)
    return corpus


def _write(folder: Path, content: dict[str, Any]) -> Study:
    path = folder / "study.json"
    path.write_text(json.dumps(content))
    return load_study(path)


def _changed(*, cells: list[dict[str, Any]] | None = None, **values: Any) -> dict[str, Any]:
    content = json.loads(json.dumps(CONTENT))
    content.update(values)
    if cells is not None:
        content["cells"] = cells
    return content


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    """The whole study, run once, and the folder of its results."""
    folder = tmp_path_factory.mktemp("study")
    study = _write(folder, CONTENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_run, "prepared", lambda settings: corpus)
        assert study_run.run_study(study, folder / "tiny", folder / "scratch")
    return study, folder / "tiny"


# Losses of documents


@pytest.mark.parametrize("tokens", [None, 61])
def test_losses_of_documents_are_the_whole_loss_by_document(corpus: Corpus, tokens: int | None) -> None:
    chosen = replace(settings.from_values(settings.PRESETS["full"], CONTENT["defaults"]), time_limit=None)
    trainer = Trainer(corpus, chosen, "temperature", 0, Budget.of_steps(5))
    trainer.train(1.0, _never, _ignore)
    losses, counts = trainer.document_losses("valid", tokens)

    part = corpus.splits["valid"]
    text = training.streams(part.tokens[:tokens], chosen.batch_size)
    with torch.no_grad():
        states = trainer.model.body(text[:, :-1], None)[0]
        nll = -trainer.model.output.log_prob(states).gather(2, text[:, 1:, None])[..., 0].double()
    expected: dict[int, list[float]] = {}
    for stream in range(text.shape[0]):
        for place in range(1, text.shape[1]):
            position = stream * text.shape[1] + place
            document = sum(start <= position for start in part.starts.tolist()) - 1
            expected.setdefault(document, []).append(nll[stream, place - 1].item())
    assert counts == [len(expected[document]) for document in sorted(expected)]
    assert losses == pytest.approx([sum(expected[document]) for document in sorted(expected)], rel=1e-5)
    assert sum(counts) == text.shape[0] * (text.shape[1] - 1)
    assert math.exp(math.fsum(losses) / sum(counts)) == pytest.approx(trainer.perplexity("valid", tokens), rel=1e-9)


# Output layers that are not trained


@pytest.mark.parametrize(
    ("name", "pieces", "trained"),
    [("plif-frozen", 50, False), ("plif-frozen-published", 100_000, False), ("plif-published", 100_000, True)],
)
def test_random_plif_follows_from_the_seed(corpus: Corpus, name: str, pieces: int, trained: bool) -> None:
    chosen = settings.from_values(settings.PRESETS["full"], CONTENT["defaults"] | {"transform_lr": 0.1})

    def start(seed: int) -> Trainer:
        return Trainer(corpus, chosen, name, seed, Budget.of_steps(3))

    trainer = start(0)
    before = trainer.model.output.transform.raw_slope.detach().clone()
    assert before.shape == (pieces,) and before.std() > 0.7
    assert torch.equal(before, start(0).model.output.transform.raw_slope)
    assert not torch.equal(before, start(1).model.output.transform.raw_slope)
    trainer.train(1.0, _never, _ignore)
    assert torch.equal(before, trainer.model.output.transform.raw_slope) is not trained
    linear = measurements.parameters(Trainer(corpus, chosen, "linear", 0, Budget.of_steps(1)))
    assert measurements.parameters(trainer)["model"] - linear["model"] == (pieces if trained else 0)
    assert Row(name, name, chosen).learns_transform is trained


# Study files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defaults": {"dimension": 3}}, "defaults: dimension is no setting"),
        ({"defaults": {"lr": -1}}, "argument --lr: must be a number"),
        ({"defaults": {"threads": 0}}, "threads must be a number"),
        ({"defaults": {"minutes": 3}}, "minutes is not a setting of a study"),
        ({"verify": {"output": "plif"}}, "verify: seed is missing"),
        ({"cell": []}, "the study: cell is not known"),
        ({"cells": []}, "cells must not be empty"),
        ({"cells": [{"name": "a", "seeds": [0], "outputs": ["lineal"]}]}, "got 'lineal'"),
        ({"cells": [{"name": "a", "seeds": [0, 0], "outputs": ["linear"]}]}, "seeds must be different"),
        ({"cells": [{"name": "a", "seeds": [0], "outputs": ["linear", "linear"]}]}, "linear is there twice"),
        ({"cells": [{"name": "verify", "seeds": [0], "outputs": ["linear"]}]}, 'no cell may be called "verify"'),
        (
            {"cells": [{"name": "a", "seeds": [0], "outputs": ["linear"], "comparisons": [["linear", "mos"]]}]},
            "comparisons name 'mos'",
        ),
        (
            {"cells": [{"name": "a", "seeds": [9], "outputs": ["linear"], "search": SEARCH}]},
            "seeds of its search must not be among",
        ),
        (
            {"cells": [{"name": "a", "seeds": [0], "outputs": ["linear"], "search": SEARCH | {"lr": [0.1, 0.01]}}]},
            "from low to high",
        ),
    ],
)
def test_mistakes_in_a_study_file_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=r"study\.json: .*" + message):
        _write(tmp_path, _changed(**change))


def test_the_studies_that_come_along_are_right() -> None:
    files = sorted(study_report.STUDIES.glob("*.json"))
    assert {path.stem for path in files} == {"gpu", "main", "small"}
    for path in files:
        study = load_study(path)
        assert study.name == path.stem
        for cell in study.cells:
            assert {"linear", "temperature"} <= {row.label for row in cell.rows}, cell.name


@pytest.mark.parametrize(
    ("file", "known", "cells"),
    [("main.json", {"wiki": 10_000}, 1), ("gpu.json", {"wiki": 16_491, "sotu": 14_728}, 12)],
)
def test_equal_parameters_are_at_least_those_of_the_mixture(file: str, known: dict[str, int], cells: int) -> None:
    compared = 0
    for cell in load_study(study_report.STUDIES / file).cells:
        rows = {row.label: row for row in cell.rows}
        if "mos" not in rows:
            continue
        counts = {}
        for label in ("mos", "linear, equal parameters to mos"):
            chosen = rows[label].settings
            with torch.device("meta"):
                model = models.build(
                    chosen.model, rows[label].output, classes=known[chosen.corpus], dim=chosen.dim,
                    hidden=chosen.hidden, layers=chosen.layers, heads=chosen.heads, length=chosen.length,
                    dropout=chosen.dropout, experts=chosen.experts, seed=0,
                )  # fmt: skip
            counts[label] = sum(parameter.numel() for parameter in model.parameters())
        ratio = counts["linear, equal parameters to mos"] / counts["mos"]
        # A Transformer's width is a multiple of its heads, which is a large step for d = 16.
        assert 1 <= ratio < 1.25, (cell.name, counts)
        compared += 1
    assert compared == cells


def _perplexities(search: Search, learns: bool, score: Callable[[float, float], float]) -> list[Try]:
    done: list[Try] = []
    for _ in range(search.tries):
        one = next_try(search, done, learns)
        done.append(replace(one, perplexity=score(one.lr, one.transform_lr)))
    return done


def test_every_row_gets_as_many_tries() -> None:
    search = Search((0.01, 0.02, 0.04), (0.01, 0.003), 2, (9,), 1.0)

    def rates(learns: bool, best: float) -> list[tuple[float, float]]:
        done = _perplexities(search, learns, lambda lr, transform_lr: abs(math.log(lr / best)) - transform_lr)
        return [(one.lr, one.transform_lr) for one in done[3:]]

    # In the middle: the other rate of f, then between the best and its better neighbour.
    assert rates(True, 0.021) == [(0.02, 0.003), (0.02828, 0.01)]
    assert rates(False, 0.021) == [(0.02828, 0.01), (0.02378, 0.01)]
    # At an edge: outwards, for both.
    for learns in (True, False):
        assert rates(learns, 1.0) == [(0.08, 0.01), (0.16, 0.01)]
        assert rates(learns, 1e-5) == [(0.005, 0.01), (0.0025, 0.01)]
    diverged = _perplexities(search, False, lambda lr, transform_lr: math.inf if lr > 0.009 else 50.0)
    assert [one.lr for one in diverged[3:]] == [0.005, 0.0025]


# Running


def test_a_study_runs_to_its_end_and_not_again(
    finished: tuple[Study, Path], invented: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = finished
    paths = sorted(folder.rglob("*.json"))
    assert len(paths) == 1 + 3 * 2 + 2 * (3 + 1)
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert study_run.run_study(study, folder, folder.parent / "scratch")
    assert capsys.readouterr().out == ""
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("*.json"))] == stamps
    listing = study_run.list_runs(study, folder)
    assert listing.count("done ") == len(paths) and "0 of 15 runs are left" in listing
    assert not list((folder.parent / "scratch").rglob("*.pt"))


def test_the_table_is_trained_at_the_best_rate_of_the_search(finished: tuple[Study, Path]) -> None:
    study, folder = finished
    cell = study.cells[1]
    for row in cell.rows:
        tries = {}
        for path in (folder / "two" / row.folder).glob("search-*.json"):
            result = json.loads(path.read_text())
            assert result["seed"] == 9 and "documents" not in result
            tries[result["settings"]["lr"], result["settings"]["transform_lr"]] = result["perplexity"]["valid"]
        assert len(tries) == 3
        (main,) = (folder / "two" / row.folder).glob("main-*.json")
        result = json.loads(main.read_text())
        best = min(tries, key=lambda rates: tries[rates])
        assert (result["settings"]["lr"], result["settings"]["transform_lr"]) == best
        found = {(one["lr"], one["transform_lr"]): one["valid_perplexity"] for one in result["chosen"]["tries"]}
        assert found == pytest.approx(tries)
        lowest, highest = min(rate for rate, _ in tries), max(rate for rate, _ in tries)
        assert result["chosen"]["at_edge"] == (best[0] in (lowest, highest))


def test_a_result_has_what_the_report_needs(finished: tuple[Study, Path], corpus: Corpus) -> None:
    study, folder = finished
    first, second = (read_result(folder, unit) for unit in study.main_units(study.cells[0], folder)[:2])
    assert first is not None and second is not None
    assert "spectrum" in first and "spectrum" not in second
    for split in ("valid", "test"):
        documents = first["documents"][split]
        nats = math.fsum(documents["losses"]) / sum(documents["tokens"])
        assert first["perplexity"][split] == math.exp(nats)
    assert first["tokens"] == round(0.6 * training.steps_per_epoch(corpus, study.cells[0].rows[0].settings)) * 24
    assert first["environment"]["threads"] == 1
    temperature = study.main_units(study.cells[0], folder)[2]
    stored = read_result(folder, temperature)
    assert stored is not None and set(stored["transform"]) == {"log_tau"}
    assert stored["transform"]["log_tau"][0] != 0.0
    assert first["transform"] == {}


def test_results_of_other_settings_are_refused(finished: tuple[Study, Path], tmp_path: Path) -> None:
    _, folder = finished
    changed = _write(tmp_path, _changed(defaults=CONTENT["defaults"] | {"dropout": 0.3}))
    with pytest.raises(StudyError, match=r"was made with other settings \(dropout: 0\.2 -> 0\.3\)"):
        study_run.run_study(changed, folder, tmp_path / "scratch")


def test_an_interrupted_run_goes_on_to_the_same_figures(
    finished: tuple[Study, Path], invented: Corpus, tmp_path: Path
) -> None:
    study, folder = finished
    unit = study.main_units(study.cells[0], folder)[0]
    stored = read_result(folder, unit)
    assert stored is not None
    steps = stored["tokens"] // 24
    for stop_at in (3, steps // 2 + 2):
        asked = iter(range(100_000))
        with pytest.raises(Interrupted):
            study_run.run_unit(unit, tmp_path / "x.pt", lambda at=stop_at, asked=asked: next(asked) >= at)
        assert len(list(tmp_path.iterdir())) == 1
    questions: list[None] = []
    result = study_run.run_unit(unit, tmp_path / "x.pt", lambda: bool(questions.append(None)))
    assert len(questions) < steps, "it began anew"
    assert not list(tmp_path.iterdir())
    for name in ("perplexity", "documents", "tokens", "transform", "spectrum"):
        assert result[name] == stored[name], name
    assert [point["valid_perplexity"] for point in result["history"]] == [
        point["valid_perplexity"] for point in stored["history"]
    ]


def test_a_run_that_another_process_has_is_left_alone(
    invented: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = _write(tmp_path, _changed(cells=[{"name": "a", "seeds": [0], "outputs": ["linear", "temperature"]}]))
    folder, scratch = tmp_path / "results", tmp_path / "scratch"
    verify, linear, temperature = study.units(folder)
    with claimed(scratch / linear.path.with_suffix(".lock")) as mine:
        assert mine
        assert study_run.run_study(study, folder, scratch)
    assert "Other processes are at the last 1 runs" in capsys.readouterr().out
    done = [(folder / unit.path).is_file() for unit in (verify, linear, temperature)]
    assert done == [True, False, True]
    assert study_run.run_study(study, folder, scratch)
    assert (folder / linear.path).is_file()


def test_no_run_starts_after_the_limit(invented: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = _write(tmp_path, CONTENT)
    assert not study_run.run_study(study, tmp_path / "results", tmp_path / "scratch", limit_minutes=1e-9)
    assert "15 runs are left" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


def test_a_training_that_diverges_is_a_result(invented: Corpus, tmp_path: Path) -> None:
    cells = [{"name": "a", "seeds": [0], "outputs": ["linear", "temperature"]}]
    study = _write(tmp_path, _changed(cells=cells))
    folder = tmp_path / "results"
    unit = study.main_units(study.cells[0], folder)[0]

    def fails(self: Trainer) -> float:
        self.step_seconds.append(0.0)
        raise training.Diverged("the loss of step 1 is nan")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", fails)
        result = study_run.run_unit(unit, tmp_path / "x.pt", _never)
    assert result["diverged"] == "the loss of step 1 is nan"
    (folder / unit.path).parent.mkdir(parents=True)
    (folder / unit.path).write_text(json.dumps(result))
    row = read_cell(study, study.cells[0], folder).rows[0]
    assert (row.runs, row.diverged, row.missing) == ({}, (0,), ())
    assert "| 0, 1 diverged |" in study_report.write_report(study, folder).read_text()


def test_verify_repeats_to_the_bit_and_sees_a_difference(
    finished: tuple[Study, Path], invented: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = finished
    assert study_run.verify(study, folder, tmp_path)
    assert "are the same to the bit" in capsys.readouterr().out

    def altered(**environment: Any) -> Path:
        result = json.loads((folder / study.verify.path).read_text())
        losses = result["documents"]["test"]["losses"]
        losses[0] = math.nextafter(losses[0], math.inf)
        result["environment"] |= environment
        path = tmp_path / "altered" / study.verify.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
        return tmp_path / "altered"

    assert not study_run.verify(study, altered(), tmp_path)
    assert "DIFFER" in capsys.readouterr().out
    assert study_run.verify(study, altered(processor="another"), tmp_path)
    assert "agree within 0.02" in capsys.readouterr().out
    with pytest.raises(StudyError, match="run the study first"):
        study_run.verify(study, tmp_path / "empty", tmp_path)


def test_the_command_lists_and_says_what_is_wrong(
    invented: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, CONTENT)
    path = str(tmp_path / "study.json")
    assert command.main(["--study", path, "--out", str(tmp_path), "--list"]) == 0
    assert "15 of 15 runs are left" in capsys.readouterr().out
    assert command.main([f"--study={tmp_path / 'no.json'}"]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["--study", path, "--limit-minutes", "0"])
    assert "must be a positive number of minutes" in capsys.readouterr().err


# Report


def _row(label: str, output: str, losses: list[list[float]], tokens: list[int]) -> RowResults:
    """A row with a run for each seed, of which ``losses`` has the mean loss of each document."""
    chosen = settings.from_values(settings.PRESETS["full"], CONTENT["defaults"])
    runs = {}
    for seed, means in enumerate(losses):
        sums = [mean * count for mean, count in zip(means, tokens, strict=True)]
        perplexity = math.exp(math.fsum(sums) / sum(tokens))
        runs[seed] = {
            "perplexity": {"valid": perplexity, "test": perplexity},
            "documents": {"test": {"losses": sums, "tokens": tokens}},
        }
    return RowResults(Row(label, output, chosen), None, runs, (), ())


def test_comparisons_tell_a_gain_from_noise(finished: tuple[Study, Path]) -> None:
    source = random.Random(1)
    tokens = [source.randint(20, 60) for _ in range(40)]
    base = [source.gauss(5, 0.3) for _ in tokens]

    def losses(gain: float, spread: float) -> list[list[float]]:
        return [
            [value - gain + source.gauss(0, 0.02) + offset for value in base]
            for offset in [source.gauss(0, spread) for _ in range(5)]
        ]

    linear = _row("linear", "linear", losses(0, 0.001), tokens)
    better = _row("plif", "plif", losses(0.1, 0.001), tokens)
    noisy = _row("mlp", "mlp", losses(0.0, 0.05), tokens)
    frozen = _row("plif-frozen", "plif-frozen", losses(0.3, 0.001), tokens)
    cell = CellResults(finished[0].cells[0], (linear, better, noisy, frozen))
    found = cell.against("linear")
    for label, gain in (("plif", 0.1), ("plif-frozen", 0.3)):
        for difference in (found[label].seeds, found[label].documents):
            assert difference is not None and difference.significant
            assert difference.low < -gain < difference.high or difference.mean == pytest.approx(-gain, abs=0.01)
    assert found["mlp"].seeds is not None and not found["mlp"].seeds.significant
    # Holm: the largest p stays, the smallest is multiplied by the number of comparisons.
    plain = compare(better, linear).seeds
    largest, smallest = found["mlp"].seeds.p, found["plif"].seeds
    assert plain is not None and smallest is not None
    assert largest == pytest.approx(compare(noisy, linear).seeds.p)  # type: ignore[union-attr]
    assert smallest.p >= 2 * plain.p * (1 - 1e-12)
    # The control is no candidate for the best transform.
    best = cell.best_transform()
    assert best is not None and best.row.label == "plif"
    sentence = study_report._best_sentence(cell, found, {})
    assert sentence.startswith(
        "**The best transform in this cell is plif (chosen on validation): gain over linear +0.0"
    )
    assert "not significant" not in sentence
    text = study_report._text(found["mlp"].seeds)
    assert text.endswith("not significant")
    with pytest.raises(StudyError, match="different documents"):
        compare(better, _row("linear", "linear", losses(0, 0.001), [count + 1 for count in tokens]))


def test_report_follows_from_the_files(finished: tuple[Study, Path]) -> None:
    study, folder = finished
    path = study_report.write_report(study, folder)
    text = path.read_text()
    for name in ("gains", "transforms", "spectra"):
        assert f"![{name}]({name}.png)" in text
        assert (folder / f"{name}.png").stat().st_size > 5000
    results = [read_result(folder, unit) for unit in study.main_units(study.cells[0], folder)[:2]]
    values = [result["perplexity"]["test"] for result in results if result is not None]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / math.sqrt(2)
    assert f"{mean:.2f} ± {spread:.2f}" in text
    assert "Every run of study `tiny` is done." in text
    # One seed is enough for documents, not for a statement about seeds.
    assert "over temperature" not in text.split("### two")[1]
    assert "There is no run of temperature to compare with." in text
    assert "gain over linear not known (one seed) over seeds" in text


def test_report_of_a_part_names_what_is_missing(finished: tuple[Study, Path], tmp_path: Path) -> None:
    study, folder = finished
    kept = tmp_path / "tiny"
    for path in folder.rglob("*.json"):
        if "temperature" not in path.parts and not (path.parent.name == "plif" and path.name.startswith("search")):
            copy = kept / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    study = replace(study, beyond=study.path)
    text = study_report.write_report(study, kept).read_text()
    missing = text.split("### What was not run")[1]
    assert "- one: temperature (seeds 0, 1)" in missing
    assert "- two: plif (seeds 0)" in missing
    assert f"`python -m benchmarks.language_model --study {study.path}`" in missing
    assert "Study `tiny` was not run here: 14 runs in 2 cells" in missing
    assert "No transform has run in this cell." in text
    empty = study_report.write_report(study, tmp_path / "empty").read_text()
    assert empty.count("Not run.") == 2
