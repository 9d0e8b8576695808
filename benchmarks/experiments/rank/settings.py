"""What is measured: random factors, noise, larger matrices and trained heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from ..language_model.settings import Settings
from ..synthetic.methods import METHODS as SYNTHETIC_METHODS
from ..synthetic.settings import MAIN, Training

#: Shares of the squared spectrum that an effective rank leaves out; as Parthiban et al., AAAI 2021.
TOLERANCES = (1e-3, 1e-4, 1e-5)
SEEDS, HEAD_SEEDS = (0, 1, 2, 3, 4), (0, 1)


@dataclass(frozen=True)
class Random:
    """log softmax f(H W^T) with standard normal H (contexts, dim) and W (words, dim)."""

    transform: str
    contexts: int
    words: int
    dim: int
    seed: int


@dataclass(frozen=True)
class Large(Random):
    """The same, by its ``leading`` singular values, and by all of them, too, if ``exact``."""

    leading: int
    exact: bool


@dataclass(frozen=True)
class Noise:
    """diag(1, 1/2, ..., 1/rank, 0, ...) with normal noise of variance c / published_rows^2."""

    c: float
    rows: int = 1000
    rank: int = 10
    published_rows: int = 10_000


@dataclass(frozen=True)
class LanguageModelHead:
    """The output layer of a language model after so many steps."""

    training: Settings
    steps: int


#: The published initialisation of a PLIF, up to the number of its pieces.
_RANDOM_PLIF = partial(ms.transforms.PLIF, bound=20.0, min_slope=1e-6, init="random", dtype=torch.float64)


def _perturbed(transform: MonotonicTransform, generator: torch.Generator) -> MonotonicTransform:
    """Standard normal noise on every raw parameter of what would start as the identity."""
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return transform


_COMMON = ("linear", "temperature", "plif", "sigsoftmax", "gss")
_LEARNED = ("softcap-learned", "sigmoidcap-learned", "mlp", "spline")
_SAME = (*_COMMON, "gss-published", "softcap", "sigmoidcap", "mlp", "spline")
#: Pieces of the random PLIFs, in the picture of ranks by pieces.
PLIF_PIECES = (10, 20, 50, 200, 1000, 10_000, 100_000)
#: f of the random factors, made from a source of random numbers; everything not called random is at its defaults.
TRANSFORMS = {
    **{name: SYNTHETIC_METHODS[name].transform for name in _SAME},
    "mlp-random": lambda generator: _perturbed(ms.transforms.MonotonicMLP(), generator),
    "spline-random": lambda generator: _perturbed(ms.transforms.RationalQuadraticSpline(), generator),
    **{f"plif-{n}": lambda generator, n=n: _RANDOM_PLIF(n, generator=generator) for n in PLIF_PIECES},
}
#: f whose spectra are shown.
SHOWN = ("linear", "plif-20", "plif-1000", "plif-100000", "sigsoftmax", "softcap", "sigmoidcap")
DIMS, ROWS = (16, 64), 600
_RANDOM = [Random(name, ROWS, ROWS, dim, seed) for dim in DIMS for name in TRANSFORMS for seed in SEEDS]
RANDOM = {f"random-d{each.dim}/{each.transform}/seed{each.seed}": each for each in _RANDOM}

NOISE_C = (1e-16, 1e-20, 1e-21, 1e-22, 1e-23, 1e-24, 1e-25, 1e-26, 1e-28, 1e-32)
NOISE = {f"noise/c{c:g}": Noise(c) for c in NOISE_C}

_LARGE = ("linear", "softcap", "sigmoidcap", "sigsoftmax", "plif-20")
LARGE = {f"large/{f}": Large(f, 3000, 10_000, 64, 0, leading=400, exact=f == "plif-20") for f in _LARGE}

#: The main cell of the synthetic experiment with fewer steps, at one learning rate for all.
CELL, LR = replace(MAIN, steps=600), 0.1
METHODS = (*_COMMON[:3], "plif-frozen", "published-sgd", "published-adam", *_COMMON[3:], *_LEARNED, "mos4")
SYNTHETIC = {f"synthetic/{m}/seed{seed}": Training(CELL, m, seed, LR) for m in METHODS for seed in HEAD_SEEDS}

#: An LSTM, too small and trained too shortly to rank output layers by their perplexity.
_SIZES = {"vocabulary_size": 4000, "dim": 32, "hidden": 64, "layers": 1, "experts": 3, "dropout": 0.1, "lr": 0.003}
_MEASURED = {"validations": 1, "evaluation_tokens": 10_000, "rank_contexts": 800}
SMALL_MODEL = Settings(corpus="wiki", text_style="ptb", **_SIZES, **_MEASURED)
OUTPUTS = (*_COMMON, *_LEARNED, "mos")
LANGUAGE_MODEL = {f"language_model/{f}": LanguageModelHead(replace(SMALL_MODEL, output=f), 400) for f in OUTPUTS}

UNITS = RANDOM | NOISE | SYNTHETIC | LANGUAGE_MODEL | LARGE
