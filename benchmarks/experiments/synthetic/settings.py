"""The settings: sizes of problems, which methods run in them, and how they are trained."""

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
_FURTHER = ("sigsoftmax", "softcap-learned", "gss", "plif-frozen", "spline", "softcap", "sigmoidcap", "gss-published")
GRID_METHODS = (*_CORE, "mos4", "linear-eq-mos4", *_FURTHER)
LARGER_METHODS = (*_CORE, "mos4")
#: The methods of each cell, and the seeds of its trainings at the rate that the search found.
STUDY = {
    MAIN: (tuple(METHODS), SEEDS),
    **{cell: (GRID_METHODS, SEEDS) for cell in GRID},
    **{cell: (LARGER_METHODS, seeds) for cell, seeds in LARGER.items()},
}

#: Linear-Softmax with PyTorch's own loss, for times.
EAGER = "eager"
#: In the first cell logits fit in the cache, in the second they do not.
TIMINGS = (Timing(MAIN, (EAGER, *METHODS), rounds=201), Timing([*LARGER][-1], (EAGER, *_CORE), rounds=9))
