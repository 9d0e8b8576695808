"""The loss module and the output layer."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import monosoftmax as ms
from monosoftmax.transforms import PLIF, Identity, SigmoidCap, Temperature

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference")

N, D, V = 6, 5, 17
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-3}]
CLASS_WEIGHT = torch.linspace(0.3, 2.0, V, dtype=torch.float64)
#: All of those that the layer takes.
ALL_OPTIONS = [
    *OPTIONS,
    {"weight": CLASS_WEIGHT},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"weight": CLASS_WEIGHT, "reduction": "none", "label_smoothing": 0.1},
    {"weight": CLASS_WEIGHT, "reduction": "sum", "label_smoothing": 0.2, "z_loss": 1e-3},
]


def bent_plif(dtype: torch.dtype = torch.float64) -> PLIF:
    return PLIF(20, 5.0, init="random", generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(N, D, generator=generator, dtype=torch.float64)
    target = torch.randint(V, (N,), generator=generator)
    target[2] = -100
    return input, target


def plain_loss(y, target, weight=None, label_smoothing=0.0, z_loss=0.0, reduction="mean"):
    """The loss of transformed logits ``y`` by PyTorch's function. The z-loss has no class weights."""
    valid = target != -100
    rows = F.cross_entropy(y, target, weight, label_smoothing=label_smoothing, reduction="none")
    divisor = {"mean": valid.sum() if weight is None else weight[target[valid]].sum(), "sum": 1, "none": 1}[reduction]
    rows = torch.where(valid, rows + z_loss * y.logsumexp(1).square(), 0.0)
    return rows if reduction == "none" else rows.sum() / divisor


def layer(transform=None, **options) -> ms.MonotonicSoftmax:
    torch.manual_seed(3)
    return ms.MonotonicSoftmax(D, V, transform, dtype=torch.float64, **options)


# --- MonotonicCrossEntropyLoss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_module_is_the_function(options, reduction):
    torch.manual_seed(0)
    z, target = torch.randn(N, V), torch.randint(V, (N,))
    target[1] = 3
    weight = torch.rand(V) + 0.5
    transform = bent_plif(torch.float32)
    loss = ms.MonotonicCrossEntropyLoss(transform, weight=weight, ignore_index=3, reduction=reduction, **options)
    expected = ms.cross_entropy(z, target, transform, weight=weight, ignore_index=3, reduction=reduction, **options)
    assert torch.equal(loss(z, target), expected)


