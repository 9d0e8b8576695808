"""What no implementation can beat, measured in turn with the contestants: a copy in memory, bare matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs
from .timing import Action

COPY, PRODUCTS = "copy", "products"
#: Bytes of each of the two buffers of the copy: several times the last-level cache of a CPU or GPU.
COPY_BUFFER_BYTES = 2**27


@dataclass(frozen=True)
class Probe:
    """Something to time in turn with the contestants, and the work that one call of it does."""

    action: Action
    #: Bytes moved, read and written, or floating-point operations.
    work: int


def probes(case: Case, inputs: Inputs) -> dict[str, Probe]:
    """The copy, and for the head the products. Their buffers are made here, once, and written to here, once."""
    found = {COPY: _copy(inputs.target.device)}
    if case.dim is not None:
        found[PRODUCTS] = Probe(_products(case, *(operand.detach() for operand in inputs.operands)), case.flops)
    return found


def probe_bytes(case: Case) -> int:
    """Bytes that the buffers of :func:`probes` take."""
    if case.dim is None:
        return 2 * COPY_BUFFER_BYTES
    return 2 * COPY_BUFFER_BYTES + case.logits_bytes + (case.operand_bytes if case.mode == "train" else 0)


def floor(case: Case, medians: dict[str, float]) -> dict[str, Any]:
    """The floor of a case, from the median seconds of the probes.

    The time for the least bytes at the bandwidth of the copy and that for the matrix products, which are measured at
    the case's own shape: whichever is longer is the floor. Data that fits in a cache can be faster than memory.
    """
    bandwidth = 2 * COPY_BUFFER_BYTES / medians[COPY]
    memory_ms = 1e3 * case.minimum_bytes / bandwidth
    products_ms = 1e3 * medians[PRODUCTS] if PRODUCTS in medians else None
    return {
        "bytes": case.minimum_bytes,
        "bytes_per_second": bandwidth,
        "memory_ms": memory_ms,
        "flops": case.flops,
        "flops_per_second": case.flops / medians[PRODUCTS] if PRODUCTS in medians else None,
        "products_ms": products_ms,
        "ms": max(memory_ms, products_ms or 0.0),
    }


def _copy(device: torch.device) -> Probe:
    source, copied = (torch.ones(COPY_BUFFER_BYTES // 4, device=device) for _ in range(2))
    return Probe(lambda: copied.copy_(source), 2 * COPY_BUFFER_BYTES)


def _products(case: Case, input: Tensor, weight: Tensor) -> Action:
    """logits = x W^T and, in ``train``, dx = g W and dW = g^T x with the logits in the place of g."""
    logits = input.new_zeros(case.rows, case.classes)
    if case.mode == "no-grad":
        return lambda: torch.mm(input, weight.T, out=logits)
    grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)

    def products() -> None:
        torch.mm(input, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_input)
        torch.mm(logits.T, input, out=grad_weight)

    return products
