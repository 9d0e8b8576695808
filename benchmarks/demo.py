"""``python -m benchmarks demo``: what a monotonic f can do, in a few minutes."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .engine import document
from .engine.experiment import ExperimentError
from .engine.runner import deterministic
from .engine.store import Store
from .experiments.language_model import LanguageModels
from .experiments.language_model.search import choose
from .experiments.language_model.settings import Settings
from .experiments.language_model.studies import BASELINE, DEMO

_CELL = DEMO.cells[0]
_TOLERANCE = "1e-05"
_SMOKE = {"vocabulary_size": 2000, "dim": 32, "hidden": 64, "epochs": 0.05, "evaluation_tokens": 4000}


def demo(smoke: bool = False, folder: Path = Path("results/demo")) -> None:
    """Compare output layers on a synthetic problem (20 seconds) and as language models (4 minutes on 2 cores).

    Args:
        smoke: the same on a slice, which shows that it runs and nothing else.
        folder: for demo.md and its pictures.
    """
    started = time.monotonic()
    synthetic = _synthetic(smoke)
    text = [synthetic, _language_models(smoke, folder / "pictures")]
    text.append(f"{time.monotonic() - started:.0f} s in all, {torch.get_num_threads()} threads.")
    print(text[-1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.md").write_text("\n\n".join(["# Demo", *text]) + "\n", encoding="utf-8")
    print(f"{folder / 'demo.md'}, and pictures beside it")


def _synthetic(smoke: bool) -> str:
    # Only here: what draws and what trains take seconds to load.
    from .experiments.synthetic.demonstration import demonstration

    before = "One synthetic problem: how close each output layer comes to the true distributions, and their modes."
    print(f"\n{before}\n")
    rows = demonstration(20) if smoke else demonstration()
    print(document.table(rows, "simple"))
    return "\n\n".join([before, document.table(rows)])


def settings_of_layers() -> dict[str, Settings]:
    """The settings of each layer, at the learning rates that its search found.

    Raises:
        ExperimentError: a search is not done.
    """
    results, found = Store(LanguageModels.name).results(), {}
    for row in _CELL.rows:
        chosen = choose(DEMO, _CELL, row, results)
        if chosen is None:
            raise ExperimentError(f"the search of {row.label} is missing: {LanguageModels().command('demo/*')}")
        found[row.label] = replace(row.settings, lr=chosen.lr, transform_lr=chosen.transform_lr)
    return found


def _language_models(smoke: bool, folder: Path) -> str:
    from .experiments.language_model import measures, pictures
    from .experiments.language_model.training import Trainer, prepared

    settings = settings_of_layers()
    if smoke:
        settings = {label: replace(each, **_SMOKE) for label, each in settings.items()}
    corpus = prepared(settings[BASELINE])
    trainers = {label: Trainer(corpus, each) for label, each in settings.items()}
    any_settings, words = settings[BASELINE], _words(trainers[BASELINE])
    before = (
        f"Language models on Wikipedia, LSTM with d = {any_settings.dim} and {len(corpus.vocabulary):,} words known: "
        f"every output layer reads the same {words:,} words in the same order."
    )
    print(f"\n{before}\n")
    with deterministic(torch.get_num_threads()):
        _train(trainers, words)
        seconds = measures.layer_seconds(list(trainers.values()))
        spectra: dict[str, tuple[str, dict[str, Any]]] = {}
        for label, trainer in trainers.items():
            values = measures.singular_values(trainer)
            figures = {"singular_values": values.tolist(), "effective_ranks": measures.effective_ranks(values)}
            spectra[label] = label, figures
        perplexities = {label: trainer.perplexity("test") for label, trainer in trainers.items()}
    pictures.spectra(spectra, folder / "demo-spectrum.png")
    pictures.transforms(list(trainers.values()), folder / "demo-transforms.png")
    rows = [
        {
            "output": label,
            "lr": f"{trainer.settings.lr:g}",
            "transform lr": f"{trainer.settings.transform_lr:g}" if row.learns_transform else "-",
            "test ppl": f"{perplexities[label]:.1f}",
            "/ linear": f"{perplexities[label] / perplexities[BASELINE]:.3f}",
            f"rank {_TOLERANCE}": spectra[label][1]["effective_ranks"][_TOLERANCE],
            "parameters": f"{measures.parameters(trainer):,}",
            "tokens/s": f"{_words(trainer, 1) / statistics.median(trainer.step_seconds):,.0f}",
            "layer ms": f"{layer * 1e3:.1f}",
        }
        for (label, trainer), row, layer in zip(trainers.items(), _CELL.rows, seconds, strict=True)
    ]
    after = (
        f"Learning rates: {_CELL.search.tries} tries for each layer, by one rule, on the validation perplexity of a "
        f"training of {_CELL.search.epochs:g} epochs with another seed ({LanguageModels.name}.jsonl, demo/*).\n\n"
        "One seed: the spread is not known, so that small differences rank nothing; benchmarks/results/REPORT.md has "
        "more seeds."
    )
    if smoke:
        after = "A slice: nothing here ranks output layers."
    print(f"\n{document.table(rows, 'simple')}\n\n{after}\n")
    return "\n\n".join([before, document.table(rows), after])


def _words(trainer: Any, steps: int | None = None) -> int:
    """Words of so many steps, of all by default."""
    total: int = (steps or trainer.steps) * trainer.settings.batch_size * trainer.settings.length
    return total


def _train(trainers: dict[str, Any], words: int) -> None:
    from tqdm import tqdm

    with tqdm(total=len(trainers) * words, unit=" words", unit_scale=True, smoothing=0.05) as bar:
        for label, trainer in trainers.items():
            bar.set_description(label)
            trainer.train(report=bar.update)
