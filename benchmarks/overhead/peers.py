"""Losses of torch and of other packages, and why one of them cannot run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[..., Tensor]


class Unavailable(Exception):
    """A contestant cannot run here; the message says why."""


def linear_cross_entropy(chunked: bool) -> Loss:
    """torch.nn.functional.linear_cross_entropy(input, weight, target), with its options for chunks where asked for."""
    if not (hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")):
        raise Unavailable(f"torch {torch.__version__} has no such function, or no options for it")
    given = {"options": nn.LinearCrossEntropyOptions()} if chunked else {}
    return lambda input, weight, target: F.linear_cross_entropy(input, weight, target, **given)


def cut_cross_entropy(kernels: bool, device: torch.device) -> Loss:
    """Cut-cross-entropy (Wijmans et al., ICLR 2025): its Triton kernels, or its ``torch_compile``.

    The kernels by default count tiles whose gradients are all small as zero.
    """
    if not kernels:
        found: Loss = _import("cut_cross_entropy.torch_compile").torch_compile_linear_cross_entropy
        return found
    if device.type != "cuda":
        raise Unavailable(f"the kernels of cut-cross-entropy need a GPU, inputs are on {device}")
    function = _import("cut_cross_entropy").linear_cross_entropy
    return lambda input, weight, target: function(input, weight, target, impl="cce")


def liger(group: str) -> Loss:
    """Liger's loss of (logits, target), whose gradient overwrites the logits, or of (input, weight, target)."""
    if group == "head":
        head = _import("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
        return lambda input, weight, target: head.apply(input, weight, target)[0]
    loss = _import("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    return lambda logits, target: loss.apply(logits, target, None)[0]


def _import(module: str) -> Any:
    """A module of a package of requirements/peers.txt; :class:`Unavailable` where it, or triton, is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module.partition(".")[0], "triton"):
            raise
        raise Unavailable(f"{error.name} is not installed: pip install --no-deps -r requirements/peers.txt") from None
