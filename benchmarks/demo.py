"""``python -m benchmarks demo``: what a monotonic f can do, in a few minutes."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .engine import document
from .engine.experiment import NotRun
from .engine.runner import deterministic
from .engine.store import Store
from .experiments.language_model import LanguageModels, measures
from .experiments.language_model.search import choose
from .experiments.language_model.settings import Settings
from .experiments.language_model.studies import BASELINE, DEMO
from .experiments.language_model.training import Trainer, prepared

_CELL = DEMO.cells[0]
_RANK = "1e-05"
_SLICE: dict[str, Any] = {"vocabulary_size": 2000, "dim": 32, "hidden": 64, "epochs": 0.05, "evaluation_tokens": 4000}


def demo(smoke: bool = False, folder: Path = Path("results/demo")) -> None:
    """Compare output layers on a synthetic problem (20 seconds) and as language models (minutes).

    Args:
        smoke: the same on a slice, which shows that it runs and nothing else.
        folder: for demo.md and its pictures.
    """
    started, said = time.monotonic(), ["# Demo"]

    def say(text: str | list[dict[str, Any]]) -> None:
        print(f"\n{text if isinstance(text, str) else document.table(text, 'simple')}", flush=True)
        said.append(text if isinstance(text, str) else document.table(text))

    say("A synthetic problem: how far each output layer stays from the true distributions, and whose modes it finds.")
    say(_synthetic(steps=20 if smoke else 200))
    settings = settings_of_layers()
    if smoke:
        settings = {label: replace(each, **_SLICE) for label, each in settings.items()}
    trainers = {label: Trainer(prepared(each), each) for label, each in settings.items()}
    first = trainers[BASELINE]
    say(
        f"Language models on Wikipedia, LSTM with d = {first.settings.dim} and {len(first.corpus.vocabulary):,} words "
        f"known: every output layer reads the same {_words(first, first.steps):,} words in the same order."
    )
    with deterministic(torch.get_num_threads()):
        say(_language_models(trainers, folder / "pictures"))
    search = _CELL.search
    say(
        f"Learning rates: {search.tries} tries for each layer by one rule, on the validation perplexity of a training "
        f"of {search.epochs:g} epochs with another seed (demo/* in benchmarks/results/language_model.jsonl)."
    )
    say(
        "One seed. On these logits softcap is nearly the identity: its distance from linear shows how little small "
        "differences mean. A layer that needs a low rate has learned less." + (" A slice ranks nothing." * smoke)
    )
    say(f"{time.monotonic() - started:.0f} s in all, {document.count(torch.get_num_threads(), 'thread')}.")
    (folder / "demo.md").write_text("\n\n".join(said) + "\n", encoding="utf-8")
    print(folder / "demo.md")


def _synthetic(steps: int) -> list[dict[str, str]]:
    """Rows of a table, with KL in nats, after training on the first problem of the main cell; the same each time."""
    # scipy takes seconds to load, and the other commands do not need it.
    from .experiments.synthetic.experiment import Synthetic, best_rate
    from .experiments.synthetic.settings import MAIN, SEEDS, Training
    from .experiments.synthetic.training import train

    results, rows = Store(Synthetic.name).results(), []
    # What is loaded at the first step is none of the first method's time.
    train(Training(replace(MAIN, steps=1), "linear", SEEDS[0], 0.1))
    for method in ("linear", "temperature", "plif", "gss", "mos4"):
        lr = best_rate(results, MAIN, method)
        if lr is None:
            raise NotRun(Synthetic().command(f"{MAIN.name}/*"))
        started = time.monotonic()
        with deterministic(Synthetic.threads):
            found = train(Training(replace(MAIN, steps=steps), method, SEEDS[0], lr)).figures
        row = {"method": method, "KL": f"{found['kl']:.3f}", "modes %": f"{100 * found['modes']:.1f}"}
        rows.append(row | {"seconds": f"{time.monotonic() - started:.1f}"})
    return rows


def settings_of_layers() -> dict[str, Settings]:
    """The settings of each layer, at the learning rates that its search found."""
    results, found = Store(LanguageModels.name).results(), {}
    for row in _CELL.rows:
        chosen = choose(DEMO, _CELL, row, results)
        if chosen is None:
            raise NotRun(LanguageModels().command("demo/*"))
        found[row.label] = replace(row.settings, lr=chosen.lr, transform_lr=chosen.transform_lr)
    return found


def _language_models(trainers: dict[str, Trainer], folder: Path) -> list[dict[str, Any]]:
    """Train, draw the pictures, and give the rows of the table."""
    from .experiments.language_model import pictures

    total = sum(_words(trainer, trainer.steps) for trainer in trainers.values())
    with tqdm(total=total, unit=" words", unit_scale=True, smoothing=0.05) as bar:
        for label, trainer in trainers.items():
            bar.set_description(label)
            trainer.train(report=bar.update)
    spectra = {label: (label, measures.spectrum(trainer)) for label, trainer in trainers.items()}
    perplexities = {label: trainer.perplexity("test") for label, trainer in trainers.items()}
    pictures.spectra(spectra, folder / "demo-spectrum.png")
    pictures.transforms(list(trainers.values()), folder / "demo-transforms.png")
    return [
        {
            "output": label,
            "lr": f"{trainer.settings.lr:g}",
            "transform lr": f"{trainer.settings.transform_lr:g}" if row.learns_transform else "-",
            "test ppl": f"{perplexities[label]:.1f}",
            "/ linear": f"{perplexities[label] / perplexities[BASELINE]:.3f}",
            f"rank {_RANK}": spectra[label][1]["effective_ranks"][_RANK],
            "parameters": f"{measures.parameters(trainer):,}",
            "tokens/s": f"{_words(trainer) / statistics.median(trainer.step_seconds):,.0f}",
        }
        for (label, trainer), row in zip(trainers.items(), _CELL.rows, strict=True)
    ]


def _words(trainer: Trainer, steps: int = 1) -> int:
    return steps * trainer.settings.batch_size * trainer.settings.length
