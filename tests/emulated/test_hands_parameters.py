"""Parameters of f and of the head that are not what they were registered as: computed, replaced, moved or wrapped.

A row is a hand that a module gets into: it says what is trained there and which raw values that amounts to. A column is
a function, called by a module of the user that owns f and the matrix, or one of the package's modules, on a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hands import BACKENDS, check_table, on
from hands_of_parameters import HANDS, OF_THE_MATRIX, AuxiliaryTrainingWrapper, Hand, Raws, mask_of
from losses import TRANSFORMS, disturbed
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import monosoftmax as ms

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference", "ignore:.*weight_norm")

ROWS, CLASSES, FEATURES = 3, 7, 4


# --- columns ----------------------------------------------------------------------------------------------------------


class OnLogits(nn.Module):
    """What users write around a function of logits."""

    def __init__(self, name: str, transform: nn.Module, backend: Any) -> None:
        super().__init__()
        self.name, self.backend, self.transform = name, backend, transform

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.name == "log_softmax":
            return {"log_p": ms.log_softmax(input, self.transform, backend=self.backend)}
        return {"loss": ms.cross_entropy(input, target, self.transform, backend=self.backend)}


class OnFeatures(nn.Module):
    """What users write around a function that multiplies by a matrix."""

    def __init__(self, name: str, transform: nn.Module, backend: Any) -> None:
        super().__init__()
        self.name, self.backend, self.transform = name, backend, transform
        self.weight = nn.Parameter(torch.empty(CLASSES, FEATURES))
        self.bias = nn.Parameter(torch.empty(CLASSES))

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        function = getattr(ms, self.name)
        result = function(input, self.weight, target, self.transform, linear_bias=self.bias, backend=self.backend)
        return {"loss": result} if self.name == "linear_cross_entropy" else dict(result._asdict())


class Loss(ms.MonotonicCrossEntropyLoss):
    def __init__(self, name: str, transform: nn.Module, backend: Any) -> None:
        super().__init__(transform, backend=backend)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(input, target)}


class Head(ms.MonotonicSoftmax):
    def __init__(self, name: str, transform: nn.Module, backend: Any) -> None:
        super().__init__(FEATURES, CLASSES, transform, backend=backend)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"log_prob": (result := super().forward(input, target)).output, "loss": result.loss}

    def other_methods(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What torch calls no hooks before."""
        return {"log_p": self.log_prob(input), "argmax": self.predict(input)}


COLUMNS: dict[str, Any] = {
    "cross_entropy": OnLogits, "linear_cross_entropy": OnFeatures, "log_softmax": OnLogits,
    "linear_token_statistics": OnFeatures, "MonotonicCrossEntropyLoss": Loss, "MonotonicSoftmax": Head,
    "MonotonicSoftmax.log_prob": Head,
}  # fmt: skip
WITH_A_MATRIX = [column for column, kind in COLUMNS.items() if kind in (OnFeatures, Head)]


def made(column: str, transform: nn.Module, backend: Any) -> nn.Module:
    """The module of a column, away from where it starts."""
    module: nn.Module = COLUMNS[column](column, transform, backend)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 if name == "weight" else 0.5))
    return module


# --- the truth --------------------------------------------------------------------------------------------------------


def plif(z: Tensor, raws: Raws) -> Tensor:
    """PLIF as the integral of its slopes from 0 to z: of each slope, times what of the way lies in its piece."""
    slopes = 0.01 + 0.99 * nn.functional.softplus(raws["raw_slope"])
    knots = torch.linspace(-4, 4, len(slopes) + 1, dtype=z.dtype)
    first, last = knots[:-1].clone(), knots[1:].clone()
    first[0], last[-1] = -torch.inf, torch.inf
    z = z.unsqueeze(-1)
    return (slopes * (z.clamp(first, last) - torch.zeros_like(z).clamp(first, last))).sum(-1)


