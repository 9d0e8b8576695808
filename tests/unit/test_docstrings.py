"""The examples in docstrings run, and every public function of :mod:`monosoftmax.functional` has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import monosoftmax as ms

MODULES = [
    module.name
    for module in pkgutil.walk_packages(ms.__path__, "monosoftmax.")
    if not module.name.startswith(
        # tests/integrations/test_integrations.py has the integrations, which need other packages.
        ("monosoftmax.triton_kernels", "monosoftmax._C", "monosoftmax.info", "monosoftmax.integrations.")
    )
]

#: What examples may name without an import, beside what their module does: the public names.
GLOBALS = {"torch": torch, "nn": nn, "monosoftmax": ms, **vars(ms.transforms)} | {
    name: getattr(ms, name) for name in ms.__all__
}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(name), extraglobs=GLOBALS)
    assert results.failed == 0


@pytest.mark.parametrize(
    "function",
    [
        ms.cross_entropy,
        ms.linear_cross_entropy,
        ms.linear_log_prob,
        ms.linear_token_statistics,
        ms.log_prob,
        ms.log_softmax,
        ms.parameter_groups,
        ms.clip_grad_norm_,
        ms.backends.explain,
        ms.MonotonicCrossEntropyLoss,
        ms.MonotonicSoftmax,
    ],
)
def test_there_is_an_example(function: object) -> None:
    assert doctest.DocTestFinder(recurse=False).find(function)[0].examples