@pytest.mark.parametrize("shape", [(V,), (N, V), (N, V, 2, 3)])
def test_loss_module_without_transform_is_torch(shape):
    torch.manual_seed(0)
    z = torch.randn(shape)
    target = torch.randint(V, shape[:1] * (len(shape) > 1) + shape[2:])
    weight = torch.rand(V) + 0.5
    loss = ms.MonotonicCrossEntropyLoss(weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(loss(z, target), nn.CrossEntropyLoss(weight, label_smoothing=0.1)(z, target))


def test_loss_module_owns_transform_and_weight():
    loss = ms.MonotonicCrossEntropyLoss(PLIF(4, 2.0), weight=torch.ones(3))
    assert set(loss.state_dict()) == {"weight", "transform.raw_slope"}
    assert [name for name, _ in loss.named_parameters()] == ["transform.raw_slope"]
    loss(torch.randn(2, 3), torch.tensor([0, 2])).backward()
    assert loss.transform.raw_slope.grad.abs().max() > 0
    loaded = ms.MonotonicCrossEntropyLoss(PLIF(4, 2.0), weight=torch.zeros(3))
    with torch.no_grad():
        loss.transform.raw_slope.add_(1)
    loaded.load_state_dict(loss.state_dict())
    assert torch.equal(loaded.weight, torch.ones(3))
    assert torch.equal(loaded.transform.raw_slope, loss.transform.raw_slope)


def test_repr():
    assert repr(ms.MonotonicCrossEntropyLoss(z_loss=1e-4, reduction="sum")) == (
        "MonotonicCrossEntropyLoss(\n"
        "  ignore_index=-100, label_smoothing=0, z_loss=0.0001, reduction='sum', backend='auto'\n"
        "  (transform): Identity()\n"
        ")"
    )
    layer = ms.MonotonicSoftmax(4, 9, bias=False, reduction="none")
    assert repr(layer) == (
        "MonotonicSoftmax(\n"
        "  in_features=4, n_classes=9, bias=False, class_weight=False, ignore_index=-100, label_smoothing=0, z_loss=0, "
        "reduction='none', backend='auto'\n"
        "  (transform): Identity()\n"
        ")"
    )
    assert "class_weight=True" in repr(ms.MonotonicSoftmax(4, 9, weight=torch.ones(9)))


# --- MonotonicSoftmax -------------------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("options", ALL_OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", [None, bent_plif, SigmoidCap])
def test_output_is_log_p_of_the_target_whatever_the_loss(data, options, bias, transform):
    input, target = data
    module = layer(transform and transform(), bias=bias, **options)
    output, loss = module(input, target)
    valid = target != -100
    z = module.logits(input)
    log_p = torch.log_softmax(module.transform(z), -1)
    torch.testing.assert_close(output[valid], log_p[valid].gather(1, target[valid, None]).squeeze(1))
    assert output[2] == 0
    torch.testing.assert_close(module.log_prob(input), log_p)

    torch.testing.assert_close(loss, plain_loss(module.transform(z), target, **options))


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_gradients_of_the_layer(data, options):
    input, target = data
    fused, plain = layer(bent_plif(), **options), layer(bent_plif(), **options)
    x, x_plain = input.clone().requires_grad_(), input.clone().requires_grad_()
    fused(x, target).loss.sum().backward()
    plain_loss(plain.transform(plain.logits(x_plain)), target, **options).sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad)
    assert (x.grad[2] == 0).all()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_output_is_differentiable(data, options):
    input, target = data
    module = layer(bent_plif(), **options)
    x, x_plain = input.clone().requires_grad_(), input.clone().requires_grad_()
    module(x, target).output.sum().backward()
    valid = target != -100
    log_p = torch.log_softmax(module.transform(module.logits(x_plain)), -1)
    log_p[valid].gather(1, target[valid, None]).sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad)


AUTOCAST = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
DTYPES = [(dtype, None) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.grid
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES + AUTOCAST)
@pytest.mark.parametrize("options", ALL_OPTIONS)
@pytest.mark.parametrize("transform", [None, bent_plif])
def test_no_probability_of_a_confident_model_exceeds_one(transform, options, dtype, autocast, backend):
    """Where log p is about 0, a logit of the target that is rounded otherwise than those in lse makes it positive."""
    head = layer(transform and transform(), backend=backend, **options).to(dtype)
    target = torch.arange(V)
    target[3] = -100
    hidden = (head.weight.detach() * 300).to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = head(hidden, target).output
        own = head.log_prob(hidden)
        losses = ms.linear_cross_entropy(
            hidden, head.weight, target, head.transform, linear_bias=head.bias, reduction="none", backend=backend
        )
        largest = head.transform(head.logits(hidden).double()).abs().max()
    assert (output <= 0).all() and output[3] == 0
    assert torch.equal(output, -losses)
    valid = target != -100
    # Logits may be rounded differently in products of other shapes; log p is computed in float32 at least.
    rounding = torch.finfo(autocast or dtype).eps * max(1.0, largest.item()) * 4
    own = own[valid].gather(1, target[valid, None]).squeeze(1)
    torch.testing.assert_close(output[valid], own, rtol=0, atol=rounding)
    if transform is None:
        assert output.max() > -1e-3  # it is a confident model


