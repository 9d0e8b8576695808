"""``python -m benchmarks train``: one language model with settings of one's own choice."""

from __future__ import annotations

from typing import Annotated

import tyro

from .experiments.language_model.settings import Settings


def train(settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()) -> None:  # noqa: B008
    """Train a language model and print its perplexities.

    Args:
        settings: of the model and its training.
    """
    from tqdm import tqdm

    from .experiments.language_model.training import Trainer, prepared

    trainer = Trainer(prepared(settings), settings)
    words = settings.batch_size * settings.length
    with tqdm(total=trainer.steps * words, unit=" words", unit_scale=True) as bar:
        for number in range(1, settings.validations + 1):
            trainer.train(trainer.round_end(number), report=bar.update)
            bar.write(f"{trainer.step * words:>12,} words: validation perplexity {trainer.perplexity('valid'):.2f}")
    print(f"test perplexity {trainer.perplexity('test'):.2f}")
