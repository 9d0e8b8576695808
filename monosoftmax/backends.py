"""The backends that exist here, the choice of one for a call, and the reasons against each better one.

``auto`` takes the first backend, in the order of preference for the device, that can take the call. Nothing fails over
silently: :func:`explain` gives the choice and its reasons, and a backend named by the caller takes the call or raises.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .row_kernels import PROBLEMS, extension_problem, host_execution, interpreting, row_kernels
from .row_kernels import extension as extension
from .transforms import Chain, Identity, MonotonicTransform

BackendName = Literal["auto", "reference", "cpu", "triton", "cuda"]
Operation = Literal[
    "cross_entropy",
    "linear_cross_entropy",
    "linear_token_statistics",
    "linear_log_prob",
    "linear_token_loss",
    "linear_distillation",
    "log_softmax",
    "log_prob",
]

#: The kinds of targets: class indices, class probabilities, or class probabilities that require a gradient.
TargetKind = Literal["indices", "probabilities", "differentiated probabilities"]


class Call(NamedTuple):
    """The properties of a call that decide the backend. The choice reads no data."""

    operation: Operation
    device: str
    dtype: torch.dtype
    transform: MonotonicTransform
    #: For the head: the method, and whether the caller sets ``chunk_rows`` and ``grad_in_forward``.
    method: str = "auto"
    has_chunk_rows: bool = False
    has_grad_in_forward: bool = False
    #: For cross_entropy.
    target_kind: TargetKind = "indices"
    #: For cross_entropy: whether the gradient overwrites the logits.
    inplace: bool = False
    #: For :func:`explain`: logits of the shape in question.
    like: Tensor | None = None
    #: The number of classes; 0 if it is unknown.
    classes: int = 0
    #: For log_softmax: the type of the result; None for the type of the arithmetic.
    result_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Status:
    """Whether a backend can run here, with its description or the reason why it cannot."""

    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{'available' if self.available else 'not available'}: {self.detail}"


@dataclass(frozen=True)
class Explanation:
    """The backend that takes a call, how it computes the call, and why each preferred backend does not."""

    backend: str
    how: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.how}"]
        lines += [f"not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Backend:
    #: The reason why the backend cannot run here, or None.
    problem: Callable[[], str | None]
    #: A description of the backend, and of the device or processor it uses.
    detail: Callable[[], str]
    #: The reason why the backend cannot take a call, or None.
    refusal: Callable[[Call], str | None]
    #: How the backend computes a call that it takes.
    how: Callable[[Call], str]


def target_kind(target: Tensor) -> TargetKind:
    """The kind of ``target``."""
    if not target.is_floating_point():
        return "indices"
    return "differentiated probabilities" if target.requires_grad and torch.is_grad_enabled() else "probabilities"


def _reference_how(call: Call) -> str:
    return "plain PyTorch; holds the transformed logits [N, V] in float32 or float64"


def _reference_refusal(call: Call) -> str | None:
    if call.method != "auto":
        return f'it holds the logits in full, and has no method="{call.method}"'
    if call.has_chunk_rows:
        return "it holds the logits in full, and has no use for chunk_rows"
    if call.has_grad_in_forward:
        return "autograd computes its gradients, and it has no use for grad_in_forward"
    if call.inplace:
        return "autograd computes its gradients, none of them inplace"
    return None


def _cpu_detail() -> str:
    assert extension is not None
    return f"C++, {extension.cpu_capability()} instructions, {torch.get_num_threads()} threads"


def _cpu_refusal(call: Call) -> str | None:
    if call.device != "cpu":
        return f"it takes CPU tensors, input is on {call.device}"
    if call.method == "recompute":
        return 'it has no method="recompute": the triton backend has'
    return _no_fused_kernel(call)


def _no_fused_kernel(call: Call) -> str | None:
    if call.target_kind == "differentiated probabilities":
        return "it does not differentiate with respect to class probabilities, target requires a gradient"
    if call.transform.kernel is None:
        if isinstance(call.transform, Chain) and call.transform.unfused:
            return call.transform.unfused
        return f"{type(call.transform).__name__} has no fused kernel"
    return None


#: The GPU kernels number the columns of a row by int32, with room for a tile beyond the last column.
_MOST_CLASSES_ON_GPU = (2**31 - 1) // 2

#: The CUDA kernels keep the number of a piece in the last bits of a float32 (kMostPieces in csrc/cuda/limits.h).
_MOST_PIECES_OF_CUDA = 2**22


def _gpu_refusal(call: Call) -> str | None:
    """The reason why no kernel for GPUs can take ``call``, or None."""
    if call.dtype == torch.float64:
        return "it computes in float32, input is float64"
    if call.classes > _MOST_CLASSES_ON_GPU:
        return f"it takes up to {_MOST_CLASSES_ON_GPU} classes, input has {call.classes}"
    return _no_fused_kernel(call)


_CHUNKED_HOW = "chunks of rows through one buffer of logits: matrix product, fused "

#: The words of :func:`explain` for an operation of the head, after its product and its fused kernel.
_LINEAR_HOW = {
    "linear_cross_entropy": (
        ", products of the gradients of a mean or sum, all in the forward pass; memory beyond inputs, outputs and "
        "gradients does not grow with N times V"
    ),
    "linear_token_statistics": "",
    "linear_log_prob": "; the backward pass computes the logits again, and three more products of them",
    "linear_token_loss": ", products of the gradients, all in the forward pass",
    "linear_distillation": (
        " of both heads, products of the student's gradients of a mean or sum, all in the forward pass"
    ),
}

#: The words of :func:`explain` for log_prob, after the name of the language.
_LOG_PROB_HOW = "kernel each way"


def _cpu_how(call: Call) -> str:
    if call.operation == "cross_entropy":
        return (
            "one fused C++ kernel, which computes the gradient of a mean or sum in the forward pass; "
            "memory beyond inputs, outputs and gradients is O(N)"
        )
    if call.operation in _LINEAR_HOW:
        return f"{_CHUNKED_HOW}C++ kernel{_LINEAR_HOW[call.operation]}"
    if call.operation == "log_prob":
        return f"one fused C++ {_LOG_PROB_HOW}"
    return "one fused C++ kernel each way; memory beyond inputs, outputs and gradients is O(N)"


def _triton_detail() -> str:
    where = "its interpreter, on the CPU" if interpreting() else torch.cuda.get_device_name()
    return f"Triton {sys.modules['triton'].__version__}, {where}"


def _triton_refusal(call: Call) -> str | None:
    if call.device != "cuda" and not (call.device == "cpu" and interpreting()):
        return f"it takes CUDA tensors, input is on {call.device}"
    return _gpu_refusal(call)


def _triton_how(call: Call) -> str:
    if call.operation == "cross_entropy":
        sums = f"a table of coefficients adds buffers for the sums of its gradient{_order(call)}"
        return f"one fused Triton kernel; {sums}"
    if call.operation == "log_softmax":
        return "one fused Triton kernel each way"
    if call.operation == "log_prob":
        return f"one fused Triton {_LOG_PROB_HOW}"
    if call.method == "recompute":
        return _RECOMPUTE_HOW
    chunked = (
        f"chunks of rows through one buffer of logits: matrix product, fused Triton kernel{_LINEAR_HOW[call.operation]}"
    )
    if call.operation == "linear_cross_entropy" and call.method == "auto" and call.dtype != torch.float32:
        return f"{chunked}; for d <= {_RECOMPUTE_FEATURES} and without gradients: {_RECOMPUTE_HOW}"
    return chunked


def _order(call: Call) -> str:
    kernels = importlib.import_module(f"{__package__}.triton_kernels.coefficient_sums")
    transforms = importlib.import_module(f"{__package__}.triton_kernels.transforms")
    table_rows = transforms.REGISTRY[call.transform.kernel].table_rows
    size = call.transform().shape[-1]
    regime = kernels.regime_of(table_rows, size, torch.are_deterministic_algorithms_enabled())
    return ", to which atomics add in an order that changes" if size and regime == "global" else ""


_RECOMPUTE_HOW = (
    "logits formed tile by tile in the kernels that use them, and again for the gradients, which are summed by "
    "atomics; no logits in memory"
)

#: The most features of a head for which ``method="auto"`` is ``"recompute"``.
_RECOMPUTE_FEATURES = 512


def head_method(
    backend: str, features: int, dtype: torch.dtype, needs_gradient: bool
) -> Literal["chunked", "recompute"]:
    """The method that ``"auto"`` takes for a head of ``features`` features.

    It is ``"recompute"`` on the triton backend, in half precision, without gradients and with 512 features at most. On
    an H100, with 8192 rows of 50304 classes, the kernel multiplies at two thirds of the speed of cuBLAS, and saves 0.6
    ms of writing and reading logits: with 2048 features it took 3.6 ms instead of 3.0. At that rate both are equal at
    990 features, or at fewer if the kernel has a fixed cost; that was not timed. With gradients, the chunked head
    multiplies three times and took 14 ms; ``"recompute"`` multiplies four times and took 33 ms
    (``benchmarks/results/gpu/h100_80gb_hbm3``).
    """
    if backend == "triton" and not needs_gradient and dtype != torch.float32 and features <= _RECOMPUTE_FEATURES:
        return "recompute"
    return "chunked"


def _cuda_detail() -> str:
    if host_execution():
        return "CUDA C++, executed on the CPU"
    assert extension is not None
    build = extension.build_info()
    return (
        f"CUDA C++, built with CUDA {build['cuda']} for {build['cuda_architectures']}; {torch.cuda.get_device_name()}"
    )


def _cuda_refusal(call: Call) -> str | None:
    if call.device != "cuda" and not (call.device == "cpu" and host_execution()):
        return f"it takes CUDA tensors, input is on {call.device}"
    if call.method == "recompute":
        return 'it has no method="recompute": the triton backend has'
    if call.result_dtype == torch.float64:
        return "its results are float32, bfloat16 or float16, dtype is float64"
    if call.transform.table_size > _MOST_PIECES_OF_CUDA:
        name, pieces = type(call.transform).__name__, call.transform.table_size
        return f"it takes tables of up to {_MOST_PIECES_OF_CUDA} pieces, {name} has {pieces}"
    return _gpu_refusal(call)


def _cuda_how(call: Call) -> str:
    if call.operation in _LINEAR_HOW:
        return f"{_CHUNKED_HOW}CUDA kernel{_LINEAR_HOW[call.operation]}"
    if call.operation == "log_softmax":
        return "one fused CUDA kernel each way"
    if call.operation == "log_prob":
        return f"one fused CUDA {_LOG_PROB_HOW}"
    how = "one fused CUDA kernel, which computes the gradient of a mean or sum in the forward pass"
    if call.like is None:
        return how
    coefficients = call.transform()
    plan = row_kernels("cuda").describe_plan(  # type: ignore[attr-defined]
        call.like, call.transform.kernel, coefficients.shape[-1], True, coefficients.requires_grad
    )
    return f"{how}: {plan}"


_BACKENDS = {
    "cuda": _Backend(PROBLEMS["cuda"], _cuda_detail, _cuda_refusal, _cuda_how),
    "triton": _Backend(PROBLEMS["triton"], _triton_detail, _triton_refusal, _triton_how),
    "cpu": _Backend(PROBLEMS["cpu"], _cpu_detail, _cpu_refusal, _cpu_how),
    "reference": _Backend(
        lambda: None, lambda: "plain PyTorch on any device, twice differentiable", _reference_refusal, _reference_how
    ),
}
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def available() -> dict[str, Status]:
    """The backends by name, and whether each can run here. ``python -m monosoftmax.info`` prints it."""
    return {
        name: Status(True, backend.detail()) if problem is None else Status(False, problem)
        for name, backend, problem in ((name, each, each.problem()) for name, each in _BACKENDS.items())
    }


def explain(
    operation: Operation,
    input: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    target: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    method: Literal["auto", "chunked", "recompute"] = "auto",
) -> Explanation:
    """The backend that takes a call of ``operation`` with these arguments, and why each better one does not.

    >>> print(explain("cross_entropy", torch.randn(8, 1_000), backend="reference"))
    reference: plain PyTorch; holds the transformed logits [N, V] in float32 or float64

    Args:
        operation: ``"cross_entropy"``, ``"linear_cross_entropy"``, ``"linear_token_statistics"``,
            ``"linear_log_prob"``, ``"linear_token_loss"``, ``"linear_distillation"``, ``"log_softmax"`` or
            ``"log_prob"``.
        input: the logits, or the input of the head. Only its device, its dtype and the shape of logits [N, V] matter,
            not its values.
        transform: as given to the call.
        target: as given to ``cross_entropy`` or ``linear_cross_entropy``. It matters whether it is class probabilities,
            and whether they require a gradient. ``None`` stands for class indices.
        dtype: as given to ``log_softmax``.
        backend: as given to the call.
        method: as given to ``linear_cross_entropy``.

    Raises:
        ValueError: ``operation`` or ``backend`` is unknown, the named backend cannot take the call, ``target`` is class
            probabilities and ``operation`` takes none, or ``dtype`` is given and ``operation`` not
            ``"log_softmax"``.
    """
    if operation not in get_args(Operation):
        raise ValueError(f"operation must be one of {', '.join(get_args(Operation))}, got {operation!r}")
    transform = Identity() if transform is None else transform
    like = input if operation == "cross_entropy" and input.dim() == 2 else None
    kind = "indices" if target is None else target_kind(target)
    if kind != "indices" and operation not in ("cross_entropy", "linear_cross_entropy"):
        raise ValueError(f'target must be class indices for operation "{operation}", got class probabilities')
    if dtype is not None and operation != "log_softmax":
        raise ValueError(f'dtype must be None for operation "{operation}", which does not have it, got {dtype}')
    of_logits = operation in ("cross_entropy", "log_softmax", "log_prob") and input.dim() > 0
    class_dim = 1 if operation == "cross_entropy" and input.dim() > 1 else -1
    call = Call(
        operation,
        input.device.type,
        input.dtype,
        transform,
        method,
        target_kind=kind,
        like=like,
        classes=input.shape[class_dim] if of_logits else 0,
        result_dtype=dtype,
    )
    chosen, refused = _choose(call, backend)
    return Explanation(chosen, _BACKENDS[chosen].how(call), refused)


def choose(call: Call, backend: BackendName) -> str:
    """The name of the backend that takes ``call``.

    Raises:
        ValueError: ``backend`` is unknown, or cannot take the call.
    """
    chosen, _ = _choose(call, backend)
    if backend == "auto" and call.device == "cpu" and extension is None and not torch.compiler.is_compiling():
        warnings.warn(
            f"monosoftmax runs the slow reference backend on the CPU: {extension_problem}. "
            'Pass backend="reference" to ask for it.',
            stacklevel=3,
        )
    return chosen


def _choose(call: Call, backend: BackendName) -> tuple[str, dict[str, str]]:
    if backend == "auto":
        refused: dict[str, str] = {}
        for name in _PREFERENCE.get(call.device, ("reference",)):
            reason = _reason_against(name, call)
            if reason is None:
                return name, refused
            refused[name] = reason
        raise ValueError("no backend takes this call: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(get_args(BackendName))}, got {backend!r}")
    reason = _reason_against(backend, call)
    if reason is not None:
        raise ValueError(f'backend="{backend}" cannot take this call: {reason}')
    return backend, {}


def _reason_against(name: str, call: Call) -> str | None:
    backend = _BACKENDS[name]
    return backend.problem() or backend.refusal(call)
