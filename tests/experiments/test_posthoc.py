"""Transforms on a trained model, with a model of 40 tokens and 6 features that nobody trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import monosoftmax as ms
from benchmarks.engine import runner, statistics
from benchmarks.engine.experiment import ExperimentError, Results
from benchmarks.engine.store import Store
from benchmarks.experiments.posthoc import Posthoc, fit, measure, results
from benchmarks.experiments.posthoc.settings import Alone, Evaluation, States, Together
from benchmarks.experiments.posthoc.states import HiddenStates, Split, load

CLASSES, FEATURES = 40, 6
DATA = States(length=12, fit_tokens=300, valid_tokens=80, test_tokens=200, block_tokens=64)
EVALUATION = Evaluation(rank_contexts=30, histogram_contexts=50, chunk_tokens=48)


class ToyModel:  # Letters are tokens; a state is the mean of the embeddings up to its token.
    embedding = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(5))
    head = 2 * embedding

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % (CLASSES - 1) + 1 for letter in text]

    def hidden_states(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding[tokens].cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]

    @staticmethod
    def texts(corpus: str) -> dict[str, str]:
        return {f"{corpus}-{n}": "".join(chr(97 + (n * k * k + k) % 26) for k in range(1 + n % 120)) for n in range(90)}


class ToyPosthoc(Posthoc):
    alone = Alone(DATA, EVALUATION, rates=(0.01, 0.1), batch_tokens=64)
    together = Together(DATA, EVALUATION, batch_tokens=64, fit_tokens=256, valid_tokens=64)
    rates, seeds, load = (1e-3, 1e-2), (0, 1), lambda _, states: load(states, ToyModel, ToyModel.texts)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HiddenStates:
    monkeypatch.setenv("MONOSOFTMAX_CACHE", str(tmp_path))
    return load(DATA, ToyModel, ToyModel.texts)


def test_states_are_those_of_each_document_alone(toy: HiddenStates, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, split in load(DATA, lambda: pytest.fail("the model was loaded"), ToyModel.texts).splits.items():
        assert len(split.target) >= getattr(DATA, f"{name}_tokens")
        for number in range(len(split.documents)):
            tokens, hidden = (values[split.document == number] for values in (split.target, split.hidden))
            alone = ToyModel().hidden_states(torch.tensor([[0, *tokens[:-1]]]))[0]
            assert len(tokens) <= DATA.length and torch.equal(hidden, alone)
    with pytest.raises(ExperimentError, match="corpus wiki has too few tokens"):
        load(States(), ToyModel, ToyModel.texts)
    monkeypatch.setattr("benchmarks.experiments.posthoc.states.find_spec", lambda name: None if name == "gguf" else 1)
    with pytest.raises(ExperimentError, match=r"^gguf not installed; run: make \.venv/\.posthoc"):
        load(States())


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.125, 0.25, 0.5, 0.375, 0.875, 1.0, 0.8125])
    bins = measure.calibration_bins(confidence, torch.tensor([False, True, True, False, True, True, False]), 4)
    assert bins == {"tokens": [2, 2, 0, 3], "confidence": [0.375, 0.875, 0, 2.6875], "hits": [1, 1, 0, 2]}
    assert results.calibration_error(bins) == pytest.approx((0.625 + 0.125 + 0.6875) / 7, rel=1e-12)


def test_figures_against_softmax_and_singular_values(toy: HiddenStates) -> None:
    split = toy.splits["test"]
    logits = split.hidden.double() @ toy.head.double().T / 1.7
    (found,) = measure.evaluate(split, toy.head, [ms.transforms.Temperature(1.7)], EVALUATION)
    losses = -logits.log_softmax(1).gather(1, split.target[:, None])[split.document == 3]
    assert found["document_nll"][3] == pytest.approx(losses.sum().item(), rel=1e-5)
    assert sum(found["bins"]["confidence"]) == pytest.approx(logits.softmax(1).amax(1).sum().item(), rel=1e-4)
    assert sum(found["bins"]["hits"]) == (logits.argmax(1) == split.target).sum()
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
    found = fit.alone(HiddenStates(splits, head), Alone(transform="temperature", rates=(1e-6, 0.1), batch_tokens=100))
    f = fit.with_parameters(ms.transforms.Temperature(), found["parameters"])
    assert f.coefficients().item() == pytest.approx(2, rel=0.1) and found["rate"] == 0.1
    # A head that has something to learn; at a rate that ruins it nothing is better than the start.
    states = HiddenStates(splits, head + torch.randn(head.shape, generator=generator))
    start = Together(transform="temperature", start=found["parameters"], rate=0.03, fit_tokens=2048, batch_tokens=128)
    better, ruined = fit.together(states, start), fit.together(states, replace(start, rate=100.0))
    (at_start,) = measure.evaluate(states.splits["test"], states.head, [f], EVALUATION)
    assert better["step"] > ruined["step"] == 0 and better["test_nll"] < ruined["test_nll"] == at_start["test_nll"]


def test_units_verify_and_report(toy: HiddenStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_RESAMPLES", 199)
    posthoc, store = ToyPosthoc(), Store("posthoc", tmp_path)
    runner.run(posthoc, store, runner.Selection())
    found = store.results()
    search, chosen = (of(found, "temperature") for of in (results.head_search, results.head_runs))
    assert chosen[0] == min(search.values(), key=lambda run: run.figures["valid_nll"]) and len(found) == 11 + 4 * 3
    assert [differences for _, differences in runner.verify(posthoc, store, posthoc.to_verify(found))] == [""] * 3
    text, loss = posthoc.section(found, tmp_path), found["transforms/temperature"].figures["test_nll"]
    assert f" {loss:.4f} |" in text and "missing" not in text and "nan" not in text
    for gone, stages in ((list(found)[-1:], 1), (["transforms/gss"], 0), (list(found), 0)):
        text = posthoc.section(Results(record for name, record in found.items() if name not in gone), tmp_path)
        assert f" missing ({gone[0]}" in text and text.count("### f ") == stages
