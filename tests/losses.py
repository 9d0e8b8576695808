"""What the tests of the losses share: transforms away from their starting point, and a loss with all its gradients."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import monosoftmax as ms

TRANSFORMS = list(ms.transforms.REGISTRY)
_LEARNED = ("gss", "soft_cap", "sigmoid_cap")


def disturbed(name: str, seed: int = 0, scale: float = 0.3, **settings: Any) -> ms.transforms.MonotonicTransform:
    """The transform ``name`` with learned constants, its raw parameters moved by normal noise."""
    if name in _LEARNED:
        settings["learnable"] = True
    transform = ms.transforms.make(name, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return transform


def loss_and_gradients(
    input: Tensor,
    target: Tensor,
    transform: ms.transforms.MonotonicTransform | None,
    backend: Any,
    dtype: torch.dtype | None = None,
    upstream: tuple[Tensor, ...] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """Loss, lse if asked for, and their gradients for every parameter, all under the ``upstream`` gradients (or 1)."""
    transform = copy.deepcopy(transform)
    if dtype is not None:
        input = input.to(dtype)
        upstream = tuple(each.to(dtype) for each in upstream)
        options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        if transform is not None:
            transform = transform.to(dtype)
    input = input.detach().requires_grad_()
    parameters = {} if transform is None else dict(transform.named_parameters())
    result = ms.cross_entropy(input, target, transform, backend=backend, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(
        outputs,
        [input, *parameters.values()],
        list(upstream) or [torch.ones_like(output) for output in outputs],
    )
    named = dict(zip(["loss", "lse"], (output.detach() for output in outputs), strict=False))
    return named | dict(zip(["input", *parameters], gradients, strict=True))


def head_loss_and_gradients(
    head: Mapping[str, Tensor | None],
    target: Tensor,
    transform: ms.transforms.MonotonicTransform | None,
    backend: Any,
    dtype: torch.dtype | None = None,
    upstream: tuple[Tensor, ...] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """:func:`loss_and_gradients` of linear_cross_entropy, for ``head``: its input, linear_weight and linear_bias."""
    transform = copy.deepcopy(transform)
    if dtype is not None:
        head = {name: each if each is None else each.to(dtype) for name, each in head.items()}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        upstream = tuple(each.to(wide) for each in upstream)
        options = {k: v.to(wide) if isinstance(v, Tensor) else v for k, v in options.items()}
        if transform is not None:
            transform = transform.to(wide)
    leaves = {name: each if each is None else each.detach().clone().requires_grad_() for name, each in head.items()}
    parameters = {} if transform is None else dict(transform.named_parameters())
    result = ms.linear_cross_entropy(
        leaves["input"], leaves["linear_weight"], target, transform, linear_bias=leaves.get("linear_bias"),
        backend=backend, **options,
    )  # fmt: skip
    outputs = result if isinstance(result, tuple) else (result,)
    named = {name: leaf for name, leaf in (*leaves.items(), *parameters.items()) if leaf is not None}
    gradients = torch.autograd.grad(
        outputs, list(named.values()), list(upstream) or [torch.ones_like(output) for output in outputs]
    )
    return dict(zip(["loss", "lse"], (output.detach() for output in outputs), strict=False)) | dict(
        zip(named, gradients, strict=True)
    )


def distance(result: Tensor, truth: Tensor) -> float:
    """Euclidean, in float64."""
    return (result.double() - truth.double()).norm().item()


class ErrorsBesideThoseOfPyTorch:
    """Relative errors of a backend, and of the reference in float32, over draws of what they compute."""

    def __init__(self) -> None:
        self._errors: dict[str, list[tuple[float, float]]] = {}

    def add(self, fused: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
        """One draw. Where the truth is 0, ``fused`` must be that to 1e-7."""
        for key, value in truth.items():
            norm = value.norm().item()
            if norm == 0:
                assert distance(fused[key], value) <= 1e-7, key
            else:
                row = (distance(fused[key], value) / norm, distance(plain[key], value) / norm)
                self._errors.setdefault(key, []).append(row)

    def check(self) -> None:
        """At most twice the error of the reference, plus 1e-7.

        For losses and input gradients over all draws together. For the gradients of parameters in the median draw: they
        are sums that cancel, so that the error of one of them is a draw of luck.
        """
        for key, rows in self._errors.items():
            together = key in ("loss", "input")
            of_fused, of_plain = (
                math.sqrt(statistics.fmean(x * x for x in column)) if together else statistics.median(column)
                for column in zip(*rows, strict=True)
            )
            assert of_fused <= 2 * of_plain + 1e-7, (key, of_fused, of_plain)
