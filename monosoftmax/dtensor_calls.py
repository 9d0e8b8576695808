"""Hands calls that are given DTensors over to :mod:`monosoftmax.distributed`, which is loaded for them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor, without the price of importing torch.distributed.tensor."""
    return type(value) not in _PLAIN and isinstance(value, Tensor) and hasattr(value, "full_tensor")


def for_dtensors(name: str) -> Callable[..., Any]:
    """The function that stands in for ``name`` where an argument is a DTensor."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.distributed.dtensors"), name)
    return function


def takes_dtensors(function: _Function) -> _Function:
    """``function``, a public one; calls with DTensors go to the function of its name for them."""

    @functools.wraps(function)
    def with_dtensors(*args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()):
            if is_dtensor(each):
                return for_dtensors(function.__name__)(*args, **kwargs)
        return function(*args, **kwargs)

    return with_dtensors  # type: ignore[return-value]
