"""Parameter groups and the clipping of gradients, on plain, wrapped, tied and sharded models."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import monosoftmax as ms
from monosoftmax.transforms import GSS, PLIF, MonotonicMLP, RationalQuadraticSpline, Temperature

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference")

D, V = 5, 17


class Model(nn.Module):
    """A tied language model with two transforms, one of them shared by two layers, and frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.head = ms.MonotonicSoftmax(D, V, PLIF(10, 5.0)).tie_weights(self.embedding)
        self.second = ms.MonotonicCrossEntropyLoss(self.head.transform)
        self.fixed = ms.MonotonicCrossEntropyLoss(GSS(learnable=False))
        self.stopped = Temperature().requires_grad_(False)
        self.spline = RationalQuadraticSpline(3)


OF_THE_TRANSFORMS = ["head.transform.raw_slope", "spline.log_width", "spline.log_height", "spline.log_derivative"]


def names(module: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The names of the parameters of each group."""
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {group["name"]: [of[id(parameter)] for parameter in group["params"]] for group in groups}


# --- parameter_groups -------------------------------------------------------------------------------------------------


def test_groups_hold_every_trained_parameter_once_in_the_order_of_the_model():
    model = Model()
    groups = ms.parameter_groups(model, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    assert names(model, groups) == {
        "model": ["embedding.weight", "body.weight"],
        "no_decay": ["body.bias", "norm.weight", "norm.bias", "head.bias"],
        "transform": OF_THE_TRANSFORMS,
    }
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.2), (0.1, 0.0), (0.01, 0.0)]
    assert all(group["betas"] == (0.8, 0.9) for group in groups)
    assert ms.parameter_groups(model, lr=0.1, transform_lr=0.003)[-1]["lr"] == 0.003


def test_without_weight_decay_there_is_nothing_to_set_apart():
    # As older versions had it: states of optimisers load, and parameters are updated in the same order.
    model = Model()
    groups = names(model, ms.parameter_groups(model, lr=0.1))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert groups == {
        "model": [name for name in trained if name not in OF_THE_TRANSFORMS],
        "transform": OF_THE_TRANSFORMS,
    }


def test_empty_groups_are_left_out():
    def found(module: nn.Module) -> list[str]:
        return [group["name"] for group in ms.parameter_groups(module, lr=0.1, weight_decay=0.1)]

    assert found(nn.Linear(2, 2, bias=False)) == ["model"]
    assert found(nn.LayerNorm(2)) == ["no_decay"]
    assert found(nn.Sequential(nn.Linear(2, 2), MonotonicMLP(2))) == ["model", "no_decay", "transform"]
    assert found(MonotonicMLP(2)) == ["transform"]
    assert found(Model().requires_grad_(False)) == []


def test_weight_decay_reaches_matrices_only():
    model = Model()
    optimiser = torch.optim.AdamW(ms.parameter_groups(model, lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.detach().fill_(1.0)  # 0 would decay to 0
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser.step()
    decayed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert decayed == {"embedding.weight", "body.weight"}


class Saved(nn.Module):
    """PEFT's wrapper of a module that is trained in full: the original, and a copy that takes its place."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original).requires_grad_(True)})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.modules_to_save["default"], name)


def test_what_is_below_a_transform_is_its_own_however_it_is_wrapped():
    head = ms.MonotonicSoftmax(D, V, PLIF(10, 5.0))
    head.transform = Saved(head.transform)
    groups = ms.parameter_groups(head, lr=0.1, weight_decay=0.1)
    assert names(head, groups) == {
        "model": ["weight"],
        "no_decay": ["bias"],
        "transform": ["transform.modules_to_save.default.raw_slope"],
    }

    head = ms.MonotonicSoftmax(D, V, PLIF(10, 5.0))
    prune.l1_unstructured(head.transform, "raw_slope", 0.3)
    parametrizations.weight_norm(head, "weight")
    assert names(head, ms.parameter_groups(head, lr=0.1)) == {
        "model": ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"],
        "transform": ["transform.raw_slope_orig"],
    }

    head = ms.MonotonicSoftmax(D, V, PLIF(10, 5.0))
    parametrizations.weight_norm(head.transform, "raw_slope", dim=None)
    assert names(head, ms.parameter_groups(head, lr=0.1))["transform"] == [
        "transform.parametrizations.raw_slope.original0",
        "transform.parametrizations.raw_slope.original1",
    ]


@pytest.mark.parametrize("name", ["lr", "transform_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_groups_refuse_bad_rates(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be finite and not negative, got"):
        ms.parameter_groups(nn.Linear(2, 2), **{"lr": 0.1, name: value})


def test_the_model_is_wanted_not_its_parameters():
    message = "module must be a torch.nn.Module, the model and not its parameters, got generator"
    with pytest.raises(TypeError, match=message):
        ms.parameter_groups(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=message):
        ms.clip_grad_norm_(nn.Linear(2, 2).parameters(), 1.0)


def test_plif_learns_a_shape_that_a_linear_softmax_cannot_have():
    """Targets drawn from softmax(g(W h)) with g convex, W and h known: only f can lower the loss."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 8), torch.randn(50, 8)
    p = torch.softmax(F.softplus(2 * hidden @ weight.t()) * 0.8, -1)

    def trained(transform) -> float:
        module = ms.MonotonicSoftmax(8, 50, transform, bias=False)
        with torch.no_grad():
            module.weight.copy_(weight)
        module.weight.requires_grad_(False)
        groups = ms.parameter_groups(module, lr=0.0, transform_lr=0.03)
        optimiser = torch.optim.AdamW(groups, weight_decay=0.1)
        for _ in range(150):
            optimiser.zero_grad()
            loss = -(p * module.log_prob(hidden)).sum(-1).mean()
            loss.backward()
            optimiser.step()
        return loss.item()

    entropy = -(p * p.log()).sum(-1).mean().item()
    start = -(p * torch.log_softmax(hidden @ weight.t(), -1)).sum(-1).mean().item()
    temperature, plif = trained(Temperature()), trained(PLIF(40, 10.0))
    assert entropy < plif < temperature < start
    # What PLIF leaves of the gap to the truth, beside what one scalar leaves.
    assert plif - entropy < 0.2 * (temperature - entropy)


# --- clip_grad_norm_ --------------------------------------------------------------------------------------------------


def model_with_gradients() -> Model:
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    for parameter in (model.head.transform.raw_slope, *model.spline.parameters()):
        parameter.grad *= 100
    return model


def with_gradients(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.grad is not None]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_both_parts_are_clipped_as_torch_clips_each_alone(norm_type, foreach):
    model, other = model_with_gradients(), model_with_gradients()
    norms = ms.clip_grad_norm_(model, 0.5, transform_max_norm=3.0, norm_type=norm_type, foreach=foreach)
    named = dict(other.named_parameters())
    of_f = [named[name] for name in OF_THE_TRANSFORMS]
    others = [parameter for name, parameter in named.items() if name not in OF_THE_TRANSFORMS]
    assert torch.equal(norms.model, torch.nn.utils.clip_grad_norm_(others, 0.5, norm_type, foreach=foreach))
    assert torch.equal(norms.transform, torch.nn.utils.clip_grad_norm_(of_f, 3.0, norm_type, foreach=foreach))
    assert norms.transform > 10 * norms.model > 5
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


def test_a_large_gradient_of_f_leaves_that_of_the_model_alone():
    model = model_with_gradients()
    before = {name: parameter.grad.clone() for name, parameter in with_gradients(model)}
    norms = ms.clip_grad_norm_(model, 50.0)
    assert norms.model < 50 < norms.transform
    for name, parameter in with_gradients(model):
        scale = 50 / norms.transform if name in OF_THE_TRANSFORMS else 1.0
        torch.testing.assert_close(parameter.grad, before[name] * scale)
    # max_norm=inf is for measuring.
    measured = ms.clip_grad_norm_(model, math.inf)
    torch.testing.assert_close(measured, ms.GradientNorms(norms.model, torch.tensor(50.0)))


def test_norms_of_parts_without_gradients_are_zero():
    linear = nn.Linear(2, 2)
    assert ms.clip_grad_norm_(linear, 1.0) == (0, 0)
    linear.weight.grad = torch.full((2, 2), 2.0)
    assert ms.clip_grad_norm_(linear, 1.0) == (4, 0)
    transform = Temperature()
    transform.log_tau.grad = torch.full_like(transform.log_tau, -3.0)
    assert ms.clip_grad_norm_(transform, 1.0) == (0, 3)
    assert transform.log_tau.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("bad", ["head.bias", "spline.log_width"])
def test_error_if_nonfinite_changes_nothing(bad):
    model = model_with_gradients()
    model.get_parameter(bad).grad[0] = math.inf
    before = {name: parameter.grad.clone() for name, parameter in with_gradients(model)}
    with pytest.raises(RuntimeError, match="non-finite"):
        ms.clip_grad_norm_(model, 1e-3, error_if_nonfinite=True)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in with_gradients(model))
    ms.clip_grad_norm_(model, 1e-3)
    # The other part is clipped as if nothing were.
    norms = ms.clip_grad_norm_(model, math.inf)
    finite = norms.transform if bad == "head.bias" else norms.model
    assert finite.item() == pytest.approx(1e-3, rel=1e-3)


def test_clipping_does_not_wait_for_the_device():
    # A number of a tensor on the meta device cannot be read.
    with torch.device("meta"):
        model = Model()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
    for part in (model, model.body, model.spline):
        norms = ms.clip_grad_norm_(part, 1.0)
        # Both of them, so that they can be logged as one tensor.
        assert norms.model.is_meta and norms.transform.is_meta


@pytest.mark.parametrize("name", ["max_norm", "transform_max_norm"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_clipping_refuses_bad_norms(name, value):
    with pytest.raises(ValueError, match=f"^{name} must not be negative, got"):
        ms.clip_grad_norm_(nn.Linear(2, 2), **{"max_norm": 1.0, name: value})


# --- sharded models ---------------------------------------------------------------------------------------------------

SHARDED = """
import math, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
import monosoftmax as ms

rank = int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = ms.MonotonicSoftmax(4, 6, ms.transforms.PLIF(8, 2.0)).tie_weights(self.embedding)
    def forward(self, words, target):
        return self.head(self.norm(self.embedding(words)), target).loss

def model():
    torch.manual_seed(0)
    return Model()

def groups(module):
    of = {id(parameter): name.replace("_fsdp_wrapped_module.", "") for name, parameter in module.named_parameters()}
    found = {}
    for group in ms.parameter_groups(module, lr=0.1, weight_decay=0.1):
        assert len({type(each) for each in group["params"]}) == 1, "foreach kernels take no mixture"
        found.setdefault(group["name"], []).extend(of[id(each)] for each in group["params"])
    return found

def raises(error, message, function):
    try:
        function()
    except error as raised:
        assert message in str(raised), raised
    else:
        raise AssertionError(f"no {error}")

words, target = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 5])
expected = {"model": ["embedding.weight"], "no_decay": ["norm.weight", "norm.bias", "head.bias"],
            "transform": ["head.transform.raw_slope"]}
