"""Transforms on a trained model, with a model of 40 tokens and 6 features that nobody trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import monosoftmax as ms
from benchmarks.engine import runner, statistics
from benchmarks.engine.experiment import ExperimentError
from benchmarks.engine.store import Store
from benchmarks.experiments.posthoc import Posthoc, fit, measure, results
from benchmarks.experiments.posthoc.settings import Alone, Evaluation, States, Study, Together
from benchmarks.experiments.posthoc.states import HiddenStates, Split, load

CLASSES, FEATURES = 40, 6
DATA = States(length=12, fit_tokens=300, valid_tokens=80, test_tokens=200, block_tokens=64)
EVALUATION = Evaluation(rank_contexts=30, histogram_contexts=50, chunk_tokens=48)
TOGETHER = Together(DATA, EVALUATION, batch_tokens=64, fit_tokens=256, valid_tokens=64)
STUDY = Study(Alone(DATA, EVALUATION, rates=(0.01, 0.1), batch_tokens=64), TOGETHER, rates=(1e-3, 1e-2), seeds=(0, 1))


class ToyModel:  # Letters are tokens; a state is the mean of the embeddings up to its token.
    embedding = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(5))

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % (CLASSES - 1) + 1 for letter in text]

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding[tokens].cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]

    def head(self) -> torch.Tensor:
        return 2 * self.embedding


def texts(corpus: str) -> dict[str, str]:
    return {f"{corpus}-{n}": "".join(chr(97 + (n * k * k + k) % 26) for k in range(1 + n % 120)) for n in range(90)}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HiddenStates:
    monkeypatch.setenv("MONOSOFTMAX_CACHE", str(tmp_path))
    return load(DATA, ToyModel, texts)


def test_states_are_those_of_each_document_alone(toy: HiddenStates) -> None:
    for name, split in load(DATA, lambda: pytest.fail("the model was loaded"), texts).splits.items():
        assert len(split.target) >= getattr(DATA, f"{name}_tokens")
        for number in range(len(split.documents)):
            tokens = split.target[split.document == number].tolist()
            alone = ToyModel().hidden_states(torch.tensor([[0, *tokens[:-1]]]))[0]
            assert len(tokens) <= DATA.length and torch.equal(split.hidden[split.document == number], alone)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MONOSOFTMAX_CACHE", str(tmp_path))
    with pytest.raises(ExperimentError, match="corpus wiki has too few tokens"):
        load(DATA, ToyModel, lambda _: {"a": "text"})
    monkeypatch.setattr("benchmarks.experiments.posthoc.states.find_spec", lambda name: None if name == "gguf" else 1)
    with pytest.raises(ExperimentError, match=r"^gguf not installed; run: make \.venv/\.posthoc"):
        load(DATA)
    assert "Not run. `python -m benchmarks run posthoc`" in Posthoc().section(
        Store("posthoc", tmp_path).results(), tmp_path
    )


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.125, 0.25, 0.5, 0.375, 0.875, 1.0, 0.8125])
    bins = measure.calibration_bins(confidence, torch.tensor([False, True, True, False, True, True, False]), 4)
    # Bins (0, 0.25], (0.25, 0.5], (0.5, 0.75], (0.75, 1].
    assert bins == {"tokens": [2, 2, 0, 3], "confidence": [0.375, 0.875, 0, 2.6875], "hits": [1, 1, 0, 2]}
    by_hand = 2 * abs(1 / 2 - 0.1875) + 2 * abs(1 / 2 - 0.4375) + 3 * abs(2 / 3 - 2.6875 / 3)
    assert results.calibration_error(bins) == pytest.approx(by_hand / 7, rel=1e-12)


def test_figures_against_softmax_and_singular_values(toy: HiddenStates) -> None:
    split = toy.splits["test"]
    logits = split.hidden.double() @ toy.head.double().T / 1.7
    (found,) = measure.evaluate(split, toy.head, [ms.transforms.Temperature(1.7)], EVALUATION)
    losses = -logits.log_softmax(1).gather(1, split.target[:, None])[split.document == 3]
    assert found["document_nll"][3] == pytest.approx(losses.sum().item(), rel=1e-5)
    confidence, likeliest = logits.softmax(1).max(1)
    for name, values in measure.calibration_bins(confidence, likeliest == split.target, EVALUATION.bins).items():
        assert found["bins"][name] == pytest.approx(values, rel=1e-4)
    exact = ms.analysis.spectrum(ms.log_softmax(split.subset(30).hidden.double() @ toy.head.double().T))
    spectrum = measure.spectrum(split, toy.head, ms.transforms.Identity(), 30)
    assert spectrum["singular_values"][:FEATURES] == pytest.approx(exact[:FEATURES].tolist(), rel=1e-3)
    assert spectrum["effective_ranks"]["0.001"] == ms.analysis.effective_rank(exact, 1e-3) <= FEATURES + 1


@runner.deterministic(threads=1)
def test_both_stages_find_the_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    head, splits = 3 * torch.randn(CLASSES, FEATURES, generator=generator), {}
    for name, count in (("fit", 4000), ("valid", 1000), ("test", 1000)):
        hidden = torch.randn(count, FEATURES, generator=generator)
        target = torch.multinomial((hidden @ head.T / 2).softmax(1), 1, generator=generator)[:, 0]
        splits[name] = Split(hidden, target, torch.arange(count) // 20, tuple(map(str, range(count // 20))))
    states = HiddenStates(splits, head, "overconfident")
    settings = Alone(transform="temperature", rates=(1e-6, 0.1), batch_tokens=200, epochs=3)
    trained, found = fit.alone(states, replace(settings, transform="identity")), fit.alone(states, settings)
    assert found["test_nll"] < trained["test_nll"] - 0.1 and found["rate"] == 0.1
    f = fit.with_parameters(ms.transforms.Temperature(), found["parameters"])
    assert f.coefficients().item() == pytest.approx(2, rel=0.1)
    # A head that has something to learn; at a rate that ruins it nothing is better than the start.
    states = replace(states, head=head + torch.randn(head.shape, generator=generator))
    start = Together(transform="temperature", start=found["parameters"], rate=0.03, fit_tokens=2048, batch_tokens=128)
    better, ruined = fit.together(states, start), fit.together(states, replace(start, rate=100.0))
    (at_start,) = measure.evaluate(states.splits["test"], states.head, [f], EVALUATION)
    assert better["step"] > ruined["step"] == 0 and better["test_nll"] < ruined["test_nll"] == at_start["nll"]


def test_units_verify_and_report(toy: HiddenStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_RESAMPLES", 199)
    posthoc, store = Posthoc(STUDY, lambda _: toy), Store("posthoc", tmp_path)
    runner.run(posthoc, store, runner.Selection())
    found = store.results()
    search, chosen = results.head_search(found, "temperature"), results.head_runs(found, "temperature")
    assert len(search) == 2 and len(chosen) == 2 and len(found) == 1 + 10 + 4 * 3
    assert chosen[0] == min(search.values(), key=lambda run: run.figures["valid_nll"])
    assert [differences for _, differences in runner.verify(posthoc, store, posthoc.to_verify(found))] == [""] * 3
    text, loss = posthoc.section(found, tmp_path), found["transforms/temperature"].figures["test_nll"]
    assert f" {loss:.4f} |" in text and "missing" not in text and "nan" not in text
    monkeypatch.setattr("benchmarks.experiments.posthoc.report._draw", lambda *_: None)
    store.path.write_text(lines := store.path.read_text().replace('"unit":"transforms/gss"', '"unit":"transforms/no"'))
    assert "missing (transforms/gss)" in posthoc.section(store.results(), tmp_path)
    store.path.write_text(lines.replace(toy.digest, "0" * 64, 1))
    with pytest.raises(ExperimentError, match="different hidden states"):
        posthoc.section(store.results(), tmp_path)
