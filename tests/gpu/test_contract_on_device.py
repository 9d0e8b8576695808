"""The contract of the row kernels on a device: chains, temperatures, the entropy, other targets, shards."""

from __future__ import annotations

from typing import Any

import pytest
import row_contract
import torch
from losses import TRANSFORMS
from row_contract import Composition, compositions

from monosoftmax.row_kernels import row_kernels

BACKENDS = ["cuda", "triton"]
#: Several tiles, one of them not whole, where a device is; emulators take few classes.
SHAPES = {"cuda": (9, 4099), "cpu": (5, 77)}


def case(name: str, composition: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, Composition]:
    around = compositions(name)[composition]
    return row_contract.logits(dtype, SHAPES[device.type], device=device), around._replace(
        module=around.module.to(device)
    )


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_composition_and_entropy(backend: Any, name: str, dtype: torch.dtype, device: torch.device) -> None:
    for number in (0, 4):
        rows, composition = case(name, number, dtype, device)
        row_contract.check_composition(row_kernels(backend), rows, composition)
        row_contract.check_entropy_gradient(row_kernels(backend), rows, composition)


@pytest.mark.emulated
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_of_all_classes(backend: Any, name: str, device: torch.device) -> None:
    rows, composition = case(name, 4, torch.float32, device)
    row_contract.check_probabilities(row_kernels(backend), rows, composition)
    row_contract.check_divergence(row_kernels(backend), rows, composition, log_dtype=torch.float32)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shards(backend: Any, name: str, dtype: torch.dtype, device: torch.device) -> None:
    rows, composition = case(name, 1, dtype, device)
    row_contract.check_shards(row_kernels(backend), rows, composition)
    row_contract.check_smoothed_shards(row_kernels(backend), rows, composition)
