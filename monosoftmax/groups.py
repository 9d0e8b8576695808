"""The named groups that a call carries from the public functions to the kernels.

A group has the same fields, in the same order, in Python, in the schemas of the operators, which are made from it
(:mod:`monosoftmax.ops`), in Triton's launchers and in C++ (``csrc/groups.h``).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Transform(NamedTuple):
    """f, as kernels take it: what ``MonotonicTransform`` calls coefficients, kernel and constants."""

    #: [P], or a table [R, K]; float64 for float64 logits, else float32.
    coefficients: Tensor
    name: str
    constants: list[float]


class LossOptions(NamedTuple):
    """The options of a loss of rows, as :func:`monosoftmax.cross_entropy` defines them."""

    #: [V], of the type of the coefficients.
    weight: Tensor | None
    #: Not read for class probabilities, of which none are ignored.
    ignore_index: int
    label_smoothing: float
    z_loss: float
    #: Whether lse is asked for: that of an ignored row is 0 otherwise.
    return_lse: bool


class Head(NamedTuple):
    """The operands of the logits ``input @ linear_weight.T + linear_bias``."""

    #: [N, d]; the product is formed in its type.
    input: Tensor
    #: [V, d]
    linear_weight: Tensor
    #: [V]
    linear_bias: Tensor | None


class HeadOptions(NamedTuple):
    """How the logits of a head are kept out of memory."""

    #: "auto", "chunked" or "recompute".
    method: str
    #: Rows in a chunk; 0 leaves them to the backend.
    chunk_rows: int
    filter_eps: float


class Upstream(NamedTuple):
    """The gradients of what a loss of rows returns, in the type of the coefficients. An absent one is zero."""

    #: [N], or 0-dim: the same for all rows.
    loss: Tensor | None
    #: [N]
    lse: Tensor | None = None
    #: 0-dim. Where it is 1, nothing is done, and ``grad_rows`` stays as it is; else it multiplies ``loss``.
    factor: Tensor | None = None


class RowResults(NamedTuple):
    """What a row kernel of the loss returns; empty where nothing was asked for."""

    #: [N]; empty where ``row_stats`` was given.
    loss: Tensor
    #: [N]; empty where ``row_stats`` was given.
    lse: Tensor
    #: [2, N]: the largest y of a row, and sum exp(y - largest). [3, N] for class probabilities: and the sum of their q.
    row_stats: Tensor
    #: [N, V]
    grad_rows: Tensor
    #: Of the shape of the coefficients.
    grad_coefficients: Tensor


class HeadGradients(NamedTuple):
    """The gradients of a head's loss; empty where nothing was asked for."""

    input: Tensor
    #: In the type of the coefficients, as that of the bias.
    linear_weight: Tensor
    linear_bias: Tensor
    coefficients: Tensor
