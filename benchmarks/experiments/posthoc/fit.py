"""Fitting f to hidden states: alone, below the head as the model was trained with it; or together with that head."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from .measure import evaluate, spectrum
from .settings import TRANSFORMS, Alone, Together
from .states import HiddenStates, Split

_BETAS = (0.9, 0.99)


def alone(states: HiddenStates, settings: Alone) -> dict[str, Any]:
    """Fit f with each rate, side by side on the same logits; test the one with the lowest validation loss."""
    make = TRANSFORMS[settings.transform].make
    rates = settings.rates if list(make().parameters()) else (0.0,)
    transforms = [make() for _ in rates]
    if any(rates):
        _fit_alone(states, transforms, settings)
    found = evaluate(states.splits["valid"], states.head, transforms, settings.evaluation)
    search = [{"rate": rate, "valid_nll": each["test_nll"]} for rate, each in zip(rates, found, strict=True)]
    best = min(range(len(rates)), key=lambda place: search[place]["valid_nll"])
    return {
        "search": search,
        **search[best],
        "parameters": {name: value.tolist() for name, value in transforms[best].state_dict().items()},
        **_tested(states.splits["test"], states.head, transforms[best], settings),
    }


def _fit_alone(states: HiddenStates, transforms: list[MonotonicTransform], settings: Alone) -> None:
    split, pairs = states.splits["fit"], zip(transforms, settings.rates, strict=True)
    # Only whole batches: those that are left of an epoch are in other places of the next one.
    per_epoch = len(split.target) // settings.batch_tokens
    steps = settings.epochs * per_epoch
    optimizer = torch.optim.Adam([{"params": f.parameters(), "lr": rate} for f, rate in pairs], betas=_BETAS)
    schedule = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for epoch in range(settings.epochs):
        order = _order(len(split.target), settings.seed * 1_000_003 + epoch)
        for rows in order.split(settings.batch_tokens)[:per_epoch]:
            logits, target = split.hidden[rows] @ states.head.T, split.target[rows]
            optimizer.zero_grad()
            for f in transforms:
                ms.cross_entropy(logits, target, f).backward()
            optimizer.step()
            schedule.step()


def together(states: HiddenStates, settings: Together) -> dict[str, Any]:
    """Fit a copy of the head, and f from what stage 1 found; test the best point by validation, the start included."""
    split, valid = states.splits["fit"], states.splits["valid"].subset(settings.valid_tokens)
    transform = with_parameters(TRANSFORMS[settings.transform].make(), settings.start)
    weight = states.head.clone().requires_grad_()
    groups = [
        {"params": [weight], "lr": settings.rate},
        {"params": list(transform.parameters()), "lr": settings.transform_rate},
    ]
    # fused: one pass over the 28 million weights and their two averages.
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)
    steps = settings.fit_tokens // settings.batch_tokens
    # The rates rise over a tenth of the steps, and fall along a line to 0 after that.
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1.0))
    points = {round(steps * (point + 1) / settings.validations) for point in range(settings.validations)}
    best = 0, _loss(valid, weight, transform), states.head, copy.deepcopy(transform)
    batches = _order(len(split.target), settings.seed).split(settings.batch_tokens)[:steps]
    for step, rows in enumerate(batches, start=1):
        optimizer.zero_grad()
        ms.linear_cross_entropy(split.hidden[rows], weight, split.target[rows], transform).backward()
        optimizer.step()
        schedule.step()
        if step in points and (loss := _loss(valid, weight, transform)) < best[1]:
            best = step, loss, weight.detach().clone(), copy.deepcopy(transform)
    step, loss, head, transform = best
    return {"step": step, "valid_nll": loss, **_tested(states.splits["test"], head, transform, settings)}


@torch.no_grad()
def _loss(split: Split, weight: Tensor, transform: MonotonicTransform) -> float:
    losses = ms.linear_cross_entropy(split.hidden, weight.detach(), split.target, transform, reduction="none")
    return losses.double().mean().item()


def _tested(test: Split, head: Tensor, transform: MonotonicTransform, settings: Alone | Together) -> dict[str, Any]:
    (found,) = evaluate(test, head, [transform], settings.evaluation)
    if isinstance(settings, Together) and not settings.search:
        return found
    return found | spectrum(test, head, transform, settings.evaluation.rank_contexts)


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def with_parameters(transform: MonotonicTransform, parameters: Mapping[str, Any]) -> MonotonicTransform:
    """``transform`` with its raw parameters from JSON: the same bit for bit, as JSON keeps float32 whole."""
    transform.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
    return transform
