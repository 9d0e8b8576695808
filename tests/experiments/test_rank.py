"""The ranks: what is measured on matrices and heads, and what the section says about the stored results."""

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.engine.experiment import Results
from benchmarks.engine.runner import deterministic
from benchmarks.engine.store import Store
from benchmarks.experiments.language_model import corpora
from benchmarks.experiments.language_model import training as language_model_training
from benchmarks.experiments.rank import Rank, experiment, report, settings
from benchmarks.experiments.rank.settings import LanguageModelHead, Large, Noise, Random
from benchmarks.experiments.synthetic.settings import Cell, Training


def test_linear_random_factors_have_rank_d_plus_1_and_coarse_random_plifs_have_more():
    log_p = {f: experiment.random_log_p(Random(f, 40, 40, 4, 0)) for f in ("linear", "plif-10", "plif-100000")}
    linear, coarse, published = (experiment.describe(each, each is log_p["linear"]) for each in log_p.values())
    assert set(linear["ranks"].values()) == set(linear["press"].values()) == {5} == {len(linear["singular_values"])}
    assert experiment.centred(log_p["linear"])["1e-05"] == 4
    assert published["ranks"]["0.0001"] == 5 < coarse["ranks"]["0.0001"] and "singular_values" not in coarse
    # The numerical rank does not tell them apart.
    assert published["press"]["float64"] == coarse["press"]["float64"] == 40
    # Factors are the same for every f, and different for every seed.
    assert torch.equal(log_p["linear"], experiment.random_log_p(Random("temperature", 40, 40, 4, 0)))
    assert not torch.equal(log_p["linear"], experiment.random_log_p(Random("linear", 40, 40, 4, 1)))


def test_a_large_matrix_has_ranks_up_to_the_number_of_values():
    size = Large("sigsoftmax", 60, 80, 4, 0, leading=16, exact=True)
    found, exact = experiment.large(size), experiment.describe(experiment.random_log_p(size))["ranks"]
    assert found["exact"]["ranks"] == exact
    assert found["ranks"] == {key: rank if rank <= 16 else None for key, rank in exact.items()}
    assert None in found["ranks"].values() and found["ranks"]["0.001"] == exact["0.001"]
    assert 0 <= found["exact"]["largest_errors"][0] <= found["exact"]["largest_errors"][1] < 0.5


@pytest.mark.parametrize("c", settings.NOISE_C)
def test_noise_reproduces_the_published_experiment(c):
    found, published = experiment.noise(Noise(c, rows=200)), report.PUBLISHED[c]
    for dtype in ("float64", "float32"):
        assert found[dtype]["press"] == pytest.approx(max(10, published / 10_000 * 200), abs=8)
    assert set(found["float64"]["ranks"].values()) == {10}
    # The closed form of the report has the published figures.
    assert report.expected(c**0.5 / 10_000, 10_000, 10) == pytest.approx(published, abs=4)


@deterministic(1)
def test_a_trained_head_has_low_rank_before_f_and_more_after():
    training = Training(Cell(30, 25, 4, 0.1, 60), "plif-frozen", 0, 0.1)
    found = experiment.synthetic(training)
    assert found["before"]["ranks"]["1e-05"] <= 4 + 2 < found["after"]["ranks"]["1e-05"]
    assert found["before"]["press"]["float64"] == 6 == len(found["before"]["singular_values"])
    linear = experiment.synthetic(replace(training, method="linear", seed=1))
    assert linear["before"] == linear["after"] and "singular_values" not in linear["after"]
    assert experiment.synthetic(replace(training, method="mos4"))["before"] is None


@deterministic(1)
def test_a_language_model_before_and_after_f(monkeypatch):
    words = [chr(97 + n) for n in torch.randint(26, (7200,), generator=torch.Generator().manual_seed(0))]
    texts = {f"text {i}": " ".join(words[120 * i : 120 * i + 120]) for i in range(60)}
    corpus = corpora.prepare("toy", "", texts, style="ptb", vocabulary_size=25, min_count=1)
    monkeypatch.setattr(language_model_training, "prepared", lambda settings: corpus)
    small = replace(settings.SMALL_MODEL, dim=4, hidden=8, batch_size=2, length=10, rank_contexts=50)
    found, again, mixture = (
        experiment.language_model(LanguageModelHead(replace(small, output=f), 3)) for f in ("gss", "gss", "mos")
    )
    assert found["tokens"] == 3 * 2 * 10 and found == again and mixture["before"] is None
    assert found["before"]["press"]["float64"] <= 4 + 2 < found["after"]["press"]["float64"]


def test_the_section_follows_from_the_stored_results_and_says_what_is_missing(tmp_path):
    results = Store("rank").results()
    some = Results(record for name, record in results.items() if name.startswith("random") or name == "noise/c1e-24")
    text = re.sub(" +", " ", Rank().section(some, tmp_path))
    ranks = [results[f"random-d64/plif-20/seed{seed}"].figures["ranks"]["0.0001"] for seed in settings.SEEDS]
    assert "\n| linear | 17 | 17 | 17 | 17 | 17 |\n" in text and f" | {report.span(ranks)} | " in text
    assert "65 for every seed: sigsoftmax, gss-published" in text and "plif-20, plif-50. Not: linear" in text
    assert "9 units missing, the first is noise/c1e-16; `python -m benchmarks run rank --only 'noise/*'`" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-pieces.png", "rank-random.png"]
    assert [report.span([17, 17]), report.span([1, 2, 6])] == ["17", "3 (1-6)"]
