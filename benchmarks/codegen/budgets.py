"""All budgets of the compiled kernels, each with its reason, and what breaks them.

A broken budget is work to do on the kernels: the limit does not move to what they happen to need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from .cuda_compiler import static_bytes
from .figures import AMD, AMD_SHARED, DEVICES, Measurement


@dataclass(frozen=True)
class Budget:
    """The most, or the least, that a figure of some kernels may be. Of what is left empty every value counts."""

    figure: str
    limit: float
    reason: str
    compiler: str = ""
    operators: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    #: Words that a variant has, and words that it does not have.
    having: str = ""
    lacking: tuple[str, ...] = ()
    at_least: bool = False

    def takes(self, each: Measurement) -> bool:
        """Whether the budget is one of this measurement."""
        kernel = each.kernel
        return all(
            (
                self.compiler in ("", kernel.compiler),
                not self.operators or kernel.operator in self.operators,
                not self.transforms or kernel.transform in self.transforms,
                not self.dtypes or kernel.dtype in self.dtypes,
                not self.targets or each.target in self.targets,
                self.having in kernel.variant,
                not any(word in kernel.variant for word in self.lacking),
                # AMD's compiler gives no number of blocks.
                each.figures.value(self.figure) is not None,
            )
        )


@dataclass(frozen=True)
class Verdict:
    """A figure held against its budget."""

    budget: Budget
    measurement: Measurement
    value: float

    @property
    def kept(self) -> bool:
        """Whether the budget is kept."""
        return self.value >= self.budget.limit if self.budget.at_least else self.value <= self.budget.limit

    def __str__(self) -> str:
        relation = "at least" if self.budget.at_least else "at most"
        what = f"{self.budget.figure.replace('_', ' ')} {self.value:g}, {relation} {self.budget.limit:g}"
        return f"{self.measurement.kernel} for {self.measurement.target}: {what} ({self.budget.reason})"


_ALL = (
    Budget("local", 0, "a spilled register is a store and a load, and no array is in a thread's own memory"),
    Budget("local_accesses", 0, "as no byte of local memory"),
    Budget("blocks", 1, "a block has the shared memory and the registers that it asks for", at_least=True),
)

# The Triton kernels: a transform, an operator of triton_calls.py, a type of logits, a variant.

_SWEEP_ONCE = ("loss", "backward")
_GRADIENTS = ("loss, d logits", "loss, d logits, d coefficients", "loss, d logits in place, d coefficients")
_SWEEP_TWICE = (*_GRADIENTS, "token statistics", "log_softmax", "log_softmax backward")
_HEADS = ("recomputed head: loss", "recomputed head: gradients")
#: By the sweeps of a loss: those with p as the first factor need the whole row before they sum.
_DENSE = {"probabilities": 1, "forward_kl": 1, "reverse_kl": 2, "jsd": 2}
_DENSE_LOSSES = tuple(f"{kind}: loss" for kind in _DENSE)
_DENSE_GRADIENTS = tuple(f"{name}, d logits, d coefficients" for name in _DENSE_LOSSES)
_ANY_PLACE = ("V=50257", "sliced")
_HALF = ("bf16", "fp16")
_EVERY = (*_HALF, "fp32")
_NVIDIA = tuple(DEVICES)
_MAIN = ("sm_90",)
_PLAIN = ("all options", "deterministic")
_BUT_THE_SPLINE = (
    *("identity", "temperature", "sigsoftmax", "gss", "soft_cap", "sigmoid_cap"),
    *("plif-4", "plif-64", "plif-1000", "mlp-8"),
)


def _triton_accesses() -> Iterator[Budget]:
    """16 bytes at once in every sweep of a row: an eighth of the instructions of accesses of 2 bytes."""
    for sweeps, operators in ((1, _SWEEP_ONCE), (2, _SWEEP_TWICE)):
        loads = partial(Budget, compiler="triton", operators=operators, targets=_NVIDIA)
        reason = "full tiles and the masked one of aligned rows, in each sweep"
        yield loads("wide_loads", 2 * sweeps, reason, lacking=(*_ANY_PLACE, "deterministic"), at_least=True)
        yield loads("single_loads", 1, "the target's logit", dtypes=_HALF, lacking=_ANY_PLACE)
        for word in _ANY_PLACE:
            reason = "full tiles of rows that begin anywhere, in each sweep"
            yield loads("wide_loads", sweeps, reason, having=word, at_least=True)
            reason = "the target's logit, and masked tiles by elements"
            yield loads("single_loads", 1 + 8 * sweeps, reason, dtypes=_HALF, having=word)
    reason = "the sweep that adds up what the launch before has written"
    yield Budget("wide_loads", 2, reason, "triton", targets=_NVIDIA, having="deterministic", at_least=True)
    for kind, sweeps in _DENSE.items():
        for operator, reads in ((f"{kind}: loss", sweeps + 1), (f"{kind}: loss, d logits, d coefficients", sweeps + 3)):
            any_place = partial(Budget, compiler="triton", operators=(operator,), targets=_NVIDIA)
            loads = partial(any_place, lacking=_ANY_PLACE)
            reason = "full tiles and the masked one of aligned rows, in each sweep of the logits and of the target"
            # The masked tile of the logits stays in registers between the sweeps of a loss.
            yield loads("wide_loads", 2 * reads - (sweeps - 1), reason, at_least=True)
            yield loads("single_loads", 0, "as wide loads", dtypes=_HALF)
            reason = "full tiles of rows that begin anywhere, in each sweep of the logits and of the target"
            yield any_place("wide_loads", reads, reason, having="V=50257", at_least=True)
    writing = (*_GRADIENTS, *_DENSE_GRADIENTS, "backward", "log_softmax", "log_softmax backward")
    stores = partial(Budget, compiler="triton", operators=writing, targets=_NVIDIA)
    reason = "full tiles and the masked one of aligned rows"
    yield stores("wide_stores", 2, reason, lacking=(*_ANY_PLACE, "deterministic"), at_least=True)
    yield stores("single_stores", 0, "as wide stores", dtypes=_HALF, lacking=_ANY_PLACE)
    reason = "full tiles of rows that begin anywhere, as their gradient does"
    yield stores("wide_stores", 1, reason, having="V=50257", at_least=True)
    yield stores("single_stores", 8, "masked tiles by elements", dtypes=_HALF, having="V=50257")


def _triton_registers() -> Iterator[Budget]:
    """Up to 64 registers leave 1024 threads to a multiprocessor, up to 128 leave 512."""
    losses = ("loss",)
    without = ("loss", "token statistics", "log_softmax", *_DENSE_LOSSES)
    gradients = (*_GRADIENTS, *_DENSE_GRADIENTS, "backward", "log_softmax backward")
    for limit, reason, operators, transforms in (
        (48, "loss of the identity", losses, ("identity",)),
        (64, "without gradients: the limit that the launcher sets for losses", without, _BUT_THE_SPLINE),
        (96, "the spline without gradients: six numbers a piece", without, ("spline-16",)),
        (128, "gradients of all but the spline: the limit that the launcher sets", gradients, _BUT_THE_SPLINE),
        (232, "gradients of the spline: six rows of a table", gradients, ("spline-16",)),
    ):
        yield Budget("registers", limit, reason, "triton", operators, transforms, ("bf16",), _MAIN, lacking=_PLAIN)


_TRITON_HEADS = (
    Budget("products", 1, "products by the matrix unit", "triton", _HEADS, dtypes=_HALF, at_least=True),
    Budget("shared", AMD_SHARED, "what a block may have", "triton", targets=(AMD,)),
)

# The CUDA kernels: a transform's class, a kernel, a type of logits, how rows are kept and sums are made.

_GRADIENT = ("cross entropy gradient",)


def _cuda_accesses() -> Iterator[Budget]:
    """Loads and stores of chunks of 16 bytes, at least, and of single elements of two bytes, at most, by kernel."""
    for operator, having, dtypes, loads, stores, single_loads, single_stores in (
        ("cross entropy", "", _EVERY, 2, 0, 4, 0),
        ("cross entropy gradient", "resident", _EVERY, 4, 2, 1, 18),
        ("cross entropy gradient", "reread", _EVERY, 3, 2, 5, 18),
        ("token statistics", "", _EVERY, 2, 0, 4, 0),
        ("log softmax", "", _HALF, 2, 4, 4, 20),
        ("log softmax", "", ("fp32",), 2, 1, 0, 12),
        ("log softmax backward", "", _HALF, 9, 1, 37, 9),
        ("log softmax backward", "", ("fp32",), 3, 1, 10, 0),
        ("scale", "", _EVERY, 1, 1, 1, 1),
    ):
        budget = partial(Budget, compiler="cuda", operators=(operator,), dtypes=dtypes, having=having)
        reason = "chunks of 16 bytes, in each sweep and for each type that other rows may have"
        yield budget("wide_loads", loads, reason, at_least=True)
        yield budget("wide_stores", stores, reason, at_least=True)
        reason = "edges of rows, and rows that begin at another place than their logits"
        yield budget("single_loads", single_loads, reason)
        yield budget("single_stores", single_stores, reason)


def _cuda() -> Iterator[Budget]:
    yield Budget("registers", 128, "two blocks of 256 threads to a multiprocessor", "cuda")
    reason = "csrc/cuda/plan.cpp leaves it to kernels whose rows or sums fill the shared memory"
    for operators in (_GRADIENT, ("log softmax backward",)):
        yield Budget("shared", static_bytes(), reason, "cuda", operators)
    targets = tuple(each for each in _NVIDIA if each != "sm_75")
    reason = "no thread waits for what it copies"
    yield Budget("async_copies", 1, reason, "cuda", _GRADIENT, targets=targets, having="resident", at_least=True)


BUDGETS: tuple[Budget, ...] = (
    *_ALL,
    *_triton_accesses(),
    *_triton_registers(),
    *_TRITON_HEADS,
    *_cuda_accesses(),
    *_cuda(),
)


def judge(measurements: Sequence[Measurement]) -> list[Verdict]:
    """Every budget, held against each measurement that it takes."""
    pairs = [(budget, each) for budget in BUDGETS for each in measurements if budget.takes(each)]
    return [Verdict(budget, each, each.figures.value(budget.figure)) for budget, each in pairs]
