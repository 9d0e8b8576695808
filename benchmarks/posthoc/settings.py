"""The settings of the runs, the contestants, and the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from ..language_model.corpora import cache_folder

RESULTS = Path(__file__).parents[1] / "results" / "posthoc"
STAGES = ("states", "transforms", "head")
TOLERANCES = (1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class StatesSettings:
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
class TransformSettings:
    """Stage 1: f is fitted, the head stays as it is."""

    #: Each transform is fitted with each rate; validation chooses. Adam, with the rate lowered to 0 along a cosine.
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    batch_tokens: int = 512
    epochs: int = 2
    seed: int = 0
    checkpoint_steps: int = 20


@dataclass(frozen=True)
class HeadSettings:
    """Stage 2: f and the head's weight are fitted together."""

    #: At 1e-3, tried first, the validation loss only rises.
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    #: Of f, which starts as stage 1 left it.
    transform_rate: float = 0.003
    batch_tokens: int = 512
    fit_tokens: int = 16_384
    valid_tokens: int = 4_096
    #: Validations, at even distances; the weight of the best one is what is tested.
    validations: int = 4
    #: Of the order of the data. The rates are compared under the first one.
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured on the test split."""

    bins: int = 15
    rank_contexts: int = 1_000
    histogram_contexts: int = 1_000
    histogram_bins: int = 120
    histogram_range: tuple[float, float] = (-45.0, 45.0)
    chunk_tokens: int = 1_024


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on, except for versions and the machine."""

    states: StatesSettings = StatesSettings()
    transforms: TransformSettings = TransformSettings()
    head: HeadSettings = HeadSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    threads: int = 1

    def to_json(self, *parts: str) -> dict[str, Any]:
        """The settings, or some parts of them, as JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items() if not parts or name in parts}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Contestant:
    """A transform as it starts. SmolLM2's logits lie within (-45, 45), its largest ones mostly between 5 and 36."""

    label: str
    make: Callable[[], MonotonicTransform]

    def trained(self) -> bool:
        """Whether there is anything to fit."""
        return any(True for _ in self.make().parameters())


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Exit with code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = _Parser(
        prog="python -m benchmarks.posthoc",
        description="Put transforms on the head of a trained language model, SmolLM2-135M: fit f alone, then f and the "
        "head together, on hidden states of real text. Goes on where an earlier call stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", choices=STAGES, help="one stage: hidden states, f alone, or f and the head (default: all in turn)")
    add("--limit-minutes", type=_minutes, help="start nothing more after as many minutes")
    add("--report", action="store_true", help="write report.md and the plots from the JSON, and run nothing")
    add("--verify", action="store_true", help="repeat a small part of what is stored; exit code 1 if it differs")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON is (%(default)s)")
    found = parser.parse_args(arguments)
    if found.report and found.verify:
        parser.error("--report and --verify are two calls")
    if (found.report or found.verify) and (found.only or found.limit_minutes is not None):
        parser.error("--only and --limit-minutes go with neither --report nor --verify")
    return found


def states_folder() -> Path:
    """Where hidden states are kept."""
    return cache_folder() / "posthoc"


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value
