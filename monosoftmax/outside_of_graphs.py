"""What ``torch.compile`` runs as it is, between its graphs.

Imported only while something is compiled: torch.compiler.disable loads Dynamo, which takes a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)
