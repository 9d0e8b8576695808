"""The configurations of the Triton kernels that are compiled: a transform, an operator, a type of logits, a row length.

Each is made by calling the operator of the ``triton`` backend on a few rows of CPU tensors; what it would launch is in
:mod:`.launches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from monosoftmax import transforms
from monosoftmax.groups import Head, LossOptions, Transform, Upstream
from monosoftmax.triton_kernels import head_tiles, linear_cross_entropy, linear_cross_entropy_backward, operators
from monosoftmax.triton_kernels import launch as launchers

from .launches import Launch, launches_of
from .triton_targets import TARGETS

#: Rows that begin at multiples of 16 bytes, and rows that do not.
ALIGNED, SHIFTED = 50304, 50257
ROWS = 2
#: Columns that the matrix of a slice has more: a multiple of 16 bytes.
_WIDER = 8

#: The transforms with coefficients that are learned, by what the report calls them: registered name and settings.
TRANSFORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "temperature": ("temperature", {}),
    "sigsoftmax": ("sigsoftmax", {}),
    "gss": ("gss", {}),
    "soft_cap": ("soft_cap", {"learnable": True}),
    "sigmoid_cap": ("sigmoid_cap", {"learnable": True}),
    "plif-4": ("plif", {"num_pieces": 4}),
    "plif-50": ("plif", {"num_pieces": 50}),
    "plif-64": ("plif", {"num_pieces": 64}),
    "plif-1000": ("plif", {"num_pieces": 1000}),
    "spline-16": ("spline", {"num_bins": 16}),
    "mlp-8": ("monotonic_mlp", {"num_units": 8}),
}
_WITHOUT_COEFFICIENTS = ("identity", "sigsoftmax")

LOSS = "loss"
LOSS_INPUT = "loss, d logits"
LOSS_ALL = "loss, d logits, d coefficients"
LOSS_IN_PLACE = "loss, d logits in place, d coefficients"
BACKWARD = "backward"
STATISTICS = "token statistics"
LOG_SOFTMAX = "log_softmax"
LOG_SOFTMAX_BACKWARD = "log_softmax backward"
#: PLIF's table from its parameter, and the way back: no kernels over rows.
COEFFICIENTS = "coefficients"
COEFFICIENTS_BACKWARD = "coefficients backward"

#: The head whose logits are in no memory.
HEAD_LOSS = "recomputed head: loss"
HEAD_BACKWARD = "recomputed head: gradients"
_HEAD_ROWS, _HEAD_FEATURES = 4096, 1024

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Configuration:
    """What an operator is called with."""

    transform: str
    operator: str
    classes: int = ALIGNED
    dtype: str = "bf16"
    #: Class weights, smoothed labels, z_loss and lse.
    all_options: bool = False
    #: With PyTorch's deterministic algorithms.
    deterministic: bool = False
    #: Which of the launches of the operator.
    number: int = 0
    #: The logits are the columns after the first one of a larger matrix: even their pointer is no multiple of 16 bytes.
    sliced: bool = False

    @property
    def what(self) -> str:
        """The operator, with what is special about the call."""
        extras = [", all options"] * self.all_options + [", deterministic"] * self.deterministic
        extras += [", sliced"] * self.sliced + [f", launch {self.number + 1}"] * (self.number > 0)
        return f"{self.operator}{''.join(extras)}"

    def __str__(self) -> str:
        return f"{self.transform}: {self.what} ({self.dtype}, V={self.classes})"

    def launch(self, target: str) -> Launch:
        """The launch, as it is made on ``target``."""
        return self.launches(target)[self.number]

    def launches(self, target: str) -> list[Launch]:
        """All launches of the operator."""
        # What the launchers ask the device for: AMD's compiler takes no limit of registers, and its warps are larger.
        limits = mock.patch.object(launchers, "limits_registers", lambda device: TARGETS[target].backend == "cuda")
        warps = mock.patch.object(launchers, "warp_size", lambda device: TARGETS[target].warp_size)
        # Adds up what a kernel would have written, by indices that it would have written.
        nothing = mock.patch.object(launchers.Sums, "add_written", lambda sums, part: None)
        # The head's: of which family the device is, and the size of its warps once more.
        family = mock.patch.object(head_tiles, "family_of", lambda device: target)
        threads = mock.patch.object(
            linear_cross_entropy_backward, "warp_size", lambda device: TARGETS[target].warp_size
        )
        with limits, warps, family, threads, nothing, _deterministic(self.deterministic):
            return launches_of(self._call())

    def _call(self) -> Callable[[], object]:
        name, settings = TRANSFORMS[self.transform]
        transform = transforms.make(name, **settings)
        f = Transform(transform.coefficients().detach().contiguous(), name, list(transform.constants()))
        if self.operator in (HEAD_LOSS, HEAD_BACKWARD):
            return self._head_call(f)
        if self.operator == COEFFICIENTS:
            return partial(operators.plif_coefficients, torch.empty(f.coefficients.shape[1]), 20.0, 0.01)
        if self.operator == COEFFICIENTS_BACKWARD:
            raw_slope = torch.empty(f.coefficients.shape[1])
            return partial(operators.plif_coefficients_backward, f.coefficients, raw_slope, 20.0, 0.01)
        logits = torch.empty(ROWS, self.classes + (_WIDER if self.sliced else 0), dtype=_DTYPES[self.dtype])
        if self.sliced:
            logits = logits[:, 1 : self.classes + 1]
        target = torch.zeros(ROWS, dtype=torch.int64)
        stats = torch.empty(2, ROWS)
        coefficients = self.transform not in _WITHOUT_COEFFICIENTS
        loss = partial(operators.cross_entropy, logits, target, f, self._options())
        if self.operator == LOSS:
            return partial(loss, None, None, (False, False), None)
        if self.operator == BACKWARD:
            upstream = Upstream(torch.ones(ROWS), torch.ones(ROWS) if self.all_options else None)
            return partial(loss, upstream, stats, (True, coefficients), None)
        if self.operator in (LOSS_INPUT, LOSS_ALL, LOSS_IN_PLACE):
            mask = True, self.operator != LOSS_INPUT and coefficients
            return partial(
                loss, Upstream(torch.ones(())), None, mask, logits if self.operator == LOSS_IN_PLACE else None
            )
        if self.operator == STATISTICS:
            return partial(operators.token_statistics, logits, target, f, -100)
        if self.operator == LOG_SOFTMAX:
            return partial(operators.log_softmax, logits, f, logits.dtype)
        return partial(operators.log_softmax_backward, torch.empty_like(logits), logits, f, stats, (True, coefficients))

    def _options(self) -> LossOptions:
        if self.all_options:
            return LossOptions(torch.ones(self.classes), -100, 0.1, 1e-4, True)
        return LossOptions(None, -100, 0.0, 0.0, False)

    def _head_call(self, f: Transform) -> Callable[[], object]:
        input, weight = (torch.empty(n, _HEAD_FEATURES, dtype=_DTYPES[self.dtype]) for n in (_HEAD_ROWS, self.classes))
        every = self.all_options
        head = Head(input, weight, torch.empty(self.classes, dtype=input.dtype) if every else None)
        loss = launchers.RowLoss.of(torch.zeros(_HEAD_ROWS, dtype=torch.int64), f, self._options())
        if self.operator == HEAD_LOSS:
            return partial(linear_cross_entropy.recompute_forward, head, loss)
        upstream = Upstream(torch.ones(()), torch.ones(_HEAD_ROWS) if every else None)
        mask = True, True, every, self.transform not in _WITHOUT_COEFFICIENTS
        stats = torch.ones(2, _HEAD_ROWS)
        return partial(linear_cross_entropy_backward.recompute_backward, head, loss, upstream, stats, mask)


@contextmanager
def _deterministic(mode: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def configurations() -> list[Configuration]:
    """All that are compiled, in the order of the report. One that launches what another does is not among them."""
    found = [
        Configuration(transform, operator, classes)
        for operator in (LOSS, LOSS_INPUT, LOSS_ALL, BACKWARD)
        for transform in TRANSFORMS
        for classes in (ALIGNED, SHIFTED)
        if _is_of_its_own(transform, operator, classes)
    ]
    found += [
        Configuration(transform, operator)
        for operator in (STATISTICS, LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD)
        for transform in TRANSFORMS
        if _is_of_its_own(transform, operator, ALIGNED)
    ]
    found += [
        Configuration(transform, operator, dtype=dtype)
        for dtype in ("fp16", "fp32")
        for operator in (LOSS, LOSS_ALL)
        for transform in ("identity", "soft_cap", "plif-64", "spline-16")
        if (transform, operator, dtype) != ("spline-16", LOSS_ALL, "fp16")  # 8 seconds, and as in bf16
    ]
    found += [
        Configuration(transform, operator, classes, all_options=True)
        for operator, classes in ((LOSS, ALIGNED), (LOSS_ALL, ALIGNED), (LOSS_ALL, SHIFTED), (BACKWARD, ALIGNED))
        for transform in ("identity", "plif-64", "mlp-8")
        if (transform, classes) != ("mlp-8", SHIFTED)
    ]
    found += SLICED
    # Contributions that are written for PyTorch to add up: the second launch.
    found.append(Configuration("plif-1000", LOSS_ALL, deterministic=True, number=1))
    found += [
        Configuration(transform, operator)
        for operator in (HEAD_LOSS, HEAD_BACKWARD)
        for transform in ("identity", "plif-64", "spline-16")
    ]
    found += [
        Configuration(transform, operator, dtype="fp32")
        for operator in (COEFFICIENTS, COEFFICIENTS_BACKWARD)
        for transform in ("plif-64", "plif-1000")
    ]
    return found


def _is_of_its_own(transform: str, operator: str, classes: int) -> bool:
    """Whether no other configuration compiles the same, or the same but for the value of a constant."""
    if operator == LOSS_INPUT:
        return classes == ALIGNED and transform not in (*_WITHOUT_COEFFICIENTS, "plif-4", "plif-50", "plif-1000")
    if operator == BACKWARD and classes == SHIFTED:
        return False
    # How many pieces there are matters where their sums are kept.
    if transform == "plif-4":
        return operator in (LOSS_ALL, BACKWARD, LOG_SOFTMAX_BACKWARD)
    return transform != "plif-50" or (operator, classes) == (LOSS_ALL, ALIGNED)


#: Not even the logits' pointer is aligned. A gradient that has memory of its own lies otherwise than they do.
SLICED = [
    Configuration(transform, operator, sliced=True)
    for operator in (LOSS, LOSS_ALL, LOSS_IN_PLACE)
    for transform in ("identity", "plif-64")
]

#: What the ordinary tests compile.
QUICK = [
    Configuration(transform, operator, classes)
    for transform, operator in (
        ("identity", LOSS),
        ("soft_cap", LOSS),
        ("plif-64", LOSS),
        ("identity", LOSS_ALL),
        ("plif-64", LOSS_ALL),
    )
    for classes in (ALIGNED, SHIFTED)
]
QUICK += [each for each in SLICED if each.transform == "identity"]
