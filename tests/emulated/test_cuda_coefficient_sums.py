"""How the CUDA kernels sum the gradients of coefficients: which way is taken, and how often lanes meet in a piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_host import DEVICES, executing
from losses import disturbed, loss_and_gradients

import monosoftmax as ms


def plan(capability: int, **request: Any) -> Any:
    with executing(capability, 132) as host:
        return host.plan(request.pop("transform", "plif"), request.pop("size", 64), **{"rows": 8192} | request)


@pytest.mark.parametrize(
    ("capability", "classes", "rows", "cluster", "threads"),
    [
        (90, 50304, "resident", 1, 224),
        (90, 128256, "resident", 2, 192),
        (90, 262144, "resident", 8, 256),
        (80, 50304, "reread", 1, 256),
        (80, 32000, "resident", 1, 192),
        (86, 50304, "reread", 1, 160),
        (75, 32000, "reread", 1, 96),
    ],
)
def test_where_rows_are_kept(capability: int, classes: int, rows: str, cluster: int, threads: int) -> None:
    """bf16 rows with tables of 64 pieces, 65 entries of 8 bytes for each thread."""
    found = plan(capability, classes=classes)
    assert (found["rows"], found["sums"]) == (rows, "lanes")
    assert (found["cluster"], found["threads"]) == (cluster, threads)
    assert found["shared_bytes"] + 1024 <= DEVICES[capability]


def test_rows_without_tables_are_kept_in_fewer_blocks() -> None:
    assert plan(90, classes=50304, coefficients=False)["cluster"] == 1
    assert plan(90, classes=128256, transform="gss", size=2)["cluster"] == 2
    assert plan(80, classes=50304, coefficients=False)["rows"] == "resident"
    assert plan(86, classes=50304, coefficients=False)["rows"] == "reread"
    few = plan(90, classes=128256, coefficients=False, rows=8)
    assert few["cluster"] == 8 and few["blocks"] == 64


def test_what_is_summed_where() -> None:
    assert plan(90, classes=32000, transform="gss", size=2)["sums"] == "vector"
    assert plan(90, classes=32000, transform="monotonic_mlp", size=64)["sums"] == "lanes"
    assert plan(90, classes=32000, transform="spline", size=16)["sums"] == "lanes"
    assert plan(90, classes=32000, transform="identity", size=0)["sums"] == "none"
    assert plan(90, classes=32000, coefficients=False)["sums"] == "none"
    assert plan(90, classes=32000, size=256)["sums"] == "lanes"
    assert plan(75, classes=32000, size=256)["sums"] == "warps"
    large = plan(90, classes=32000, size=100_000)
    assert large["sums"] == "warps" and large["atomic"] and large["sum_sets"] == 1
    deterministic = plan(90, classes=32000, size=100_000, deterministic=True)
    assert not deterministic["atomic"] and deterministic["sum_sets"] * 8 * 100_000 <= 256 << 20
    huge = plan(90, classes=32000, size=1 << 22, deterministic=True)
    assert huge["sum_sets"] * 8 << 22 <= 256 << 20


def test_class_weights_with_smoothed_labels_read_rows_again() -> None:
    assert plan(90, classes=32000, weighted_smoothing=True)["rows"] == "reread"


def test_explain_says_how() -> None:
    input = torch.zeros(4, 5000)
    with executing():
        explanation = ms.backends.explain("cross_entropy", input, ms.transforms.PLIF(num_pieces=64), backend="cuda")
        assert "shared memory of a block of 256 threads" in explanation.how
        assert "a table of each thread in shared memory" in explanation.how
        assert "fused CUDA kernel each way" in ms.backends.explain("log_softmax", input, backend="cuda").how
        assert "chunks of rows" in ms.backends.explain("linear_cross_entropy", input, backend="cuda").how
        with pytest.raises(ValueError, match='no method="recompute"'):
            ms.backends.explain("linear_cross_entropy", input, backend="cuda", method="recompute")
        assert str(ms.backends.available()["cuda"]) == "available: CUDA C++, executed on the CPU"
    assert "executed on the CPU" not in ms.backends.available()["cuda"].detail


def test_lanes_meet_in_pieces() -> None:
    """Of a normal bulk of logits and a few large ones, most lanes of a warp meet others.

    That is why each thread has a table of its own: with one for a warp, the additions of a warp to one address would
    wait for each other. Counted where lanes are matched, in the kernel for tables of warps.
    """
    torch.manual_seed(0)
    rows, classes = 2, 32000
    input = 2.2 * torch.randn(rows, classes) - 3
    input[:, :20] += 12
    transform = disturbed("plif", num_pieces=64, bound=20.0)
    with executing(75) as host:
        # As for a GPU that has no shared memory left for tables.
        host.set_device(75, 2, 20 << 10)
        host.reset_matches()
        warps = loss_and_gradients(input, torch.tensor([3, 31999]), transform, "cuda")
        calls, groups = host.matches()
    assert calls >= rows * classes
    lanes_in_a_piece = calls / groups
    assert 2 < lanes_in_a_piece < 4, lanes_in_a_piece
    with executing() as host:
        lanes = loss_and_gradients(input, torch.tensor([3, 31999]), transform, "cuda")
    torch.testing.assert_close(lanes["raw_slope"], warps["raw_slope"], rtol=1e-4, atol=1e-6)
