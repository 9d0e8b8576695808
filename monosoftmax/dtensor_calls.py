"""Hands calls that are given DTensors over to :mod:`monosoftmax.distributed`, which is loaded for them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ._dispatch import outside_of_graphs

_Function = TypeVar("_Function", bound=Callable[..., Any])


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor. Nothing is one where nobody has loaded torch.distributed.tensor."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(value, loaded.DTensor)


@outside_of_graphs
def call_for_dtensors(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Calls the function that stands in for ``name`` where an argument is a DTensor."""
    return getattr(importlib.import_module(f"{__package__}.distributed.dtensors"), name)(*args, **kwargs)


def takes_dtensors(function: _Function) -> _Function:
    """``function``, a public one; calls with DTensors go to the function of its name for them."""

    @functools.wraps(function)
    def with_dtensors(*args: Any, **kwargs: Any) -> Any:
        for each in (*args, *kwargs.values()):
            if is_dtensor(each):
                return call_for_dtensors(function.__name__, *args, **kwargs)
        return function(*args, **kwargs)

    return with_dtensors  # type: ignore[return-value]
