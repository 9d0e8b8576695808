"""The selection of tests/tiers.py, and the key of the cache of tests/cuda_host.py."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import cuda_host
import pytest
from tiers import covering

SIZES = [(2, 3, 2, 3, 4), (9, 3, 2, 2, 4), (3, 3), (5,), (1, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("strength", [1, 2])
def test_every_combination_of_values_occurs(sizes: tuple[int, ...], strength: int) -> None:
    cases = list(itertools.product(*(map(str, range(size)) for size in sizes)))
    taken = [cases[number] for number in covering(cases, strength)]
    for columns in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
        wanted = {tuple(case[column] for column in columns) for case in cases}
        assert {tuple(case[column] for column in columns) for case in taken} == wanted
    largest = sorted(sizes)[-strength:]
    fewest = largest[0] * largest[-1] if strength == 2 and len(sizes) > 1 else largest[-1]
    assert fewest <= len(taken) <= 1.5 * fewest


def test_what_does_not_exist_need_not_occur() -> None:
    """Of ``a`` with ``1`` there is no case."""
    assert covering([("a", "0"), ("b", "0"), ("b", "1")], 2) == [0, 1, 2]
    assert covering([("a", "0"), ("b", "0"), ("b", "1")], 1) == [0, 2]


def test_the_key_of_a_build_is_that_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another checkout has the same key. A header, a new file, or a flag changes it; a C++ test does not."""
    here = cuda_host.hash_of_sources()
    shutil.copytree(cuda_host._CSRC, tmp_path / "csrc")
    monkeypatch.setattr(cuda_host, "_CSRC", tmp_path / "csrc")
    assert cuda_host.hash_of_sources() == here
    (tmp_path / "csrc/tests/test_row.cpp").write_text("")
    assert cuda_host.hash_of_sources() == here
    keys = {here}
    for name in ("transforms/plif.h", "cuda/host/fiber.cpp", "cuda/new.cuh"):
        with (tmp_path / "csrc" / name).open("a") as file:
            file.write("\n")
        keys.add(cuda_host.hash_of_sources())
    monkeypatch.setattr(cuda_host, "_FLAGS", (*cuda_host._FLAGS, "-O2"))
    keys.add(cuda_host.hash_of_sources())
    assert len(keys) == 5
