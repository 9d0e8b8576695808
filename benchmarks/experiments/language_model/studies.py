"""The studies: cells of output layers that are compared with each other, and how their learning rates are searched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .models import OUTPUTS, learns_transform
from .settings import Settings

BASELINE, CONTROL = "linear", "temperature"
EQUAL = "linear, equal parameters to mos"


@dataclass(frozen=True)
class Search:
    """How the learning rates of a row are found, with the same number of tries for each.

    The first of these are the grid ``lr``, from low to high; ``transform_lr`` has the usual rate first. A try is of so
    many ``epochs``.
    """

    lr: tuple[float, ...]
    transform_lr: tuple[float, ...]
    tries: int
    epochs: float


@dataclass(frozen=True)
class Row:
    """An output layer in a cell. What the search finds, and the seed, take the place of those in ``settings``."""

    label: str
    settings: Settings

    @property
    def slug(self) -> str:
        """The label in names of units."""
        return re.sub("[ ,]+", "-", self.label)

    @property
    def learns_transform(self) -> bool:
        """Whether ``transform_lr`` means something."""
        return learns_transform(self.settings.output)


@dataclass(frozen=True)
class Cell:
    """Rows that differ in their output layer; ``comparisons`` are pairs of labels that the report compares."""

    name: str
    rows: tuple[Row, ...]
    seeds: range
    search: Search
    comparisons: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Study:
    """Cells, and a small training for ``verify`` to repeat."""

    name: str
    cells: tuple[Cell, ...]
    verify: Settings | None = None


def cell(name: str, base: Settings, seeds: int, search: Search, outputs: Iterable[str], **more: Any) -> Cell:
    """A cell called by corpus, model and width, like wiki-lstm-64; ``base`` has the other settings of its rows.

    ``wide`` is the width of one more row: linear with as many parameters as a mixture.
    """
    corpus, model, dim = name.split("-")
    hidden = int(dim) * (2 if model == "lstm" else 4)
    base = replace(base, corpus=corpus, model=model, dim=int(dim), hidden=hidden)
    rows = [Row(output, replace(base, output=output)) for output in outputs]
    if "wide" in more:
        rows.append(Row(EQUAL, replace(base, output="linear", dim=more.pop("wide"))))
    return Cell(name, tuple(rows), range(seeds), search, **more)


_SMALL = Settings(
    corpus="wiki", text_style="ptb", vocabulary_size=10_000, layers=1, experts=3, dropout=0.1, batch_size=10,
    lr=0.012, transform_lr=0.01, validations=2, rank_contexts=1000,
)  # fmt: skip
_FIRST = ("linear", "temperature", "plif")
_MIXED = (("plif", "plif-frozen"), ("mos", EQUAL), ("plif", "mos"))


def _main(name: str, epochs: float, lr: tuple[float, ...], tries: int, search_epochs: float) -> Cell:
    return cell(name, replace(_SMALL, epochs=epochs), 3, Search(lr, (0.003, 0.001), tries, search_epochs), _FIRST)


_LSTM, _TRANSFORMER, _NARROW = (0.004, 0.012, 0.036), (0.002, 0.006, 0.018), (0.012, 0.036, 0.108)
#: Sized for 90 minutes of one CPU core.
MAIN = Study(
    "main",
    (
        cell(
            "wiki-lstm-64",
            replace(_SMALL, epochs=0.5, validations=4),
            5,
            Search(_LSTM, (0.01, 0.003, 0.001), 6, 0.25),
            (*_FIRST, "plif-frozen", "sigsoftmax", "sigmoidcap-learned", "mlp", "mos"),
            comparisons=_MIXED,
            wide=66,
        ),
        cell("wiki-lstm-16", replace(_SMALL, epochs=0.5), 5, Search(_NARROW, (0.003, 0.001), 5, 0.2), (*_FIRST, "mlp")),
        _main("sotu-lstm-64", 0.2, _LSTM, 4, 0.08),
        _main("wiki-transformer-64", 0.5, _TRANSFORMER, 4, 0.2),
        _main("sotu-transformer-64", 0.2, _TRANSFORMER, 4, 0.08),
        _main("wiki-lstm-256", 0.35, _LSTM, 4, 0.12),
        _main("sotu-lstm-16", 0.2, _NARROW, 5, 0.08),
        _main("wiki-transformer-16", 0.5, _NARROW, 5, 0.2),
    ),
    replace(_SMALL, vocabulary_size=2000, output="plif", dim=16, hidden=32, epochs=0.1),
)

#: Widths of linear that give it at least the parameters of mos at the widths 16, 64 and 256.
_WIDE = {
    "wiki-lstm": (17, 67, 286), "wiki-transformer": (20, 68, 284),
    "sotu-lstm": (17, 67, 288), "sotu-transformer": (20, 68, 288),
}  # fmt: skip


def _gpu(name: str, dim: int, wide: int) -> Cell:
    epochs = 20 if name.startswith("wiki") else 10
    base = Settings(text_style="ptb", dropout=0.3 if dim == 256 else 0.1, epochs=epochs, validations=20, device="cuda")
    search = Search((0.0005, 0.002, 0.008), (0.01, 0.003), 5, epochs / 4)
    comparisons = (*_MIXED, ("plif-published", "plif-frozen-published"))
    return cell(f"{name}-{dim}", base, 5, search, OUTPUTS, comparisons=comparisons, wide=wide)


#: The study that MAIN stands for: full vocabularies, trained to the end, every output layer.
GPU = Study("gpu", tuple(_gpu(name, *each) for name in _WIDE for each in zip((16, 64, 256), _WIDE[name], strict=True)))

#: The rates of ``python -m benchmarks demo``, searched for each of its layers.
_DEMO = replace(_SMALL, vocabulary_size=6000, epochs=0.6, rank_contexts=500)
_DEMO_SEARCH = Search((0.008, 0.016, 0.032), (0.01, 0.003), 6, 0.2)
DEMO = Study("demo", (cell("wiki-lstm-96", _DEMO, 0, _DEMO_SEARCH, (*_FIRST, "sigsoftmax", "softcap", "mos")),))