plain = model()
assert groups(plain) == expected
plain(words, target).backward()
norms = ms.clip_grad_norm_(plain, 1e-3, transform_max_norm=1e-5)

# FSDP2: DTensors keep their shape, their norms are those of the whole, on every rank.
sharded = fully_shard(model(), mesh=mesh)
assert groups(sharded) == expected
sharded(words, target).backward()
torch.testing.assert_close(ms.clip_grad_norm_(sharded, 1e-3, transform_max_norm=1e-5), norms)
for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)

# Parts that FSDP2 does not shard beside those that it does.
mixed = model()
fully_shard(mixed, mesh=mesh, ignored_params={mixed.norm.weight, mixed.norm.bias})
assert groups(mixed) == expected
mixed(words, target).backward()
torch.testing.assert_close(ms.clip_grad_norm_(mixed, 1e-3, transform_max_norm=1e-5), norms)
for ours, theirs in zip(mixed.parameters(), plain.parameters(), strict=True):
    whole = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
    torch.testing.assert_close(whole, theirs.grad)

# FSDP1 holds pieces of one dimension, of which it knows the shapes.
for original in (True, False):
    fsdp1 = FullyShardedDataParallel(model(), use_orig_params=original, device_id=torch.device("cpu"))
    if original:
        assert any(parameter.dim() != 2 for parameter in fsdp1.parameters())
        assert groups(fsdp1) == expected, groups(fsdp1)
        raises(NotImplementedError, "fully_shard", lambda: ms.clip_grad_norm_(fsdp1, 1.0))
    else:
        raises(ValueError, "use_orig_params=True", lambda: groups(fsdp1))
        raises(ValueError, "use_orig_params=True", lambda: ms.clip_grad_norm_(fsdp1, 1.0))
whole = FullyShardedDataParallel(
    model(), use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD
)
whole(words, target).backward()
assert groups(whole) == expected
torch.testing.assert_close(ms.clip_grad_norm_(whole, 1e-3, transform_max_norm=1e-5), norms)
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
def test_groups_and_clipping_of_sharded_models(tmp_path: Path):
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        results = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    # Before that, gloo of torch 2.10 says whom it has met.
    assert [out.splitlines()[-1:] for out, _ in results] == [["done"]] * 2, "\n".join(error for _, error in results)
