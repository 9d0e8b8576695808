"""Everything that the training of one model depends on, except for versions and the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...engine.experiment import ExperimentError
from .corpora import SOURCES, STYLES
from .models import MODELS, OUTPUTS

_CHOICES = {"corpus": tuple(SOURCES), "text_style": STYLES, "model": MODELS, "output": OUTPUTS}
#: The least whole numbers.
_LEAST = {name: 1 for name in ("min_count", "dim", "hidden", "layers", "heads", "experts", "batch_size", "length")} | {
    "seed": 0,
    "validations": 1,
    "rank_contexts": 2,
}


class SettingsError(ExperimentError, ValueError):
    """A setting is not as it must be."""


@dataclass(frozen=True)
class Settings:
    """One model and its training.

    Attributes:
        corpus: sotu (State of the Union messages) or wiki (lead sections of Wikipedia).
        text_style: cased, or ptb: lower case, and numbers are N.
        vocabulary_size: keep so many of the most frequent words; None for all.
        min_count: rarer words are <unk>.
        model: lstm or transformer.
        output: the output layer.
        dim: size of the embedding and of what the output layer gets.
        hidden: size of the inner LSTM layers, or of the Transformer's feed-forward layers.
        layers: of the LSTM or the Transformer.
        heads: attention heads of the Transformer.
        experts: softmaxes in mos, contexts in moc.
        dropout: its probability.
        seed: of initial weights, dropout and the order of the documents.
        epochs: how often the training text is read.
        batch_size: streams of text that are read side by side.
        length: words through which gradients go back; the context of the Transformer.
        lr: peak rate of Adam, warmed up and then lowered along a cosine.
        transform_lr: the same for the parameters of f.
        clip: largest norm of the gradient of all parameters together.
        validations: the training is in so many equal rounds, after each of which a validation is possible.
        evaluation_tokens: words of each split that perplexities are measured on; None for all.
        rank_contexts: rows of the matrix of log-probabilities whose spectrum is taken.
        device: cpu, cuda or cuda:N.
    """

    corpus: str = "sotu"
    text_style: str = "cased"
    vocabulary_size: int | None = None
    min_count: int = 3
    model: str = "lstm"
    output: str = "plif"
    dim: int = 200
    hidden: int = 400
    layers: int = 2
    heads: int = 4
    experts: int = 10
    dropout: float = 0.3
    seed: int = 0
    epochs: float = 10
    batch_size: int = 20
    length: int = 35
    lr: float = 0.002
    transform_lr: float = 0.01
    clip: float = 0.25
    validations: int = 40
    evaluation_tokens: int | None = None
    rank_contexts: int = 2000
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            self._require(name, isinstance(value, int) and value >= least, f"a whole number, at least {least}")
        for name in ("epochs", "lr", "clip"):
            self._require(name, 0 < getattr(self, name) < float("inf"), "a positive number")
        self._require("transform_lr", 0 <= self.transform_lr < float("inf"), "a number, at least 0")
        self._require("dropout", 0 <= self.dropout <= 0.99, "between 0 and 0.99")
        known = self.vocabulary_size
        self._require("vocabulary_size", known is None or known >= 3, "None or at least 3")
        wish = f"None or at least 2 for each of the {self.batch_size} streams of a batch"
        enough = self.evaluation_tokens is None or self.evaluation_tokens >= 2 * self.batch_size
        self._require("evaluation_tokens", enough, wish)
        multiple = self.model != "transformer" or self.dim % self.heads == 0
        self._require("dim", multiple, f"a multiple of heads, {self.heads}, in a transformer")
        self._require("device", re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None, "cpu, cuda or cuda:N")

    def _require(self, name: str, right: bool, wish: str) -> None:
        if not right:
            raise SettingsError(f"{name} must be {wish}, got {getattr(self, name)!r}")
