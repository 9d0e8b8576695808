"""``python -m benchmarks train``: one language model with settings of one's own choice."""

from __future__ import annotations

import os
from typing import Annotated

import tyro

from .experiments.language_model.settings import Settings
from .experiments.language_model.training import Trainer, prepared


def train(
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # noqa: B008
    vocabulary_parallel: int = 1,
) -> None:
    """Train a language model and print its perplexities. The processes of torchrun train one together.

    Args:
        settings: of the model and its training.
        vocabulary_parallel: groups of so many processes of torchrun share out the vocabulary, the groups the streams.
    """
    if vocabulary_parallel == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        _train(Trainer(prepared(settings), settings))
        return
    # This loads torch.distributed.tensor, which takes a second.
    from .experiments.language_model.ranks import joined

    with joined(settings, vocabulary_parallel) as trainer:
        _train(trainer, shown=trainer.mesh.get_rank() == 0)


def _train(trainer: Trainer, shown: bool = True) -> None:
    from tqdm import tqdm

    settings = trainer.settings
    words = settings.batch_size * settings.length
    with tqdm(total=trainer.steps * words, unit=" words", unit_scale=True, disable=not shown) as bar:
        for number in range(1, settings.validations + 1):
            trainer.train(trainer.round_end(number), report=bar.update)
            reached, perplexity = f"{trainer.step * words:>12,} words", trainer.perplexity("valid")
            if shown:
                bar.write(f"{reached}: loss {trainer.loss:.4f}, validation perplexity {perplexity:.2f}")
    perplexity = trainer.perplexity("test")
    if shown:
        print(f"test perplexity {perplexity:.2f}")
