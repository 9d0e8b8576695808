"""What no implementation can beat, measured in turn with the contestants: a copy in memory, bare matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs
from .timing import Action

COPY, PRODUCTS = "copy", "products"
#: Bytes of each of the two buffers of the copy, by the type of the device: many times its last-level cache.
COPY_BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**29}


@dataclass(frozen=True)
class Probe:
    """Something to time in turn with the contestants, and the work that one call of it does."""

    action: Action
    #: Bytes moved, read and written, or floating-point operations.
    work: int


def probes(case: Case, inputs: Inputs) -> dict[str, Probe]:
    """The copy, and for the head the products. Their buffers are made here, once, and written to here, once."""
    found = {COPY: copy_probe(inputs.target.device)}
    if case.dim is not None:
        found[PRODUCTS] = Probe(_products(case, *(operand.detach() for operand in inputs.operands)), case.flops)
    return found


def probe_bytes(case: Case, device: torch.device) -> int:
    """Bytes that the buffers of :func:`probes` take."""
    copy = 2 * COPY_BUFFER_BYTES[device.type]
    if case.dim is None:
        return copy
    return copy + case.logits_bytes + (case.operand_bytes if case.mode == "train" else 0)


def floor(case: Case, rates: Mapping[str, float]) -> dict[str, Any]:
    """The floor of a case, from the work that each probe does in a second.

    The time for the least bytes at the bandwidth of the copy and that for the matrix products, which are measured at
    the case's own shape: whichever is longer is the floor. Data that fits in a cache can be faster than memory.
    """
    memory_ms = 1e3 * case.minimum_bytes / rates[COPY]
    products_ms = 1e3 * case.flops / rates[PRODUCTS] if PRODUCTS in rates else None
    return {
        "bytes": case.minimum_bytes,
        "bytes_per_second": rates[COPY],
        "memory_ms": memory_ms,
        "flops": case.flops,
        "flops_per_second": rates.get(PRODUCTS),
        "products_ms": products_ms,
        "ms": max(memory_ms, products_ms or 0.0),
    }


def copy_probe(device: torch.device) -> Probe:
    """A copy between two buffers of their own."""
    size = COPY_BUFFER_BYTES[device.type]
    source, copied = (torch.ones(size // 4, device=device) for _ in range(2))
    return Probe(lambda: copied.copy_(source), 2 * size)


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
