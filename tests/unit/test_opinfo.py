"""torch's own samples of nn.functional.cross_entropy and linear_cross_entropy, given to ours.

The samples are those by which PyTorch tests these functions (their OpInfo), as the installed torch has them. Values and
gradients are held to torch's function in float64. What ours do not take is in :data:`LISTED`, with its reason.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiers import mostly_slow
from torch import Tensor
from torch.nn import functional as F

import monosoftmax as ms

pytestmark = pytest.mark.seconds  # torch makes all of its samples' makers at once

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "nn.functional.cross_entropy": ms.cross_entropy,
    "nn.functional.linear_cross_entropy": ms.linear_cross_entropy,
}

#: What keeps a call from being a call of ours as it is, and what is done about it.
LISTED = {
    "gradient of class probabilities": "the reference backend has it, cpu refuses it: there they require no gradient",
    "options": "of the chunks that torch works in, which do not change the loss: left out",
}

#: The samples of each variant in torch 2.13, for float32 and float64, and for bfloat16 and float16.
COUNTS = {
    "nn.functional.cross_entropy": (21, 21),
    "nn.functional.linear_cross_entropy": (119, 119),
    "nn.functional.linear_cross_entropy chunked": (133, 161),
    "nn.functional.linear_cross_entropy chunked_none": (77, 91),
}
COUNTED = torch.__version__.startswith("2.13.")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For samples this small, threads only wait for each other. tests/conftest.py brings back the others."""
    torch.set_num_threads(1)


@functools.cache
def variants() -> dict[str, Any]:
    """The OpInfos by name and variant."""
    pytest.importorskip("expecttest", reason="torch's samples need expecttest, which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {f"{each.name} {each.variant_test_name}".strip(): each for each in op_db if each.name in FUNCTIONS}


def opinfo(name: str) -> Any:
    """Skips where the installed torch does not have the function or the variant."""
    if name not in variants():
        assert not COUNTED, name
        pytest.skip(f"torch {torch.__version__} has no {name}")
    return variants()[name]


@functools.cache
def samples(name: str, dtype: torch.dtype) -> list[Any]:
    """The same in every run; OpInfo.sample_inputs, which seeds each one, takes longer than the losses of them."""
    torch.manual_seed(0)
    random.seed(0)
    info = opinfo(name)
    return list(info.sample_inputs_func(info, "cpu", dtype, True))


def tensors(call: Sequence[Any], options: dict[str, Any]) -> list[Tensor]:
    """The leaves that require gradients, in the order of the arguments."""
    return [each for each in (*call, *options.values()) if isinstance(each, Tensor) and each.requires_grad]


def in_float64(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    floating = value.is_floating_point()
    return value.detach().to(torch.float64 if floating else value.dtype).requires_grad_(value.requires_grad)


def ours(backend: str, call: Sequence[Any], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any], set[str]]:
    """The sample as a call of ours, and what it is listed for."""
    call, options, listed = list(call), dict(options), set()
    if "options" in options:
        listed.add("options")
        del options["options"]
    if backend != "reference" and call[-1].requires_grad:
        listed.add("gradient of class probabilities")
        call[-1] = call[-1].detach()
    return call, options, listed


def check(found: Tensor, leaves: Sequence[Tensor], wanted: Tensor, wanted_leaves: Sequence[Tensor], eps: float) -> None:
    """The loss and the gradients to some roundings of the largest number of each."""
    assert found.shape == wanted.shape
    upstream = torch.linspace(0.5, 1.5, wanted.numel(), dtype=torch.float64).reshape(wanted.shape)
    got = torch.autograd.grad(found, leaves, upstream.to(found.dtype))
    true = torch.autograd.grad(wanted, wanted_leaves, upstream)
    for mine, torchs in zip((found.detach(), *got), (wanted.detach(), *true), strict=True):
        assert mine.shape == torchs.shape
        scale = max(torchs.abs().max().item(), 1.0)
        error = (mine.double() - torchs).abs().max().item()
        assert error <= eps * scale, f"off by {error:.2e}, where {eps * scale:.2e} is allowed"


@pytest.mark.grid
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", mostly_slow(COUNTS, list(FUNCTIONS)))
def test_samples(backend: str, dtype: torch.dtype, name: str) -> None:
    """Every one; ours have the losses and the gradients of torch's function in float64, and what is listed occurs."""
    function = FUNCTIONS[name.split(" ")[0]]
    half = dtype in (torch.bfloat16, torch.float16)
    passed, reasons = 0, Counter[str]()
    for number, sample in enumerate(samples(name, dtype)):
        given = [sample.input, *sample.args]
        call, options, listed = ours(backend, given, sample.kwargs)
        reasons.update(listed)
        found = function(*call, **options, backend=backend)
        assert found.dtype == torch.promote_types(dtype, torch.float32), number
        wide, wide_options = [in_float64(each) for each in call], {k: in_float64(v) for k, v in options.items()}
        torchs = F.cross_entropy if function is ms.cross_entropy else F.linear_cross_entropy
        wanted = torchs(*wide, **wide_options)
        leaves, wide_leaves = tensors(call, options), tensors(wide, wide_options)
        assert len(leaves) == len(tensors(given, sample.kwargs)) - ("gradient of class probabilities" in listed)
        try:
            check(found, leaves, wanted, wide_leaves, (4 if half else 8) * torch.finfo(dtype).eps)
        except AssertionError as error:
            raise AssertionError(f"sample {number}, {sample}: {error}") from error
        passed += 1
    if COUNTED:
        assert passed == COUNTS[name][half]
    soft = sum(each.args[-1].is_floating_point() for each in samples(name, dtype))
    assert 0 < soft < passed
    expected = {"options": passed} if "chunked" in name else {}
    if backend != "reference":
        expected["gradient of class probabilities"] = soft
    assert reasons == expected and reasons.keys() <= LISTED.keys()


def test_no_reason_is_stale() -> None:
    """What is listed is really not taken; to be deleted from LISTED when it is."""
    sample = samples("nn.functional.cross_entropy", torch.float32)[1]
    with pytest.raises(ValueError, match="does not differentiate with respect to class probabilities"):
        ms.cross_entropy(sample.input, *sample.args, backend="cpu")
    name = "nn.functional.linear_cross_entropy chunked"
    sample = samples(name, torch.float32)[0]
    with pytest.raises(TypeError, match="options"):
        ms.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


def test_what_torch_refuses() -> None:
    """So do ours, but for more dimensions of the input, which are ours."""
    errors = list(opinfo("nn.functional.linear_cross_entropy").error_inputs("cpu"))
    assert len(errors) == 6 or not COUNTED
    for each in errors:
        sample = each.sample_input
        with pytest.raises((ValueError, TypeError)):
            ms.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
