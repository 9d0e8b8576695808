"""Fitting f to hidden states: alone, below the head as the model was trained with it; or together with that head."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from .measure import evaluate, spectrum
from .settings import TRANSFORMS, Alone, Together
from .states import HiddenStates, Split

#: Share of the steps over which the rates of stage 2 rise; they fall along a line to 0 after that.
_WARM_UP = 0.1
_BETAS = (0.9, 0.99)


def alone(states: HiddenStates, settings: Alone) -> dict[str, Any]:
    """Fit f with each rate, side by side on the same logits; test the one with the lowest validation loss."""
    contestant = TRANSFORMS[settings.transform]
    rates = settings.rates if contestant.learned() else (0.0,)
    transforms = [contestant.make() for _ in rates]
    if contestant.learned():
        _fit_alone(states, transforms, settings)
    valid = evaluate(states.splits["valid"], states.head, transforms, settings.evaluation)
    losses = [figures["nll"] for figures in valid]
    best = losses.index(min(losses))
    return {
        "search": [{"rate": rate, "valid_nll": loss} for rate, loss in zip(rates, losses, strict=True)],
        "rate": rates[best],
        "valid_nll": losses[best],
        "parameters": parameters_of(transforms[best]),
        **_tested(states.splits["test"], states.head, transforms[best], settings),
    }


def _fit_alone(states: HiddenStates, transforms: list[MonotonicTransform], settings: Alone) -> None:
    split, rates = states.splits["fit"], settings.rates
    pairs = zip(transforms, rates, strict=True)
    optimizers = [torch.optim.Adam(transform.parameters(), lr=rate, betas=_BETAS) for transform, rate in pairs]
    # Only whole batches: those that are left of an epoch are in other places of the next one.
    per_epoch = len(split.target) // settings.batch_tokens
    steps = settings.epochs * per_epoch
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = _order(len(split.target), settings.seed * 1_000_003 + epoch)
        rows = order[place * settings.batch_tokens :][: settings.batch_tokens]
        with torch.no_grad():
            logits, target = split.hidden[rows] @ states.head.T, split.target[rows]
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
        for transform, optimizer, rate in zip(transforms, optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad()
            ms.cross_entropy(logits, target, transform).backward()
            optimizer.step()


def together(states: HiddenStates, settings: Together) -> dict[str, Any]:
    """Fit a copy of the head, and f from what stage 1 found; test the best point by validation, the start included."""
    split, batch = states.splits["fit"], settings.batch_tokens
    valid = states.splits["valid"].subset(settings.valid_tokens)
    transform = with_parameters(TRANSFORMS[settings.transform].make(), settings.start)
    weight = states.head.clone().requires_grad_()
    # fused: one pass over the 28 million weights and their two averages.
    optimizer = torch.optim.Adam([{"params": [weight], "lr": settings.rate}], betas=_BETAS, fused=True)
    if list(transform.parameters()):
        optimizer.add_param_group({"params": list(transform.parameters()), "lr": settings.transform_rate})
    peaks = [group["lr"] for group in optimizer.param_groups]
    order = _order(len(split.target), settings.seed)
    steps = settings.fit_tokens // batch
    points = {round(steps * (point + 1) / settings.validations) for point in range(settings.validations)}
    best = 0, _loss(valid, weight, transform), states.head, copy.deepcopy(transform)
    for step in range(steps):
        share = min((step + 1) / (_WARM_UP * steps), (steps - step) / ((1 - _WARM_UP) * steps), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        rows = order[step * batch : (step + 1) * batch]
        optimizer.zero_grad()
        ms.linear_cross_entropy(split.hidden[rows], weight, split.target[rows], transform).backward()
        optimizer.step()
        if step + 1 in points and (loss := _loss(valid, weight, transform)) < best[1]:
            best = step + 1, loss, weight.detach().clone(), copy.deepcopy(transform)
    step, loss, head, transform = best
    return {"step": step, "valid_nll": loss, **_tested(states.splits["test"], head, transform, settings)}


@torch.no_grad()
def _loss(split: Split, weight: Tensor, transform: MonotonicTransform) -> float:
    losses = ms.linear_cross_entropy(split.hidden, weight.detach(), split.target, transform, reduction="none")
    return losses.double().mean().item()


def _tested(test: Split, head: Tensor, transform: MonotonicTransform, settings: Alone | Together) -> dict[str, Any]:
    (figures,) = evaluate(test, head, [transform], settings.evaluation)
    found = {"test_nll": figures["nll"], "document_nll": figures["document_nll"], "bins": figures["bins"]}
    if isinstance(settings, Together) and not settings.search:
        return found
    return found | spectrum(test, head, transform, settings.evaluation.rank_contexts)


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def parameters_of(transform: MonotonicTransform) -> dict[str, Any]:
    """The state of a transform as JSON values: raw parameters, which :func:`with_parameters` reads."""
    return {name: value.tolist() for name, value in transform.state_dict().items()}


def with_parameters(transform: MonotonicTransform, parameters: Mapping[str, Any]) -> MonotonicTransform:
    """``transform`` with what :func:`parameters_of` returned: the same bit for bit, as JSON keeps float32 whole."""
    transform.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
    return transform
