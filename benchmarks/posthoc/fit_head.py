"""Stage 2: f and the head's weight are fitted together, from what the model and stage 1 have; the rest stays."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from .calibration import evaluate, nll, spectra, subset
from .fit_transforms import Diverged, order_of, parameters_of
from .settings import EvaluationSettings, HeadSettings
from .states import States

#: Share of the steps over which the rates rise; they fall along a line to 0 after that.
_WARM_UP = 0.1


@dataclass(frozen=True)
class Fitted:
    """The best weight and f of a run, by validation, and the path to them."""

    weight: Tensor
    transform: MonotonicTransform
    #: Step and validation loss, from the start on.
    history: list[dict[str, float]]
    step: int
    seconds: float

    @property
    def valid_nll(self) -> float:
        return min(point["valid_nll"] for point in self.history)


def fit(states: States, transform: MonotonicTransform, rate: float, seed: int, settings: HeadSettings) -> Fitted:
    """Fit a copy of the head, and f, with Adam; keep what is best on validation.

    Args:
        states: hidden states and head.
        transform: f as it starts; it is changed.
        rate: of the weight; f has ``settings.transform_rate``, with the same warm-up and fall.
        seed: of the choice and the order of the tokens to fit to.
        settings: how to fit.

    Raises:
        Diverged: a loss is not finite.
        ValueError: there are fewer tokens than ``settings`` asks for.
    """
    split, valid = states.splits["fit"], subset(states.splits["valid"], settings.valid_tokens)
    if settings.fit_tokens > len(split.target):
        raise ValueError(f"fit_tokens must be at most the {len(split.target)} there are, got {settings.fit_tokens}")
    weight = states.head.clone().requires_grad_()
    # fused: one pass over the 28 million weights and their two averages.
    optimizer = torch.optim.Adam([{"params": [weight], "lr": rate}], betas=(0.9, 0.99), fused=True)
    rates = [rate]
    if list(transform.parameters()):
        optimizer.add_param_group({"params": list(transform.parameters()), "lr": settings.transform_rate})
        rates.append(settings.transform_rate)
    order = order_of(len(split.target), seed)[: settings.fit_tokens]
    steps = settings.fit_tokens // settings.batch_tokens
    points = {round(steps * (point + 1) / settings.validations) for point in range(settings.validations)}
    history = [{"step": 0, "valid_nll": _valid(valid, weight, transform)}]
    best = (weight.detach().clone(), parameters(transform), 0)
    began = time.monotonic()
    for step in range(steps):
        share = min((step + 1) / (_WARM_UP * steps), (steps - step) / ((1 - _WARM_UP) * steps), 1.0)
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * share
        rows = order[step * settings.batch_tokens :][: settings.batch_tokens]
        optimizer.zero_grad()
        loss = ms.linear_cross_entropy(split.hidden[rows], weight, split.target[rows], transform)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise Diverged(f"{type(transform).__name__} with rate {rate:g}: the loss of step {step + 1} is {loss}")
        if step + 1 in points:
            value = _valid(valid, weight, transform)
            if value < min(point["valid_nll"] for point in history):
                best = (weight.detach().clone(), parameters(transform), step + 1)
            history.append({"step": step + 1, "valid_nll": value})
    transform.load_state_dict(best[1])
    return Fitted(best[0], transform, history, best[2], time.monotonic() - began)


def parameters(transform: MonotonicTransform) -> dict[str, Tensor]:
    """A copy of the state of ``transform``."""
    return {name: value.clone() for name, value in transform.state_dict().items()}


@torch.no_grad()
def _valid(valid: Any, weight: Tensor, transform: MonotonicTransform) -> float:
    loss = ms.linear_cross_entropy(valid.hidden, weight.detach(), valid.target, transform, reduction="none")
    return loss.double().mean().item()


def measure(states: States, fitted: Fitted, settings: EvaluationSettings, spectrum: bool) -> dict[str, Any]:
    """What a result holds of a run: path, f, and the test figures of the best point; the spectrum where asked for."""
    test, head = states.splits["test"], fitted.weight
    only = {"f": fitted.transform}
    figures = evaluate(test, head, only, settings)["f"]
    return {
        "history": fitted.history,
        "step": fitted.step,
        "valid_nll": fitted.valid_nll,
        "parameters": parameters_of(fitted.transform),
        "weight_change": ((head - states.head).norm() / states.head.norm()).item(),
        "seconds": fitted.seconds,
        "test": {
            "nll": nll(figures["document_nll"], test.counts()),
            **figures,
            **(spectra(test, head, only, settings.rank_contexts)["f"] if spectrum else {}),
        },
    }
