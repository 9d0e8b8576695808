"""The named groups that a call carries from the public functions to the kernels.

A group has the same fields in the same order everywhere: in Python, in the schemas of the operators, which are made
from it (:mod:`monosoftmax.ops`), in Triton's launchers and in C++ (``csrc/groups.h``).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Transform(NamedTuple):
    """What the kernels do to logits: y = f(inner(z)) / temperature."""

    #: [P], or a table [R, K]; float64 for float64 logits, otherwise float32.
    coefficients: Tensor
    name: str
    constants: list[float]
    #: Empty: inner(z) = z. Otherwise [scale, cap] with scale > 0: inner(z) = cap tanh(scale z / cap), and scale z where
    #: cap is 0.
    inner: list[float] = []  # noqa: RUF012 (nobody writes to it)
    #: 0-dim, of the type and on the device of the coefficients; None is 1. What is not positive makes all results NaN.
    temperature: Tensor | None = None


class LossOptions(NamedTuple):
    """The options of a loss of rows, as :func:`monosoftmax.cross_entropy` defines them."""

    #: [V], in the type of the coefficients.
    weight: Tensor | None
    #: Not read for class probabilities, since no row of them is ignored.
    ignore_index: int
    label_smoothing: float
    z_loss: float
    #: Whether the call needs lse. Otherwise the lse of an ignored row is 0.
    return_lse: bool


class Head(NamedTuple):
    """The operands of the logits ``input @ linear_weight.T + linear_bias``."""

    #: [N, d]; the product is computed in its type.
    input: Tensor
    #: [V, d]
    linear_weight: Tensor
    #: [V]
    linear_bias: Tensor | None


class HeadOptions(NamedTuple):
    """The way in which a head keeps its logits out of memory."""

    #: "auto", "chunked" or "recompute".
    method: str
    #: Rows in a chunk; 0 leaves the number to the backend.
    chunk_rows: int
    filter_eps: float


class Teacher(NamedTuple):
    """The head and the transform whose probabilities are a target: as :class:`Head` and :class:`Transform`."""

    teacher_input: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    teacher_coefficients: Tensor
    teacher_name: str
    teacher_constants: list[float]
    teacher_inner: list[float]
    teacher_temperature: Tensor | None

    def head(self) -> Head:
        return Head(*self[:3])

    def transform(self) -> Transform:
        return Transform(*self[3:])


class Divergence(NamedTuple):
    """A divergence of p from q: see ``RowKernels.divergence``."""

    kind: str
    beta: float


class Upstream(NamedTuple):
    """The gradients of the results of a loss of rows, in the type of the coefficients. An absent gradient is zero."""

    #: [N], or 0-dim: the same for all rows.
    loss: Tensor | None
    #: [N]
    lse: Tensor | None = None
    #: 0-dim. It multiplies ``loss``. If it is 1, the kernel does nothing, and ``grad_rows`` stays as it is.
    factor: Tensor | None = None
    #: [N]: of the entropy of p. It needs indices as the target, and the row_stats of ``token_statistics``.
    entropy: Tensor | None = None


class TokenStatistics(NamedTuple):
    """What a row kernel finds out about each token, [N]. Entropy, argmax and lse are also those of ignored rows."""

    #: Of the target; 0 in ignored rows.
    log_prob: Tensor
    entropy: Tensor
    argmax: Tensor
    lse: Tensor
    #: The number of logits larger than that of the target; -1 in ignored rows.
    rank: Tensor
    #: [3, N]: those of :class:`RowResults`, and what the kernel needs for the gradient of the entropy.
    row_stats: Tensor


class RowResults(NamedTuple):
    """The results of a row kernel of the loss. A result is empty unless the call asks for it."""

    #: [N]; empty if ``row_stats`` was given.
    loss: Tensor
    #: [N]; empty if ``row_stats`` was given.
    lse: Tensor
    #: [2, N]: the largest y of a row, and sum exp(y - largest). [3, N] for a target of all classes: the third number is
    #: sum_j q_j for class probabilities, else the kernel's own. Without a meaning if ``row_stats`` was given.
    row_stats: Tensor
    #: [N, V]
    grad_rows: Tensor
    #: In the shape of the coefficients.
    grad_coefficients: Tensor


class HeadGradients(NamedTuple):
    """The gradients of a head's loss. A gradient is empty unless the call asks for it."""

    input: Tensor
    #: In the type of the coefficients, as the gradient of the bias.
    linear_weight: Tensor
    linear_bias: Tensor
    coefficients: Tensor
