"""The kernels over rows of logits, by which a fused backend implements the operators, and the choice between them.

A table of kernels is a module: ``monosoftmax._C.cpu``, ``monosoftmax._C.cuda`` or
``monosoftmax.triton_kernels.operators``. The last one is imported at its first use.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _installation
from ._dispatch import assume_constant
from .groups import Divergence, LossOptions, RowResults, TokenStatistics, Transform, Upstream

#: The compiled extension ``monosoftmax._C``, or None; and the reason why it is None.
extension, extension_problem = _installation.load_extension()
_installation.find_triton_kernels()


class RowKernels(Protocol):
    """The contract of the kernels. ``rows`` [N, V] have any row stride, and columns next to each other. A function
    changes its arguments or waits for a device only if its docstring says so.
    """

    def cross_entropy(
        self,
        rows: Tensor,
        target: Tensor,
        transform: Transform,
        options: LossOptions,
        upstream: Upstream | None = None,
        row_stats: Tensor | None = None,
        output_mask: Sequence[bool] = (False, False),
        grad_rows: Tensor | None = None,
    ) -> RowResults:
        """Losses of rows, and the gradients in ``output_mask``: of rows, and of the coefficients.

        An upstream gradient e of the entropy H adds -e p_j (log p_j + H) to dL/dy_j. The kernel forms it from the third
        number M = sum_j p_j (largest - y_j) of the row_stats of :meth:`token_statistics`, as
        -e p_j ((y_j - largest) + M), in which no logarithm of the sum is left to cancel. An ignored row has the
        gradients of lse and of the entropy; where both are 0 it is not read.

        Args:
            rows: [N, V].
            target: [N] int64, or class probabilities [N, V] of any floating type.
            transform: f.
            options: the options of the loss.
            upstream: the gradients of the results; needed if the mask asks for a gradient.
            row_stats: the result of an earlier call with the same arguments, which computed the losses; None computes
                the losses. They may be those of longer rows, of which ``rows`` are some columns: then the gradients
                are those of these columns. A row whose target is among other columns is an ignored row to the kernel.
            output_mask: the gradients to compute.
            grad_rows: memory for the gradient of rows; it may be ``rows`` itself. None allocates new memory.
        """

    def token_statistics(
        self, rows: Tensor, target: Tensor, transform: Transform, ignore_index: int
    ) -> TokenStatistics:
        """The statistics of rows: a tuple of the fields of :class:`.groups.TokenStatistics`."""

    def divergence(
        self,
        rows: Tensor,
        log_target: Tensor,
        transform: Transform,
        divergence: Divergence,
        upstream: Upstream | None = None,
        row_stats: Tensor | None = None,
        output_mask: Sequence[bool] = (False, False),
        grad_rows: Tensor | None = None,
    ) -> RowResults:
        """The divergence of p = softmax(y) from q = exp(``log_target``), as the loss of each row, and its gradients.

        ==============  ======================================================  =====================================
        kind            loss                                                    dL/dy_j
        ==============  ======================================================  =====================================
        "forward_kl"    sum_j q_j (log q_j - log p_j)                           g (Q p_j - q_j), Q = sum_j q_j
        "reverse_kl"    R = sum_j p_j (log p_j - log q_j)                       g p_j (log p_j - log q_j - R)
        "jsd"           beta sum_j q_j (log q_j - log m_j) + (1 - beta) R,      g (1 - beta) p_j (log p_j - log m_j - R)
                        R = sum_j p_j (log p_j - log m_j),
                        m = beta q + (1 - beta) p
        ==============  ======================================================  =====================================

        A term whose first factor is 0 is 0, also where a logarithm in it is infinite. So a class with q = 0 < p makes a
        reverse KL +inf; its gradient has no meaning then. q need not add up to 1. 0 < ``beta`` < 1 for "jsd"; the
        others do not read it. row_stats are [3, N]. The results' lse is that of p, and has no gradient: of ``upstream``
        only ``loss`` is read.

        ``log_target`` [N, V] is of any floating type, with any row stride and columns next to each other. The other
        arguments are those of :meth:`cross_entropy`; ``grad_rows`` may be ``rows``.
        """

    def log_softmax(
        self, rows: Tensor, transform: Transform, dtype: torch.dtype, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p [N, V] of type ``dtype``, and row_stats [2, N]. ``out`` is memory for log p; it may be ``rows``."""

    def log_softmax_backward(
        self,
        grad_output: Tensor,
        rows: Tensor,
        transform: Transform,
        row_stats: Tensor,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, Tensor]:
        """The gradients of rows and of the coefficients; empty unless the mask asks for them."""

    def plif_coefficients(self, raw_slope: Tensor, bound: float, min_slope: float) -> Tensor:
        """The table [2, K] of :class:`monosoftmax.transforms.PLIF`, in the type of ``raw_slope`` [K]."""

    def plif_coefficients_backward(
        self, grad_coefficients: Tensor, raw_slope: Tensor, bound: float, min_slope: float
    ) -> Tensor:
        """The gradient of ``raw_slope`` [K]."""

    def scale_(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiply a contiguous ``tensor`` by the 0-dim ``factor``, unless the factor is 1. Not for CPU tensors, where
        the caller knows the factor.
        """


def row_kernels(backend: str) -> RowKernels:
    """The kernels of ``backend``, which must be able to run here (:data:`PROBLEMS`)."""
    if backend == "triton":
        return _triton_kernels()
    if backend == "cuda" and host_execution():
        host: RowKernels = sys.modules["monosoftmax_cuda_host"].cuda
        return host
    kernels: RowKernels = getattr(extension, backend)
    return kernels


@functools.cache
def kernels_for(device: str) -> RowKernels | None:
    """The kernels of the best backend for tensors on a device of this type; None if there are none."""
    backends = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device, ())
    return next((row_kernels(each) for each in backends if PROBLEMS[each]() is None), None)


@functools.cache
def _triton_kernels() -> RowKernels:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise ImportError(f"monosoftmax: triton does not load ({error}): pip install triton") from error
    kernels: Any = importlib.import_module(f"{__package__}.triton_kernels.operators")
    return kernels  # type: ignore[no-any-return]


@assume_constant
def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU. This does not import triton."""
    triton = sys.modules.get("triton")
    return os.environ.get("TRITON_INTERPRET") == "1" if triton is None else bool(triton.knobs.runtime.interpret)


@assume_constant
def host_execution() -> bool:
    """Whether the host execution of the CUDA kernels stands in for a GPU (``tests/cuda_host.py``)."""
    return "monosoftmax_cuda_host" in sys.modules


def _cpu_problem() -> str | None:
    return extension_problem or None


@assume_constant
def _triton_problem() -> str | None:
    if not torch.cuda.is_available() and not interpreting():
        return "torch finds no GPU"
    try:
        _triton_kernels()
    except ImportError as error:
        return str(error).removeprefix("monosoftmax: ")
    return None


@assume_constant
def _cuda_problem() -> str | None:
    if host_execution():
        return None
    if extension is None:
        return extension_problem
    build = extension.build_info()
    if build["cuda"] is None:
        return f"the C++ extension was built without CUDA: {build['cuda_problem']}"
    kernels = f"CUDA {build['cuda']} kernels for {build['cuda_architectures']}"
    if not torch.cuda.is_available():
        return f"built, no device: {kernels}, but torch finds no GPU"
    gpu = torch.cuda.get_device_capability()
    if not any(runs_on(gpu, each) for each in build["cuda_architectures"].split()):
        wanted = f"{gpu[0]}.{gpu[1]}"
        again = f"TORCH_CUDA_ARCH_LIST={wanted} {_installation.command()}"
        return f"{kernels}, but this GPU is {wanted}: install again with {again}"
    return None


def runs_on(gpu: tuple[int, int], architecture: str) -> bool:
    """Whether a GPU of this capability runs code for ``architecture``, such as 9.0 or 10.0+PTX."""
    name, _, ptx = architecture.partition("+")
    major, minor = (int(part) for part in name.rstrip("af").split("."))
    if name.endswith("a"):
        return (major, minor) == gpu
    same_family = major == gpu[0] and minor <= gpu[1]
    return same_family if name.endswith("f") else same_family or (bool(ptx) and (major, minor) <= gpu)


#: For each fused backend, a function that gives the reason why it cannot run here, or None.
PROBLEMS: dict[str, Callable[[], str | None]] = {
    "cpu": _cpu_problem,
    "triton": _triton_problem,
    "cuda": _cuda_problem,
}
