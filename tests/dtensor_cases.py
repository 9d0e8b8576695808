"""What ranks do with DTensors in the tests: a public function, and layers of models; each returns what went wrong.

The tensors are the same on all ranks, as every process draws them. What one process finds with whole tensors is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from losses import disturbed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import monosoftmax as ms

BATCH, LENGTH, FEATURES, CLASSES = 3, 5, 12, 38
R, S0, S1 = Replicate(), Shard(0), Shard(1)


class Placing(NamedTuple):
    """A mesh, and where the tokens and the classes of a head are; None: a plain input."""

    mesh: tuple[int, ...]
    input: tuple[Placement, ...] | None
    weight: tuple[Placement, ...]


#: For four ranks. Three classes are few enough that ranks have none.
HEADS = {
    "classes, plain input": Placing((4,), None, (S0,)),
    "classes": Placing((4,), (R,), (S0,)),
    "classes, tokens gathered": Placing((4,), (S1,), (S0,)),
    "classes, partial input": Placing((4,), (Partial(),), (S0,)),
    "tokens": Placing((4,), (S1,), (R,)),
    "nothing": Placing((4,), None, (R,)),
    "tokens x classes": Placing((2, 2), (S0, R), (R, S0)),
    "tokens x classes, tokens gathered": Placing((2, 2), (S0, S1), (R, S0)),
    "tokens x tokens": Placing((2, 2), (S0, S1), (R, R)),
    "copies x classes": Placing((2, 2), (R, R), (R, S0)),
}
LOGITS = {
    "classes": ((4,), (S1,)),
    "classes, counted from the end": ((4,), (Shard(-1),)),
    "tokens": ((4,), (S0,)),
    "tokens x classes": ((2, 2), (S0, S1)),
    "nothing": ((4,), (R,)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "weight": torch.linspace(0.5, 1.5, CLASSES), "temperature": 1.2},
    "rows": {"reduction": "none", "return_lse": True},
}


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tensors(classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    input = torch.randn(BATCH, LENGTH, FEATURES, generator=generator)
    weight, bias = torch.randn(classes, FEATURES, generator=generator), torch.randn(classes, generator=generator)
    target = torch.randint(classes, (BATCH, LENGTH), generator=generator)
    target[1, 2] = -100
    return input, weight, bias, target


def _gradients(found: Any, leaves: Sequence[Tensor], f: nn.Module) -> list[Tensor]:
    """The numbers of ``found``, and what a sum of them with factors of their own gives the leaves and f."""
    values = [whole(each) for each in (found if isinstance(found, tuple) else (found,)) if each is not None]
    total = torch.zeros(())
    for place, each in enumerate(values):
        if each.is_floating_point():
            total = total + (each * torch.linspace(1, 2 + place, each.numel()).reshape(each.shape)).sum()
    total.backward()
    given = [whole(each.grad) for each in leaves if each.grad is not None]
    return [each.detach() for each in values] + given + [each.grad for each in f.parameters() if each.grad is not None]


def _differences(what: str, found: Sequence[Tensor], right: Sequence[Tensor], bound: float = 2e-6) -> Iterator[str]:
    if len(found) != len(right):
        yield f"{what}: {len(found)} results, not {len(right)}"
    for place, (each, wanted) in enumerate(zip(found, right, strict=False)):
        error = float((each.double() - wanted.double()).norm() / (wanted.double().norm() + 1e-12))
        if each.shape != wanted.shape or not error < bound:
            yield f"{what}: result {place} is off by {error:.1e}"


def heads(classes: int) -> list[str]:
    """linear_cross_entropy and linear_log_prob in all placings."""
    problems: list[str] = []
    outputs = ("log_prob", "entropy", "lse", "target_logit", "is_top1", "argmax", "rank")
    for label, placing in HEADS.items():
        mesh = init_device_mesh("cpu", placing.mesh)
        for name, options in {**OPTIONS, "log_prob": {"outputs": outputs, "temperature": 0.8}}.items():
            if "weight" in options and classes != CLASSES:
                continue
            call: Callable[..., Any] = ms.linear_log_prob if "outputs" in options else ms.linear_cross_entropy
            f, (input, weight, bias, target) = disturbed("plif"), _tensors(classes)
            plain = [each.clone().requires_grad_() for each in (input, weight, bias)]
            right = _gradients(call(*plain[:2], target, f, linear_bias=plain[2], **options), plain, f)
            f = disturbed("plif")
            placed = [distribute_tensor(each, mesh, placing.weight).requires_grad_() for each in (weight, bias)]
            x = leaf = input.clone().requires_grad_()
            if placing.input == (Partial(),):
                x = DTensor.from_local(leaf / dist.get_world_size(), mesh, placing.input)
                right[-4] = right[-4] / dist.get_world_size()
            elif placing.input is not None:
                x = leaf = distribute_tensor(input, mesh, placing.input).requires_grad_()
            found = _gradients(call(x, placed[0], target, f, linear_bias=placed[1], **options), [leaf, *placed], f)
            problems += _differences(f"{label}, {name}", found, right)
    return problems


def logits() -> list[str]:
    """cross_entropy, log_softmax and log_prob in all placings."""
    problems: list[str] = []
    generator = torch.Generator().manual_seed(6)
    z, target = 3 * torch.randn(15, CLASSES, generator=generator), torch.randint(CLASSES, (15,), generator=generator)
    calls: dict[str, Callable[[Tensor, nn.Module], Any]] = {
        "log_softmax": lambda z, f: ms.log_softmax(z, f, temperature=0.7),
        "log_prob": lambda z, f: ms.log_prob(z, target, f, outputs=("log_prob", "entropy", "rank")),
    }
    for name, options in OPTIONS.items():
        calls[name] = lambda z, f, options=options: ms.cross_entropy(z, target, f, **options)
    for label, (shape, placements) in LOGITS.items():
        mesh = init_device_mesh("cpu", shape)
        for name, call in calls.items():
            f, plain = disturbed("spline"), z.clone().requires_grad_()
            right = _gradients(call(plain, f), [plain], f)
            f, placed = disturbed("spline"), distribute_tensor(z, mesh, placements).requires_grad_()
            found = _gradients(call(placed, f), [placed], f)
            problems += _differences(f"{label}, {name}", found, right)
    return problems


def placements_of_results() -> tuple[str, ...]:
    """A result that all ranks have whole is plain; others are placed as the tokens or the classes are."""
    mesh = init_device_mesh("cpu", (2, 2))
    z = distribute_tensor(torch.randn(8, CLASSES), mesh, [S0, S1])
    target, words = torch.randint(CLASSES, (8,), generator=torch.Generator().manual_seed(1)), list[str]()
    for found in (
        ms.cross_entropy(z, target),
        ms.cross_entropy(z, target, reduction="none"),
        ms.log_softmax(z),
        ms.cross_entropy(distribute_tensor(torch.randn(8, CLASSES), mesh, [R, S1]), target, reduction="none"),
    ):
        words.append(str(found.placements) if isinstance(found, DTensor) else "plain")
    return tuple(words)


# --- refusals ---------------------------------------------------------------------------------------------------------


@contextmanager
def _refused(words: str, problems: list[str], kind: type[Exception] = NotImplementedError) -> Iterator[None]:
    try:
        yield
    except kind as error:
        if words not in str(error):
            problems.append(f"{error} does not say {words!r}")
    else:
        problems.append(f"nobody says {words!r}")


def refusals() -> list[str]:
    problems: list[str] = []
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    input, weight, _, target = _tensors()
    by_classes, z = distribute_tensor(weight, line, [S0]), distribute_tensor(input @ weight.T, line, [Shard(2)])
    with _refused("placed as Shard(0)", problems):
        ms.linear_cross_entropy(input, distribute_tensor(weight, line, [S1]), target)
    with _refused("which ranks", problems, ValueError):
        ms.linear_cross_entropy(input, distribute_tensor(weight, square, [R, S0]), target)
    with _refused("one dimension of the mesh", problems):
        placed = distribute_tensor(input, square, [R, R])
        ms.linear_cross_entropy(placed, distribute_tensor(weight, square, [S0, S0]), target)
    with _refused("must be a DTensor", problems, TypeError):
        ms.linear_cross_entropy(distribute_tensor(input, line, [R]), weight, target)
    with _refused("placed like linear_weight", problems, ValueError):
        ms.linear_cross_entropy(input, by_classes, target, linear_bias=torch.zeros(CLASSES))
    with _refused("candidates is not supported", problems):
        ms.linear_cross_entropy(input, by_classes, target, candidates=torch.arange(4))
    with _refused("inplace is not supported", problems):
        ms.cross_entropy(distribute_tensor(torch.randn(4, CLASSES), line, [S1]), target[0, :4], inplace=True)
    with _refused("is a DTensor, which is not supported here", problems):
        ms.linear_distillation(input, by_classes, input, weight)
    with _refused("target must have the shape", problems, ValueError):
        ms.log_prob(z, target[:2])
    if dist.get_rank() == 0:
        target = target.clone()
        target[0, 0] = (target[0, 0] + 1) % CLASSES
    with _refused("target must be the same on all ranks", problems, ValueError):
        ms.linear_cross_entropy(input, by_classes, target)
    sharded = ms.MonotonicSoftmax(FEATURES, CLASSES)
    fully_shard(sharded, mesh=line)
    for read in (lambda: ms.linear_cross_entropy(input, sharded.weight, target), lambda: sharded.predict(input)):
        with _refused("module.unshard()", problems):
            read()
    return problems


# --- layers -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, transform: str) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = ms.MonotonicSoftmax(FEATURES, CLASSES, disturbed(transform), label_smoothing=0.1, z_loss=0.001)
        self.recompute = False

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        hidden = self.body(input).tanh()
        if self.recompute:
            loss: Tensor = checkpoint(lambda h: self.head(h, target).loss, hidden, use_reentrant=False)
            return loss
        return self.head(hidden, target).loss  # type: ignore[no-any-return]


def _model(transform: str, mesh: DeviceMesh, data: bool) -> tuple[Model, Model]:
    """The model of one process, and the same shared out: its head by classes, and all of it over the data."""
    torch.manual_seed(0)
    alone = Model(transform)
    shared = copy.deepcopy(alone)
    parallelize_module(shared, mesh["classes"], {"head": ms.distributed.VocabParallel()})
    if data:
        for each in (shared.body, shared):
            fully_shard(each, mesh=mesh["data"])
        ms.distributed.prepare(shared)
    return alone, shared


def trained(transform: str) -> list[str]:
    """Three steps of a model on 2 x 2 ranks, in two parts each, and what its layer says after them.

    The gradients of a scalar of f are sums that cancel.
    """
    bound = 1e-5
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    alone, shared = _model(transform, mesh, True)
    generator, problems = torch.Generator().manual_seed(7), list[str]()
    input = torch.randn(8, LENGTH, FEATURES, generator=generator)
    target = torch.randint(CLASSES, (8, LENGTH), generator=generator)
    mine = slice(4 * mesh["data"].get_local_rank(), 4 * mesh["data"].get_local_rank() + 4)
    optimizers = [torch.optim.AdamW(ms.parameter_groups(each, lr=1e-2)) for each in (alone, shared)]
    for step in range(3):
        shared.recompute = step == 1
        (alone(input, target) * 2).backward()
        for last in (False, True):
            shared.set_requires_gradient_sync(last)  # type: ignore[operator]
            shared(input[mine], target[mine]).backward()
        norms = [ms.clip_grad_norm_(each, 1.0) for each in (alone, shared)]
        problems += _differences(f"norms of step {step}", [whole(each) for each in norms[1]], norms[0], bound)
        for name, each in shared.named_parameters():
            right = alone.get_parameter(name).grad
            assert each.grad is not None and right is not None
            problems += _differences(f"gradient of {name} in step {step}", [whole(each.grad)], [right], bound)
        for each in optimizers:
            each.step()
            each.zero_grad()
    with torch.no_grad():
        problems += _differences("log_prob", [whole(shared.head.log_prob(input))], [alone.head.log_prob(input)], bound)
        if not torch.equal(whole(shared.head.predict(input)), alone.head.predict(input)):
            problems.append("predict is another class")
        words = whole(shared.head.sample(input))
        if words.shape != target.shape or words.max() >= CLASSES:
            problems.append("sample is no class")
    return problems


def layers() -> list[str]:
    """Layers whose classes four ranks share out: plain, after sequence parallelism, and as nn.Linear."""
    mesh, problems = init_device_mesh("cpu", (4,)), list[str]()
    input, weight, _, target = _tensors()
    input, target = input[:, :4], target[:, :4]  # of which each rank has one; a style takes even shares only
    part = input.chunk(4, 1)[dist.get_rank()]
    torch.manual_seed(1)
    layer = ms.MonotonicSoftmax(FEATURES, CLASSES, disturbed("plif"))
    x = input.clone().requires_grad_()
    right = _gradients(tuple(layer(x, target)), [x, *[layer.weight, layer.bias]], layer.transform)
    for style in (ms.distributed.VocabParallel(), ms.distributed.VocabParallel(input_layouts=S1)):
        layer.zero_grad()
        shared = parallelize_module(copy.deepcopy(layer), mesh, style)
        gathers = style.input_layouts == S1
        leaf = (part if gathers else input).clone().requires_grad_()
        found = _gradients(tuple(shared(leaf, target)), [leaf, shared.weight, shared.bias], shared.transform)
        wanted = list(right)
        if gathers:
            wanted[2] = wanted[2].chunk(4, 1)[dist.get_rank()]
        problems += _differences(f"{style.input_layouts}", found, wanted)
    for mesh_shape, of_input, of_weight in ((4,), (R,), (S0,)), ((4,), (S1,), (S0,)), ((2, 2), (S0, R), (R, S0)):
        layer.zero_grad()
        x = input.clone().requires_grad_()
        wanted = _gradients(layer.log_prob(x), [x, layer.weight, layer.bias], layer.transform)
        layer.zero_grad()
        shared, square = copy.deepcopy(layer), init_device_mesh("cpu", mesh_shape)
        for name in ("weight", "bias"):
            placed = nn.Parameter(distribute_tensor(getattr(layer, name).detach(), square, of_weight))
            shared.register_parameter(name, placed)
        leaf = distribute_tensor(input, square, of_input).requires_grad_()
        found = _gradients(shared.log_prob(leaf), [leaf, shared.weight, shared.bias], shared.transform)
        problems += _differences(f"log_prob, {of_input}, {of_weight}", found, wanted)
    linear, f = nn.Linear(FEATURES, CLASSES, bias=False), layer.transform
    linear.weight.data.copy_(weight)
    flat, rows = target.flatten(), input.flatten(0, 1)
    wanted = [ms.cross_entropy(linear(rows), flat, f).detach()]
    for each in (ms.distributed.VocabParallel(), ColwiseParallel(use_local_output=False)):
        shared = parallelize_module(copy.deepcopy(linear), mesh, each)
        problems += _differences("nn.Linear", [whole(ms.cross_entropy(shared(rows), flat, f)).detach()], wanted)
        found = [ms.linear_cross_entropy(rows, shared.weight, flat, f).detach()]
        problems += _differences("the weight of nn.Linear", found, wanted)
    try:
        parallelize_module(ms.MixtureOfSoftmaxes(4, 8, 2), mesh, ms.distributed.VocabParallel())
        problems.append("a mixture is taken")
    except TypeError:
        pass
    return problems


def samples(count: int) -> tuple[list[int], list[float]]:
    """How often each class is drawn, and its probability."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(2)
    layer = ms.MonotonicSoftmax(FEATURES, 7, disturbed("plif"))
    hidden = torch.randn(1, FEATURES)
    p = ms.log_softmax(layer.logits(hidden), layer.transform, temperature=1.5).exp()[0]
    parallelize_module(layer, mesh, ms.distributed.VocabParallel())
    drawn = whole(layer.sample(hidden.expand(count, -1), temperature=1.5, generator=torch.Generator().manual_seed(3)))
    return torch.bincount(drawn, minlength=7).tolist(), p.tolist()


def saved(folder: str, load: bool) -> list[Tensor]:
    """The parameters of a layer that this many ranks share out: saved, or loaded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(9 if load else 3)
    layer = ms.MonotonicSoftmax(FEATURES, CLASSES, disturbed("spline"))
    parallelize_module(layer, mesh, ms.distributed.VocabParallel())
    state = {"layer": layer.state_dict()}
    if load:
        dcp.load(state, checkpoint_id=folder)
        layer.load_state_dict(state["layer"])
    else:
        dcp.save(state, checkpoint_id=folder)
    return [whole(each).detach() for each in layer.parameters()]
