"""A process that torchrun starts, for tests/experiments/test_language_model.py: it trains language models with others.

The folder that it is given has a corpus, settings, and the size of the groups that share out the vocabulary. The first
process writes there what becomes of the models. Then all train the first model again, as the command does.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

from benchmarks import train as command
from benchmarks.engine.experiment import ExperimentError
from benchmarks.experiments.language_model.training import Trainer


def figures(trainer: Trainer) -> list[float]:
    """The loss of each step, and the perplexities at the end."""
    losses: list[float] = []
    trainer.train(report=lambda _: losses.append(trainer.loss))
    return [*losses, trainer.perplexity("valid"), trainer.perplexity("test")]


def main(folder: Path) -> None:
    from benchmarks.experiments.language_model import ranks

    corpus, models, vocabulary = pickle.loads((folder / "given").read_bytes())
    ranks.prepared = lambda settings: corpus
    train = command._train

    def train_all(trainer: ranks.RanksTrainer, shown: bool) -> None:
        found: list[list[float] | str] = []
        for each in models:
            try:
                found.append(figures(ranks.RanksTrainer(corpus, each, trainer.mesh)))
            except ExperimentError as error:
                found.append(str(error))
        if trainer.mesh.get_rank() == 0:
            (folder / "found").write_text(json.dumps(found), encoding="utf-8")
        train(trainer, shown)

    # Processes meet once only: torchrun's store keeps what the first group wrote.
    command._train = train_all
    command.train(models[0], vocabulary)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
