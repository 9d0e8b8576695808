"""What is measured on log-probability matrices. A unit is one matrix, or one head with its matrices before and after f.

- ``random-d16/F/seed0``: log softmax f(H W^T) with random H and W of that dimension;
- ``noise/c1e-24``: a matrix of known rank with noise, the ``c`` that the published experiment has;
- ``large/F``: a larger random matrix, of which the leading singular values are computed only;
- ``synthetic/METHOD/seed0``: a head that was trained on the main cell of the synthetic experiment; ``kl``, ``modes``;
- ``language_model/OUTPUT``: a head of a small language model, with ``valid_perplexity`` and ``tokens`` of training.

Figures of a matrix: ``ranks``, the effective ranks by tolerance; ``press``, the numerical ranks by dtype; and, where
the report shows them, ``centred``, the ranks without means of rows and columns, and the largest ``singular_values``.
Heads have them as ``before`` (None for mixtures) and ``after`` f. Units that were done before the engine have no
``seconds``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import Experiment, Measured, Results, Unit
from ..language_model import training as language_models
from ..synthetic.settings import Training
from ..synthetic.training import Trainer, figures
from .settings import HEAD_SEEDS, SEEDS, SHOWN, TOLERANCES, TRANSFORMS, UNITS, LanguageModelHead, Large, Noise, Random

#: Singular values below this share of the largest are seen by no tolerance, and are not kept.
SMALLEST = 1e-6


def describe(log_p: Tensor, keep_spectrum: bool = False) -> dict[str, Any]:
    """Effective ranks, numerical ranks and, if asked for, the singular values of log_p (N, V), float64."""
    values = ms.analysis.spectrum(log_p)
    # The same matrix: rounding it to float32 is the least that computing it in float32 would do.
    press = {"float64": ms.analysis.press_rank(log_p), "float32": ms.analysis.press_rank(log_p.float())}
    # For a picture; five digits are more than it shows.
    kept = [float(f"{value:.5g}") for value in values[values >= SMALLEST * values[0]].tolist()]
    return {"ranks": ranks(values), "press": press, **({"singular_values": kept} if keep_spectrum else {})}


def ranks(singular_values: Tensor) -> dict[str, int]:
    """Effective ranks by tolerance, from all singular values."""
    return {f"{tolerance:g}": ms.analysis.effective_rank(singular_values, tolerance) for tolerance in TOLERANCES}


def centred(log_p: Tensor) -> dict[str, int]:
    """Effective ranks without the mean of each context and of each word: what is left are preferences for words.

    The means may hold nearly all of the squared norm, and have rank 2 at most.
    """
    return ranks(ms.analysis.spectrum(log_p - log_p.mean(1, keepdim=True) - log_p.mean(0) + log_p.mean()))


@torch.no_grad()
def random_log_p(settings: Random) -> Tensor:
    """log softmax f(H W^T), in float64. H and W are the same for every f, which has random numbers of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    hidden = torch.randn(settings.contexts, settings.dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(settings.words, settings.dim, generator=generator, dtype=torch.float64)
    transform = TRANSFORMS[settings.transform](torch.Generator().manual_seed(settings.seed + 1000))
    return torch.log_softmax(transform.double()(hidden @ weight.t()), -1)


def large(settings: Large) -> dict[str, Any]:
    """Effective ranks from the leading singular values; the share of the squared norm that these leave out.

    A rank is None where they leave more out than the tolerance: it is more than their number then.
    ``exact.largest_errors`` are the largest relative errors of the first half of the leading values, and of all.
    """
    log_p, leading = random_log_p(settings), settings.leading
    norm = log_p.square().sum().item()
    values = ms.analysis.leading_spectrum(log_p, leading, seed=settings.seed)
    left_out = 1 - values.square().sum().item() / norm
    found = {
        f"{t:g}": None if left_out > t else ms.analysis.effective_rank(values, t, squared_norm=norm) for t in TOLERANCES
    }
    result: dict[str, Any] = {"ranks": found, "left_out": left_out}
    if settings.exact:
        exact = ms.analysis.spectrum(log_p)
        errors = (exact[:leading] - values) / exact[:leading]
        result["exact"] = {
            "ranks": ranks(exact),
            "left_out": 1 - (exact[:leading].square().sum() / exact.square().sum()).item(),
            "largest_errors": [errors[: leading // 2].max().item(), errors.max().item()],
        }
    return result


def noise(settings: Noise) -> dict[str, Any]:
    """Ranks of a matrix with noise by dtype.

    The published experiment adds noise of variance c / n^2 to the matrix of singular values with n = 10,000. Press's
    threshold for s_1 = 1 is eps (2 n + 1)^(1/2) / 2, and the largest singular value of the noise 2 n^(1/2) times its
    standard deviation: for the same standard deviation, the same share of the singular values exceeds the threshold
    for every n. For float32 the noise is larger by the ratio of the two eps.

    Source: Parthiban, Mao, Inkpen, AAAI 2021, supplement, algorithm 2 and table 15.
    """
    normal = torch.randn(settings.rows, settings.rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = torch.zeros(settings.rows, dtype=torch.float64)
    clean[: settings.rank] = torch.arange(1, settings.rank + 1).reciprocal()
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        std = settings.c**0.5 / settings.published_rows * (torch.finfo(dtype).eps / torch.finfo(torch.float64).eps)
        matrix = (torch.diag(clean) + std * normal).to(dtype)
        found[name] = {
            "std": std,
            "share_of_squared_norm": ((std * normal).square().sum() / clean.square().sum()).item(),
            "press": ms.analysis.press_rank(matrix),
            "ranks": ranks(ms.analysis.spectrum(matrix)),
        }
    return found


def synthetic(settings: Training) -> dict[str, Any]:
    """Train a method and describe log Q before and after f; with the singular values for the first seed."""
    trainer, keep = Trainer(settings), settings.seed == HEAD_SEEDS[0]
    trainer.train()
    model = copy.deepcopy(trainer.model).double()
    with torch.no_grad():
        after = model.log_prob()
        before = None if model.transform is None else describe(torch.log_softmax(model.logits(), -1), keep)
        found = figures(trainer.probabilities, after)
    return {"kl": found["kl"], "modes": found["modes"], "before": before, "after": describe(after, keep)}


def language_model(settings: LanguageModelHead) -> dict[str, Any]:
    """Train an LSTM and describe log P of validation contexts before and after f."""
    trained = settings.training
    trainer = language_models.Trainer(language_models.prepared(trained), trained, settings.steps)
    trainer.train()
    with torch.no_grad():
        states = trainer.hidden_states(trained.rank_contexts)[0].double()
        layer = copy.deepcopy(trainer.model.output).double()
        before = torch.log_softmax(layer.logits(states), -1) if isinstance(layer, ms.MonotonicSoftmax) else None
        log_p = {"before": before, "after": layer.log_prob(states)}
        return {
            "tokens": settings.steps * trained.batch_size * trained.length,
            "valid_perplexity": trainer.perplexity("valid"),
            **{k: p if p is None else {**describe(p, True), "centred": centred(p)} for k, p in log_p.items()},
        }


_MEASURES = {
    Random: lambda of: describe(random_log_p(of), keep_spectrum=of.transform in SHOWN and of.seed == SEEDS[0]),
    Large: large,
    Noise: noise,
    Training: synthetic,
    LanguageModelHead: language_model,
}
_QUICK = ("random-d16/plif-20/seed0", "random-d16/sigsoftmax/seed1", "noise/c1e-24", "synthetic/plif/seed0")


class Rank(Experiment):
    """Ranks before and after f."""

    name = "rank"
    title = "effective ranks and spectra of log-probability matrices"

    def units(self, results: Results) -> Iterator[Unit]:
        yield from (Unit(name, settings) for name, settings in UNITS.items())

    def run(self, unit: Unit, checkpoint: Checkpoint) -> Measured:
        return Measured(_MEASURES[type(unit.settings)](unit.settings))

    def to_verify(self, results: Results) -> list[str]:
        return [name for name in _QUICK if name in results]

    def section(self, results: Results, pictures: Path) -> str:
        from .report import section

        return section(self, results, pictures)
