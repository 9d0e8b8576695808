"""Stage 1: the parameters of f are fitted to cached hidden states; the head stays as the model was trained with it.

A step computes the logits of a batch once, which is most of the work, and moves every contestant on them, each with an
optimiser of its own. So contestants see the same tokens in the same order, and what one of them does is the same
whoever runs beside it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

from ..files import replacing
from .settings import Contestant, TransformSettings
from .states import States

#: A contestant's name and its learning rate; 0 where nothing is learned.
Entry = tuple[str, float]


class Diverged(Exception):
    """A loss is not finite."""


class Fit:
    """Contestants with each learning rate, side by side.

    Args:
        states: of which the "fit" split is used.
        contestants: by name.
        settings: how to fit.
    """

    def __init__(self, states: States, contestants: Mapping[str, Contestant], settings: TransformSettings) -> None:
        self.split, self.head, self.settings = states.splits["fit"], states.head, settings
        self.transforms: dict[Entry, MonotonicTransform] = {}
        for name, contestant in contestants.items():
            for rate in settings.rates if contestant.trained() else (0.0,):
                self.transforms[name, rate] = contestant.make()
        self.optimizers = {
            entry: torch.optim.Adam(transform.parameters(), lr=entry[1], betas=(0.9, 0.99))
            for entry, transform in self.transforms.items()
            if entry[1]
        }
        self.steps = settings.epochs * (len(self.split.target) // settings.batch_tokens)
        if not self.steps:
            raise ValueError(f"batch_tokens must be at most the {len(self.split.target)} tokens, got {settings}")
        self.step = 0
        #: Sums over the last quarter of the steps.
        self.late_losses = dict.fromkeys(self.optimizers, 0.0)
        identity = [settings_key(settings), states.digest, [list(entry) for entry in self.transforms]]
        self.key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    @property
    def late(self) -> int:
        """The first step of the last quarter."""
        return self.steps - math.ceil(self.steps / 4)

    def run(
        self,
        checkpoint: Path | None = None,
        deadline: float = math.inf,
        say: Callable[[str], None] = print,
        steps: int | None = None,
    ) -> bool:
        """Take the steps that are left; returns whether all are done.

        Args:
            checkpoint: a file to go on from, and to write every now and then.
            deadline: of ``time.monotonic``; stops then.
            say: told about the progress.
            steps: stop after this one.

        Raises:
            Diverged: a loss is not finite.
        """
        if checkpoint is not None and checkpoint.is_file():
            self._load(checkpoint)
        began, first = time.monotonic(), self.step
        while self.step < min(self.steps, self.steps if steps is None else steps):
            if time.monotonic() > deadline:
                self._save(checkpoint)
                return False
            self._take_step()
            if self.step % self.settings.checkpoint_steps == 0 or self.step == self.steps:
                self._save(checkpoint)
                pace = (time.monotonic() - began) / (self.step - first)
                say(f"f alone: step {self.step} of {self.steps}, {pace:.2f} s each")
        return self.step == self.steps

    def _take_step(self) -> None:
        # Only whole batches: those that are left of an epoch are in other places of the next one.
        per_epoch = self.steps // self.settings.epochs
        epoch, place = divmod(self.step, per_epoch)
        order = order_of(len(self.split.target), self.settings.seed * 1_000_003 + epoch)
        rows = order[place * self.settings.batch_tokens :][: self.settings.batch_tokens]
        with torch.no_grad():
            logits, target = self.split.hidden[rows] @ self.head.T, self.split.target[rows]
        share = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for entry, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = entry[1] * share
            optimizer.zero_grad()
            loss = ms.cross_entropy(logits, target, self.transforms[entry])
            loss.backward()
            optimizer.step()
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(f"{entry[0]} with rate {entry[1]:g}: the loss of step {self.step + 1} is {value}")
            if self.step >= self.late:
                self.late_losses[entry] += value
        self.step += 1

    def late_loss(self, entry: Entry) -> float | None:
        """Mean loss of the last quarter of the steps, on the tokens fitted to; None where nothing is fitted."""
        return self.late_losses[entry] / (self.steps - self.late) if entry in self.late_losses else None

    def _save(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        content = {
            "key": self.key,
            "step": self.step,
            "late_losses": list(self.late_losses.values()),
            "transforms": [transform.state_dict() for transform in self.transforms.values()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()],
        }
        # Through memory: torch.save wants to seek, and a file that is not whole has no name yet.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with replacing(checkpoint) as file:
            file.write(buffer.getbuffer())

    def _load(self, checkpoint: Path) -> None:
        content = torch.load(checkpoint, weights_only=True)
        if content["key"] != self.key:
            raise ValueError(f"{checkpoint} is of other settings, states or contestants; delete it")
        self.step = content["step"]
        self.late_losses = dict(zip(self.late_losses, content["late_losses"], strict=True))
        for transform, state in zip(self.transforms.values(), content["transforms"], strict=True):
            transform.load_state_dict(state)
        for optimizer, state in zip(self.optimizers.values(), content["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def settings_key(settings: TransformSettings) -> dict[str, Any]:
    """What a fit depends on; not how often it is saved."""
    return {name: value for name, value in asdict(settings).items() if name != "checkpoint_steps"}


def order_of(count: int, seed: int) -> Tensor:
    """A random order of the numbers below ``count``."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def parameters_of(transform: MonotonicTransform) -> dict[str, Any]:
    """The state of a transform as JSON values: raw parameters, which :func:`with_parameters` reads."""
    return {name: value.tolist() for name, value in transform.state_dict().items()}


def with_parameters(transform: MonotonicTransform, parameters: Mapping[str, float | Sequence[float]]) -> Any:
    """``transform`` with what :func:`parameters_of` returned: the same bit for bit, as JSON keeps float32 whole."""
    transform.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
    return transform
