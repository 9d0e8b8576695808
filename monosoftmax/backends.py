"""Which backends exist here, which of them takes a call, and why each better one does not.

``auto`` takes the first backend, in the order of preference for the device, that can take the call. Nothing fails over
silently: :func:`explain` says what was chosen and why; a backend that is asked for by name takes the call or raises.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from .transforms import Identity, MonotonicTransform

BackendName = Literal["auto", "reference", "cpu", "triton", "cuda"]
Operation = Literal["cross_entropy", "linear_cross_entropy", "linear_token_statistics", "log_softmax"]


def _load_extension() -> tuple[ModuleType | None, str]:
    """The compiled extension, or the reason why it cannot be used."""
    name = f"{__package__}._C"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None, (
            "the C++ extension is not built: with a C++ compiler on PATH, pip install --no-build-isolation monosoftmax"
        )
    except ImportError as error:
        return None, f"the C++ extension does not load: {error}"
    built, running = module.build_info()["torch"].split("+")[0], torch.__version__.split("+")[0]
    if built.rsplit(".", 1)[0] != running.rsplit(".", 1)[0]:
        return None, (
            f"the C++ extension was built against torch {built}, this is torch {running}: "
            "pip install --no-build-isolation --force-reinstall --no-deps monosoftmax"
        )
    return module, ""


#: The compiled extension ``monosoftmax._C``, or None; and why it is None.
extension, _extension_problem = _load_extension()


@dataclass(frozen=True)
class Call:
    """What the choice of a backend depends on. It reads no data."""

    operation: Operation
    device: str
    dtype: torch.dtype
    transform: MonotonicTransform


@dataclass(frozen=True)
class Status:
    """Whether a backend can run here, and what it is or why it cannot."""

    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{'available' if self.available else 'not available'}: {self.detail}"


@dataclass(frozen=True)
class Explanation:
    """The backend that takes a call, how it does it, and why each backend that would be preferred does not."""

    backend: str
    how: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.how}"]
        lines += [f"not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Backend:
    #: The reason why it cannot run here, or None.
    problem: str | None
    #: What it is, and with what it runs.
    detail: Callable[[], str]
    #: The reason why it cannot take a call, or None.
    refusal: Callable[[Call], str | None]
    #: How it does a call that it takes.
    how: Callable[[Call], str]


def _reference_how(call: Call) -> str:
    return "plain PyTorch; holds the transformed logits [N, V] in float32 or float64"


def _cpu_detail() -> str:
    assert extension is not None
    return f"C++, {extension.cpu_capability()} instructions, {torch.get_num_threads()} threads"


def _cpu_refusal(call: Call) -> str | None:
    if call.device != "cpu":
        return f"it takes CPU tensors, input is on {call.device}"
    if call.transform.kernel is None:
        return f"{type(call.transform).__name__} has no fused kernel"
    return None


def _cpu_how(call: Call) -> str:
    if call.operation == "cross_entropy":
        return (
            "one fused C++ kernel, which computes the gradient of a mean or sum in the forward pass; "
            "memory beyond inputs, outputs and gradients is O(N)"
        )
    if call.operation == "linear_cross_entropy":
        return (
            "chunks of rows through one buffer of logits: matrix product, fused C++ kernel, products of the gradients "
            "of a mean or sum, all in the forward pass; memory beyond inputs, outputs and gradients does not grow with "
            "N times V"
        )
    if call.operation == "linear_token_statistics":
        return "chunks of rows through one buffer of logits: matrix product, fused C++ kernel"
    return "one fused C++ kernel each way; memory beyond inputs, outputs and gradients is O(N)"


def _planned(name: str) -> _Backend:
    problem = f"the {name} kernels are not part of this version"
    return _Backend(problem, lambda: problem, lambda call: problem, lambda call: problem)


_BACKENDS = {
    "cuda": _planned("CUDA"),
    "triton": _planned("Triton"),
    "cpu": _Backend(_extension_problem or None, _cpu_detail, _cpu_refusal, _cpu_how),
    "reference": _Backend(
        None, lambda: "plain PyTorch on any device, twice differentiable", lambda call: None, _reference_how
    ),
}
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


def available() -> dict[str, Status]:
    """The backends by name: which can run here, and why the others cannot. ``python -m monosoftmax.info`` prints it."""
    return {
        name: Status(True, backend.detail()) if backend.problem is None else Status(False, backend.problem)
        for name, backend in _BACKENDS.items()
    }


def explain(
    operation: Operation,
    input: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    backend: BackendName = "auto",
) -> Explanation:
    """Which backend takes a call of ``operation`` with these arguments, and why each better one does not.

    Args:
        operation: ``"cross_entropy"``, ``"linear_cross_entropy"``, ``"linear_token_statistics"`` or ``"log_softmax"``.
        input: the logits, or the input of the head. Only its device and dtype are looked at.
        transform: as given to the call.
        backend: as given to the call.

    Raises:
        ValueError: ``operation`` or ``backend`` is unknown, or the named backend cannot take the call.
    """
    if operation not in get_args(Operation):
        raise ValueError(f"operation must be one of {', '.join(get_args(Operation))}, got {operation!r}")
    call = Call(operation, input.device.type, input.dtype, Identity() if transform is None else transform)
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
            f"monosoftmax runs the slow reference backend on the CPU: {_extension_problem}. "
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
        raise AssertionError("the reference backend takes every call")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(get_args(BackendName))}, got {backend!r}")
    reason = _reason_against(backend, call)
    if reason is not None:
        raise ValueError(f'backend="{backend}" cannot take this call: {reason}')
    return backend, {}


def _reason_against(name: str, call: Call) -> str | None:
    backend = _BACKENDS[name]
    return backend.problem or backend.refusal(call)