@pytest.mark.grid(3)  # One mistake shows for plain options, both and one backend only.
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("differentiated", ["output", "loss", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_gradients_through_output_and_loss(data, options, dtype, differentiated, backend):
    input, target = data
    module = layer(bent_plif(), backend=backend, **options).to(dtype)
    x = input.to(dtype).requires_grad_()
    exact, y = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)

    def objective(output, loss):
        parts = {"output": (output.double() * upstream).sum(), "loss": (loss.double() * 1.5).sum()}
        return sum(parts.values()) if differentiated == "both" else parts[differentiated]

    objective(*module(x, target)).backward()
    z = exact.transform(F.linear(y, exact.weight, exact.bias))
    log_p = F.log_softmax(z, -1).gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    objective(torch.where(target == -100, 0.0, log_p), plain_loss(z, target, **options)).backward()
    # Sums of up to 17 products of numbers of about 1, rounded along the way.
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=tolerance, atol=tolerance)
    for (name, ours), theirs in zip(module.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.double(),
            theirs.grad,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_predict_is_the_argmax_of_log_prob(data):
    input, _ = data
    for transform in (None, bent_plif(), SigmoidCap()):
        module = layer(transform)
        assert torch.equal(module.predict(input), module.log_prob(input).argmax(-1))
        assert torch.equal(module.predict(input.reshape(2, 3, D)), module.predict(input).reshape(2, 3))


def test_any_leading_shape(data):
    input, target = data
    module = layer(bent_plif())
    output, loss = module(input, target)
    shaped = module(input.reshape(2, 3, D), target.reshape(2, 3))
    torch.testing.assert_close(shaped.output, output.reshape(2, 3))
    torch.testing.assert_close(shaped.loss, loss)
    assert module.log_prob(input.reshape(2, 3, D)).shape == (2, 3, V)
    single = module(input[0], target[0])
    torch.testing.assert_close(single.output, output[0])


def test_ignore_index(data):
    input, target = data
    target = target.clone()
    target[2] = 4
    target[0] = 7
    default, other = layer(bent_plif()), layer(bent_plif(), ignore_index=4)
    valid = target != 4
    torch.testing.assert_close(other(input, target).loss, default(input[valid], target[valid]).loss)
    assert other(input, target).output[2] == 0
    assert default(input, target).output[2] != 0
    assert default(input, torch.full((N,), -100)).loss.isnan()


def test_tied_weights_are_one_parameter_and_train():
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D)
    module = ms.MonotonicSoftmax(D, V)
    assert module.tie_weights(embedding) is module
    assert module.weight is embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": module})
    assert len(list(model.parameters())) == 2
    words, target = torch.randint(V, (8,)), torch.randint(V, (8,))

    # The gradient is the sum of what comes through the input and through the head.
    model["head"](model["embedding"](words), target).loss.backward()
    weight = embedding.weight.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(weight[words], weight, module.bias), target).backward()
    torch.testing.assert_close(embedding.weight.grad, weight.grad)

    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = model["head"](model["embedding"](words), target).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert module.weight is embedding.weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("embedding", "error", "message"),
    [
        (lambda: nn.Embedding(V, 6), ValueError, r"a weight of shape \(17, 5\), got \(17, 6\)"),
        (lambda: nn.Linear(D, V), TypeError, "must be a torch.nn.Embedding, got torch.nn.modules.linear.Linear"),
        (lambda: nn.Embedding(V, D).weight, TypeError, "must be a torch.nn.Embedding, got .*Parameter"),
        (lambda: with_weight(torch.zeros(V, D, dtype=torch.int8)), TypeError, "float64, got torch.int8"),
        (
            lambda: parametrizations.weight_norm(nn.Embedding(V, D), "weight"),
            TypeError,
            r"embedding is computed from other .* monosoftmax.linear_cross_entropy\(h, embedding.weight, target",
        ),
        (lambda: prune.l1_unstructured(nn.Embedding(V, D), "weight", 0.5), TypeError, "embedding is computed from"),
        (lambda: nn.utils.spectral_norm(nn.Embedding(V, D)), TypeError, "embedding is computed from"),
    ],
)
def test_tie_weights_refuses_what_has_no_weight_to_share(embedding, error, message, bias):
    module = ms.MonotonicSoftmax(D, V, bias=bias)
    weight = module.weight
    with pytest.raises(error, match=message):
        module.tie_weights(embedding())
    assert module.weight is weight