def truth(name: str, raws: Raws, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    """All that columns return, of raw values in float64."""
    of_f = {name[10:]: raw for name, raw in raws.items() if name.startswith("transform.")}
    z = input @ raws["weight"].t() + raws["bias"] if "weight" in raws else input
    gain = of_f.pop("log_gain", torch.zeros(())).exp()
    if name == "plif":
        y = gain * plif(z, of_f)
    else:
        f = disturbed(name).double()
        y = f.evaluate(z, gain * functional_call(f, of_f, ()))
    log_p = torch.log_softmax(y, -1)
    log_prob = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    return {
        "log_p": log_p, "log_prob": log_prob, "loss": -log_prob.mean(), "entropy": -(log_p.exp() * log_p).sum(-1),
        "argmax": z.argmax(-1), "lse": y.logsumexp(-1), "rank": (z > z.gather(1, target.unsqueeze(1))).sum(-1),
    }  # fmt: skip


def objective(outputs: list[Tensor]) -> Tensor:
    """A number that every element of the outputs has a share of its own in."""
    total = torch.zeros(())
    for i, each in enumerate(outputs):
        total = total + (each * torch.linspace(0.5 + i, 1.5, each.numel(), dtype=each.dtype).reshape(each.shape)).mean()
    return total


# --- the table --------------------------------------------------------------------------------------------------------


#: Those that bend where the logits are.
SETTINGS: dict[str, dict[str, Any]] = {"plif": {"num_pieces": 8, "bound": 4.0}, "soft_cap": {"cap": 3.0}}


def check_cell(hand: Callable[[nn.Module], Hand], column: str, name: str, backend: Any) -> None:
    """Values and gradients are those of float64, and so they are after a step of an optimiser."""
    module = made(column, disturbed(name, **SETTINGS.get(name, {})), backend)
    entered = hand(module)
    generator = torch.Generator().manual_seed(2)
    input = 2 * torch.randn(ROWS, FEATURES if column in WITH_A_MATRIX else CLASSES, generator=generator)
    target = torch.tensor([1, 6, 3])
    if backend == "triton":  # of which the interpreter takes 50 ms a row
        input, target = input[1:2], target[1:2]
        with torch.no_grad():
            called(entered, column, input, target)
    else:
        compare(entered, column, name, input, target)
    for leaf in entered.leaves.values():
        leaf.grad = torch.linspace(1.0, -0.5, leaf.numel()).reshape(leaf.shape)
    if entered.leaves:
        torch.optim.SGD(entered.leaves.values(), lr=0.2).step()
    compare(entered, column, name, input, target)


def called(entered: Hand, column: str, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    module = entered.for_a_call()
    outputs: dict[str, Tensor] = (module.other_methods if "." in column else module)(input, target)
    return outputs


def compare(entered: Hand, column: str, name: str, input: Tensor, target: Tensor) -> None:
    x = input.clone().requires_grad_()
    outputs = called(entered, column, x, target)
    leaves = {"input": x, **entered.leaves}
    doubles = {leaf: each.detach().double().requires_grad_() for leaf, each in leaves.items()}
    raws = entered.raws({leaf: each for leaf, each in doubles.items() if leaf != "input"})
    of_truth = truth(name, raws, doubles["input"], target)
    for output, value in outputs.items():
        torch.testing.assert_close(value.double(), of_truth[output].double(), rtol=2e-5, atol=2e-6)
    differentiated = [output for output, value in outputs.items() if value.requires_grad]
    assert differentiated or column == "linear_token_statistics"
    if not differentiated:
        return
    gradients, expected = (
        torch.autograd.grad(objective([each[name] for name in differentiated]), of.values(), materialize_grads=True)
        for each, of in ((outputs, leaves), (of_truth, doubles))
    )
    for leaf, ours, theirs in zip(leaves, gradients, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=2e-6), (leaf, ours, theirs)
    assert name in ("identity", "sigsoftmax") or any(each.norm() > 1e-3 for each in expected[1:])


#: torch.func calls forward only, and so do the hooks of offloading.
FORWARD_ONLY = ("functional_call", "loaded by hooks")


@pytest.mark.slow
def test_table():
    torch.set_num_threads(1)  # there is nothing to share
    columns = [f"{column} {backend}" for column in COLUMNS for backend in BACKENDS]
    cells = {row: dict.fromkeys(columns, "") for row in (*HANDS, *OF_THE_MATRIX)}
    for backend in BACKENDS:
        with on(backend):
            for column in COLUMNS:
                for row, hand in (HANDS | OF_THE_MATRIX if column in WITH_A_MATRIX else HANDS).items():
                    if "." not in column or row not in FORWARD_ONLY:
                        # The others of the nine differ in nothing that this is about but the names of parameters.
                        every = TRANSFORMS if (column, backend) == ("cross_entropy", "cpu") else ["plif"]
                        for name in every:
                            check_cell(hand, column, name, backend)
                        cells[row][f"{column} {backend}"] = "right"
    check_table("Parameters that are not registered parameters", cells)


# --- beside the table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ms.MonotonicCrossEntropyLoss, lambda f: ms.MonotonicSoftmax(CLASSES, CLASSES, f)])
def test_a_wrapper_that_a_module_is_built_with_goes_on_choosing(kind):
    wrapper = AuxiliaryTrainingWrapper(disturbed("plif"))
    with torch.no_grad():
        wrapper.modules_to_save["default"].raw_slope.mul_(2)
    module, input, target = kind(wrapper), torch.randn(ROWS, CLASSES), torch.tensor([1, 6, 3])
    logits = module.logits(input) if isinstance(module, ms.MonotonicSoftmax) else input
    for choose in (lambda: None, lambda: wrapper.enable_adapters(False), lambda: wrapper.enable_adapters(True)):
        choose()
        result = module(input, target)
        expected = ms.cross_entropy(logits, target, wrapper.in_use(), backend="reference")
        torch.testing.assert_close(getattr(result, "loss", result), expected)
    assert module.transform is wrapper
    assert "transform.raw_slope" in kind(torch.compile(disturbed("plif"))).state_dict()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", [ms.MixtureOfSoftmaxes, ms.MixtureOfContexts])
def test_a_computed_decoder_of_a_mixture_is_that_of_the_present(kind, backend):
    torch.manual_seed(0)
    mixture, plain = (kind(FEATURES, CLASSES, 2, backend=backend) for _ in range(2))
    input, target = torch.randn(ROWS, FEATURES), torch.tensor([1, 6, 3])
    prune.custom_from_mask(mixture.decoder, "weight", mask_of(mixture.decoder.weight))
    mask = mixture.decoder.weight_mask
    optimiser = torch.optim.SGD(mixture.parameters(), lr=2.0)
    for _ in range(2):
        raws = dict(mixture.named_parameters())
        with torch.no_grad():
            for name, raw in plain.named_parameters():
                raw.copy_(raws["decoder.weight_orig"] * mask if name == "decoder.weight" else raws[name])
        optimiser.zero_grad()
        plain.zero_grad()
        result, expected = mixture(input, target), plain(input, target)
        torch.testing.assert_close(tuple(result), tuple(expected))  # first, so that no other method has run the hooks
        for method in ("log_prob", "predict"):
            torch.testing.assert_close(getattr(mixture, method)(input), getattr(plain, method)(input))
        result.loss.backward()
        expected.loss.backward()
        torch.testing.assert_close(raws["decoder.weight_orig"].grad, plain.decoder.weight.grad * mask)
        optimiser.step()
