"""The loss module, the output layer, and the optimiser groups."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import monosoftmax as ms
from monosoftmax.transforms import GSS, PLIF, Identity, MonotonicMLP, RationalQuadraticSpline, SigmoidCap, Temperature

pytestmark = pytest.mark.filterwarnings("ignore:monosoftmax runs the slow reference")

N, D, V = 6, 5, 17
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-3}]


def bent_plif(dtype: torch.dtype = torch.float64) -> PLIF:
    return PLIF(20, 5.0, init="random", generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(N, D, generator=generator, dtype=torch.float64)
    target = torch.randint(V, (N,), generator=generator)
    target[2] = -100
    return input, target


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
    assert repr(ms.MonotonicSoftmax(4, 9, PLIF(3, 2.0), bias=False)) == (
        "MonotonicSoftmax(\n"
        "  in_features=4, n_classes=9, bias=False, ignore_index=-100, label_smoothing=0, z_loss=0, backend='auto'\n"
        "  (transform): PLIF(num_pieces=3, bound=2, min_slope=0.01, init='identity')\n"
        ")"
    )


# --- MonotonicSoftmax -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
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

    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    y = module.transform(z)[valid]
    expected = F.cross_entropy(y, target[valid], label_smoothing=smoothing) + z_loss * y.logsumexp(1).square().mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_the_layer(data, options):
    input, target = data
    fused, plain = layer(bent_plif(), **options), layer(bent_plif(), **options)
    x, x_plain = input.clone().requires_grad_(), input.clone().requires_grad_()
    fused(x, target).loss.backward()

    valid = target != -100
    y = plain.transform(plain.logits(x_plain))[valid]
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    loss = F.cross_entropy(y, target[valid], label_smoothing=smoothing) + z_loss * y.logsumexp(1).square().mean()
    loss.backward()
    torch.testing.assert_close(x.grad, x_plain.grad)
    assert (x.grad[2] == 0).all()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", OPTIONS)
def test_output_is_differentiable(data, options):
    input, target = data
    module = layer(bent_plif(), **options)
    x, x_plain = input.clone().requires_grad_(), input.clone().requires_grad_()
    module(x, target).output.sum().backward()
    valid = target != -100
    log_p = torch.log_softmax(module.transform(module.logits(x_plain)), -1)
    log_p[valid].gather(1, target[valid, None]).sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad)


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


def test_tie_weights_refuses_another_shape():
    with pytest.raises(ValueError, match=r"embedding must have a weight of shape \(17, 5\), got \(17, 6\)"):
        ms.MonotonicSoftmax(D, V).tie_weights(nn.Embedding(V, 6))


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
    before = bent_plif(torch.float32)
    module = ms.MonotonicSoftmax(4, 9, before)
    slopes = before.raw_slope.clone()
    module.reset_parameters()
    assert torch.equal(before.raw_slope, slopes)
    assert ms.MonotonicSoftmax(4, 9, device="meta", dtype=torch.bfloat16).weight.is_meta


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


# --- parameter_groups -------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A tied language model with two transforms, one of them shared by two layers, and frozen parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.head = ms.MonotonicSoftmax(D, V, PLIF(10, 5.0)).tie_weights(self.embedding)
        self.second = ms.MonotonicCrossEntropyLoss(self.head.transform)
        self.fixed = ms.MonotonicCrossEntropyLoss(GSS(learnable=False))
        self.stopped = Temperature().requires_grad_(False)
        self.spline = RationalQuadraticSpline(3)


def test_groups_hold_every_trained_parameter_exactly_once():
    model = Model()
    body, transform = ms.parameter_groups(model, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))
    ids = [id(parameter) for group in (body, transform) for parameter in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(p) for p in transform["params"]} == {
        id(p) for p in (model.head.transform.raw_slope, *model.spline.parameters())
    }
    assert (body["name"], body["lr"], body["weight_decay"], body["betas"]) == ("model", 0.1, 0.2, (0.8, 0.9))
    assert (transform["name"], transform["lr"], transform["weight_decay"]) == ("transform", 0.01, 0.0)
    assert transform["betas"] == (0.8, 0.9)
    assert ms.parameter_groups(model, lr=0.1, transform_lr=0.003)[1]["lr"] == 0.003


def test_empty_groups_are_left_out():
    assert [group["name"] for group in ms.parameter_groups(nn.Linear(2, 2), lr=0.1)] == ["model"]
    assert [group["name"] for group in ms.parameter_groups(MonotonicMLP(2), lr=0.1)] == ["transform"]
    assert ms.parameter_groups(Model().requires_grad_(False), lr=0.1) == []


def test_weight_decay_does_not_reach_the_transforms():
    model = Model()
    optimiser = torch.optim.AdamW(ms.parameter_groups(model, lr=0.1, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    decayed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert decayed == {"embedding.weight", "body.weight", "body.bias", "head.bias"}


@pytest.mark.parametrize("name", ["lr", "transform_lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_groups_refuse_bad_rates(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be finite and not negative, got"):
        ms.parameter_groups(nn.Linear(2, 2), **{"lr": 0.1, name: value})


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


@pytest.mark.parametrize("make", [ms.MonotonicCrossEntropyLoss, lambda f: ms.MonotonicSoftmax(3, 5, f)])
def test_what_is_no_transform_is_refused_at_once(make: Any) -> None:
    with pytest.raises(TypeError, match="transform must be a monosoftmax transform or None, got str"):
        make("plif")
