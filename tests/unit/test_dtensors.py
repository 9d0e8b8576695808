"""DTensors and layers of torch.distributed, on four processes: what one process finds with whole tensors."""

from __future__ import annotations

from pathlib import Path

import dtensor_cases
import pytest
import ranks
import torch

import monosoftmax as ms

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no gloo"
)


def all_right(found: list[list[str]]) -> None:
    for rank, problems in enumerate(found):
        assert not problems, f"rank {rank}:\n" + "\n".join(problems)


@pytest.mark.parametrize("classes", [dtensor_cases.CLASSES, 3])
def test_placings_of_a_head(classes: int) -> None:
    all_right(ranks.call(4, dtensor_cases.heads, classes))


def test_placings_of_logits() -> None:
    all_right(ranks.call(4, dtensor_cases.logits))


def test_results_that_all_ranks_have_are_plain() -> None:
    wanted = ("plain", "(Shard(dim=0), Replicate())", "(Shard(dim=0), Shard(dim=1))", "plain")
    assert ranks.call(4, dtensor_cases.placements_of_results) == [wanted] * 4


def test_what_is_refused() -> None:
    all_right(ranks.call(4, dtensor_cases.refusals))


def test_styles_of_layers() -> None:
    all_right(ranks.call(4, dtensor_cases.layers))


@pytest.mark.parametrize("transform", ["plif", "gss"])
def test_data_times_classes(transform: str) -> None:
    all_right(ranks.call(4, dtensor_cases.trained, transform))


@pytest.mark.parametrize("size", [2, 4])
def test_samples_have_the_distribution(size: int) -> None:
    """Chi squared of 6 degrees of freedom exceeds 35 once in 200,000 times, and the seed is fixed."""
    count = 20_000
    found = ranks.call(size, dtensor_cases.samples, count)
    assert all(each == found[0] for each in found)
    drawn, p = found[0]
    assert sum((n - count * q) ** 2 / (count * q) for n, q in zip(drawn, p, strict=True)) < 35


def test_samples_of_one_device() -> None:
    torch.manual_seed(4)
    layer, hidden, count = ms.MonotonicSoftmax(12, 7, ms.transforms.SoftCap(3.0)), torch.randn(1, 12), 20_000
    drawn = layer.sample(hidden.expand(count, -1), temperature=0.5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        p = ms.log_softmax(layer.logits(hidden), layer.transform, temperature=0.5).exp()[0]
    observed = torch.bincount(drawn, minlength=7)
    assert float(((observed - count * p) ** 2 / (count * p)).sum()) < 35
    assert layer.sample(torch.randn(2, 3, 12)).shape == (2, 3)
    with pytest.raises(ValueError, match="temperature must be positive"):
        layer.sample(hidden, temperature=0.0)


@pytest.mark.parametrize("size", [1, 4])
def test_checkpoints_of_two_ranks_are_read_by(size: int, tmp_path: Path) -> None:
    before = ranks.call(2, dtensor_cases.saved, str(tmp_path), False)
    for found in ranks.call(size, dtensor_cases.saved, str(tmp_path), True):
        assert all(torch.equal(a, b) for a, b in zip(before[0], found, strict=True))
