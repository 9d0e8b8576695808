"""The settings of the units, and the contestants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from monosoftmax import transforms
from monosoftmax.transforms import MonotonicTransform


@dataclass(frozen=True)
class States:
    """Which hidden states there are. Token counts are of both corpora together; each gives half."""

    corpora: tuple[str, ...] = ("wiki", "sotu")
    #: Most tokens of a document. Of a longer one, an excerpt that starts at the first line end after the middle.
    length: int = 256
    fit_tokens: int = 40_000
    valid_tokens: int = 10_000
    test_tokens: int = 30_000
    #: Documents are sorted by length and put into blocks of so many tokens, which the model's passes do not cross.
    block_tokens: int = 4_096


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the test split."""

    bins: int = 15
    rank_contexts: int = 1_000
    histogram_contexts: int = 1_000
    histogram_bins: int = 120
    histogram_range: tuple[float, float] = (-45.0, 45.0)
    #: Tokens whose logits there are at a time.
    chunk_tokens: int = 1_024


@dataclass(frozen=True)
class Data:
    """The settings of the unit ``states``, which the others have, too."""

    states: States = States()
    evaluation: Evaluation = Evaluation()


@dataclass(frozen=True)
class Alone(Data):
    """Stage 1: f is fitted, the head stays as it is."""

    transform: str = "identity"
    #: Each is tried; validation chooses. Adam, with the rate lowered to 0 along a cosine.
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    batch_tokens: int = 512
    epochs: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Together(Data):
    """Stage 2: f, from the parameters ``start`` of stage 1, and the head's weight are fitted together."""

    transform: str = "identity"
    start: Mapping[str, Any] = field(default_factory=dict)
    #: Of the head's weight.
    rate: float = 0.0
    #: Of the choice and the order of the tokens.
    seed: int = 0
    #: Whether this run is one that the rate is chosen by. Only these measure the spectrum, which takes long.
    search: bool = True
    transform_rate: float = 0.003
    batch_tokens: int = 512
    fit_tokens: int = 16_384
    valid_tokens: int = 4_096
    #: Validations, at even distances; the weight of the best one is what is tested.
    validations: int = 4


@dataclass(frozen=True)
class Contestant:
    """A transform as it starts. SmolLM2's logits lie within (-45, 45), its largest ones mostly between 5 and 36."""

    label: str
    make: Callable[[], MonotonicTransform]


#: The change of slope of a GSS starts between the mean logit, 3, and the mean of the largest ones, 22. A cap starts so
#: high and wide that its slope is near 1 where most of the logits are: one of 30 would cut the largest logits off
#: before anything is learned. SigmoidCap has slope 1 (4 c = a) at z = -b, amid the logits of the likely words.
TRANSFORMS: dict[str, Contestant] = {
    "identity": Contestant("Identity (as trained)", transforms.Identity),
    "temperature": Contestant("Temperature", transforms.Temperature),
    "plif": Contestant("PLIF, 50 pieces, bound 20", lambda: transforms.PLIF(50, 20.0)),
    "plif_40": Contestant("PLIF, 50 pieces, bound 40", lambda: transforms.PLIF(50, 40.0)),
    "sigsoftmax": Contestant("SigSoftmax (nothing learned)", transforms.SigSoftmax),
    "gss": Contestant("GSS, from k = 1, c = 10", lambda: transforms.GSS(1.0, 10.0)),
    "soft_cap": Contestant("SoftCap, from c = 60", lambda: transforms.SoftCap(60.0, learnable=True)),
    "sigmoid_cap": Contestant(
        "SigmoidCap, from a = 160, b = -15, c = 40",
        lambda: transforms.SigmoidCap(160.0, -15.0, 40.0, learnable=True),
    ),
    "monotonic_mlp": Contestant("MonotonicMLP, 8 units, bound 30", lambda: transforms.MonotonicMLP(8, 30.0)),
    "spline": Contestant(
        "RationalQuadraticSpline, 16 bins, bound 40", lambda: transforms.RationalQuadraticSpline(16, 40.0)
    ),
}
BASELINE, CONTROL = "identity", "temperature"
PLIFS = ("plif", "plif_40")
