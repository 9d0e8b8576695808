"""What every test shares: GPU tests skip with a reason, and hypothesis has no deadline on shared machines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("monosoftmax", deadline=None)
settings.load_profile("monosoftmax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch finds no GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