def with_weight(weight: torch.Tensor) -> nn.Embedding:
    embedding = nn.Embedding(*weight.shape)
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    return embedding


def test_tie_weights_wants_the_dtype_and_device_of_the_bias():
    message = "embedding must have a weight of the dtype of the bias, torch.float32, got torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        ms.MonotonicSoftmax(D, V).tie_weights(nn.Embedding(V, D, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="embedding must have a weight of the device of the bias, cpu, got meta"):
        ms.MonotonicSoftmax(D, V).tie_weights(nn.Embedding(V, D, device="meta"))
    # Nothing else of the layer has a dtype where there is no bias.
    embedding = nn.Embedding(V, D, dtype=torch.bfloat16)
    module = ms.MonotonicSoftmax(D, V, bias=False).tie_weights(embedding)
    module(torch.randn(3, D, dtype=torch.bfloat16), torch.arange(3)).loss.backward()
    assert embedding.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "compute", [lambda m: parametrizations.weight_norm(m, "weight"), lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
def test_a_computed_weight_of_the_layer_is_neither_tied_nor_reset(compute):
    # Assigned to, a parametrization would copy the values; what prune computes would not be read.
    module = ms.MonotonicSoftmax(D, V)
    compute(module)
    with pytest.raises(TypeError, match=r"the weight of this layer is computed from .*: tie first"):
        module.tie_weights(nn.Embedding(V, D))
    with pytest.raises(RuntimeError, match=r"weight is computed from .* before reset_parameters"):
        module.reset_parameters()


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_and_copies(data, bias):
    input, _ = data
    module, other = layer(bent_plif(), bias=bias), layer(PLIF(20, 5.0, dtype=torch.float64), bias=bias)
    names = {"weight", "transform.raw_slope"} | ({"bias"} if bias else set())
    assert set(module.state_dict()) == names
    with torch.no_grad():
        module.weight.mul_(2)
    assert not torch.allclose(other.log_prob(input), module.log_prob(input))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.log_prob(input), module.log_prob(input))
    assert torch.equal(copy.deepcopy(module).log_prob(input), module.log_prob(input))


def test_starts_as_a_linear_layer_does():
    torch.manual_seed(0)
    module = ms.MonotonicSoftmax(400, 1000)
    assert isinstance(module.transform, Identity)
    for parameter in module.parameters():
        assert 0.95 / 20 < parameter.abs().max() <= 1 / 20
        assert abs(parameter.mean()) < 0.005
    assert ms.MonotonicSoftmax(4, 9, device="meta", dtype=torch.bfloat16).weight.is_meta
    # A transform is taken as it is given, trained maybe.
    transform = bent_plif(torch.float32)
    slopes = transform.raw_slope.clone()
    assert torch.equal(ms.MonotonicSoftmax(4, 9, transform).transform.raw_slope, slopes)


# --- class weights ----------------------------------------------------------------------------------------------------


def test_class_weights_are_a_buffer_and_leave_the_output_alone(data):
    input, target = data
    plain, weighted = layer(bent_plif()), layer(bent_plif(), weight=CLASS_WEIGHT)
    assert set(weighted.state_dict()) - set(plain.state_dict()) == {"class_weight"}
    assert torch.equal(weighted.class_weight, CLASS_WEIGHT)
    torch.testing.assert_close(weighted(input, target).output, plain(input, target).output)
    assert weighted(input, target).loss != plain(input, target).loss
    loaded = layer(bent_plif(), weight=torch.ones(V))
    loaded.load_state_dict(weighted.state_dict())
    torch.testing.assert_close(loaded(input, target).loss, weighted(input, target).loss)
    # They go where the layer goes.
    assert ms.MonotonicSoftmax(D, V, weight=CLASS_WEIGHT, device="meta").class_weight.is_meta
    assert weighted.to("meta").class_weight.is_meta


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": torch.ones(V + 1)}, ValueError, r"weight must have shape \(17,\), got \(18,\)"),
        ({"weight": torch.ones(V, D)}, ValueError, r"weight must have shape \(17,\), got \(17, 5\)"),
        ({"weight": torch.ones(V, dtype=torch.long)}, TypeError, "weight must be float32, .* got torch.int64"),
        ({"weight": [1.0] * V}, TypeError, "weight must be a Tensor, got list"),
        ({"weight": torch.ones(V, requires_grad=True)}, ValueError, "weight must not require a gradient"),
        ({"weight": torch.ones(V, device="meta")}, ValueError, "weight must be on cpu like input, got meta"),
        ({"reduction": "average"}, ValueError, 'reduction must be "none", "mean" or "sum", got \'average\''),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1, got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be finite and not negative, got -1.0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    ],
)
def test_options_are_checked_at_once(options, error, message):
    with pytest.raises(error, match=message):
        ms.MonotonicSoftmax(D, V, **options)


