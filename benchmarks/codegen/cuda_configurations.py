"""The configurations that the CUDA kernels are counted in: a transform, an operator, a type of logits, a row length.

Many share a kernel: what it is launched with is the plan's (``csrc/cuda/plan.cpp``), for so many rows that every
multiprocessor has some.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from .cuda_plans import Plan, PlanRequest
from .cuda_source import CSRC
from .cuda_targets import ELEMENTS, CudaError, KernelName

#: Rows that begin at multiples of 16 bytes, rows that do not, and vocabularies of recent language models.
ALIGNED, SHIFTED = 50304, 50257
LARGE = (128256, 262144)
ROWS = 8192

#: The transforms, by what the report calls them: registered name and the coefficients in a row.
TRANSFORMS = {
    "identity": ("identity", 0),
    "temperature": ("temperature", 1),
    "sigsoftmax": ("sigsoftmax", 0),
    "gss": ("gss", 2),
    "soft_cap": ("soft_cap", 1),
    "sigmoid_cap": ("sigmoid_cap", 3),
    "plif-4": ("plif", 4),
    "plif-50": ("plif", 50),
    "plif-64": ("plif", 64),
    "plif-1000": ("plif", 1000),
    "plif-5000": ("plif", 5000),
    "spline-16": ("spline", 16),
    "mlp-8": ("monotonic_mlp", 25),
}
_WITHOUT_COEFFICIENTS = ("identity", "sigsoftmax")

LOSS = "loss"
LOSS_INPUT = "loss, d logits"
LOSS_ALL = "loss, d logits, d coefficients"
BACKWARD = "backward"
STATISTICS = "token statistics"
LOG_SOFTMAX = "log_softmax"
LOG_SOFTMAX_BACKWARD = "log_softmax backward"
OPERATORS = (LOSS, LOSS_INPUT, LOSS_ALL, BACKWARD, STATISTICS, LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD)
_KERNELS = {
    STATISTICS: "token_statistics_kernel",
    LOG_SOFTMAX: "log_softmax_kernel",
    LOG_SOFTMAX_BACKWARD: "log_softmax_backward_kernel",
}

_LOSS_KERNELS = ["cross_entropy_kernel", "cross_entropy_gradient_kernel"]
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_SUMS = {"none": "NoSums", "vector": "VectorSums", "lanes": "LaneSums", "warps": "WarpSums"}


@dataclass(frozen=True)
class Configuration:
    """What an operator is called with."""

    transform: str
    operator: str
    classes: int = ALIGNED
    dtype: str = "bf16"

    def __str__(self) -> str:
        return f"{self.transform}: {self.operator} ({self.dtype}, V={self.classes})"

    @property
    def size(self) -> int:
        """Coefficients in a row."""
        return TRANSFORMS[self.transform][1]

    @property
    def element_bytes(self) -> int:
        """Of a logit."""
        return _BYTES[self.dtype]

    @property
    def losses(self) -> bool:
        """Whether the losses are computed; else they have been, and their statistics are read."""
        return self.operator not in (BACKWARD, LOG_SOFTMAX_BACKWARD)

    @property
    def gradient(self) -> bool:
        """Whether gradients are."""
        return self.operator not in (LOSS, STATISTICS, LOG_SOFTMAX)

    @property
    def coefficients(self) -> bool:
        """Whether those of the coefficients are."""
        return (
            self.operator in (LOSS_ALL, BACKWARD, LOG_SOFTMAX_BACKWARD) and self.transform not in _WITHOUT_COEFFICIENTS
        )

    @property
    def moved_bytes(self) -> int:
        """Bytes of memory that an element takes at least: each row that is given is read, each result written, once."""
        rows = {LOSS: 1, STATISTICS: 1, LOG_SOFTMAX_BACKWARD: 3}
        return self.element_bytes * rows.get(self.operator, 2)

    @property
    def request(self) -> PlanRequest:
        """What the planner is asked."""
        return PlanRequest(
            transform=TRANSFORMS[self.transform][0],
            size=self.size,
            rows=ROWS,
            classes=self.classes,
            element_bytes=self.element_bytes,
            losses=self.losses,
            gradient=self.gradient,
            coefficients=self.coefficients,
        )

    def is_launched(self, kernel: KernelName, plan: Plan) -> bool:
        """Whether a kernel is the one that the plan takes: as in ``csrc/cuda/*_launch.cuh``."""
        name, rows = _registry()[TRANSFORMS[self.transform][0]]
        loss = "cross_entropy_kernel" if plan.rows == "once" else "cross_entropy_gradient_kernel"
        return (
            kernel.transform == name
            and kernel.element == ELEMENTS[self.dtype]
            and kernel.table_in_shared_memory in ((None,) if rows == 0 else (plan.table_in_shared_memory,))
            and kernel.kernel == _KERNELS.get(self.operator, loss)
            and kernel.sums == (_SUMS[plan.sums] if self.gradient else "")
            and kernel.resident == (plan.rows == "resident")
        )

    def is_of(self, kernel: KernelName) -> bool:
        """Whether a kernel is one of the operator's, for this type of logits."""
        kernels = [_KERNELS[self.operator]] if self.operator in _KERNELS else _LOSS_KERNELS
        return kernel.kernel in kernels and kernel.element == ELEMENTS[self.dtype]


def configurations() -> list[Configuration]:
    """All that are counted, in the order of the report."""
    found = [
        Configuration(transform, operator)
        for operator in OPERATORS
        for transform in TRANSFORMS
        if _is_of_its_own(transform, operator)
    ]
    found += [
        Configuration(transform, operator, classes)
        for operator in (LOSS, LOSS_INPUT, LOSS_ALL)
        for transform in ("identity", "soft_cap", "plif-64", "spline-16", "mlp-8")
        for classes in (SHIFTED, *LARGE)
        if _is_of_its_own(transform, operator)
    ]
    found += [
        Configuration(transform, operator, dtype=dtype)
        for dtype in ("fp16", "fp32")
        for operator in (*OPERATORS[:3], *OPERATORS[4:])
        for transform in ("identity", "soft_cap", "plif-64", "spline-16", "mlp-8")
        if _is_of_its_own(transform, operator)
    ]
    return found


def _is_of_its_own(transform: str, operator: str) -> bool:
    """Whether another configuration does not do the same."""
    return operator != LOSS_ALL or transform not in _WITHOUT_COEFFICIENTS


@cache
def _registry() -> dict[str, tuple[str, int]]:
    """The classes of the transforms, and the rows of their tables, by name: those of ``csrc/transforms/registry.h``."""
    text = (CSRC / "transforms" / "registry.h").read_text(encoding="utf-8")
    found = {name: (cls, int(rows)) for name, cls, rows in re.findall(r'ROW\("(\w+)", (\w+), (\d+),', text)}
    if not {name for name, _ in TRANSFORMS.values()} <= set(found):
        raise CudaError("csrc/transforms/registry.h has no rows for some of the transforms that are counted")
    return found
