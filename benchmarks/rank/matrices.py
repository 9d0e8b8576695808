"""Log-probability matrices of random factors, a matrix with noise, and what is measured on a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from .settings import (
    LARGE_CONTEXTS,
    LARGE_DIM,
    LARGE_EXACT,
    LARGE_LEADING,
    LARGE_WORDS,
    NOISE_C,
    NOISE_PUBLISHED_ROWS,
    NOISE_RANK,
    NOISE_ROWS,
    RANDOM_ROWS,
    RANDOM_TRANSFORMS,
    TOLERANCES,
)


def describe(log_p: Tensor, keep_spectrum: bool = False) -> dict[str, Any]:
    """Effective ranks by tolerance, numerical ranks by dtype and, if asked for, the singular values.

    ``centred`` has the effective ranks without the mean of each context and of each word: what is left are the
    preferences of contexts for words. The means may hold nearly all of the squared norm, and have rank 2 at most.

    Args:
        log_p: (N, V), float64.
        keep_spectrum: whether to keep the singular values.
    """
    values = ms.analysis.spectrum(log_p)
    centred = log_p - log_p.mean(1, keepdim=True) - log_p.mean(0) + log_p.mean()
    result: dict[str, Any] = {
        "ranks": ranks(values),
        "centred": ranks(ms.analysis.spectrum(centred)),
        # The same matrix: rounding it to float32 is the least that computing it in float32 would do.
        "press": {"float64": ms.analysis.press_rank(log_p), "float32": ms.analysis.press_rank(log_p.float())},
    }
    if keep_spectrum:
        result["singular_values"] = values.tolist()
    return result


def ranks(singular_values: Tensor) -> dict[str, int]:
    """Effective ranks by tolerance, from all singular values."""
    return {f"{tolerance:g}": ms.analysis.effective_rank(singular_values, tolerance) for tolerance in TOLERANCES}


def random_log_p(name: str, contexts: int, words: int, dim: int, seed: int) -> Tensor:
    """log softmax f(H W^T) with standard normal H (contexts, dim), W (words, dim), and f of that name, in float64.

    H and W are the same for every f, which has random numbers of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for rows in (contexts, words))
    transform: MonotonicTransform = RANDOM_TRANSFORMS[name](torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        return torch.log_softmax(transform.double()(hidden @ weight.t()), -1)


def random_factors(name: str, dim: int, seed: int, keep_spectrum: bool) -> dict[str, Any]:
    """What :func:`describe` finds for random factors of dimension ``dim``."""
    log_p = random_log_p(name, RANDOM_ROWS, RANDOM_ROWS, dim, seed)
    return {"seed": seed, **describe(log_p, keep_spectrum)}


def large(name: str, seed: int) -> dict[str, Any]:
    """Effective ranks of the larger matrix from its leading singular values; for one f, from all of them, too.

    A rank is None where the leading values leave more out than the tolerance: it is more than their number then.
    """
    log_p = random_log_p(name, LARGE_CONTEXTS, LARGE_WORDS, LARGE_DIM, seed)
    squared_norm = log_p.square().sum().item()
    values = ms.analysis.leading_spectrum(log_p, LARGE_LEADING, seed=seed)
    left_out = 1 - values.square().sum().item() / squared_norm
    result: dict[str, Any] = {
        "seed": seed,
        "ranks": {
            f"{tolerance:g}": ms.analysis.effective_rank(values, tolerance, squared_norm=squared_norm)
            if left_out <= tolerance
            else None
            for tolerance in TOLERANCES
        },
        "left_out": left_out,
        "singular_values": values.tolist(),
    }
    if name == LARGE_EXACT:
        exact = ms.analysis.spectrum(log_p)
        result["exact"] = {
            "ranks": ranks(exact),
            "left_out": 1 - (exact[:LARGE_LEADING].square().sum() / exact.square().sum()).item(),
            "relative_errors": ((exact[:LARGE_LEADING] - values) / exact[:LARGE_LEADING]).tolist(),
        }
    return result


def noise() -> list[dict[str, Any]]:
    """Ranks of diag(1, 1/2, ..., 1/10, 0, ...) with normal noise, by the published c and by dtype.

    The published experiment adds noise of variance c / n^2 to the matrix of singular values with n = 10,000. Press's
    threshold for s_1 = 1 is eps (2 n + 1)^(1/2) / 2, and the largest singular value of the noise 2 n^(1/2) times its
    standard deviation: for the same standard deviation, the same share of the singular values exceeds the threshold
    for every n. For float32 the noise is larger by the ratio of the two eps.

    Source: Parthiban, Mao, Inkpen, AAAI 2021, supplement, algorithm 2 and table 15.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(NOISE_ROWS, NOISE_ROWS, generator=generator, dtype=torch.float64)
    clean = torch.zeros(NOISE_ROWS, dtype=torch.float64)
    clean[:NOISE_RANK] = torch.arange(1, NOISE_RANK + 1).reciprocal()
    eps = torch.finfo(torch.float64).eps
    rows = []
    for c in NOISE_C:
        row: dict[str, Any] = {"c": c}
        for dtype in (torch.float64, torch.float32):
            std = c**0.5 / NOISE_PUBLISHED_ROWS * (torch.finfo(dtype).eps / eps)
            matrix = (torch.diag(clean) + std * normal).to(dtype)
            squares = (std * normal).square().sum() / clean.square().sum()
            row[str(dtype).removeprefix("torch.")] = {
                "std": std,
                "share_of_squared_norm": squares.item(),
                "press": ms.analysis.press_rank(matrix),
                "ranks": ranks(ms.analysis.spectrum(matrix)),
            }
        rows.append(row)
    return rows
