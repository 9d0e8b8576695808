"""The settings of the units, and the contestants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

#: Shares of the squared spectrum that an effective rank leaves out.
TOLERANCES = (1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class States:
    """Which hidden states there are. Token counts are of both corpora together; each gives half."""

    corpora: tuple[str, ...] = ("wiki", "sotu")
    #: Most tokens of a document. Of a longer one, an excerpt that starts at the first line end after the middle.
    length: int = 256
    fit_tokens: int = 40_000
    valid_tokens: int = 10_000
    test_tokens: int = 30_000
    #: Hidden states are written in blocks of about as many tokens, so that an interrupted run goes on.
    block_tokens: int = 4_096

    def tokens(self, split: str) -> int:
        """Least number of tokens of ``split``, ``"fit"``, ``"valid"`` or ``"test"``."""
        return int(getattr(self, f"{split}_tokens"))


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the test split."""

    bins: int = 15
    rank_contexts: int = 1_000
    histogram_contexts: int = 1_000
    histogram_bins: int = 120
    histogram_range: tuple[float, float] = (-45.0, 45.0)
    chunk_tokens: int = 1_024


@dataclass(frozen=True)
class Alone:
    """Stage 1: f is fitted, the head stays as it is."""

    #: Each transform is fitted with each rate; validation chooses. Adam, with the rate lowered to 0 along a cosine.
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    batch_tokens: int = 512
    epochs: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Together:
    """Stage 2: f and the head's weight are fitted together."""

    #: Of f, which starts as stage 1 left it.
    transform_rate: float = 0.003
    batch_tokens: int = 512
    fit_tokens: int = 16_384
    valid_tokens: int = 4_096
    #: Validations, at even distances; the weight of the best one is what is tested.
    validations: int = 4


@dataclass(frozen=True)
class Study:
    """Everything that there is to choose.

    Attributes:
        head_rates: of the head's weight. At 1e-3, tried first, the validation loss only rises.
        seeds: of the order of the tokens in stage 2. The rates are compared under the first one.
    """

    states: States = States()
    evaluation: Evaluation = Evaluation()
    alone: Alone = Alone()
    together: Together = Together()
    head_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class StatesUnit:
    """Hidden states, and the logits of the trained head above them."""

    states: States
    evaluation: Evaluation


@dataclass(frozen=True)
class AloneUnit:
    """A transform that is fitted alone."""

    transform: str
    states: States
    evaluation: Evaluation
    alone: Alone


@dataclass(frozen=True)
class TogetherUnit:
    """A transform that is fitted with the head.

    Attributes:
        start: the parameters that stage 1 found.
        rate: of the head's weight.
        seed: of the choice and the order of the tokens.
        spectrum: whether it is measured: it takes a third of the time of a test, and differs little between seeds.
    """

    transform: str
    start: Mapping[str, Any]
    rate: float
    seed: int
    spectrum: bool
    states: States
    evaluation: Evaluation
    together: Together


@dataclass(frozen=True)
class Contestant:
    """A transform as it starts. SmolLM2's logits lie within (-45, 45), its largest ones mostly between 5 and 36."""

    label: str
    make: Callable[[], MonotonicTransform]

    def learned(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.make().parameters())


#: The change of slope of a GSS starts between the mean logit, 3, and the mean of the largest ones, 22. A cap starts so
#: high and wide that its slope is near 1 where most of the logits are: one of 30 would cut the largest logits off
#: before anything is learned.
TRANSFORMS: dict[str, Contestant] = {
    "identity": Contestant("Identity (as trained)", ms.transforms.Identity),
    "temperature": Contestant("Temperature", ms.transforms.Temperature),
    "plif": Contestant("PLIF, 50 pieces, bound 20", lambda: ms.transforms.PLIF(50, 20.0)),
    "plif_40": Contestant("PLIF, 50 pieces, bound 40", lambda: ms.transforms.PLIF(50, 40.0)),
    "sigsoftmax": Contestant("SigSoftmax (nothing learned)", ms.transforms.SigSoftmax),
    "gss": Contestant("GSS, from k = 1, c = 10", lambda: ms.transforms.GSS(1.0, 10.0)),
    "soft_cap": Contestant("SoftCap, from c = 60", lambda: ms.transforms.SoftCap(60.0, learnable=True)),
    # 4 c = a: slope 1 at z = -b, which is in the middle of the logits of the likely words.
    "sigmoid_cap": Contestant(
        "SigmoidCap, from a = 160, b = -15, c = 40",
        lambda: ms.transforms.SigmoidCap(160.0, -15.0, 40.0, learnable=True),
    ),
    "monotonic_mlp": Contestant("MonotonicMLP, 8 units, bound 30", lambda: ms.transforms.MonotonicMLP(8, 30.0)),
    "spline": Contestant(
        "RationalQuadraticSpline, 16 bins, bound 40", lambda: ms.transforms.RationalQuadraticSpline(16, 40.0)
    ),
}
BASELINE, CONTROL = "identity", "temperature"
PLIFS = ("plif", "plif_40")
