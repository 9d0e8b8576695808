"""Everything that the training of one model depends on, except for versions and the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...engine.experiment import ExperimentError
from .corpora import SOURCES, STYLES
from .models import BODIES, OUTPUTS

_CHOICES = {"corpus": tuple(SOURCES), "text_style": STYLES, "model": tuple(BODIES), "output": OUTPUTS}
_SIZES = ("min_count", "dim", "hidden", "layers", "heads", "experts", "batch_size", "length", "validations")
#: The least and the largest value.
_BOUNDS = {
    **dict.fromkeys(_SIZES, (1, 1e12)),
    **dict.fromkeys(("epochs", "lr", "clip"), (1e-12, 1e12)),
    **dict.fromkeys(("seed", "transform_lr"), (0, 1e12)),
    **{"vocabulary_size": (3, 1e12), "rank_contexts": (2, 1e12), "dropout": (0, 0.99)},
}


@dataclass(frozen=True)
class Settings:
    """One model and its training. The comments are the help of ``python -m benchmarks train``."""

    corpus: str = "sotu"  # sotu (State of the Union messages) or wiki (lead sections of Wikipedia).
    text_style: str = "cased"  # cased, or ptb: lower case, and numbers are N.
    vocabulary_size: int | None = None  # keep so many of the most frequent words; None for all.
    min_count: int = 3  # rarer words are <unk>.
    model: str = "lstm"  # lstm or transformer.
    output: str = "plif"  # the output layer.
    dim: int = 200  # size of the embedding and of what the output layer gets.
    hidden: int = 400  # size of the inner LSTM layers, or of the Transformer's feed-forward layers.
    layers: int = 2  # of the LSTM or the Transformer.
    heads: int = 4  # attention heads of the Transformer.
    experts: int = 10  # softmaxes in mos, contexts in moc.
    dropout: float = 0.3  # its probability.
    seed: int = 0  # of initial weights, dropout and the order of the documents.
    epochs: float = 10  # how often the training text is read.
    batch_size: int = 20  # streams of text that are read side by side.
    length: int = 35  # words through which gradients go back; the context of the Transformer.
    lr: float = 0.002  # peak rate of Adam, warmed up and then lowered along a cosine.
    transform_lr: float = 0.01  # the same for the parameters of f.
    clip: float = 0.25  # largest norm of the gradient of all parameters together.
    validations: int = 40  # the training is in so many equal rounds, after each of which a validation is possible.
    evaluation_tokens: int | None = None  # words of each split that perplexities are measured on; None for all.
    rank_contexts: int = 2000  # rows of the matrix of log-probabilities whose spectrum is taken.
    device: str = "cpu"  # cpu, cuda or cuda:N.

    def __post_init__(self) -> None:
        wishes, values = {}, vars(self)
        for name, allowed in _CHOICES.items():
            if values[name] not in allowed:
                wishes[name] = f"one of {', '.join(allowed)}"
        # Each stream of a batch needs a word to begin with and one to predict.
        for name, (least, most) in {**_BOUNDS, "evaluation_tokens": (2 * self.batch_size, 1e12)}.items():
            if values[name] is not None and not least <= values[name] <= most:
                wishes[name] = f"from {least:g} to {most:g}"
        if not wishes and self.model == "transformer" and self.dim % self.heads:
            wishes["dim"] = f"a multiple of heads, {self.heads}, in a transformer"
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            wishes["device"] = "cpu, cuda or cuda:N"
        if wishes:
            raise ExperimentError("; ".join(f"{name} must be {wishes[name]}, got {values[name]!r}" for name in wishes))
