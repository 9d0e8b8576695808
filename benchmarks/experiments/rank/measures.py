"""Log-probability matrices of random factors, with noise and of trained heads, and what is measured on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from ..language_model import training as language_models
from ..synthetic.settings import Training
from ..synthetic.training import Trainer, figures
from .settings import HEAD_SEEDS, SEEDS, SHOWN, TOLERANCES, TRANSFORMS, LanguageModelHead, Large, Noise, Random

#: Singular values below this share of the largest are seen by no tolerance, and are not kept.
SMALLEST = 1e-6


def describe(log_p: Tensor, keep_spectrum: bool = False) -> dict[str, Any]:
    """Effective ranks, numerical ranks and, if asked for, the singular values of log_p (N, V), float64."""
    values = ms.analysis.spectrum(log_p)
    # The same matrix: rounding it to float32 is the least that computing it in float32 would do.
    press = {"float64": ms.analysis.press_rank(log_p), "float32": ms.analysis.press_rank(log_p.float())}
    kept = {"singular_values": values[values >= SMALLEST * values[0]].tolist()} if keep_spectrum else {}
    return {"ranks": ranks(values), "press": press, **kept}


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


def random_factors(settings: Random) -> dict[str, Any]:
    """What :func:`describe` finds; with the singular values where they are shown."""
    return describe(random_log_p(settings), settings.transform in SHOWN and settings.seed == SEEDS[0])


def large(settings: Large) -> dict[str, Any]:
    """Effective ranks from the leading singular values; the share of the squared norm that these leave out.

    A rank is None where they leave more out than the tolerance: it is more than their number then.
    ``exact.largest_errors`` are the largest relative errors of the first half of the leading values, and of all.
    """
    log_p, leading = random_log_p(settings), settings.leading
    norm = log_p.square().sum().item()
    values = ms.analysis.leading_spectrum(log_p, leading, seed=settings.seed)
    left_out = 1 - values.square().sum().item() / norm
    found: dict[str, int | None] = {f"{tolerance:g}": None for tolerance in TOLERANCES}
    for tolerance in TOLERANCES:
        if left_out <= tolerance:
            found[f"{tolerance:g}"] = ms.analysis.effective_rank(values, tolerance, squared_norm=norm)
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
        log_p = {"before": None, "after": layer.log_prob(states)}
        if isinstance(layer, ms.MonotonicSoftmax):
            log_p["before"] = torch.log_softmax(layer.logits(states), -1)
        return {
            "tokens": settings.steps * trained.batch_size * trained.length,
            "valid_perplexity": trainer.perplexity("valid"),
            **{k: p if p is None else {**describe(p, True), "centred": centred(p)} for k, p in log_p.items()},
        }
