"""Training and evaluation of one language model, which can be stopped and taken up again to the last bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

from ...engine.checkpoint import Checkpoint
from ...engine.experiment import ExperimentError
from .corpora import Corpus, Split, load
from .models import LanguageModel
from .settings import Settings

#: Share of the training over which the learning rates rise, and the share of them that is left at the end.
_WARM_UP, _LAST = 0.05, 0.05


class Diverged(ExperimentError):
    """The training loss is not finite any more."""


def prepared(settings: Any) -> Corpus:
    """The corpus that ``settings`` ask for."""
    return load(settings.corpus, settings.text_style, settings.vocabulary_size, settings.min_count)


def streams(tokens: Tensor, count: int) -> Tensor:
    """``tokens`` as ``count`` streams of equal length, (count, N). Up to count - 1 words at the end are left out."""
    length = len(tokens) // count
    return tokens[: length * count].reshape(count, length)


def document_of_words(part: Split, settings: Any) -> Tensor:
    """The document of each word that is predicted: all but the first word of a stream, stream by stream."""
    places = streams(torch.arange(len(part.tokens[: settings.evaluation_tokens])), settings.batch_size)
    return torch.searchsorted(part.starts, places[:, 1:].flatten(), right=True) - 1


def document_tokens(part: Split, settings: Any) -> list[int]:
    """How many words of each document are predicted; documents of which no word is are left out."""
    count = torch.bincount(document_of_words(part, settings))
    return count[count > 0].tolist()


class Trainer:
    """The training of the model of ``settings`` on ``corpus``, in ``steps`` or as many as ``settings.epochs`` says.

    ``step`` of them are done, and each took ``step_seconds``; ``loss`` is that of the last one.
    """

    def __init__(self, corpus: Corpus, settings: Settings, steps: int | None = None) -> None:
        self.corpus, self.settings, self.device = corpus, settings, torch.device(settings.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ExperimentError(f"the settings ask for device {settings.device}, but torch sees no CUDA device here")
        self.model = self._new_model()
        groups = ms.parameter_groups(self.model, lr=settings.lr, transform_lr=settings.transform_lr)
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps_per_epoch = (len(corpus.splits["train"].tokens) // settings.batch_size - 1) // settings.length
        if self.steps_per_epoch < 1:
            raise ExperimentError(f"the training split of {corpus.name} has too few words for one batch")
        self.steps = steps or max(1, round(settings.epochs * self.steps_per_epoch))
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self._random = self._random_state()
        self.step, self.step_seconds, self.loss = 0, list[float](), math.nan
        self._state, self._text = None, None

    def _new_model(self) -> LanguageModel:
        return LanguageModel(self.settings, len(self.corpus.vocabulary)).to(self.device)

    def round_end(self, number: int) -> int:
        """The step that round ``number`` ends at; they are ``settings.validations`` rounds, counted from 1."""
        return -(-self.steps * number // self.settings.validations)

    def train(
        self,
        until: int | None = None,
        checkpoint: Checkpoint | None = None,
        report: Callable[[int], Any] = lambda words: None,
    ) -> None:
        """Train to step ``until`` or to the end; ``report`` is called after every step with the number of its words."""
        if checkpoint is not None and (kept := checkpoint.load()) is not None:
            self._restore(kept)
        # Random numbers outside stay as they are.
        with torch.random.fork_rng():
            torch.set_rng_state(self._random[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random[1], self.device)
            self.model.train()
            while self.step < (until or self.steps):
                self._train_step()
                report(self.settings.batch_size * self.settings.length)
                if checkpoint is not None and checkpoint.due():
                    checkpoint.save(self._kept())
            self._random = self._random_state()

    def _train_step(self) -> None:
        started = time.perf_counter()
        words, targets = self._batch()
        rate = self._rate(self._progress())
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * rate
        self.optimizer.zero_grad()
        loss = self._gradients(words, targets)
        self.optimizer.step()
        self.loss = loss.item()
        self.step += 1
        self.step_seconds.append(time.perf_counter() - started)
        if not math.isfinite(self.loss):
            raise Diverged(
                f"{self.settings.output}, seed {self.settings.seed}: the loss of step {self.step} is {self.loss}"
            )

    def _gradients(self, words: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch. The parameters get its gradients, clipped."""
        loss = self._loss(words, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        return loss

    def _loss(self, words: Tensor, targets: Tensor) -> Tensor:
        hidden, self._state = self.model.body(words, self._state)
        loss: Tensor = self.model.output(hidden, targets).loss
        return loss

    def _batch(self) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if place == 0:
            self._state = None
        if place == 0 or self._text is None:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
            text = self.corpus.splits["train"].shuffled(generator)
            self._text = streams(text, self.settings.batch_size).to(self.device)
        first = place * self.settings.length
        stretch = self._text[:, first : first + self.settings.length + 1]
        return stretch[:, :-1], stretch[:, 1:]

    def _progress(self) -> float:
        """The share of the training that is done. Rounds count the same where they differ by a step."""
        rounds = self.settings.validations
        done = self.step * rounds // self.steps
        begin, end = self.round_end(done), self.round_end(done + 1)
        return (done + (self.step - begin) / (end - begin)) / rounds

    @staticmethod
    def _rate(progress: float) -> float:
        if progress < _WARM_UP:
            return (progress + 0.01) / (_WARM_UP + 0.01)
        along = (progress - _WARM_UP) / (1 - _WARM_UP)
        return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * along)) / 2

    @torch.no_grad()
    def perplexity(self, split: str) -> float:
        """Perplexity on ``settings.evaluation_tokens`` words of a split, with dropout off.

        The words are read as as many streams as a training batch has, in one pass with the hidden state carried along;
        a Transformer sees the words since the start of a stretch only.
        """
        total, words = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for hidden, targets in self._read(split, self.settings.evaluation_tokens):
            total += self.model.output(hidden, targets).output.sum(dtype=torch.float64)
            words += targets.numel()
        return math.exp(-total.item() / words)

    @torch.no_grad()
    def document_losses(self, split: str) -> list[float]:
        """Sums of -log p of each document of a split, as :meth:`perplexity` reads it; see :func:`document_tokens`."""
        read = self._read(split, self.settings.evaluation_tokens)
        log_p = torch.cat([self.model.output(hidden, targets).output for hidden, targets in read], 1)
        document = document_of_words(self.corpus.splits[split], self.settings)
        return torch.bincount(document, -log_p.double().cpu().flatten())[document.unique()].tolist()

    @torch.no_grad()
    def hidden_states(self, count: int) -> tuple[Tensor, Tensor]:
        """The first hidden states (n, dim) of the stretches of the validation split, and their targets (n,)."""
        stretches = -(-count // (self.settings.batch_size * self.settings.length))
        read = [(h.flatten(0, 1), t.flatten()) for h, t in islice(self._read("valid"), stretches)]
        states, targets = map(torch.cat, zip(*read, strict=True))
        return states[:count], targets[:count]

    def _read(self, split: str, tokens: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden states (B, T, dim) and targets (B, T) of each stretch of a split, with dropout off."""
        self.model.eval()
        text = streams(self.corpus.splits[split].tokens[:tokens], self.settings.batch_size).to(self.device)
        state = None
        for first in range(0, text.shape[1] - 1, self.settings.length):
            stretch = text[:, first : first + self.settings.length + 1]
            hidden, state = self.model.body(stretch[:, :-1], state)
            yield hidden, stretch[:, 1:]

    def _kept(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random_state(),
            "state": self._state,
            "step": self.step,
            "step_seconds": self.step_seconds,
        }

    def _restore(self, kept: dict[str, Any]) -> None:
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self._random, carried = kept["random"], kept["state"]
        self._state = carried and [(h.to(self.device), c.to(self.device)) for h, c in carried]
        self.step, self.step_seconds = kept["step"], kept["step_seconds"]

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states
