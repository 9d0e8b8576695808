"""Losses of torch and of other packages, and why one of them cannot run here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Unavailable(Exception):
    """A contestant cannot run here; the message says why."""


def linear_cross_entropy(chunked: bool) -> Callable[..., Tensor]:
    """torch.nn.functional.linear_cross_entropy(input, weight, target), with its options for chunks where asked for.

    Raises:
        Unavailable: this torch has no such function, or no options for it.
    """
    function: Callable[..., Tensor] | None = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    if not chunked:
        return function
    make_options: Callable[[], Any] | None = getattr(nn, "LinearCrossEntropyOptions", None)
    if make_options is None:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions")
    options = make_options()
    return lambda input, weight, target: function(input, weight, target, options=options)


@cache
def cut_cross_entropy() -> tuple[Callable[..., Tensor], str]:
    """``torch_compile`` of cut-cross-entropy (Wijmans et al., ICLR 2025), and how it was imported.

    Raises:
        Unavailable: the package is not installed.
    """
    try:
        module = _import("cut_cross_entropy.torch_compile")
        note = ""
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        module = _without_kernels()
        note = (
            "its module torch_compile alone: the package itself imports its Triton kernels on every system but macOS, "
            "and triton is not installed"
        )
    loss: Callable[..., Tensor] = module.torch_compile_linear_cross_entropy
    return loss, note


def cut_cross_entropy_kernels(device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """The Triton kernels of cut-cross-entropy, and what they leave out.

    Raises:
        Unavailable: the package is not installed, or its kernels do not run on ``device``.
    """
    if device.type != "cuda":
        raise Unavailable(f"the kernels of cut-cross-entropy need a GPU, inputs are on {device}")
    function = _import("cut_cross_entropy").linear_cross_entropy
    note = 'filter_eps="high", its default: tiles whose gradients of the logits are all small count as zero'
    return lambda input, weight, target: function(input, weight, target, impl="cce"), note


def liger_cross_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's cross entropy of (logits, target). Where the logits require a gradient, it overwrites them with it.

    Raises:
        Unavailable: the package is not installed.
    """
    function = _import("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    return lambda logits, target: function.apply(logits, target, None)[0]


def liger_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's loss of (input, weight, target), which forms the logits in chunks of rows.

    Raises:
        Unavailable: the package is not installed.
    """
    function = _import("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    return lambda input, weight, target: function.apply(input, weight, target)[0]


def _import(module: str) -> ModuleType:
    """A module of a package of requirements/peers.txt; :class:`Unavailable` where the package is not installed."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        name = package.replace("_", "-")
        raise Unavailable(f"{name} is not installed: pip install --no-deps -r requirements/peers.txt") from None


def _without_kernels() -> ModuleType:
    """``cut_cross_entropy.torch_compile``, imported without running ``cut_cross_entropy/__init__.py``.

    The package imports its Triton kernels in ``__init__``; this module and what it imports need none. A bare package
    stands in for it during the import, and is then forgotten: importing the package still fails as it did before.
    """
    package = "cut_cross_entropy"
    specification = importlib.util.find_spec(package)
    assert specification is not None  # The caller has just seen the import of it fail halfway.
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = importlib.util.module_from_spec(specification)
    try:
        return importlib.import_module(f"{package}.torch_compile")
    finally:
        del sys.modules[package]
