"""The settings: sizes of problems, which methods run in them and in what order, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass

from .methods import METHODS

#: The same for every method. They are tried on a problem of their own, which no reported figure is from.
LEARNING_RATES = (0.03, 0.1, 0.3)
SEARCH_SEED = 100
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Cell:
    """A size of the problem: N contexts, M words, dimension d, Dirichlet's alpha; and the steps of a training."""

    contexts: int
    words: int
    dim: int
    alpha: float
    steps: int

    @property
    def name(self) -> str:
        return f"n{self.contexts}-m{self.words}-d{self.dim}-alpha{self.alpha:g}"


@dataclass(frozen=True)
class Training:
    """A training: ``seed`` makes both the targets and the initial values, ``lr`` is the peak learning rate."""

    cell: Cell
    method: str
    seed: int
    lr: float
    warm_up_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Timing:
    """A comparison of times: how often each of ``methods`` has its turn."""

    cell: Cell
    methods: tuple[str, ...]
    rounds: int


MAIN = Cell(400, 300, 10, 0.1, 1000)
DIMS, ALPHAS = (5, 10, 20, 50, 100), (0.01, 0.1, 1.0)
_GRID = [(dim, alpha) for alpha in (0.1, 0.01, 1.0) for dim in DIMS if (dim, alpha) != (MAIN.dim, MAIN.alpha)]
GRID = tuple(Cell(MAIN.contexts, MAIN.words, dim, alpha, 500) for dim, alpha in _GRID)
#: More words, and as many seeds and steps as there was time for.
LARGER = {Cell(1000, 1000, 20, 0.1, 500): (0, 1, 2), Cell(1000, 10_000, 50, 0.1, 200): (0,)}

_CORE = ("linear", "temperature", "plif", "sigmoidcap-learned", "mlp", "mlp-1")
_SECOND = ("mos4", "linear-eq-mos4", "sigsoftmax", "softcap-learned", "gss", "plif-frozen", "spline")
_THIRD = ("softcap", "sigmoidcap", "gss-published")
GRID_METHODS = (*_CORE, *_SECOND, *_THIRD)
LARGER_METHODS = (*_CORE, "mos4")

#: Linear-Softmax with PyTorch's own loss, for times.
EAGER = "eager"
#: In the first cell logits fit in the cache, in the second they do not.
TIMINGS = (Timing(MAIN, (EAGER, *METHODS), rounds=201), Timing([*LARGER][-1], (EAGER, *_CORE), rounds=9))


def study() -> list[tuple[Cell, str]]:
    """Cells and methods, the most wanted first."""
    first, second, third = ([(cell, m) for m in methods for cell in GRID] for methods in (_CORE, _SECOND, _THIRD))
    small, large = ([(cell, method) for method in _CORE] for cell in LARGER)
    slow = [(cell, "mos4") for cell in LARGER]
    return [*((MAIN, method) for method in METHODS), *first, *small, *second, *large, *third, *slow]


def seeds_of(cell: Cell) -> tuple[int, ...]:
    """The seeds of the trainings at the rate that the search found."""
    return LARGER.get(cell, SEEDS)