# --- reset_parameters -------------------------------------------------------------------------------------------------


def spoil(module: nn.Module) -> None:
    """Stands for what memory that nobody wrote to may hold."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(3.0)


def assert_same(module: nn.Module, other: nn.Module) -> None:
    state, expected = module.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name in state:
        assert torch.equal(state[name], expected[name]), name


KINDS: dict[str, Any] = {
    "loss": lambda f, **options: ms.MonotonicCrossEntropyLoss(f, **options),
    "layer": lambda f, **options: ms.MonotonicSoftmax(D, V, f, **options),
    "layer without bias": lambda f, **options: ms.MonotonicSoftmax(D, V, f, False, **options),
}
TRANSFORMS: dict[str, Any] = {
    "none": lambda: None,
    "plif": lambda: PLIF(10, 5.0),
    "random plif": lambda: PLIF(10, 5.0, init="random"),
    "temperature": lambda: Temperature(2.0),
    "fixed cap": lambda: SigmoidCap(20.0, 1.0, 3.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
def test_reset_restores_the_very_module(kind, transform, weight):
    def make() -> nn.Module:
        torch.manual_seed(7)
        return KINDS[kind](TRANSFORMS[transform](), weight=None if weight is None else weight.clone())

    new, module = make(), make()
    spoil(module)
    torch.manual_seed(7)
    module.reset_parameters()
    assert_same(module, new)

    # Of a copy, too, and after a state_dict has brought other class weights.
    module = pickle.loads(pickle.dumps(copy.deepcopy(make())))
    other = make()
    spoil(other)
    module.load_state_dict(other.state_dict())
    torch.manual_seed(7)
    module.reset_parameters()
    assert_same(module, new)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "random plif"])
@pytest.mark.parametrize("weight", [None, CLASS_WEIGHT])
def test_deferred_initialisation_gives_the_very_module(kind, transform, weight):
    torch.manual_seed(7)
    new = KINDS[kind](TRANSFORMS[transform](), weight=weight)
    for reset in (reset_all, reset_those_with_tensors, lambda module: module.reset_parameters()):
        with torch.device("meta"):
            module = KINDS[kind](TRANSFORMS[transform](), weight=weight)
            if kind != "loss" and weight is not None:
                assert module.class_weight.is_meta
        module.to_empty(device="cpu")
        spoil(module)
        torch.manual_seed(7)
        reset(module)
        assert_same(module, new)


def reset_all(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def reset_those_with_tensors(module: nn.Module) -> None:
    """As FSDP1 and recipes for FSDP2 do."""
    for part in module.modules():
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            part.reset_parameters()


@pytest.mark.parametrize("kind", ["loss", "layer"])
def test_class_weights_from_the_meta_device_cannot_be_restored(kind):
    with torch.device("meta"):
        module = KINDS[kind](None, weight=torch.ones(V))
    module.reset_parameters()  # nothing to restore yet
    module.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="weight was given on the meta device, so that reset_parameters"):
        module.reset_parameters()


def test_reset_reaches_a_transform_through_what_wraps_it():
    module = ms.MonotonicSoftmax(D, V, Temperature(2.0))
    module.transform = torch.compile(module.transform, backend="eager")
    spoil(module)
    module.reset_parameters()
    assert module.transform.log_tau.item() == pytest.approx(math.log(2))


def test_what_ties_and_to_empty_do_to_each_other():
    """tie_weights says to call it again, and reset_parameters that it draws a tied weight."""
    with torch.device("meta"):
        model = nn.ModuleDict({"embedding": nn.Embedding(V, D)})
        model["head"] = ms.MonotonicSoftmax(D, V).tie_weights(model["embedding"])
    model.to_empty(device="cpu")
    reset_all(model)
    assert model["head"].weight is not model["embedding"].weight
    model["head"].tie_weights(model["embedding"])
    assert model["embedding"].weight.abs().max() > 1
    model["head"].reset_parameters()
    assert model["embedding"].weight.abs().max() <= 1 / math.sqrt(D)


# --- sharded ----------------------------------------------------------------------------------------------------------

SHARDED = """
import torch, torch.distributed as dist, monosoftmax as ms
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
input, target, weight = torch.randn(3, 5), torch.arange(3), torch.rand(17)
torch.manual_seed(0)
plain = ms.MonotonicSoftmax(5, 17, ms.transforms.PLIF(), weight=weight)
torch.manual_seed(0)
sharded = fully_shard(ms.MonotonicSoftmax(5, 17, ms.transforms.PLIF(), weight=weight), mesh=mesh)
for name in ("logits", "log_prob", "predict"):
    try:
        getattr(sharded, name)(input)
    except NotImplementedError as error:
        assert "weight is a DTensor" in str(error) and "register_fsdp_forward_method" in str(error), error
        print(name)
