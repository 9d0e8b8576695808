"""The settings: what is measured, in units that are done one at a time, and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

RESULTS = Path(__file__).parents[1] / "results" / "rank"

#: Shares of the squared spectrum that an effective rank leaves out; as Parthiban et al., AAAI 2021.
TOLERANCES = (1e-3, 1e-4, 1e-5)
SEEDS = (0, 1, 2, 3, 4)

#: Random factors: N contexts and M words of dimension d, all standard normal.
RANDOM_ROWS, RANDOM_DIMS = 600, (16, 64)
#: The larger matrix, whose leading singular values are computed only; and for which transform all of them, too.
LARGE_CONTEXTS, LARGE_WORDS, LARGE_DIM, LARGE_LEADING, LARGE_EXACT = 3000, 10_000, 64, 400, "plif-20"

#: Noise on a matrix of rank 10, by the c of the published experiment: normal, of variance c / n^2 for n = 10,000.
NOISE_ROWS, NOISE_RANK, NOISE_PUBLISHED_ROWS = 1000, 10, 10_000
NOISE_C = (1e-16, 1e-20, 1e-21, 1e-22, 1e-23, 1e-24, 1e-25, 1e-26, 1e-28, 1e-32)
#: The published Press ranks of 10,000 (supplement, table 15).
NOISE_PUBLISHED = {
    1e-16: 9998, 1e-20: 9899, 1e-21: 9681, 1e-22: 9001, 1e-23: 6869, 1e-24: 1159, 1e-25: 10, 1e-26: 10, 1e-28: 10,
    1e-32: 10,
}  # fmt: skip

#: Trained heads: the main cell of benchmarks.synthetic with fewer steps and seeds, at one learning rate for all.
SYNTHETIC_LR, SYNTHETIC_STEPS, SYNTHETIC_SEEDS = 0.1, 600, (0, 1)
SYNTHETIC_METHODS = (
    "linear",
    "temperature",
    "plif",
    "plif-frozen",
    "published-sgd",
    "published-adam",
    "sigsoftmax",
    "gss",
    "softcap-learned",
    "sigmoidcap-learned",
    "mlp",
    "spline",
    "mos4",
)
#: Language models: an LSTM, too small and trained too shortly to rank output layers by their perplexity.
LANGUAGE_MODEL_OUTPUTS = (
    "linear",
    "temperature",
    "plif",
    "sigsoftmax",
    "gss",
    "softcap-learned",
    "sigmoidcap-learned",
    "mlp",
    "spline",
    "mos",
)
LANGUAGE_MODEL_STEPS, LANGUAGE_MODEL_CONTEXTS, LANGUAGE_MODEL_SEED = 400, 800, 0

_T = ms.transforms
_PUBLISHED_FLOOR = 1e-6


def _random_plif(pieces: int) -> Callable[[torch.Generator], MonotonicTransform]:
    return lambda generator: _T.PLIF(
        pieces, 20.0, min_slope=_PUBLISHED_FLOOR, init="random", generator=generator, dtype=torch.float64
    )


def _perturbed(kind: Callable[[], MonotonicTransform]) -> Callable[[torch.Generator], MonotonicTransform]:
    """Standard normal noise on every raw parameter of what would start as the identity."""

    def make(generator: torch.Generator) -> MonotonicTransform:
        transform = kind()
        with torch.no_grad():
            for parameter in transform.parameters():
                parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return transform

    return make


#: Pieces of the random PLIFs, in the picture of ranks by pieces.
PLIF_PIECES = (10, 20, 50, 200, 1000, 10_000, 100_000)
#: f of the random factors, made from a source of random numbers; everything not called random is at its defaults.
RANDOM_TRANSFORMS: dict[str, Callable[[torch.Generator], MonotonicTransform]] = {
    "linear": lambda _: _T.Identity(),
    "temperature": lambda _: _T.Temperature(),
    "plif": lambda _: _T.PLIF(),
    "sigsoftmax": lambda _: _T.SigSoftmax(),
    "gss": lambda _: _T.GSS(),
    "gss-published": lambda _: _T.GSS(2.5, -1.5, learnable=False),
    "softcap": lambda _: _T.SoftCap(),
    "sigmoidcap": lambda _: _T.SigmoidCap(),
    "mlp": lambda _: _T.MonotonicMLP(),
    "spline": lambda _: _T.RationalQuadraticSpline(),
    "mlp-random": _perturbed(_T.MonotonicMLP),
    "spline-random": _perturbed(_T.RationalQuadraticSpline),
    **{f"plif-{pieces}": _random_plif(pieces) for pieces in PLIF_PIECES},
}
LARGE_TRANSFORMS = ("linear", "softcap", "sigmoidcap", "sigsoftmax", "plif-20")

#: What the pilot found for d = 16 and one draw of the factors (reference/method.md, 2d), at the three tolerances.
PILOT = {
    "linear": (17, 17, 17),
    "plif-100000": (17, 17, 17),
    "plif-1000": (17, 17, 236),
    "plif-20": (149, 337, 466),
    "sigsoftmax": (81, 169, 363),
    "softcap": (17, 17, 46),
    "sigmoidcap": (17, 123, 257),
}

GROUPS = (*(f"random-d{dim}" for dim in RANDOM_DIMS), "noise", "large", "synthetic", "language_model")


@dataclass(frozen=True)
class Unit:
    """What one file of results holds: one transform, method or output layer of a group; for noise the one file."""

    group: str
    name: str

    def __str__(self) -> str:
        return f"{self.group}/{self.name}"


def units() -> list[Unit]:
    """All units, the quick ones first."""
    return [
        *(Unit(f"random-d{dim}", name) for dim in RANDOM_DIMS for name in RANDOM_TRANSFORMS),
        Unit("noise", "noise"),
        *(Unit("synthetic", name) for name in SYNTHETIC_METHODS),
        *(Unit("language_model", name) for name in LANGUAGE_MODEL_OUTPUTS),
        *(Unit("large", name) for name in LARGE_TRANSFORMS),
    ]


#: What --verify does once more.
VERIFIED = (
    Unit("random-d16", "plif-20"),
    Unit("random-d16", "sigsoftmax"),
    Unit("noise", "noise"),
    Unit("synthetic", "plif"),
)


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    action: str
    units: list[Unit]
    folder: Path
    threads: int


def parse(arguments: Sequence[str] | None = None) -> Command:
    """The command that ``arguments`` (by default those of the process) are. Exits with code 2 on a mistake in them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rank",
        description="Effective ranks and spectra of log-probability matrices, before and after f. Without an action it "
        "measures what is missing; several processes may do so at once.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--groups", metavar="GROUP,...", help=f"only these, of {', '.join(GROUPS)}")
    add("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results/rank)")
    add("--threads", type=int, default=1, help="of torch; figures are the same for the same number of threads")
    actions = parser.add_mutually_exclusive_group()
    for name, text in (
        ("list", "what there is and what is missing"),
        ("report", "write report.md and its pictures from the results"),
        ("verify", f"measure {', '.join(map(str, VERIFIED))} once more, and compare with the results"),
    ):
        actions.add_argument(f"--{name}", dest="action", action="store_const", const=name, default="run", help=text)
    given = parser.parse_args(arguments)
    if given.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {given.threads}")
    wanted = set(GROUPS) if given.groups is None else set(given.groups.split(","))
    if wanted - set(GROUPS):
        parser.error(f"argument --groups: must be of {', '.join(GROUPS)}, got {min(wanted - set(GROUPS))!r}")
    return Command(given.action, [unit for unit in units() if unit.group in wanted], given.out, given.threads)
