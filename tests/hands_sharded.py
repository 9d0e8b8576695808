"""The job of tests/unit/test_hands_sharded.py: one of two processes that share heads, in each of torch's ways.

It returns a table: what each way comes to with each transform, or the error that was no refusal.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hands import outcome
from hands_heads import CLASSES, FEATURES, ROWS, SETTINGS, Head, built
from hands_in_processes import WORLD, parameters_of
from losses import TRANSFORMS, disturbed
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import monosoftmax as ms

DTENSOR = r"DTensor.*module\.unshard\(\).*register_fsdp_forward_method|DTensor.*register_fsdp_forward.*unshard\(\)"
PIECE = r"FullyShardedDataParallel.*summon_full_params"
FULL = StateDictOptions(full_state_dict=True)
FOLDER: Path
MESH: DeviceMesh

generator = torch.Generator().manual_seed(3)
HIDDEN = torch.randn(ROWS, FEATURES, generator=generator)
WORDS = torch.randint(CLASSES, (ROWS,), generator=generator)
LOGITS = 2 * torch.randn(ROWS, CLASSES, generator=generator)
TARGET = torch.randint(CLASSES, (ROWS,), generator=generator)


# --- modules ----------------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = torch.utils.checkpoint.checkpoint(self.head, input, target, use_reentrant=False)
        return loss


class Tied(nn.Module):
    """A language model whose head owns the weight of its embedding."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(CLASSES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.head = head.tie_weights(self.embedding)

    def forward(self, words: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.head(self.body(self.embedding(words)), target)
        return loss


class OnLogits(nn.Module):
    """What users write around a function that they give f to."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.transform = head.transform

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return ms.cross_entropy(logits, target, self.transform, backend="cpu")


def inputs_of(module: nn.Module) -> Tensor:
    return WORDS if isinstance(module, Tied) else LOGITS if isinstance(module, OnLogits) else HIDDEN


# --- cells: each of them asserts, or is refused -----------------------------------------------------------------------


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().double().clone()
    dist.all_reduce(value)
    return value / WORLD


def at_once(module: Any, input: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = module(input, target)
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def in_two_parts(before: Callable[[Any, bool], AbstractContextManager[Any] | None]) -> Callable[..., Tensor]:
    """Gradients of two passes, added up before they are averaged over ranks: ``before`` says whether a pass is last."""

    def losses(module: Any, input: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros(())
        for last, part in enumerate((slice(0, ROWS // WORLD // 2), slice(ROWS // WORLD // 2, None))):
            with before(module, bool(last)) or contextlib.nullcontext():
                loss = module(input[part], target[part]) / 2
                loss.backward()
            total += loss.detach()
        return total

    return losses


def averaged_by_hand(module: Any, input: Tensor, target: Tensor) -> Tensor:
    """For parameters that nobody shares."""
    loss = at_once(module, input, target)
    for parameter in module.parameters():
        if not hasattr(parameter, "full_tensor"):
            parameter.grad = mean_over_ranks(parameter.grad).to(parameter.dtype)
    return loss


def trains(
    enter: Callable[[Any], Any],
    of: Callable[[Head], nn.Module] = lambda head: head,
    losses: Callable[..., Tensor] = at_once,
    half: bool = False,
) -> Callable[[str], str]:
    """Two steps: losses and parameters are those of one process with all rows, in float64 on the reference backend.

    With a learning rate of 1 a step is the gradient, whatever became of the parameters that it was summed in.
    """
    # Logits of 4 are rounded by 2^-8 in bfloat16, and so is p; gradients are rounded, added up and rounded again.
    bound = 0.03 if half else 1e-5

    def cell(name: str) -> str:
        truth, module = built(name, of), enter(built(name, of))
        input, mine = inputs_of(truth), slice(dist.get_rank() * ROWS // WORLD, (dist.get_rank() + 1) * ROWS // WORLD)
        for part in truth.double().modules():
            part.backend = "reference"
        parameters = dict(truth.named_parameters())
        optimiser = torch.optim.SGD(module.parameters(), lr=1.0) if parameters else None
        for _ in range(2):
            values = {each: parameter.detach().clone() for each, parameter in parameters.items()}
            for parameter in parameters.values() if half else ():
                parameter.data.copy_(parameter.bfloat16())
            expected = truth(input.double() if input.is_floating_point() else input, TARGET)
            gradients = torch.autograd.grad(expected, parameters.values()) if parameters else ()
            loss = mean_over_ranks(losses(module, input[mine], TARGET[mine]))
            torch.testing.assert_close(loss, expected.detach(), rtol=bound, atol=bound)
            if optimiser is not None:
                optimiser.step()
                optimiser.zero_grad()
            found = parameters_of(module)
            assert found.keys() == parameters.keys(), (found.keys(), parameters.keys())
            for (each, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                assert found[each].dtype == torch.float32, each
                step = values[each] - found[each].double()
                error, norm = (step - gradient).norm().item(), gradient.norm().item()
                assert error <= bound * (norm + 0.1), (each, error, norm)
                parameter.data.copy_(found[each])
        return "right"

    return cell


Cell = Callable[[str], str]


def refused(
    enter: Callable[[Any], Any],
    *calls: Callable[[Any], Any],
    of: Callable[[Head], nn.Module] = lambda head: head,
    saying: str = DTENSOR,
    then: Callable[..., Any] = at_once,
    alike: bool = True,
) -> Cell:
    """Calls that are all refused, or all right, before and after a pass; by one rank alone unless ``alike``."""

    def cell(name: str) -> str:
        plain, module = built(name, of), enter(built(name, of))
        found = set()
        for _ in range(2):
            for call in calls:

                def compared(call: Any = call) -> None:
                    torch.testing.assert_close(call(module), call(plain), rtol=1e-5, atol=1e-6)

                found.add(outcome(compared, NotImplementedError, saying=saying))
            then(module, inputs_of(plain), TARGET)
        # A piece may be the whole on one rank, and nothing on the other.
        everywhere: list[Any] = [None] * WORLD
        dist.all_gather_object(everywhere, found)
        refusals = set().union(*everywhere) - {"right"}
        assert len(refusals) <= 1 and (alike is False or len(found) == 1), everywhere
        return refusals.pop() if refusals else "right"

    return cell


def sharded(module: Any, **options: Any) -> Any:
    return fully_shard(module, mesh=MESH, **options)


def f_sharded(module: Any, **options: Any) -> Any:
    fully_shard(module.transform, mesh=MESH, **options)
    return module


def f_sharded_apart(module: Any, **options: Any) -> Any:
    return fully_shard(f_sharded(module), mesh=MESH, **options)


def gathering(*methods: str) -> Callable[[Any], Any]:
    def enter(module: Any) -> Any:
        sharded(module)
        for method in methods:
            register_fsdp_forward_method(module, method)
        return module

    return enter


def fsdp1(module: Any, use_orig_params: bool, **options: Any) -> Any:
    return FullyShardedDataParallel(module, use_orig_params=use_orig_params, device_id=torch.device("cpu"), **options)


def f_distributed(module: Any) -> Any:
    """f with parameters that are DTensors, each of them whole on every rank: as plans of tensor parallelism have it."""
    distribute_module(module.transform, MESH)
    return module


def unsharded(module: Any, method: str, *arguments: Tensor) -> Tensor:
    if not hasattr(module, "unshard"):
        result: Tensor = getattr(module, method)(*arguments)
        return result
    module.unshard()
    result = getattr(module, method)(*arguments)
    module.reshard()
    return result


def summoned(module: Any, method: str, *arguments: Tensor) -> Tensor:
    with FullyShardedDataParallel.summon_full_params(module):
        result: Tensor = getattr(module.module if hasattr(module, "module") else module, method)(*arguments)
        return result.detach().clone()


def other(name: str) -> Head:
    """Of the same shape as :func:`built`, with other values."""
    return Head(disturbed(name, seed=7, **SETTINGS.get(name, {})))


def on_meta(name: str) -> Head:
    with torch.device("meta"):
        head = other(name)
    sharded(head).to_empty(device="cpu")
    return head


def restored(
    save: Callable[[str], Mapping[str, Any]],
    to: Callable[[str], Any],
    load: Callable[[Any, Mapping[str, Any]], Any],
    then: Callable[[Any], Any] = lambda module: module,
) -> Cell:
    """What was saved of one module is what another one has after loading it, and goes on from."""

    def cell(name: str) -> str:
        module = to(name)
        load(module, save(name))
        for each, parameter in dict(built(name).named_parameters()).items():
            assert torch.equal(parameters_of(module)[each], parameter.detach()), each
        return trains(lambda _: then(module))(name)

    return cell


def saved(enter: Callable[[Any], Any], **options: bool) -> Callable[[str], Mapping[str, Any]]:
    return lambda name: get_model_state_dict(enter(built(name)), options=StateDictOptions(**options))


def loading(**options: bool) -> Callable[[Any, Mapping[str, Any]], Any]:
    return lambda module, state: set_model_state_dict(module, dict(state), options=StateDictOptions(**options))


def as_once(name: str) -> Mapping[str, Any]:
    """A checkpoint from when scalars had no dimension."""
    return {each: raw.reshape(()) if raw.shape == (1,) else raw for each, raw in built(name).state_dict().items()}


def through_files(module: Any, state: Mapping[str, Any]) -> None:
    """As distributed checkpoints: every rank writes its pieces and reads those that it needs."""
    folder = [str(FOLDER / f"checkpoint{torch.randint(2**60, ()).item()}")]
    dist.broadcast_object_list(folder)
    dcp.save(dict(state), checkpoint_id=folder[0])
    into = get_model_state_dict(module)
    dcp.load(into, checkpoint_id=folder[0])
    set_model_state_dict(module, into)


def reset_after_the_meta_device(name: str) -> str:
    head = on_meta(name)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(torch.nan)
    head.reset_parameters()
    found, start = parameters_of(head), ms.transforms.from_dict(built(name).transform.to_dict())
    for each, parameter in start.named_parameters():
        assert torch.equal(found[f"transform.{each}"], parameter.detach()), each
    for each in ("weight", "bias"):
        assert 0 < found[each].abs().max() <= FEATURES**-0.5
    loading(full_state_dict=True)(head, built(name).state_dict())
    return trains(lambda _: head)(name)


def rows() -> dict[str, Cell]:
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    replicas = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicas", "shards"))
    full = {"full_state_dict": True}

    def a_dtensor(whole: Tensor) -> Any:
        return distribute_tensor(whole, MESH, [Shard(0)])

    def with_f(function: Any, *operands: Tensor) -> Callable[[Any], Any]:
        return lambda module: function(*operands, module.transform)

    return {
        "DDP(head)": trains(DistributedDataParallel),
        "DDP(head), two passes": trains(
            DistributedDataParallel, losses=in_two_parts(lambda module, last: None if last else module.no_sync())
        ),
        "fully_shard(head)": trains(sharded),
        "fully_shard(head), two passes": trains(
            sharded, losses=in_two_parts(lambda module, last: module.set_requires_gradient_sync(last))
        ),
        "fully_shard(model), tied": trains(sharded, Tied),
        "fully_shard(f), fully_shard(head)": trains(f_sharded_apart),
        "fully_shard(f), plain head": trains(f_sharded, losses=averaged_by_hand),
        "fully_shard(f), f by itself": trains(f_sharded, OnLogits),
        "fully_shard(head), bfloat16": trains(lambda head: sharded(head, mp_policy=bf16), half=True),
        "fully_shard(f), fully_shard(head, bfloat16)": trains(
            lambda head: fully_shard(f_sharded(head), mesh=MESH, mp_policy=bf16), half=True
        ),
        "fully_shard(head), not resharded after forward": trains(
            lambda head: sharded(head, reshard_after_forward=False)
        ),
        "fully_shard(head), replicas of shards": trains(lambda head: fully_shard(head, mesh=replicas)),
        "fully_shard(head), checkpointed": trains(lambda model: sharded(model.head) and model, Checkpointed),
        "fully_shard(model), checkpointed": trains(
            lambda model: (sharded(model.head), sharded(model))[1], Checkpointed
        ),
        "fully_shard(checkpoint_wrapper(head))": trains(lambda head: sharded(checkpoint_wrapper(head))),
        "FSDP1, use_orig_params": trains(lambda head: fsdp1(head, True)),
        "FSDP1": trains(lambda head: fsdp1(head, False)),
        "FSDP1, tied": trains(lambda model: fsdp1(model, True), Tied),
        "FSDP1, bfloat16": trains(
            lambda head: fsdp1(head, True, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)), half=True
        ),
        "fully_shard(head).log_prob": refused(
            sharded, lambda head: head.log_prob(HIDDEN), lambda head: head.predict(HIDDEN)
        ),
        "fully_shard(head).log_prob, registered": refused(
            gathering("log_prob", "predict"), lambda head: head.log_prob(HIDDEN), lambda head: head.predict(HIDDEN)
        ),
        "fully_shard(head).log_prob, unshard()": refused(
            sharded, lambda head: unsharded(head, "log_prob", HIDDEN), lambda head: unsharded(head, "predict", HIDDEN)
        ),
        "FSDP1(head).module.log_prob, summon_full_params": refused(
            lambda head: fsdp1(head, True), lambda head: summoned(head, "log_prob", HIDDEN)
        ),
        "DTensor as linear_weight": refused(
            sharded,
            lambda head: ms.linear_cross_entropy(HIDDEN, head.weight, TARGET, backend="cpu"),
            lambda head: ms.linear_token_statistics(HIDDEN, head.weight, TARGET, backend="cpu"),
        ),
        "DTensor as logits": refused(
            sharded,
            lambda head: ms.cross_entropy(a_dtensor(LOGITS), TARGET, backend="cpu"),
            lambda head: ms.log_softmax(a_dtensor(LOGITS), backend="cpu"),
        ),
        "f of fully_shard(head) elsewhere": refused(
            sharded,
            with_f(ms.cross_entropy, LOGITS, TARGET),
            with_f(ms.log_softmax, LOGITS),
            with_f(ms.linear_cross_entropy, HIDDEN, LOGITS.t()[:, :FEATURES].contiguous(), TARGET),
            with_f(ms.linear_token_statistics, HIDDEN, LOGITS.t()[:, :FEATURES].contiguous(), TARGET),
            lambda head: head.transform(LOGITS),
        ),
        "f of FSDP1(f) elsewhere": refused(
            lambda module: fsdp1(module, True),
            with_f(ms.cross_entropy, LOGITS, TARGET),
            lambda module: module.transform(LOGITS),
            of=OnLogits,
            saying=PIECE,
            alike=False,
        ),
        "f of distribute_module": refused(
            f_distributed,
            lambda module: module(LOGITS, TARGET),
            with_f(ms.log_softmax, LOGITS),
            of=OnLogits,
            then=lambda *_: None,
        ),
        "full state, into a plain head": restored(
            saved(sharded, **full), other, lambda head, state: head.load_state_dict(state), DistributedDataParallel
        ),
        "full state of FSDP1, into a plain head": restored(
            saved(lambda head: fsdp1(head, True), **full),
            other,
            lambda head, state: head.load_state_dict(state),
            DistributedDataParallel,
        ),
        "full state, into fully_shard(head)": restored(
            lambda name: built(name).state_dict(), lambda name: sharded(other(name)), loading(**full)
        ),
        "full state of rank 0, into fully_shard(head) from meta": restored(
            lambda name: built(name).state_dict() if dist.get_rank() == 0 else {},
            on_meta,
            loading(**full, broadcast_from_rank0=True),
        ),
        "state without scalars' dimension, into a plain head": restored(
            as_once, other, lambda head, state: head.load_state_dict(state), DistributedDataParallel
        ),
        "state without scalars' dimension, into fully_shard(head)": restored(
            as_once, lambda name: sharded(other(name)), loading(**full)
        ),
        "state without scalars' dimension of rank 0, into fully_shard(head) from meta": restored(
            lambda name: as_once(name) if dist.get_rank() == 0 else {},
            on_meta,
            loading(**full, broadcast_from_rank0=True),
        ),
        "distributed checkpoint": restored(saved(sharded), lambda name: sharded(other(name)), through_files),
        "meta, fully_shard, to_empty, reset_parameters": reset_after_the_meta_device,
    }


def table(folder: str) -> dict[str, dict[str, str]]:
    """Up to the first cell that is wrong: ranks may be out of step after it. ``folder`` is for checkpoints."""
    global FOLDER, MESH
    FOLDER, MESH = Path(folder), init_device_mesh("cpu", (WORLD,))
    found: dict[str, dict[str, str]] = {}
    for row, cell in rows().items():
        for name in TRANSFORMS:
            try:
                found.setdefault(row, {})[name] = cell(name)
            except Exception:
                found[row][name] = f"wrong: {traceback.format_exc()}"
                return found
    return found
