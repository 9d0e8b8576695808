"""Log-probability matrices of random factors, with noise and of trained heads, and what is measured on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from ..language_model import training as language_models
from ..synthetic.settings import Training
from ..synthetic.training import Trainer, dirichlet, figures, training_targets
from .settings import HEAD_SEEDS, SEEDS, SHOWN, TOLERANCES, TRANSFORMS, LanguageModelHead, Large, Noise, Random

#: Singular values below this share of the largest are seen by no tolerance, and are not kept.
SMALLEST = 1e-6


def describe(log_p: Tensor, keep_spectrum: bool = False) -> dict[str, Any]:
    """Effective ranks by tolerance, numerical ranks by dtype and, if asked for, the singular values.

    Args:
        log_p: (N, V), float64.
        keep_spectrum: whether to keep the singular values that are not below ``SMALLEST``.
    """
    values = ms.analysis.spectrum(log_p)
    result: dict[str, Any] = {
        "ranks": ranks(values),
        # The same matrix: rounding it to float32 is the least that computing it in float32 would do.
        "press": {"float64": ms.analysis.press_rank(log_p), "float32": ms.analysis.press_rank(log_p.float())},
    }
    if keep_spectrum:
        result["singular_values"] = values[values >= SMALLEST * values[0]].tolist()
    return result


def ranks(singular_values: Tensor) -> dict[str, int]:
    """Effective ranks by tolerance, from all singular values."""
    return {f"{tolerance:g}": ms.analysis.effective_rank(singular_values, tolerance) for tolerance in TOLERANCES}


def centred(log_p: Tensor) -> dict[str, int]:
    """Effective ranks without the mean of each context and of each word: what is left are preferences for words.

    The means may hold nearly all of the squared norm, and have rank 2 at most.
    """
    return ranks(ms.analysis.spectrum(log_p - log_p.mean(1, keepdim=True) - log_p.mean(0) + log_p.mean()))


def random_log_p(settings: Random) -> Tensor:
    """log softmax f(H W^T), in float64. H and W are the same for every f, which has random numbers of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    hidden, weight = (
        torch.randn(rows, settings.dim, generator=generator, dtype=torch.float64)
        for rows in (settings.contexts, settings.words)
    )
    transform = TRANSFORMS[settings.transform](torch.Generator().manual_seed(settings.seed + 1000))
    with torch.no_grad():
        return torch.log_softmax(transform.double()(hidden @ weight.t()), -1)


def random_factors(settings: Random) -> dict[str, Any]:
    """What :func:`describe` finds; with the singular values where they are shown."""
    shown = settings.transform in SHOWN and settings.seed == SEEDS[0]
    return describe(random_log_p(settings), shown)


def large(settings: Large) -> dict[str, Any]:
    """Effective ranks from the leading singular values; the share of the squared norm that these leave out.

    A rank is None where they leave more out than the tolerance: it is more than their number then.
    ``exact.largest_errors`` are the largest relative errors of the first half of the leading values, and of all.
    """
    log_p, leading = random_log_p(settings), settings.leading
    squared_norm = log_p.square().sum().item()
    values = ms.analysis.leading_spectrum(log_p, leading, seed=settings.seed)
    left_out = 1 - values.square().sum().item() / squared_norm
    found: dict[str, int | None] = {
        f"{tolerance:g}": ms.analysis.effective_rank(values, tolerance, squared_norm=squared_norm)
        if left_out <= tolerance
        else None
        for tolerance in TOLERANCES
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
    for dtype in (torch.float64, torch.float32):
        std = settings.c**0.5 / settings.published_rows * (torch.finfo(dtype).eps / torch.finfo(torch.float64).eps)
        matrix = (torch.diag(clean) + std * normal).to(dtype)
        found[str(dtype).removeprefix("torch.")] = {
            "std": std,
            "share_of_squared_norm": ((std * normal).square().sum() / clean.square().sum()).item(),
            "press": ms.analysis.press_rank(matrix),
            "ranks": ranks(ms.analysis.spectrum(matrix)),
        }
    return found


@torch.no_grad()
def synthetic(settings: Training) -> dict[str, Any]:
    """Train a method and describe log Q before and after f; with the singular values for the first seed."""
    cell, keep = settings.cell, settings.seed == HEAD_SEEDS[0]
    probabilities = dirichlet(cell.contexts, cell.words, cell.alpha, settings.seed)
    with torch.enable_grad():
        model = Trainer(settings, training_targets(probabilities)).trained_model()
    after = model.log_prob()
    before = None if model.transform is None else torch.log_softmax(model.logits(), -1)
    found = figures(probabilities, after)
    return {
        "kl": found["kl"],
        "modes": found["modes"],
        "before": None if before is None else describe(before, keep),
        "after": describe(after, keep),
    }


@torch.no_grad()
def language_model(settings: LanguageModelHead) -> dict[str, Any]:
    """Train an LSTM and describe log P of validation contexts before and after f."""
    trained = settings.training
    corpus = language_models.prepared(trained)
    trainer = language_models.Trainer(corpus, trained, settings.steps)
    with torch.enable_grad():
        trainer.train()
    states = trainer.hidden_states(trained.rank_contexts)[0].double()
    layer = copy.deepcopy(trainer.model.output).double()
    after = layer.log_prob(states)
    before = torch.log_softmax(layer.logits(states), -1) if isinstance(layer, ms.MonotonicSoftmax) else None
    return {
        "tokens": settings.steps * trained.batch_size * trained.length,
        "valid_perplexity": trainer.perplexity("valid"),
        "before": None if before is None else {**describe(before, True), "centred": centred(before)},
        "after": {**describe(after, True), "centred": centred(after)},
    }
