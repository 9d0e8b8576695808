"""The operators of the fused backends: arguments, results and fake implementations.

An operator, such as ``torch.ops.monosoftmax.cross_entropy``, is what ``torch.compile`` and ``torch.func`` see of a
call. Its schema is made from two NamedTuples, the arguments and the results; a group among the arguments
(:mod:`monosoftmax.groups`) takes a place for each of its fields. Python calls an :class:`Operator` by its NamedTuple,
which is flattened for torch's dispatcher and autograd only. :mod:`monosoftmax.row_operators` and
:mod:`monosoftmax.chunked_head` set what an operator computes, :mod:`monosoftmax.autograd` its derivative.

``input`` is [N, V], with rows of any stride and columns next to each other, or in a :class:`.groups.Head` [N, d].
``output_mask`` says which gradients an operator computes, in the order of its gradients among the results; the others
are empty. A backward pass scales the gradients of ``total`` in place: nobody else may keep them. What
:class:`.row_kernels.RowKernels` says of targets, upstream gradients and row_stats holds here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from . import _dispatch
from .groups import Divergence, Head, HeadGradients, HeadOptions, LossOptions, Teacher, TokenStatistics, Transform
from .transforms.base import arithmetic_dtype

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])
Results = TypeVar("Results", bound=tuple[Any, ...])


class CrossEntropy(NamedTuple):
    """``total`` is ``scale`` times the sum of the losses, which is their mean, or 1; the gradients are those of total.

    For ``reduction="none"`` there is neither.
    """

    backend: str
    input: Tensor
    target: Tensor
    transform: Transform
    options: LossOptions
    reduction: str
    output_mask: Sequence[bool]


class Losses(NamedTuple):
    loss: Tensor
    lse: Tensor
    row_stats: Tensor
    scale: Tensor
    total: Tensor
    grad_input: Tensor
    grad_coefficients: Tensor


class CrossEntropyBackward(NamedTuple):
    backend: str
    grad_loss: Tensor | None
    grad_lse: Tensor | None
    input: Tensor
    target: Tensor
    transform: Transform
    options: LossOptions
    row_stats: Tensor
    output_mask: Sequence[bool]


class Gradients(NamedTuple):
    grad_input: Tensor
    grad_coefficients: Tensor


class LinearCrossEntropy(NamedTuple):
    """:class:`CrossEntropy` of the logits of a head, which exist for one chunk of rows at a time.

    The gradients of linear_weight and linear_bias are sums over the chunks, in the arithmetic type. For float16 the
    gradients are multiplied by ``float16_shift(scale, ...)``. ``log_prob`` is log p of the target, 0 in ignored rows,
    whatever weight, label_smoothing and z_loss are. ``return_statistics`` asks for it too, then without a derivative,
    and for entropy, argmax and rank.
    """

    backend: str
    head: Head
    target: Tensor
    transform: Transform
    options: LossOptions
    head_options: HeadOptions
    reduction: str
    return_log_prob: bool
    return_statistics: bool
    output_mask: Sequence[bool]


class LinearLosses(NamedTuple):
    loss: Tensor
    lse: Tensor
    row_stats: Tensor
    log_prob: Tensor
    entropy: Tensor
    argmax: Tensor
    rank: Tensor
    scale: Tensor
    total: Tensor
    grad_input: Tensor
    grad_linear_weight: Tensor
    grad_linear_bias: Tensor
    grad_coefficients: Tensor


class LinearCrossEntropyBackward(NamedTuple):
    backend: str
    grad_loss: Tensor | None
    grad_lse: Tensor | None
    head: Head
    target: Tensor
    transform: Transform
    options: LossOptions
    head_options: HeadOptions
    row_stats: Tensor
    output_mask: Sequence[bool]


class LinearTokenStatistics(NamedTuple):
    backend: str
    head: Head
    target: Tensor
    transform: Transform
    ignore_index: int


class LinearTokenStatisticsBackward(NamedTuple):
    backend: str
    grad_log_prob: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None
    head: Head
    target: Tensor
    transform: Transform
    ignore_index: int
    row_stats: Tensor
    output_mask: Sequence[bool]


class RowTokenStatistics(NamedTuple):
    """:class:`LinearTokenStatistics` of given logits."""

    backend: str
    input: Tensor
    target: Tensor
    transform: Transform
    ignore_index: int


class RowTokenStatisticsBackward(NamedTuple):
    backend: str
    grad_log_prob: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None
    input: Tensor
    target: Tensor
    transform: Transform
    ignore_index: int
    row_stats: Tensor
    output_mask: Sequence[bool]


class LinearDistillation(NamedTuple):
    """The divergence of a student's head from a teacher's, whose logits exist for one chunk of rows at a time.

    ``total`` is the sum of the losses times ``scale`` [N], of which the gradients are computed, as far as
    ``output_mask`` asks for them; the gradients of linear_weight and linear_bias in the arithmetic type, and in float16
    multiplied by ``float16_shift(scale.amax(), ...)``. Without a scale there is no total and no gradient.
    """

    backend: str
    head: Head
    transform: Transform
    teacher: Teacher
    divergence: Divergence
    scale: Tensor | None
    output_mask: Sequence[bool]


class DistillationLosses(NamedTuple):
    loss: Tensor
    row_stats: Tensor
    total: Tensor
    grad_input: Tensor
    grad_linear_weight: Tensor
    grad_linear_bias: Tensor
    grad_coefficients: Tensor


class LinearDistillationBackward(NamedTuple):
    backend: str
    grad_loss: Tensor
    head: Head
    transform: Transform
    teacher: Teacher
    divergence: Divergence
    row_stats: Tensor
    output_mask: Sequence[bool]


class LogSoftmax(NamedTuple):
    backend: str
    input: Tensor
    transform: Transform
    dtype: torch.dtype


class LogProbabilities(NamedTuple):
    output: Tensor
    row_stats: Tensor


class LogSoftmaxBackward(NamedTuple):
    backend: str
    grad_output: Tensor
    input: Tensor
    transform: Transform
    row_stats: Tensor
    output_mask: Sequence[bool]


_KINDS: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    bool | None: "bool?",
    list[float]: "float[]",
    torch.dtype: "ScalarType",
    Sequence[bool]: "bool[]",
}

_DISPATCH_KEYS = ("CPU", "CUDA")  # of the devices that some backend takes

#: Outlives the modules of this package: a second import, after ``sys.modules`` was cleared, finds the operators of the
#: first. torch lets nobody define an operator twice. It does not matter which import's code runs.
_LIBRARIES: dict[str, torch.library.Library] = torch.ops.__dict__.setdefault("_monosoftmax_libraries", {})
_IMPORTED_BEFORE = "monosoftmax" in _LIBRARIES


class _NoLibrary:
    """Stands in for the library at a second import."""

    def define(self, *_: Any, **__: Any) -> None: ...
    def impl(self, *_: Any) -> None: ...


if not _IMPORTED_BEFORE:
    _LIBRARIES["monosoftmax"] = torch.library.Library("monosoftmax", "DEF")  # type: ignore[no-untyped-call]
library: Any = _NoLibrary() if _IMPORTED_BEFORE else _LIBRARIES["monosoftmax"]


class Operator(Generic[Arguments, Results]):
    """An operator: called by its arguments, a NamedTuple, and by its name at torch's dispatcher."""

    def __init__(
        self, name: str, arguments: type[Arguments], results: type[Results], fake: Callable[[Arguments], Results]
    ) -> None:
        self.name, self.arguments, self.results = f"monosoftmax::{name}", arguments, results
        #: The groups among the arguments: their places, and the places of their fields among the flattened arguments.
        self._groups: list[tuple[int, type[Any], int, int]] = []
        #: The names of the flattened arguments.
        self.names: list[str] = []
        fields: list[str] = []
        for place, (field, kind) in enumerate(get_type_hints(arguments).items()):
            group = {field: kind}
            if hasattr(kind, "_fields"):
                group = get_type_hints(kind)
                self._groups.append((place, kind, len(fields), len(fields) + len(group)))
            fields += [f"{_KINDS[each]} {name}" for name, each in group.items()]
            self.names += group
        returns = ", ".join(f"Tensor {each}" for each in results._fields)  # type: ignore[attr-defined]
        library.define(f"{name}({', '.join(fields)}) -> ({returns})", tags=(torch.Tag.pt2_compliant_tag,))
        self.overload: Any = getattr(torch.ops.monosoftmax, name).default
        if not _IMPORTED_BEFORE:
            torch.library.register_fake(self.name, self._by_arguments(fake), lib=library)
        #: The places of tensors among them.
        self.tensors = [place for place, each in enumerate(fields) if each.startswith("Tensor")]

    def computes(self, kernel: Callable[[Arguments], Results]) -> None:
        """Let ``kernel`` be what the operator computes."""
        self._kernel, by_name = kernel, self._by_arguments(kernel)
        for key in _DISPATCH_KEYS:
            library.impl(self.overload, by_name, key)

    def differentiate(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Give the operator its derivative: see :func:`torch.library.register_autograd`."""
        self._derivative = _dispatch.register_autograd(
            self.overload, backward, setup_context=setup_context, lib=library
        )

    def __call__(self, arguments: Arguments) -> Results:
        flat: list[Any] = []
        after = 0
        for place, _, _, _ in self._groups:
            flat += arguments[after:place]
            flat += arguments[place]
            after = place + 1
        flat += arguments[after:]
        if not _dispatch.unobserved([flat[place] for place in self.tensors]):
            results = self.overload(*flat)
        elif torch.is_grad_enabled():
            results = self._derivative.apply(*flat, lambda: self._kernel(arguments))
        else:
            return self._kernel(arguments)
        made: Results = self.results._make(results)  # type: ignore[attr-defined]
        return made

    def named(self, flat: Sequence[Any]) -> Arguments:
        """The arguments that the dispatcher or autograd hands on one by one, in their groups."""
        parts: list[Any] = []
        after = 0
        for _, group, begin, end in self._groups:
            parts += flat[after:begin]
            parts.append(group(*flat[begin:end]))
            after = end
        made: Arguments = self.arguments._make([*parts, *flat[after:]])  # type: ignore[attr-defined]
        return made

    def _by_arguments(self, function: Callable[[Arguments], Results]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *flat: tuple(function(self.named(flat)))


def _row_results(input: Tensor, stats: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = input.shape[0], arithmetic_dtype(input.dtype)
    loss = input.new_empty(rows, dtype=dtype)
    return loss, torch.empty_like(loss), loss.new_empty((stats, rows))


def _scale_and_total(reduction: str, loss: Tensor) -> tuple[Tensor, Tensor]:
    scale = loss.new_empty((0,) if reduction == "none" else ())
    return scale, torch.empty_like(scale)


def _masked(mask: Sequence[bool], *gradients: Tensor) -> list[Tensor]:
    return [each.new_empty(each.shape if needed else 0) for needed, each in zip(mask, gradients, strict=True)]


def _fake_cross_entropy(call: CrossEntropy) -> Losses:
    loss, lse, row_stats = _row_results(call.input, 3 if call.target.is_floating_point() else 2)
    gradients = _masked(call.output_mask, call.input, call.transform.coefficients)
    return Losses(loss, lse, row_stats, *_scale_and_total(call.reduction, loss), *gradients)


def _fake_gradients(call: CrossEntropyBackward | LogSoftmaxBackward | RowTokenStatisticsBackward) -> Gradients:
    return Gradients(*_masked(call.output_mask, call.input, call.transform.coefficients))


def _fake_linear_gradients(
    call: LinearCrossEntropy
    | LinearCrossEntropyBackward
    | LinearTokenStatisticsBackward
    | LinearDistillation
    | LinearDistillationBackward,
) -> HeadGradients:
    input, linear_weight, _ = call.head
    weight = linear_weight.to(arithmetic_dtype(input.dtype))
    return HeadGradients(*_masked(call.output_mask, input, weight, weight[:, 0], call.transform.coefficients))


def _fake_linear_cross_entropy(call: LinearCrossEntropy) -> LinearLosses:
    loss, lse, row_stats = _row_results(call.head.input, 3 if call.target.is_floating_point() else 2)
    log_prob = loss.new_empty(loss.shape if call.return_log_prob or call.return_statistics else 0)
    entropy = loss.new_empty(loss.shape if call.return_statistics else 0)
    argmax, rank = (entropy.new_empty(entropy.shape, dtype=torch.int64) for _ in range(2))
    of_rows, reduced = (loss, lse, row_stats), _scale_and_total(call.reduction, loss)
    statistics = (log_prob, entropy, argmax, rank)
    return LinearLosses(*of_rows, *statistics, *reduced, *_fake_linear_gradients(call))


def _fake_token_statistics(call: LinearTokenStatistics | RowTokenStatistics) -> TokenStatistics:
    input = call.head.input if isinstance(call, LinearTokenStatistics) else call.input
    log_prob, entropy, row_stats = _row_results(input, 3)
    argmax, rank = torch.empty_like(call.target), torch.empty_like(call.target)
    return TokenStatistics(
        log_prob=log_prob,
        entropy=entropy,
        argmax=argmax,
        lse=torch.empty_like(log_prob),
        rank=rank,
        row_stats=row_stats,
    )


def _fake_linear_distillation(call: LinearDistillation) -> DistillationLosses:
    loss, _, row_stats = _row_results(call.head.input, 3)
    total = loss.new_empty((0,) if call.scale is None else ())
    return DistillationLosses(loss, row_stats, total, *_fake_linear_gradients(call))


def _fake_log_softmax(call: LogSoftmax) -> LogProbabilities:
    return LogProbabilities(call.input.new_empty(call.input.shape, dtype=call.dtype), _row_results(call.input)[2])


cross_entropy = Operator("cross_entropy", CrossEntropy, Losses, _fake_cross_entropy)
cross_entropy_backward = Operator("cross_entropy_backward", CrossEntropyBackward, Gradients, _fake_gradients)
linear_cross_entropy = Operator("linear_cross_entropy", LinearCrossEntropy, LinearLosses, _fake_linear_cross_entropy)
linear_cross_entropy_backward = Operator(
    "linear_cross_entropy_backward", LinearCrossEntropyBackward, HeadGradients, _fake_linear_gradients
)
linear_token_statistics = Operator(
    "linear_token_statistics", LinearTokenStatistics, TokenStatistics, _fake_token_statistics
)
linear_token_statistics_backward = Operator(
    "linear_token_statistics_backward", LinearTokenStatisticsBackward, HeadGradients, _fake_linear_gradients
)
token_statistics = Operator("token_statistics", RowTokenStatistics, TokenStatistics, _fake_token_statistics)
token_statistics_backward = Operator(
    "token_statistics_backward", RowTokenStatisticsBackward, Gradients, _fake_gradients
)
linear_distillation = Operator("linear_distillation", LinearDistillation, DistillationLosses, _fake_linear_distillation)
linear_distillation_backward = Operator(
    "linear_distillation_backward", LinearDistillationBackward, HeadGradients, _fake_linear_gradients
)
log_softmax = Operator("log_softmax", LogSoftmax, LogProbabilities, _fake_log_softmax)
log_softmax_backward = Operator("log_softmax_backward", LogSoftmaxBackward, Gradients, _fake_gradients)

#: All of them by name.
OPERATORS: dict[str, Operator[Any, Any]] = {
    each.name.partition("::")[2]: each for each in list(globals().values()) if type(each) is Operator
}


library.define("no_derivative(Tensor like, Tensor[] upstream, str reason) -> Tensor")


def _no_derivative(like: Tensor, upstream: list[Tensor], reason: str) -> Tensor:
    raise RuntimeError(reason)


# What stands in the place of a derivative that does not exist: an error when it runs, not when it is traced, because
# torch.compile traces the backward pass of everything whether it will be run or not. It takes the upstream gradients so
# that a compiler does not move it to the forward pass.
library.impl("no_derivative", _no_derivative, "CompositeExplicitAutograd")
if not _IMPORTED_BEFORE:
    torch.library.register_fake("monosoftmax::no_derivative", lambda like, *_: torch.empty_like(like), lib=library)
