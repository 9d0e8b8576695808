"""The calls of the ``triton`` backend whose kernels are compiled: operators with CPU tensors that nobody reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from monosoftmax import transforms
from monosoftmax.groups import Divergence, Head, LossOptions, Transform, Upstream
from monosoftmax.triton_kernels import head_tiles, linear_cross_entropy, linear_cross_entropy_backward, operators
from monosoftmax.triton_kernels import launch as launchers

from .figures import AMD, Kernel

#: Rows that begin at multiples of 16 bytes, and rows that begin anywhere.
ALIGNED, SHIFTED = 50304, 50257
_ROWS = 2
#: Columns that the matrix of a slice has more: a multiple of 16 bytes.
_WIDER = 8
_HEAD_ROWS, _HEAD_FEATURES = 4096, 1024

#: The transforms with learned coefficients, by the words of the report: registered name and settings.
TRANSFORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "identity": ("identity", {}),
    "temperature": ("temperature", {}),
    "sigsoftmax": ("sigsoftmax", {}),
    "gss": ("gss", {}),
    "soft_cap": ("soft_cap", {"learnable": True}),
    "sigmoid_cap": ("sigmoid_cap", {"learnable": True}),
    "plif-4": ("plif", {"num_pieces": 4}),
    "plif-64": ("plif", {"num_pieces": 64}),
    "plif-1000": ("plif", {"num_pieces": 1000}),
    "spline-16": ("spline", {"num_bins": 16}),
    "mlp-8": ("monotonic_mlp", {"num_units": 8}),
}
_WITHOUT_COEFFICIENTS = ("identity", "sigsoftmax")
_CLOSED_FORMS = ("temperature", "sigsoftmax", "gss", "soft_cap", "sigmoid_cap")

LOSS = "loss"
LOSS_INPUT = "loss, d logits"
LOSS_ALL = "loss, d logits, d coefficients"
LOSS_IN_PLACE = "loss, d logits in place, d coefficients"
BACKWARD = "backward"
STATISTICS = "token statistics"
LOG_SOFTMAX = "log_softmax"
LOG_SOFTMAX_BACKWARD = "log_softmax backward"
#: PLIF's table from its parameter, and the way back.
COEFFICIENTS = "coefficients"
COEFFICIENTS_BACKWARD = "coefficients backward"
#: The head whose logits are in no memory.
HEAD_LOSS = "recomputed head: loss"
HEAD_BACKWARD = "recomputed head: gradients"
HEADS = (HEAD_LOSS, HEAD_BACKWARD)
#: Losses against a target of all classes, by their kinds, and the same with all gradients.
DENSE_LOSSES = {"probabilities: loss": "probabilities"} | {
    f"{kind}: loss": kind for kind in ("forward_kl", "reverse_kl", "jsd")
}
DENSE_GRADIENTS = {f"{name}, d logits, d coefficients": kind for name, kind in DENSE_LOSSES.items()}

#: Words of a variant. "all options": class weights, smoothed labels, z_loss and lse. "sliced": the logits are columns
#: of a larger matrix, and even their pointer is no multiple of 16 bytes. "composed": a soft cap before f and a
#: temperature after it. "entropy": with the gradient of the entropy.
OF_ANY_LENGTH, SLICED, ALL_OPTIONS, DETERMINISTIC = "V=50257", "sliced", "all options", "deterministic"
COMPOSED, ENTROPY = "composed", "entropy"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def kernel(transform: str, operator: str, dtype: str = "bf16", variant: str = "") -> Kernel:
    """A kernel of this compiler."""
    return Kernel("triton", transform, operator, dtype, variant)


_SOME, _MORE = ("identity", "plif-64"), ("identity", "plif-64", "mlp-8")
_FEW = ("identity", "soft_cap", "plif-64", "spline-16")
_IN_TILES = tuple(name for name in TRANSFORMS if name != "plif-1000")
_SWEEPS = (LOSS, LOSS_INPUT, LOSS_ALL, BACKWARD, STATISTICS, LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD)
#: Types, operators, transforms, variants: all combinations, in the order of the report.
_COMPILED: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("bf16",), _SWEEPS, tuple(TRANSFORMS), ("", OF_ANY_LENGTH)),
    (("fp16",), (LOSS,), _FEW, ("",)),
    (("fp16",), (LOSS_ALL,), _FEW[:-1], ("",)),  # the spline takes 8 seconds, and is as in bf16
    (("fp32",), (LOSS, LOSS_ALL), _FEW, ("",)),
    (("bf16",), (LOSS, LOSS_ALL), _MORE, (ALL_OPTIONS,)),
    (("bf16",), (LOSS_ALL,), _SOME, (f"{ALL_OPTIONS}, {OF_ANY_LENGTH}",)),
    (("bf16",), (BACKWARD,), _MORE, (ALL_OPTIONS,)),
    (("bf16",), (LOSS, LOSS_ALL, LOSS_IN_PLACE), _SOME, (SLICED,)),
    (("bf16",), (LOSS_ALL,), ("plif-1000",), (DETERMINISTIC,)),
    (("bf16",), HEADS, _IN_TILES, ("",)),
    (("bf16",), (HEAD_LOSS,), _MORE, (ALL_OPTIONS,)),
    (("fp32",), (HEAD_LOSS,), _MORE, ("",)),
    (("bf16",), (HEAD_BACKWARD,), _MORE, (ALL_OPTIONS,)),
    (("fp32",), (HEAD_BACKWARD,), _MORE, ("",)),
    (("bf16",), (LOSS, LOSS_ALL, STATISTICS, LOG_SOFTMAX_BACKWARD, *HEADS), ("soft_cap", "plif-64"), (COMPOSED,)),
    (("fp32",), (LOSS_ALL,), ("soft_cap", "plif-64"), (COMPOSED,)),
    (("bf16",), (BACKWARD,), _SOME, (ENTROPY, f"{ENTROPY}, {ALL_OPTIONS}")),
    (("bf16",), (*DENSE_LOSSES, *DENSE_GRADIENTS), _SOME, ("",)),
    (("fp32",), (*DENSE_GRADIENTS,), ("identity",), ("",)),
    (("bf16",), ("jsd: loss, d logits, d coefficients",), ("plif-64",), (COMPOSED,)),
    (("bf16",), ("probabilities: loss, d logits, d coefficients",), _SOME, (OF_ANY_LENGTH, ALL_OPTIONS)),
    (("fp32",), (COEFFICIENTS, COEFFICIENTS_BACKWARD), ("plif-64", "plif-1000"), ("",)),
)


def kernels() -> list[Kernel]:
    """All that are compiled, in the order of the report. One that launches what another does is not among them."""
    every = itertools.chain.from_iterable(itertools.starmap(itertools.product, _COMPILED))
    found = [kernel(transform, operator, dtype, variant) for dtype, operator, transform, variant in every]
    return [each for each in found if _is_of_its_own(each)]


def is_costly(one: Kernel) -> bool:
    """Whether a kernel needs so much that it may spill on any target, or has tiles of its own on each of them."""
    if one.operator in HEADS:
        return (one.dtype, one.variant) == ("bf16", "") and one.transform in ("identity", "plif-64", "spline-16")
    return one.operator == LOSS_ALL and one.variant == "" and one.transform in ("plif-64", "spline-16", "mlp-8")


def _is_of_its_own(one: Kernel) -> bool:
    """Whether no other kernel is the same, or the same but for a constant or a part that it leaves out.

    Closed forms with all gradients do all that they do in a backward pass.
    """
    if one.transform in _CLOSED_FORMS:
        return one.operator not in (LOSS_INPUT, BACKWARD) and one.variant in ("", COMPOSED)
    if one.variant == OF_ANY_LENGTH and one.operator not in (LOSS, LOSS_ALL, *DENSE_GRADIENTS):
        return False
    if one.operator == LOSS_INPUT:
        return one.transform not in (*_WITHOUT_COEFFICIENTS, "plif-4", "plif-1000")
    # How many pieces there are matters where their sums are kept.
    return one.transform != "plif-4" or one.operator in (LOSS_ALL, BACKWARD, LOG_SOFTMAX_BACKWARD, *HEADS)


@contextmanager
def as_on(target: str, warp_size: int) -> Iterator[None]:
    """Answers what the launchers ask the device, which is not there."""
    answers: list[tuple[object, str, Callable[..., object]]] = [
        # AMD's compiler takes no limit of registers.
        (launchers, "limits_registers", lambda device: target != AMD),
        (launchers, "warp_size", lambda device: warp_size),
        (linear_cross_entropy_backward, "warp_size", lambda device: warp_size),
        (head_tiles, "family_of", lambda device: target),
        # Adds up what a kernel would have written, by indices that it would have written.
        (launchers.Sums, "add_written", lambda sums, part: None),
    ]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield


def call_of(one: Kernel, classes: int | None = None) -> Callable[[], object]:
    """The call that launches a kernel; ``classes`` replaces the number of columns."""
    name, settings = TRANSFORMS[one.transform]
    transform = transforms.make(name, **settings)
    f = Transform(transform.coefficients().detach().contiguous(), name, list(transform.constants()))
    if COMPOSED in one.variant:
        f = f._replace(inner=[0.5, 30.0], temperature=torch.ones(()))
    if classes is None:
        classes = SHIFTED if OF_ANY_LENGTH in one.variant else ALIGNED
    if one.operator in HEADS:
        call = _head_call(one, f, classes)
    elif one.operator in DENSE_LOSSES or one.operator in DENSE_GRADIENTS:
        call = _dense_call(one, f, classes)
    elif one.operator == COEFFICIENTS:
        call = partial(operators.plif_coefficients, torch.empty(f.coefficients.shape[1]), 20.0, 0.01)
    elif one.operator == COEFFICIENTS_BACKWARD:
        raw_slope = torch.empty(f.coefficients.shape[1])
        call = partial(operators.plif_coefficients_backward, f.coefficients, raw_slope, 20.0, 0.01)
    else:
        call = _row_call(one, f, classes)
    return partial(_deterministic, call) if DETERMINISTIC in one.variant else call


def _row_call(one: Kernel, f: Transform, classes: int) -> Callable[[], object]:
    logits = torch.empty(_ROWS, classes + (_WIDER if SLICED in one.variant else 0), dtype=_DTYPES[one.dtype])
    if SLICED in one.variant:
        logits = logits[:, 1 : classes + 1]
    target = torch.zeros(_ROWS, dtype=torch.int64)
    stats = torch.empty(3 if ENTROPY in one.variant else 2, _ROWS)
    coefficients = one.transform not in _WITHOUT_COEFFICIENTS
    loss = partial(operators.cross_entropy, logits, target, f, _options(one, classes))
    if one.operator == LOSS:
        return partial(loss, None, None, (False, False), None)
    if one.operator == BACKWARD:
        entropy = torch.ones(_ROWS) if ENTROPY in one.variant else None
        upstream = Upstream(torch.ones(_ROWS), torch.ones(_ROWS) if ALL_OPTIONS in one.variant else None, None, entropy)
        return partial(loss, upstream, stats, (True, coefficients), None)
    if one.operator in (LOSS_INPUT, LOSS_ALL, LOSS_IN_PLACE):
        mask = True, one.operator != LOSS_INPUT and coefficients
        return partial(loss, Upstream(torch.ones(())), None, mask, logits if one.operator == LOSS_IN_PLACE else None)
    if one.operator == STATISTICS:
        return partial(operators.token_statistics, logits, target, f, -100)
    if one.operator == LOG_SOFTMAX:
        return partial(operators.log_softmax, logits, f, logits.dtype)
    return partial(operators.log_softmax_backward, torch.empty_like(logits), logits, f, stats, (True, coefficients))


def _dense_call(one: Kernel, f: Transform, classes: int) -> Callable[[], object]:
    logits = torch.empty(_ROWS, classes, dtype=_DTYPES[one.dtype])
    target = torch.empty_like(logits)
    losses = one.operator in DENSE_LOSSES
    kind = DENSE_LOSSES[one.operator] if losses else DENSE_GRADIENTS[one.operator]
    upstream = None if losses else Upstream(torch.ones(()))
    mask = not losses, not losses and one.transform not in _WITHOUT_COEFFICIENTS
    if kind == "probabilities":
        return partial(operators.cross_entropy, logits, target, f, _options(one, classes), upstream, output_mask=mask)
    return partial(operators.divergence, logits, target, f, Divergence(kind, 0.5), upstream=upstream, output_mask=mask)


def _head_call(one: Kernel, f: Transform, classes: int) -> Callable[[], object]:
    every = ALL_OPTIONS in one.variant
    input, weight = (torch.empty(n, _HEAD_FEATURES, dtype=_DTYPES[one.dtype]) for n in (_HEAD_ROWS, classes))
    head = Head(input, weight, torch.empty(classes, dtype=input.dtype) if every else None)
    loss = launchers.RowLoss.of(torch.zeros(_HEAD_ROWS, dtype=torch.int64), f, _options(one, classes))
    if one.operator == HEAD_LOSS:
        return partial(linear_cross_entropy.recompute_forward, head, loss)
    upstream = Upstream(torch.ones(()), torch.ones(_HEAD_ROWS) if every else None)
    mask = True, True, every, one.transform not in _WITHOUT_COEFFICIENTS
    stats = torch.ones(2, _HEAD_ROWS)
    return partial(linear_cross_entropy_backward.recompute_backward, head, loss, upstream, stats, mask)


def _options(one: Kernel, classes: int) -> LossOptions:
    if ALL_OPTIONS in one.variant:
        return LossOptions(torch.ones(classes), -100, 0.1, 1e-4, True)
    return LossOptions(None, -100, 0.0, 0.0, False)


def _deterministic(call: Callable[[], object]) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
