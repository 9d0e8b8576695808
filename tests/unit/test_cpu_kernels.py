"""The cpu kernels: rows shared among threads, tables of every size, logits whose probabilities are subnormal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from losses import TRANSFORMS, distance, disturbed, loss_and_gradients
from torch import Tensor

import monosoftmax as ms


def _log_softmax_and_gradients(
    input: Tensor, transform: ms.transforms.MonotonicTransform, upstream: Tensor
) -> dict[str, Tensor]:
    leaf = input.clone().requires_grad_()
    output = ms.log_softmax(leaf, transform, backend="cpu")
    names = ["input", *dict(transform.named_parameters())]
    gradients = torch.autograd.grad(output, [leaf, *transform.parameters()], upstream)
    return {"output": output.detach()} | dict(zip(names, gradients, strict=True))


@pytest.mark.grid
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}, {"return_lse": True}, {"reduction": "none"}, {"weight": True}],
)
@pytest.mark.parametrize("classes", [8192, 12345])
def test_columns_are_shared_where_rows_are_few(name: str, options: dict[str, Any], classes: int) -> None:
    """Two rows among three and four threads are what they are on one, to rounding; and the same in every run."""
    torch.manual_seed(classes)
    input = 3 * torch.randn(2, classes, dtype=torch.float64)
    target = torch.tensor([classes - 2, -100])
    transform = disturbed(name).double()
    if options.get("weight"):
        options = {"weight": torch.rand(classes, dtype=torch.float64)}
    upstream = torch.randn(2, classes, dtype=torch.float64)
    results = []
    for threads in (1, 3, 4, 4):
        torch.set_num_threads(threads)
        result = loss_and_gradients(input, target, transform, "cpu", **options)
        result |= {f"log {k}": v for k, v in _log_softmax_and_gradients(input, transform, upstream).items()}
        results.append(result)
    for key, wanted in results[0].items():
        scale = wanted.abs().max().item() if wanted.numel() else 1.0
        for result in results[1:]:
            torch.testing.assert_close(result[key], wanted, rtol=1e-11, atol=1e-12 * max(scale, 1e-3), msg=key)
        assert torch.equal(results[2][key], results[3][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("of_output", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_log_softmax_of_another_dtype(dtype: torch.dtype, of_output: torch.dtype) -> None:
    """An upstream gradient of any type is read as what it is."""
    torch.manual_seed(0)
    input, upstream = torch.randn(3, 1050).to(dtype), torch.randn(3, 1050).to(of_output)
    gradients = []
    for backend in ("reference", "cpu"):
        leaf = input.clone().requires_grad_()
        ms.log_softmax(leaf, dtype=of_output, backend=backend).backward(upstream)
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.grid
@pytest.mark.parametrize("name", ["plif", "spline"])
@pytest.mark.parametrize("pieces", [1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 3000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_tables_of_every_size(name: str, pieces: int, label_smoothing: float) -> None:
    """Sizes about those at which tables leave the registers and histograms leave the row."""
    torch.manual_seed(pieces)
    settings = {"num_pieces": pieces, "bound": 5.0} if name == "plif" else {"num_bins": pieces, "bound": 5.0}
    transform = disturbed(name, **settings)
    input = 3 * torch.randn(5, 2051)
    target = torch.randint(0, 2051, (5,))
    input[3, target[3]] += 30
    arguments = (input, target, transform)
    truth = loss_and_gradients(*arguments, "reference", torch.float64, label_smoothing=label_smoothing)
    plain = loss_and_gradients(*arguments, "reference", label_smoothing=label_smoothing)
    fused = loss_and_gradients(*arguments, "cpu", label_smoothing=label_smoothing)
    for key, value in truth.items():
        assert distance(fused[key], value) <= 2 * distance(plain[key], value) + 1e-6 * value.norm().item(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_below_the_smallest_normal_number(dtype: torch.dtype) -> None:
    """They and their gradients are 0, in the row and in the threads' state afterwards."""
    input = torch.linspace(-110, 0, 4001).repeat(3, 1).to(dtype)
    target = torch.tensor([4000, 4000, 0])
    result = loss_and_gradients(input, target, None, "cpu", reduction="sum")
    truth = loss_and_gradients(input.double(), target, None, "reference", reduction="sum")
    tiny = torch.finfo(torch.float32).tiny
    assert result["input"].float().abs()[truth["input"].abs() < tiny / 2].max() == 0
    torch.testing.assert_close(result["input"].double(), truth["input"], rtol=8e-3, atol=1e-6)
    torch.testing.assert_close(result["loss"].double(), truth["loss"], rtol=1e-6, atol=0)
    subnormal = torch.full((100_000,), 1e-38) * 0.1
    assert (subnormal > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("std", [1.0, 20.0])
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if list(disturbed(name).parameters())])
def test_parameter_gradients_of_a_large_batch(name: str, std: float) -> None:
    """At most 1e-5 from the float64 truth, relative, at N = 4096 and V = 50257.

    The truth is the cpu backend's in float64, which is the reference's to 1e-12 (test_cross_entropy.py), in less
    memory. The numbers of a vector may cancel (a shift of y has no gradient): each may be off by 1e-5 of the largest.
    """
    rows, classes, chunk = 4096, 50257, 256
    generator = torch.Generator().manual_seed(3)
    input = std * torch.randn(rows, classes, generator=generator)
    target = torch.randint(0, classes, (rows,), generator=generator)
    transform = disturbed(name)
    ms.cross_entropy(input, target, transform, backend="cpu").backward()
    got = {key: parameter.grad for key, parameter in transform.named_parameters()}
    transform = disturbed(name).double()
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        loss = ms.cross_entropy(input[part].double(), target[part], transform, backend="cpu", reduction="sum")
        (loss / rows).backward()
    for key, parameter in transform.named_parameters():
        assert parameter.grad is not None and got[key] is not None
        error = (got[key].double() - parameter.grad).abs().max().item()
        assert error <= 1e-5 * parameter.grad.abs().max().item(), (key, error)
