"""Heads and transforms that two processes share, in all the ways that torch has for it: tests/hands_sharded.py."""

from __future__ import annotations

from pathlib import Path

import hands_sharded
import pytest
import ranks
import torch
from hands import check_table
from hands_in_processes import TIMEOUT, WORLD


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_table(tmp_path: Path) -> None:
    with ranks.Group(WORLD, group_timeout=30) as group:
        first, second = group.call(hands_sharded.table, str(tmp_path), timeout=TIMEOUT)
    for row, cells in first.items():
        for transform, cell in cells.items():
            for rank, found in enumerate((cell, second[row][transform])):
                assert not found.startswith("wrong"), f"{row} of {transform} on rank {rank} is {found}"
    assert first == second
    check_table("Sharded and replicated", first)
