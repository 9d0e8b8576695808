"""Jobs of ranks that are not about numbers: what they exchange and hold, and what becomes of them if one is wrong."""

from __future__ import annotations

import ctypes
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from distributed_cases import Case, given, mesh, place_of, prepared
from distributed_tokens import OUTPUTS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import monosoftmax as ms

# --- what is exchanged ------------------------------------------------------------------------------------------------

#: Collectives as kind and number of elements.
Traffic = list[tuple[str, int]]


class Exchanged(NamedTuple):
    """As the package counts it, and as torch's dispatcher sees it."""

    forward: Traffic
    backward: Traffic
    seen_forward: Traffic
    seen_backward: Traffic


class _Collectives(TorchDispatchMode):
    """Notes the collectives that pass torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Traffic = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            # The operands of allgather_ are its results and what it sends.
            sent = tree_leaves(args[1] if "allgather" in func.__name__ else args[0])[0]
            self.seen.append((func.__name__.partition(".")[0], sent.numel()))
        return func(*args, **(kwargs or {}))


def exchanged(case: Case, function: str, changes: Mapping[str, Any], alone: bool = False) -> Exchanged:
    """The traffic of a call and of its backward pass; ``alone``: in groups of one rank each, with all classes."""
    changes = dict(changes)
    if alone:
        changes |= {"group": _own_group(), "vocab_start": 0}
        case = case._replace(shards=(case.classes, 0) if dist.get_rank() == 0 else (0, case.classes))
    forward, upstream, leaves = _call(case, function, changes)

    def noted(run: Callable[[], Any]) -> tuple[Any, Traffic, Traffic]:
        with ms.distributed.traffic() as record, _Collectives() as mode:
            result = run()
        assert all(each.nbytes >= 4 * each.numel and each.ranks > 1 for each in record)
        return result, [(each.kind, each.numel) for each in record], mode.seen

    outputs, counted, seen = noted(forward)
    needed = [each for each in leaves if each is not None and each.requires_grad]
    _, counted_back, seen_back = noted(lambda: torch.autograd.grad(outputs, needed, upstream))
    return Exchanged(counted, counted_back, seen, seen_back)


def _call(case: Case, function: str, changes: Mapping[str, Any]) -> tuple[Callable[[], Any], list[Tensor], list[Any]]:
    if function == "linear_cross_entropy":
        call = prepared(case, **changes)
        return call.forward, call.upstream, list(call.leaves.values())
    whole, place = given(case), place_of(case)
    options = {"transform": whole.transform, "vocab_start": place.start} | dict(changes)
    parameters = list(options["transform"].parameters())
    if function == "log_softmax":
        logits = whole.input[..., place.classes].detach().requires_grad_()
        return (
            lambda: (ms.distributed.log_softmax(logits, **options),),
            [torch.ones_like(logits)],
            [logits, *parameters],
        )
    assert whole.weight is not None
    options.pop("linear_bias", None)
    weight = options.pop("local_weight", whole.weight[place.classes])
    leaves = [each.detach().clone().requires_grad_() for each in (whole.input, weight)]
    outputs = options.setdefault("outputs", OUTPUTS)

    def log_prob() -> list[Tensor]:
        found = ms.distributed.linear_log_prob(*leaves, **({"target": whole.target} | options))
        return [each for each in found if each is not None and each.requires_grad]

    count = len([each for each in outputs if each in OUTPUTS[:4]])
    return log_prob, [torch.ones(case.rows)] * count, [*leaves, *parameters]


@functools.cache
def _own_group() -> Any:
    """A group of this rank alone."""
    return dist.new_subgroups(1)[0]


# --- how a call is used -----------------------------------------------------------------------------------------------


def differentiated_twice(case: Case) -> tuple[bool, str]:
    """Whether two backward passes through one call find the same, and what a derivative of a gradient ends in."""
    call = prepared(case)
    outputs, needed = call.forward(), [each for each in call.leaves.values() if each is not None]
    first, second = (torch.autograd.grad(outputs, needed, call.upstream, retain_graph=True) for _ in range(2))
    graph = torch.autograd.grad(outputs, needed, call.upstream, create_graph=True)
    same = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, graph, strict=True))
    try:
        graph[0].sum().backward()
    except RuntimeError as error:
        return same, str(error)
    return same, ""


def of_groups(case: Case) -> dict[str, Any]:
    """The loss in each kind of group, and the words of those that are none."""

    def loss(group: Any) -> Any:
        try:
            return prepared(case, group=group).forward()[0].item()
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    both = mesh(1)
    return {
        "none": loss(None),
        "process group": loss(dist.group.WORLD),
        "mesh": loss(both["classes"]),
        "two dimensions": loss(both),
        "a word": loss("classes"),
        "of the other rank": loss(dist.new_subgroups_by_enumeration([[0], [1]])[1][1 - dist.get_rank()]),
    }


def outcome_without_grad(case: Case) -> tuple[bool, bool]:
    """Whether a call without gradients finds the same, and whether its result needs one."""
    call = prepared(case)
    with torch.no_grad():
        outputs = call.forward()
    same = all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(outputs, call.forward(), strict=True))
    return same, any(each.requires_grad for each in outputs)


# --- what is held -----------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that comes out of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return results


def largest_tensor(case: Case, function: str, changes: Mapping[str, Any]) -> int:
    """The elements of the largest tensor that a step makes."""
    forward, upstream, leaves = _call(case, function, changes)
    needed = [each for each in leaves if each is not None and each.requires_grad]
    with _Largest() as largest:
        torch.autograd.grad(forward(), needed, upstream)
    return largest.elements


def peak_mib(case: Case, function: str, options: Mapping[str, Any]) -> float:
    """The most memory that a step takes beside its operands and their gradients, after a small step."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-3, 1 << 16), (-1, 0)):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: what is freed is gone
        assert libc.mallopt(parameter, value) == 1

    def step(of: Case) -> float:
        forward, upstream, leaves = _call(of, function, options)
        needed = [each for each in leaves if each is not None]
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _peak()
        gradients = torch.autograd.grad(forward(), needed, upstream)
        return _peak() - before - sum(each.nbytes for each in gradients) / 2**20

    step(case._replace(rows=8))
    return step(case)


def _peak() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


# --- ranks that are wrong ---------------------------------------------------------------------------------------------


def disagreeing(case: Case, of_ranks: Mapping[int, Mapping[str, Any]], function: str) -> list[float]:
    """The loss of a call whose arguments are changed on some ranks; "case" changes what they are made of."""
    changes = dict(of_ranks.get(dist.get_rank(), {}))
    case = case._replace(**changes.pop("case", {}))
    with torch.set_grad_enabled(changes.pop("grad", True)):
        forward, upstream, _ = _call(case, function, changes)
        outputs = forward()
    if outputs[0].requires_grad:
        torch.autograd.backward(outputs, upstream)
    return outputs[0].detach().reshape(-1).tolist()


def leaving(case: Case, how: str) -> list[float]:
    """Rank 1 does not take part: it "dies", "sleeps" for 4 seconds, "raises", or dies before the backward pass."""
    call = prepared(case)
    late = dist.get_rank() == 1
    if late and how == "dies":
        os._exit(3)
    if late and how == "sleeps":
        time.sleep(4)
    if late and how == "raises":
        raise KeyError("the user's own")
    outputs = call.forward()
    if late and how == "dies between":
        os._exit(3)
    outputs[0].backward()
    return outputs[0].tolist()
