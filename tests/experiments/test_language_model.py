"""Language models: the texts, that a training goes on where it stopped, the searches, and what is said about them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language_model_ranks import figures

from benchmarks.demo import settings_of_layers
from benchmarks.engine import runner
from benchmarks.engine.checkpoint import Checkpoint
from benchmarks.engine.experiment import ExperimentError, Record
from benchmarks.engine.store import Store
from benchmarks.experiments.language_model import LanguageModels, corpora, experiment, models, training
from benchmarks.experiments.language_model.models import LanguageModel
from benchmarks.experiments.language_model.report import section
from benchmarks.experiments.language_model.results import CellResults, RowResults, compare
from benchmarks.experiments.language_model.search import Try, next_try
from benchmarks.experiments.language_model.settings import Settings
from benchmarks.experiments.language_model.studies import EQUAL, Row, Search, Study, cell
from benchmarks.experiments.language_model.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference backend")

TINY = Settings(
    corpus="wiki", min_count=1, dim=8, hidden=12, heads=2, experts=2, dropout=0.2, epochs=0.6, batch_size=4, length=6,
    validations=2, rank_contexts=20,
)  # fmt: skip
SEARCH = Search((0.01, 0.03), (0.01, 0.003), 3, 0.3)
STUDY = Study(
    "main",
    (
        cell("wiki-lstm-8", TINY, 2, SEARCH, ("linear", "temperature"), comparisons=(("linear", EQUAL),), wide=9),
        cell("wiki-transformer-8", replace(TINY, layers=1), 1, SEARCH, ("linear", "plif")),
    ),
    replace(TINY, output="plif", epochs=0.3),
)
DOCUMENTS = {
    f"document {i}": "\n".join(" ".join(source.choices(known, k=9)) + " ." for _ in range(source.randint(1, 4)))
    for source, known in [(random.Random(0), [f"{a}{b}{c}" for a in "bdkt" for b in "aeiou" for c in "nrs"])]
    for i in range(80)
}
CORPUS = corpora.prepare("wiki", "0" * 64, DOCUMENTS, style="cased", vocabulary_size=None, min_count=1)


def test_words_are_split_by_the_hash_of_their_document_and_the_vocabulary_is_that_of_the_training_split() -> None:
    assert " ".join(corpora.words("Don't 3rd 1,234.5%\n \nX.\n", "cased")) == "Don't 3 rd 1,234.5 % <eos> X . <eos>"
    assert " ".join(corpora.words("Don't 3rd 1,234.5%", "ptb")) == "don't N rd N % <eos>"
    # Written down once: the split of a document must never change, or results from before and after do not compare.
    by_split = {split: [name for name in DOCUMENTS if corpora.split_of(name) == split] for split in corpora.SPLITS}
    assert by_split["test"] == ["document 46", "document 72"]
    assert by_split["valid"] == ["document 15", "document 29", "document 45", "document 63", "document 69"]
    train, valid, test = (by_split[split][0] for split in corpora.SPLITS)
    texts, options = {train: "b a b c b a", valid: "d a", test: "e b"}, {"style": "cased", "min_count": 2}
    for known, numbers in ((None, [[2, 3, 2, 0, 2, 3, 1], [0, 3, 1], [0, 2, 1]]), (3, [[2, 0, 2, 0, 2, 0, 1]])):
        found = corpora.prepare("x", "", texts, vocabulary_size=known, **options)
        assert found.vocabulary == ("<unk>", "<eos>", "b", "a")[:known]
        assert [split.tokens.tolist() for split in found.splits.values()][: len(numbers)] == numbers
    with pytest.raises(ExperimentError, match="the valid split of corpus x is empty"):
        corpora.prepare("x", "", {train: "a"}, vocabulary_size=None, **options)


def test_a_corpus_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "invented" / "data").mkdir(parents=True)
    (tmp_path / "invented" / "__init__.py").write_text("raise ImportError('the package must not be imported')")
    path = tmp_path / "invented" / "data" / "summaries_en-us.json"
    path.write_text(json.dumps({name: {"extract": text} for name, text in DOCUMENTS.items()}))
    monkeypatch.syspath_prepend(str(tmp_path))
    wiki, digest = corpora.SOURCES["wiki"], hashlib.sha256(path.read_bytes()).hexdigest()
    source = replace(wiki, package="invented==1.0", sha256=digest)
    assert corpora.read(source) == DOCUMENTS
    path.write_text(path.read_text() + " ")
    for wrong in (source, replace(source, package="never-installed==1.0")):
        with pytest.raises(ExperimentError, match=r"is not installed, or .* another sha256 .*; run: pip install"):
            corpora.read(wrong)


def test_wrong_settings_are_refused() -> None:
    for change, message in (
        ({"output": "lineal"}, "output must be one of linear, .*, got 'lineal'"),
        ({"dim": 0, "dropout": 1.0}, "dim must be from 1 to .*, got 0; dropout must be from 0 to 0.99, got 1.0"),
        ({"dim": 9, "model": "transformer"}, "dim must be a multiple of heads, 2, in a transformer, got 9"),
        ({"evaluation_tokens": 7}, "evaluation_tokens must be from 8 to .*, got 7"),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:N, got 'gpu'"),
    ):
        with pytest.raises(ExperimentError, match=message):
            replace(TINY, **change)


@pytest.mark.parametrize("output", models.OUTPUTS)
def test_output_layers_are_tied_and_bodies_equal(output: str) -> None:
    model, baseline = (LanguageModel(replace(TINY, output=name), 30) for name in (output, "linear"))
    for mine, other in zip(model.body.state_dict().values(), baseline.body.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert any(parameter is model.body.embedding.weight for parameter in model.output.parameters())
    more = sum(p.numel() * p.requires_grad for p in model.parameters()) > sum(p.numel() for p in baseline.parameters())
    assert more == (models.learns_transform(output) or output in ("mos", "moc"))


def test_transformer_does_not_see_the_future() -> None:
    model = LanguageModel(replace(TINY, model="transformer"), 30).eval()
    words, later = torch.arange(12).reshape(2, 6), torch.arange(6) > 3
    one, two = model.body(words, None)[0], model.body(words + 10 * later, None)[0]
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])


@pytest.mark.parametrize(("model", "output"), [("lstm", "plif"), ("transformer", "mos")])
def test_resumed_training_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, output: str
) -> None:
    whole = Trainer(CORPUS, replace(TINY, model=model, output=output, epochs=1.3))
    whole.train()
    epoch, path = whole.steps_per_epoch, tmp_path / "state.pt"
    # Stopped within an epoch, at its end, and in the next one; each time by a new process, which has other numbers.
    for kept_at in (2, epoch, epoch + 3, 10**9):
        part, checkpoint = Trainer(CORPUS, whole.settings), Checkpoint(path)
        monkeypatch.setattr(checkpoint, "due", lambda part=part, kept_at=kept_at: part.step == kept_at)

        def stop(words: int, part: Trainer = part, kept_at: int = kept_at) -> None:
            if part.step > kept_at:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            part.train(checkpoint=checkpoint, report=stop)
        torch.randn(7)
    assert part.step == whole.step == round(1.3 * epoch)
    assert part.document_losses("valid") == whole.document_losses("valid")
    for mine, other in zip(part.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_rates_rise_and_fall_and_all_layers_read_the_same_words() -> None:
    trainer, other = (Trainer(CORPUS, replace(TINY, output=output), steps=5) for output in ("linear", "mos"))
    shares = []
    for step in range(5):
        trainer.step = other.step = step
        shares.append(trainer._progress())
        assert torch.equal(trainer._batch()[0], other._batch()[0])
    # Two rounds, of 3 and 2 steps, count the same.
    assert shares == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2, 3 / 4])
    assert [trainer._rate(x) for x in (0, 0.05, 0.525, 1)] == pytest.approx([1 / 6, 1, 0.05 + 0.95 / 2, 0.05])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_of_torchrun_train_the_model_that_one_process_trains(tmp_path: Path, processes: int) -> None:
    base = replace(TINY, epochs=0.26, lr=0.02)
    trained = [replace(base, output="plif"), replace(base, model="transformer", output="linear")]
    refused = {replace(base, output="mos"): "vocabulary_parallel must be 1 for the output layer mos"}
    if processes == 4:  # two groups share out the streams of a batch
        refused[replace(base, batch_size=5)] = "batch_size must be a multiple of 2, got 5"
    (tmp_path / "given").write_bytes(pickle.dumps((CORPUS, [*trained, *refused], 2)))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    ranks = subprocess.run(
        [*command, root / "tests/language_model_ranks.py", tmp_path],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ranks.returncode == 0, ranks.stderr
    found = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    expected = [figures(Trainer(CORPUS, each)) for each in trained]
    assert [len(each) for each in expected] == [22, 22]
    for mine, one in zip(found, expected, strict=False):
        assert mine == pytest.approx(one, rel=1e-5)
    assert found[2:] == list(refused.values())
    # The first process alone prints.
    *losses, perplexity = re.findall(r"(?:loss|test perplexity) ([\d.]+)", ranks.stdout)
    assert list(map(float, losses)) == pytest.approx([expected[0][9], expected[0][19]], abs=1e-4)
    assert float(perplexity) == pytest.approx(expected[0][-1], abs=0.01)


@pytest.mark.parametrize("tokens", [None, 61])
def test_losses_of_documents_are_the_whole_loss_by_document(tokens: int | None) -> None:
    trainer = Trainer(CORPUS, replace(TINY, output="temperature", evaluation_tokens=tokens), steps=5)
    trainer.train()
    part = CORPUS.splits["valid"]
    losses, counts = trainer.document_losses("valid"), training.document_tokens(part, trainer.settings)
    text = training.streams(part.tokens[:tokens], 4)
    trainer.model.eval()
    with torch.no_grad():
        states = trainer.model.body(text[:, :-1], None)[0]
        nll = -trainer.model.output.log_prob(states).gather(2, text[:, 1:, None])[..., 0].double()
    expected: dict[int, list[float]] = {}
    for stream, place in itertools.product(range(4), range(1, text.shape[1])):
        document = sum(start <= stream * text.shape[1] + place for start in part.starts.tolist()) - 1
        expected.setdefault(document, []).append(nll[stream, place - 1].item())
    assert counts == [len(each) for _, each in sorted(expected.items())]
    assert losses == pytest.approx([sum(each) for _, each in sorted(expected.items())], rel=1e-5)
    assert math.exp(math.fsum(losses) / sum(counts)) == pytest.approx(trainer.perplexity("valid"), rel=1e-9)


def test_every_row_gets_as_many_tries() -> None:
    search = Search((0.01, 0.02, 0.04), (0.01, 0.003), 5, 1.0)

    def refinements(learns: bool, best: float) -> list[tuple[float, float]]:
        done: list[Try] = []
        for _ in range(search.tries):
            one = next_try(search, done, learns)
            done.append(replace(one, perplexity=abs(math.log(one.lr / best)) - one.transform_lr))
        return [(one.lr, one.transform_lr) for one in done[3:]]

    # In the middle: the other rate of f, then between the best and its better neighbour.
    assert refinements(True, 0.021) == [(0.02, 0.003), (0.02828, 0.01)]
    assert refinements(False, 0.021) == [(0.02828, 0.01), (0.02378, 0.01)]
    # At an edge: outwards, for both.
    for learns in (True, False):
        assert refinements(learns, 1.0) == [(0.08, 0.01), (0.16, 0.01)]
        assert refinements(learns, 1e-5) == [(0.005, 0.01), (0.0025, 0.01)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The whole tiny study, run once and verified."""
    tiny, store = LanguageModels((STUDY,)), Store("language_model", tmp_path_factory.mktemp("study"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "prepared", lambda settings: CORPUS)
        assert runner.run(tiny, store, runner.Selection()) == []
        verified = dict(runner.verify(tiny, store, tiny.to_verify(store.results())))
    assert verified == {"main/verify/plif/seed0": "", "main/corpus/wiki-all": ""}
    return store


def test_the_tables_are_trained_at_the_best_rate_of_the_search(finished: Store) -> None:
    results = finished.results()
    assert len(results) == 2 + (3 * (3 + 2)) + (2 * (3 + 1))
    tokens = results["main/corpus/wiki-all"].figures["document_tokens"]
    for name in ("wiki-lstm-8/temperature", "wiki-transformer-8/plif"):
        tries, table = results.matching(f"main/{name}/search-*-seed100"), results[f"main/{name}/seed0"]
        assert len(tries) == 3 and all(one.settings["seed"] == 100 for one in tries)
        best = min(tries, key=lambda one: one.figures["perplexity"]["valid"]).settings
        assert [table.settings[rate] for rate in ("lr", "transform_lr")] == [best["lr"], best["transform_lr"]]
        assert table.figures["perplexity"]["test"] == math.exp(math.fsum(table.figures["losses"]) / sum(tokens))


def test_report_says_what_is_there_and_what_is_missing(finished: Store, tmp_path: Path) -> None:
    results = finished.results()
    text = section(results, tmp_path, STUDY)
    for name in ("gains", "transforms", "spectra"):
        assert (tmp_path / f"language_model-{name}.png").stat().st_size > 2000
    one, two = (results[f"main/wiki-lstm-8/linear/seed{seed}"].figures["perplexity"]["test"] for seed in (0, 1))
    assert f"{(one + two) / 2:.2f} ± {abs(one - two) / math.sqrt(2):.2f}" in text
    # One seed is enough for documents, not for a statement about seeds.
    assert "over temperature" not in text.split("### wiki-transformer-8")[1]
    assert "There is no run of temperature to compare with." in text
    assert "gain over linear not known (one seed) over seeds" in text
    assert "Every run of study `main` is done." in text

    diverged = replace(results["main/wiki-lstm-8/linear/seed1"], figures={"diverged": "the loss is nan"})
    kept = [record for name, record in results.items() if "temperature" not in name and "plif/search" not in name]
    part = type(results)([diverged, *kept])
    text = section(part, tmp_path, STUDY)
    assert "- wiki-lstm-8: temperature (seeds 0, 1)\n" in text and "| 1, 1 diverged |" in text
    assert "`python -m benchmarks run language_model`" in text and "No transform has run in this cell." in text
    assert section(type(results)(), tmp_path, STUDY).count("Not run.") == 2


def test_comparisons_tell_a_gain_from_noise() -> None:
    source, tokens = random.Random(1), tuple(range(20, 60))
    base = [source.gauss(5, 0.3) for _ in tokens]

    def row(output: str, gain: float, spread: float) -> RowResults:
        runs = {}
        for seed in range(5):
            offset = source.gauss(0, spread) - gain
            losses = [(loss + offset + source.gauss(0, 0.02)) * n for loss, n in zip(base, tokens, strict=True)]
            perplexity = math.exp(math.fsum(losses) / sum(tokens))
            figures = {"perplexity": {"valid": perplexity, "test": perplexity}, "losses": losses}
            runs[seed] = Record("", {}, figures, {}, 0.0, {})
        return RowResults(Row(output, replace(TINY, output=output)), None, runs, document_tokens=tokens)

    linear, plif, noisy = row("linear", 0, 0.001), row("plif", 0.1, 0.001), row("mlp", 0, 0.05)
    # What is not learned, and what is no f, is no candidate.
    cells = CellResults(STUDY.cells[0], (linear, plif, row("plif-frozen", 0.3, 0.001), row("mos", 0.3, 0.001), noisy))
    assert cells.best_transform() is plif
    found = cells.against("linear")
    for each in (found["plif"].seeds, found["plif"].documents):
        assert each.significant and each.mean == pytest.approx(-0.1, abs=0.01)
    # Holm: the largest p stays, smaller ones are multiplied.
    assert not found["mlp"].seeds.significant and found["mlp"].seeds == compare(noisy, linear).seeds
    assert found["plif"].seeds.p >= 2 * compare(plif, linear).seeds.p * (1 - 1e-12)


def test_stored_results_are_those_of_the_studies() -> None:
    store = Store("language_model")
    results = store.results()
    units = [unit for unit in LanguageModels().units(results) if unit.name.startswith(("main/", "demo/"))]
    for unit in units:
        store.require_settings(unit, results)
    assert {unit.name for unit in units} == set(results)
    best = min(results.matching("demo/*/plif/search-*"), key=lambda one: one.figures["perplexity"]["valid"])
    assert replace(settings_of_layers()["plif"], seed=100, epochs=0.2, validations=1) == Settings(**best.settings)