for name in ("logits", "log_prob", "predict"):
    register_fsdp_forward_method(sharded, name)
    assert torch.equal(getattr(sharded, name)(input), getattr(plain, name)(input))
for each in (plain, sharded):
    each(input, target).loss.backward()
for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
    torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
embedding = fully_shard(torch.nn.Embedding(17, 5), mesh=mesh)
for head in (sharded, plain):
    try:
        head.tie_weights(embedding)
    except ValueError as error:
        assert "tied before they are sharded" in str(error)
        print("tie")
for each in (plain, sharded):
    torch.manual_seed(1)
    each.reset_parameters()
# Random values on a DTensor come from a generator of torch's own.
assert sharded.weight.full_tensor().abs().max() <= 5**-0.5
assert torch.equal(sharded.transform.raw_slope.full_tensor(), plain.transform.raw_slope)
dist.destroy_process_group()
"""


def test_methods_of_a_sharded_layer_say_what_to_do():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", SHARDED], capture_output=True, text=True)
    said = [line for line in run.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert said == ["logits", "log_prob", "predict", "tie", "tie"], run.stderr


@pytest.mark.parametrize(("name", "settings"), [("in_features", (0, 5)), ("n_classes", (5, 0)), ("n_classes", (5, -3))])
def test_refuses_sizes(name, settings):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got"):
        ms.MonotonicSoftmax(*settings)


def test_refuses_targets_of_another_shape_or_out_of_range(data):
    input, target = data
    with pytest.raises(ValueError, match="target must have the shape of input"):
        layer()(input, target[:-1])
    target[0] = V
    with pytest.raises(IndexError, match="out of bounds for 17 classes"):
        layer()(input, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_autocast(data, dtype, options):
    input, target = data[0].float(), data[1]
    module = layer(bent_plif(), **options).float()
    exact = module(input, target)
    with torch.autocast("cpu", dtype):
        output, loss = module(input, target)
    loss.backward()
    assert loss.dtype == output.dtype == torch.float32
    # Logits of about 1 in 8 bits of mantissa, with slopes of at most 3.
    torch.testing.assert_close(output, exact.output, rtol=0, atol=0.05)
    torch.testing.assert_close(loss, exact.loss, rtol=0, atol=0.05)
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@pytest.mark.parametrize("make", [ms.MonotonicCrossEntropyLoss, lambda f: ms.MonotonicSoftmax(3, 5, f)])
def test_what_is_no_transform_is_refused_at_once(make: Any) -> None:
    with pytest.raises(TypeError, match="transform must be a monosoftmax transform or None, got str"):
        make("plif")
