"""Training and evaluation of one language model, in pieces that can be stopped and taken up again to the last bit."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from ..files import replacing
from .budget import Budget
from .corpora import Corpus, CorpusError
from .models import LanguageModel, State, build
from .settings import Settings

#: Share of the training over which the learning rates rise, and the share of them that is left at the end.
_WARM_UP, _LAST = 0.05, 0.05


class Diverged(Exception):
    """The training loss is not finite any more."""


def streams(tokens: Tensor, count: int) -> Tensor:
    """``tokens`` as ``count`` streams of equal length, (count, N). Up to count - 1 words at the end are left out."""
    length = len(tokens) // count
    return tokens[: length * count].reshape(count, length)


def steps_per_epoch(corpus: Corpus, settings: Settings) -> int:
    """How many full stretches of text there are in each stream of the training split.

    Raises:
        CorpusError: there is none.
    """
    steps = (len(corpus.splits["train"].tokens) // settings.batch_size - 1) // settings.length
    if steps < 1:
        raise CorpusError(
            f"the training split has {len(corpus.splits['train'].tokens)} words, too few for one batch of "
            f"{settings.batch_size} streams of {settings.length} words"
        )
    return steps


def build_model(corpus: Corpus, settings: Settings, output: str, seed: int) -> LanguageModel:
    """The model that ``settings`` describe, on their device."""
    return build(
        settings.model,
        output,
        classes=len(corpus.vocabulary),
        dim=settings.dim,
        hidden=settings.hidden,
        layers=settings.layers,
        heads=settings.heads,
        length=settings.length,
        dropout=settings.dropout,
        experts=settings.experts,
        seed=seed,
    ).to(settings.device)


class Trainer:
    """The training of a model with output layer ``output`` from ``seed``.

    Everything that the rest of the training depends on is in :meth:`save` and :meth:`load`: weights, optimiser, random
    numbers, place in the data and the hidden state that is carried there.
    """

    def __init__(self, corpus: Corpus, settings: Settings, output: str, seed: int, budget: Budget) -> None:
        self.corpus, self.settings, self.output, self.seed, self.budget = corpus, settings, output, seed, budget
        self.device = torch.device(settings.device)
        self.model = build_model(corpus, settings, output, seed)
        groups = ms.parameter_groups(self.model, lr=settings.lr, transform_lr=settings.transform_lr)
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._steps_per_epoch = steps_per_epoch(corpus, settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._random = self._random_state()
        self._state: State = None
        self._text: Tensor | None = None
        self._text_epoch = -1
        self.step = 0
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self.evaluation_seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.final: dict[str, float] | None = None
        self._saved: tuple[int, int, bool] | None = None

    @property
    def tokens(self) -> int:
        """Words trained on so far."""
        return self.step * self.settings.batch_size * self.settings.length

    @property
    def progress(self) -> float:
        """The share of the budget that is used up."""
        return self.budget.progress(self.step, self.seconds)

    def train(self, until: float, stop: Callable[[], bool], report: Callable[[int, float], None]) -> None:
        """Train until ``progress`` is at ``until``, or until ``stop()`` after some step.

        Args:
            until: share of the budget.
            stop: asked before every step.
            report: called after every step with the number of words and the loss.

        Raises:
            Diverged: the loss is not finite.
        """
        outside = self._random_state()
        self._restore_random(self._random)
        self.model.train()
        try:
            # With a tolerance, because the end of a round is k / n, and so is ``until``, but maybe rounded differently.
            while self.progress < until - 1e-9 and not stop():
                report(self.settings.batch_size * self.settings.length, self._train_step())
        finally:
            self._random = self._random_state()
            self._restore_random(outside)

    def _train_step(self) -> float:
        started = time.perf_counter()
        words, targets = self._batch()
        rate = self._rate(self.progress)
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * rate
        self.optimizer.zero_grad()
        _, loss, self._state = self.model(words, targets, self._state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        value: float = loss.item()
        self.step += 1
        self.step_seconds.append(time.perf_counter() - started)
        self.seconds += self.step_seconds[-1]
        if not math.isfinite(value):
            raise Diverged(f"{self.output}, seed {self.seed}: the loss of step {self.step} is {value}")
        return value

    def _batch(self) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(self.step, self._steps_per_epoch)
        if place == 0:
            self._state = None
        if epoch != self._text_epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            text = self.corpus.splits["train"].shuffled(generator)
            self._text, self._text_epoch = streams(text, self.settings.batch_size).to(self.device), epoch
        assert self._text is not None
        first = place * self.settings.length
        stretch = self._text[:, first : first + self.settings.length + 1]
        return stretch[:, :-1], stretch[:, 1:]

    @staticmethod
    def _rate(progress: float) -> float:
        if progress < _WARM_UP:
            return (progress + 0.01) / (_WARM_UP + 0.01)
        along = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
        return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * along)) / 2

    @torch.no_grad()
    def perplexity(self, split: str, tokens: int | None = None) -> float:
        """Perplexity on the first ``tokens`` words (all, if None) of a split, with dropout off.

        The words are read as as many streams as a training batch has, in one pass with the hidden state carried along;
        a Transformer sees the words since the start of a stretch only.
        """
        text = streams(self.corpus.splits[split].tokens[:tokens], self.settings.batch_size).to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for log_p in self._stretches(text):
            total += log_p.sum(dtype=torch.float64)
        return math.exp(-total.item() / ((text.shape[1] - 1) * len(text)))

    @torch.no_grad()
    def document_losses(self, split: str, tokens: int | None = None) -> tuple[list[float], list[int]]:
        """Sums of -log p, and numbers of words predicted, of each document of a split, as :meth:`perplexity` reads it.

        The first word of a stream is not predicted, and words at the end that fill no stream are not read; documents
        that lose all of their words are left out.

        Args:
            split: one of ``SPLITS``.
            tokens: as in :meth:`perplexity`.

        Returns:
            Two lists with a number for each document that is left, in the order of the split.
        """
        part = self.corpus.splits[split]
        text = streams(part.tokens[:tokens], self.settings.batch_size)
        losses = -torch.cat(list(self._stretches(text.to(self.device))), 1).double().cpu()
        places = torch.arange(text.numel()).reshape(text.shape)[:, 1:].flatten()
        document = torch.searchsorted(part.starts, places, right=True) - 1
        count = torch.bincount(document)
        total = torch.zeros(len(count), dtype=torch.float64).index_add_(0, document, losses.flatten())
        read = count > 0
        return total[read].tolist(), count[read].tolist()

    @torch.no_grad()
    def _stretches(self, text: Tensor) -> Iterator[Tensor]:
        """log p of the words (B, T) of each stretch of ``text`` (B, N), from its second word on, with dropout off."""
        self.model.eval()
        state, count = None, text.shape[1] - 1
        for first in range(0, count, self.settings.length):
            last = min(first + self.settings.length, count)
            log_p, _, state = self.model(text[:, first:last], text[:, first + 1 : last + 1], state)
            yield log_p

    def validate(self) -> None:
        """Add a point to ``history``."""
        started = time.perf_counter()
        value = self.perplexity("valid", self.settings.evaluation_tokens)
        self.evaluation_seconds += time.perf_counter() - started
        self.history.append({"tokens": self.tokens, "seconds": self.seconds, "valid_perplexity": value})

    def finish(self) -> None:
        """Measure the perplexities of the weights that training ended with."""
        self.final = {split: self.perplexity(split, self.settings.evaluation_tokens) for split in self.corpus.splits}

    @torch.no_grad()
    def hidden_states(self, count: int) -> tuple[Tensor, Tensor]:
        """At least ``count`` hidden states (n, dim) of the validation split, where it has them, and their targets (n,).

        Taken stretch by stretch from all streams, as :meth:`perplexity` reads them.
        """
        self.model.eval()
        text = streams(self.corpus.splits["valid"].tokens, self.settings.batch_size).to(self.device)
        state, states, targets, found = None, [], [], 0
        for first in range(0, text.shape[1] - 1, self.settings.length):
            last = min(first + self.settings.length, text.shape[1] - 1)
            hidden, state = self.model.body(text[:, first:last], state)
            states.append(hidden.flatten(0, 1))
            targets.append(text[:, first + 1 : last + 1].flatten())
            found += len(targets[-1])
            if found >= count:
                break
        return torch.cat(states)[:count], torch.cat(targets)[:count]

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically; nothing where the last one is of the same moment."""
        moment = (self.step, len(self.history), self.final is not None)
        if moment == self._saved:
            return
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random,
            "state": self._state,
            "step": self.step,
            "step_seconds": self.step_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "history": self.history,
            "final": self.final,
        }
        # Through memory: torch.save on a file object wants to seek in it, and a file that is not whole has no name yet.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        with replacing(path) as file:
            file.write(buffer.getbuffer())
        self._saved = moment

    def load(self, path: Path) -> None:
        """Take up the training where the checkpoint left it."""
        content: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self._random = [state.cpu() for state in content["random"]]
        self._state = content["state"]
        self.step, self.step_seconds = content["step"], content["step_seconds"]
        self.seconds = sum(self.step_seconds)
        self.evaluation_seconds = content["evaluation_seconds"]
        self.history, self.final = content["history"], content["final"]
        self._saved = (self.step, len(self.history), self.final is not None)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _restore_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)
