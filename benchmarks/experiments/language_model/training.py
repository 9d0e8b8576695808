"""Training and evaluation of one language model, which can be stopped and taken up again to the last bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import ExperimentError
from .corpora import Corpus, CorpusError, Split, load
from .models import State, build
from .settings import Settings

#: Share of the training over which the learning rates rise, and the share of them that is left at the end.
_WARM_UP, _LAST = 0.05, 0.05


class Diverged(ExperimentError):
    """The training loss is not finite any more."""


def prepared(settings: Settings) -> Corpus:
    """The corpus that ``settings`` ask for."""
    return load(settings.corpus, settings.text_style, settings.vocabulary_size, settings.min_count)


def streams(tokens: Tensor, count: int) -> Tensor:
    """``tokens`` as ``count`` streams of equal length, (count, N). Up to count - 1 words at the end are left out."""
    length = len(tokens) // count
    return tokens[: length * count].reshape(count, length)


def document_of_words(part: Split, batch_size: int, tokens: int | None) -> Tensor:
    """The document of each word that is predicted: all but the first word of a stream, stream by stream."""
    places = streams(torch.arange(len(part.tokens[:tokens])), batch_size)[:, 1:].flatten()
    return torch.searchsorted(part.starts, places, right=True) - 1


def document_tokens(part: Split, batch_size: int, tokens: int | None = None) -> list[int]:
    """How many words of each document are predicted; documents of which no word is are left out."""
    count = torch.bincount(document_of_words(part, batch_size, tokens))
    found: list[int] = count[count > 0].tolist()
    return found


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


class Trainer:
    """The training of the model of ``settings`` on ``corpus``.

    Everything that the rest of the training depends on is in :meth:`state`: weights, optimiser, random numbers, place
    in the data and the hidden state that is carried there.

    Attributes:
        model: what is trained.
        steps: of the whole training: as ``settings.epochs`` says, if not given.
        step: how many of them are done.
        step_seconds: what each of them took.
    """

    def __init__(self, corpus: Corpus, settings: Settings, steps: int | None = None) -> None:
        self.corpus, self.settings = corpus, settings
        self.device = torch.device(settings.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ExperimentError(f"the settings ask for device {settings.device}, but torch sees no CUDA device here")
        self.model = build(settings, len(corpus.vocabulary)).to(self.device)
        groups = ms.parameter_groups(self.model, lr=settings.lr, transform_lr=settings.transform_lr)
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._steps_per_epoch = steps_per_epoch(corpus, settings)
        self.steps = steps or max(1, round(settings.epochs * self._steps_per_epoch))
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self._random = self._random_state()
        self._state: State = None
        self._text: Tensor | None = None
        self._text_epoch = -1
        self.step = 0
        self.step_seconds: list[float] = []

    def round_end(self, number: int) -> int:
        """The step that round ``number`` ends at; they are ``settings.validations`` rounds, counted from 1."""
        return -(-self.steps * number // self.settings.validations)

    def train(
        self,
        until: int | None = None,
        checkpoint: Checkpoint | None = None,
        report: Callable[[int], None] = lambda words: None,
    ) -> None:
        """Train until step ``until``, to the end by default.

        Args:
            until: a step.
            checkpoint: the training is taken up where it has a state, and kept there every minute.
            report: called after every step with the number of its words.

        Raises:
            Diverged: the loss is not finite.
        """
        if checkpoint is not None and (kept := checkpoint.load()) is not None:
            self.restore(kept)
        outside = self._random_state()
        self._restore_random(self._random)
        self.model.train()
        try:
            while self.step < (until or self.steps):
                self._train_step()
                report(self.settings.batch_size * self.settings.length)
                if checkpoint is not None and checkpoint.due():
                    self._random = self._random_state()
                    checkpoint.save(self.state())
        finally:
            self._random = self._random_state()
            self._restore_random(outside)

    def _train_step(self) -> None:
        started = time.perf_counter()
        words, targets = self._batch()
        rate = self._rate(self._progress())
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
        if not math.isfinite(value):
            raise Diverged(
                f"{self.settings.output}, seed {self.settings.seed}: the loss of step {self.step} is {value}"
            )

    def _batch(self) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(self.step, self._steps_per_epoch)
        if place == 0:
            self._state = None
        if epoch != self._text_epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            text = self.corpus.splits["train"].shuffled(generator)
            self._text, self._text_epoch = streams(text, self.settings.batch_size).to(self.device), epoch
        assert self._text is not None
        first = place * self.settings.length
        stretch = self._text[:, first : first + self.settings.length + 1]
        return stretch[:, :-1], stretch[:, 1:]

    def _progress(self) -> float:
        """The share of the training that is done. Rounds count the same where they differ by a step."""
        rounds = self.settings.validations
        done = next(number for number in range(rounds) if self.step < self.round_end(number + 1))
        begin, end = self.round_end(done), self.round_end(done + 1)
        return (done + (self.step - begin) / (end - begin)) / rounds

    @staticmethod
    def _rate(progress: float) -> float:
        if progress < _WARM_UP:
            return (progress + 0.01) / (_WARM_UP + 0.01)
        along = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
        return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * along)) / 2

    @torch.no_grad()
    def perplexity(self, split: str) -> float:
        """Perplexity on ``settings.evaluation_tokens`` words of a split, with dropout off.

        The words are read as as many streams as a training batch has, in one pass with the hidden state carried along;
        a Transformer sees the words since the start of a stretch only.
        """
        text = self._evaluated(split)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for log_p in self._stretches(text.to(self.device)):
            total += log_p.sum(dtype=torch.float64)
        return math.exp(-total.item() / ((text.shape[1] - 1) * len(text)))

    @torch.no_grad()
    def document_losses(self, split: str) -> list[float]:
        """Sums of -log p of each document of a split, as :meth:`perplexity` reads it; see :func:`document_tokens`."""
        text = self._evaluated(split)
        losses = -torch.cat(list(self._stretches(text.to(self.device))), 1).double().cpu()
        settings, part = self.settings, self.corpus.splits[split]
        document = document_of_words(part, settings.batch_size, settings.evaluation_tokens)
        total = torch.zeros(len(part.starts), dtype=torch.float64).index_add_(0, document, losses.flatten())
        found: list[float] = total[document.unique()].tolist()
        return found

    def _evaluated(self, split: str) -> Tensor:
        return streams(self.corpus.splits[split].tokens[: self.settings.evaluation_tokens], self.settings.batch_size)

    @torch.no_grad()
    def _stretches(self, text: Tensor) -> Iterator[Tensor]:
        """log p of the words (B, T) of each stretch of ``text`` (B, N), from its second word on, with dropout off."""
        self.model.eval()
        state, count = None, text.shape[1] - 1
        for first in range(0, count, self.settings.length):
            last = min(first + self.settings.length, count)
            log_p, _, state = self.model(text[:, first:last], text[:, first + 1 : last + 1], state)
            yield log_p

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

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` takes up."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random,
            "state": self._state,
            "step": self.step,
            "step_seconds": self.step_seconds,
        }

    def restore(self, kept: dict[str, Any]) -> None:
        """Take up the training where ``kept`` left it."""
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self._random = kept["random"]
        carried = kept["state"]
        self._state = carried and [(h.to(self.device), c.to(self.device)) for h, c in carried]
        self.step, self.step_seconds = kept["step"], kept["step_seconds"]

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _restore_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)
