"""Every transform, and the head around it, trained for twenty steps in every hand: they end where a plain run ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import ranks
import torch
from hands_heads import built
from hands_in_processes import TIMEOUT, WORLD
from hands_training import LR, LR_OF_F, STEPS, WAYS_OF_PROCESSES, reached, together, train
from losses import TRANSFORMS
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference")

every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # there is nothing to share


def plain(name: str, **options: Any) -> Mapping[str, Tensor]:
    head = built(name, **options)
    train(head)
    return dict(head.named_parameters())


def bfloat16_module(name: str) -> Mapping[str, Tensor]:
    head = built(name).to(torch.bfloat16)
    train(head, dtype=torch.bfloat16)
    return dict(head.named_parameters())


def autocast(name: str) -> Mapping[str, Tensor]:
    head = built(name)
    train(head, torch.autocast("cpu", torch.bfloat16)(head))
    return dict(head.named_parameters())


def compiled(name: str) -> Mapping[str, Tensor]:
    torch._dynamo.reset()
    head = built(name)
    train(head, torch.compile(head, backend="aot_eager", fullgraph=True))
    return dict(head.named_parameters())


def checkpointed(name: str) -> Mapping[str, Tensor]:
    head = built(name)
    train(head, lambda input, target: checkpoint(head, input, target, use_reentrant=False))
    return dict(head.named_parameters())


def functional(name: str) -> Mapping[str, Tensor]:
    head = built(name)
    start = {each: parameter.detach().clone() for each, parameter in head.named_parameters()}
    parameters = {each: value.clone().requires_grad_() for each, value in start.items()}
    train(head, lambda input, target: functional_call(head, parameters, (input, target)), parameters)
    assert all(torch.equal(parameter, start[each]) for each, parameter in head.named_parameters())
    return parameters


class Bound(NamedTuple):
    """How far from the end of the plain run, in parts of the way that it went: f, its parameters, and the head's."""

    f: float
    raws: float
    others: float


#: The same operations in the same order.
EXACT = Bound(0.0, 0.0, 0.0)
#: In another order: sums in float32 differ by some 1e-7, and so do the quotients that Adam takes its steps by.
REORDERED = Bound(1e-5, 1e-5, 1e-5)
#: Logits of 4 are off by 2^-8, and so are probabilities and gradients, whose sums over rows and classes are of both
#: signs. A step is a quotient of gradients, off by as much in proportion: a few times 2^-8, more where
#: they cancel. What such parameters do to f as a function is little.
ROUNDED_LOGITS = Bound(0.01, 0.05, 0.15)
#: And weights between 1 and 2 are rounded by up to 2^-8 at each of the steps, which are of 0.01 at most: by 0.01 in 20
#: steps of a random walk with the deviation of a rounding, beside a way of 0.1. f's parameters are not rounded.
ROUNDED_WEIGHTS = Bound(0.01, 0.05, 0.3)

HANDS: dict[str, tuple[Callable[[str], Mapping[str, Tensor]], Bound]] = {
    "bfloat16 module": (bfloat16_module, ROUNDED_WEIGHTS),
    "autocast": (autocast, ROUNDED_LOGITS),
    "compile": (compiled, REORDERED),
    "checkpoint": (checkpointed, EXACT),
    "functional_call": (functional, EXACT),
}
OF_PROCESSES = {"DDP": REORDERED, "FSDP2": REORDERED, "FSDP2 of a bfloat16 module": ROUNDED_WEIGHTS}


@functools.cache
def start_of(name: str) -> dict[str, Tensor]:
    return reached(name, dict(built(name).named_parameters()))


@functools.cache
def end_of(name: str) -> dict[str, Tensor]:
    return reached(name, plain(name))


def check(name: str, parameters: Mapping[str, Tensor], bound: Bound) -> None:
    """f as a function, f's parameters and the head's are where the plain run has left them."""
    found, expected, start = reached(name, parameters), end_of(name), start_of(name)
    assert found.keys() == expected.keys()
    for each, value in expected.items():
        part = bound.f if each == "f" else bound.raws if each.startswith("transform.") else bound.others
        error, way = (found[each] - value).norm().item(), (value - start[each]).norm().item()
        assert error <= part * way, f"{each} is off by {error:.2e}, {error / max(way, 1e-30):.1e} of its way"


@every_transform
def test_the_plain_run_moves_what_is_learned(name):
    for each, value in end_of(name).items():
        way = (value - start_of(name)[each]).abs().max().item()
        if each == "f":
            assert (way > LR_OF_F * STEPS) == (name not in ("identity", "sigsoftmax"))
        else:  # Adam goes by its rate where the gradient keeps its sign
            assert way > (LR_OF_F if each.startswith("transform.") else LR) * STEPS / 4, each


@every_transform
@pytest.mark.parametrize("hand", HANDS)
def test_twenty_steps(hand, name):
    train_in, bound = HANDS[hand]
    parameters = train_in(name)
    for each, parameter in parameters.items():
        half = hand == "bfloat16 module" and not each.startswith("transform.")
        assert parameter.dtype == (torch.bfloat16 if half else torch.float32), each
    check(name, parameters, bound)


@every_transform
def test_autocast_leaves_the_coefficients_alone(name):
    # What rounding them would do is less than what rounding the logits does, and so within the bounds above.
    transform = built(name).transform
    with torch.autocast("cpu", torch.bfloat16):
        found = transform()
    assert torch.equal(found, transform())


@every_transform
def test_twenty_steps_on_the_reference(name):
    check(name, plain(name, backend="reference"), REORDERED)


@pytest.fixture(scope="module")
def of_processes() -> dict[str, Any]:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    with ranks.Group(WORLD, group_timeout=30) as group:
        first, second = group.call(together, timeout=TIMEOUT)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return first  # type: ignore[no-any-return]


@pytest.mark.slow
@every_transform
@pytest.mark.parametrize("hand", OF_PROCESSES)
def test_twenty_steps_of_two_processes(hand, name, of_processes):
    assert OF_PROCESSES.keys() == set(WAYS_OF_PROCESSES)
    check(name, of_processes[hand][name], OF_PROCESSES[hand])
