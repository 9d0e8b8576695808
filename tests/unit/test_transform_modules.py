"""Transforms as nn.Modules: what PyTorch and its tools do to modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from built_transforms import (
    BUILT,
    LEARNED,
    WITHOUT_INVERSE,
    Doubled,
    Z,
    built,
    every_case,
    every_half,
    every_learned,
    functions_of,
    raws,
    trained,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

import monosoftmax as ms
from monosoftmax.transforms import GSS, PLIF, REGISTRY, MonotonicTransform, plif


def test_every_registered_transform_is_tested():
    assert {name for name, _ in BUILT.values()} == REGISTRY.keys()


# --- a call without an input ------------------------------------------------------------------------------------------


@every_case
def test_without_an_input_it_returns_its_coefficients(case):
    transform = trained(case)
    assert torch.equal(transform(), transform.coefficients())
    assert transform().requires_grad == (case in LEARNED)
    assert transform().dtype == torch.float32
    assert torch.equal(transform(Z), transform.evaluate(Z, transform()))


@every_learned
def test_every_method_runs_the_hooks_before_it_takes_coefficients(case):
    transform = built(case)
    fresh = trained(case)

    def update(module, args):
        with torch.no_grad():
            for mine, theirs in zip(module.parameters(), fresh.parameters(), strict=True):
                mine.copy_(theirs)

    transform.register_forward_pre_hook(update)
    start = copy.deepcopy(transform.state_dict())
    for function, expected in [
        (transform, fresh()),
        (lambda: transform.derivative(Z), fresh.derivative(Z)),
        *([] if case in WITHOUT_INVERSE else [(lambda: transform.inverse(Z), fresh.inverse(Z))]),
        *([(transform.slopes, fresh.slopes())] if case == "plif" else []),
        *([(lambda: transform.scalars()["k"], fresh.scalars()["k"])] if case == "gss" else []),
    ]:
        transform.load_state_dict(start)
        torch.testing.assert_close(function(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.seconds
@every_case
def test_compiles_whole(case):
    transform = trained(case)
    for function in (lambda: transform(), lambda: transform(Z), lambda: transform.derivative(Z)):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(), function())


@every_case
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torchscript_is_refused(case):
    model = nn.Sequential(nn.Linear(2, 2), built(case))
    with pytest.raises(NotImplementedError, match=rf"{type(model[1]).__name__} cannot be scripted.*torch\.compile"):
        torch.jit.script(model)


# --- what takes the place of parameters -------------------------------------------------------------------------------


def with_raws(case: str, change) -> Tensor:
    """f(Z) where ``change`` is applied to every raw parameter of the trained transform of ``case``."""
    transform = trained(case)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.copy_(change(parameter))
    return transform(Z)


@every_learned
def test_under_parametrizations(case):
    transform = trained(case)
    for name in [name for name, _ in transform.named_parameters()]:
        parametrize.register_parametrization(transform, name, Doubled())
    assert torch.equal(transform(Z), with_raws(case, lambda raw: 2 * raw))
    transform().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in transform.parameters())
    assert transform.to_dict() == built(case).to_dict()


@every_learned
def test_pruned(case):
    transform = trained(case)
    for name in [name for name, _ in transform.named_parameters()]:
        prune.identity(transform, name)
    with torch.no_grad():
        for name, parameter in transform.named_parameters():
            assert name.endswith("_orig")
            parameter.mul_(2)
    expected = with_raws(case, lambda raw: 2 * raw)
    # The attribute is computed anew by the hook, and not before.
    assert torch.equal(transform(), transform.coefficients())
    assert torch.equal(transform(Z), expected)


@every_learned
@pytest.mark.parametrize("weight_norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm(case, weight_norm):
    transform = trained(case)
    expected = with_raws(case, lambda raw: 2 * raw)
    for name in [name for name, _ in transform.named_parameters()]:
        weight_norm(transform, name)
    with torch.no_grad():
        for name, parameter in transform.named_parameters():
            if name.endswith(("_g", "original0")):
                parameter.mul_(2)
    torch.testing.assert_close(transform(Z), expected)
    assert torch.equal(transform.evaluate(Z, transform()), transform(Z))
    transform().sum().backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in transform.parameters())


@every_case
def test_replicas_of_data_parallel(case):
    transform = trained(case)
    replica = transform._replicate_for_data_parallel()
    for name, raw in raws(transform).items():
        setattr(replica, name, 2 * raw)  # no Parameter: a tensor with a history
    assert not list(replica.parameters())
    expected = with_raws(case, lambda raw: 2 * raw)
    if case in LEARNED:
        assert torch.equal(replica(Z), expected)
        replica().sum().backward()
        assert all(parameter.grad is not None for parameter in transform.parameters())
    assert replica.to_dict() == transform.to_dict()
    assert repr(replica) == repr(transform)


@every_case
def test_functional_call_without_an_input(case):
    transform = trained(case)
    doubled = {name: 2 * raw for name, raw in raws(transform).items()}
    other = copy.deepcopy(transform)
    other.load_state_dict(doubled)
    assert torch.equal(functional_call(transform, doubled, ()), other())


def test_a_subclass_may_have_parameters_of_its_own():
    class Tilted(GSS):
        def __init__(self) -> None:
            super().__init__(k=2.0)
            self.log_other = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    transform = Tilted()
    assert torch.equal(transform(), GSS(k=2.0)())
    assert transform.scalars().keys() == {"k", "c"}
    assert transform.half().seen.dtype == torch.int64
    assert transform.log_other.dtype == torch.float32


def test_learnable_is_what_it_was_built_with():
    transform = GSS()
    transform.requires_grad_(False)
    assert transform.learnable
    fixed = GSS(learnable=False)
    fixed.extra = nn.Parameter(torch.zeros(1))
    assert not fixed.learnable


# --- distributed ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def cpu_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


class Head(nn.Module):
    def __init__(self, transform: MonotonicTransform) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.transform = transform

    def forward(self, input: Tensor) -> Tensor:
        logits = self.linear(input)
        self.seen = self.transform()
        return self.transform(logits) + self.transform.evaluate(logits.float(), self.seen)

    def table(self) -> Tensor:
        return self.transform()


@every_case
def test_fully_shard_of_a_transform(case, one_process):
    from torch.distributed.fsdp import fully_shard

    transform, expected = trained(case), trained(case)
    fully_shard(transform, mesh=cpu_mesh())
    assert type(transform) is not type(expected)
    assert transform.to_dict() == expected.to_dict()
    for mine, theirs in zip(functions_of(case, transform), functions_of(case, expected), strict=True):
        torch.testing.assert_close(mine(Z), theirs(Z), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(transform(), expected())
    if case in LEARNED:
        transform().sum().backward()
        expected().sum().backward()
        for mine, theirs in zip(transform.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine.grad.full_tensor(), theirs.grad)


@every_case
def test_a_sharded_transform_is_initialised_after_the_meta_device(case, one_process):
    from torch.distributed.fsdp import fully_shard

    transform = built(case, **({"device": "meta"} if BUILT[case][1] else {}))
    fully_shard(transform, mesh=cpu_mesh())
    transform.to_empty(device="cpu").reset_parameters()
    assert torch.equal(transform(), built(case)())


@every_learned
def test_dtensors_are_refused_outside_of_the_module_that_was_sharded(case, one_process):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = Head(trained(case))
    names = ", ".join(name for name, _ in model.transform.named_parameters())
    fully_shard(model, mesh=cpu_mesh())
    for function in (model.table, *functions_of(case, model.transform)):
        with pytest.raises(NotImplementedError) as caught:
            function(*([] if function == model.table else [Z]))
        assert f"parameters that are DTensors ({names})" in str(caught.value)
        for wrong in ("full_tensor", "to_local"):
            assert wrong not in str(caught.value)
    # And what the message advises helps.
    expected = trained(case)()
    register_fsdp_forward_method(model, "table")
    assert torch.equal(model.table(), expected)
    model.reshard()
    model.unshard()
    assert torch.equal(model.transform(), expected)
    model.reshard()
    assert model(torch.ones(3, 4)).shape == (3, 5)


@every_learned
def test_mixed_precision_of_fsdp(case, one_process):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    together, apart = Head(trained(case)), Head(trained(case))
    fully_shard(together, mesh=cpu_mesh(), mp_policy=policy)
    fully_shard(apart.transform, mesh=cpu_mesh())
    fully_shard(apart, mesh=cpu_mesh(), mp_policy=policy)
    for model in (together, apart):
        model(torch.ones(3, 4))
        model.reshard()
        assert all(parameter.dtype == torch.float32 for parameter in model.transform.parameters())
    assert torch.equal(together.seen, with_half_values(trained(case), torch.bfloat16)())
    assert torch.equal(apart.seen, trained(case)())
    assert not torch.equal(together.seen, apart.seen)


@every_case
def test_a_half_precision_model_is_sharded_with_the_transform_apart(case, one_process):
    from torch.distributed.fsdp import fully_shard

    model = Head(trained(case)).bfloat16()
    fully_shard(model.transform, mesh=cpu_mesh())
    fully_shard(model, mesh=cpu_mesh())
    model(torch.ones(3, 4, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(model.seen, trained(case)())
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.transform.parameters())


@every_case
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_fsdp_1(case, use_orig_params, one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Head(trained(case))
    expected = copy.deepcopy(model)
    sharded = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    if case in LEARNED and not use_orig_params:
        assert not list(sharded.module.transform.parameters())
    assert torch.equal(sharded(torch.ones(3, 4)), expected(torch.ones(3, 4)))


# --- precision --------------------------------------------------------------------------------------------------------


def with_half_values(transform: MonotonicTransform, half: torch.dtype) -> MonotonicTransform:
    with torch.no_grad():
        for raw in raws(transform).values():
            raw.copy_(raw.to(half))
    return transform


@every_case
@every_half
def test_a_cast_of_the_model_to_half_precision_leaves_the_transform_as_it_is(case, half):
    casts = [lambda model: model.to(half), lambda model: model.type(half), lambda model: model.to(Z.to(half))]
    casts += [lambda model: model.half()] if half == torch.float16 else [lambda model: model.bfloat16()]
    for cast in casts:
        transform = trained(case)
        transform(Z).sum().backward() if case in LEARNED else None
        before = {name: raw.detach().clone() for name, raw in raws(transform).items()}
        model = cast(nn.Sequential(nn.Linear(2, 2), transform))
        assert model[0].weight.dtype == half
        for name, raw in raws(transform).items():
            assert raw.dtype == torch.float32
            assert torch.equal(raw, before[name])
            assert raw.grad is None or raw.grad.dtype == torch.float32
        # Optimisers hold on to parameters that were there before the cast.
        assert [id(raw) for raw in raws(model[1]).values()] == [id(raw) for raw in raws(transform).values()]
        assert transform(Z.to(half)).dtype == half
        assert transform().dtype == torch.float32


@every_case
@every_half
def test_other_moves_and_casts_are_done(case, half):
    transform = trained(case)
    values = [raw.double() for raw in raws(transform).values()]
    assert all(raw.dtype == torch.float64 for raw in raws(transform.double()).values())
    assert all(raw.dtype == torch.float64 for raw in raws(transform.to(half)).values())
    assert all(torch.equal(raw, value) for raw, value in zip(raws(transform).values(), values, strict=True))
    assert all(raw.dtype == torch.float32 for raw in raws(transform.float()).values())
    on_meta = transform.to("meta", half)
    assert all(raw.is_meta and raw.dtype == torch.float32 for raw in raws(on_meta).values())
    empty = on_meta.to_empty(device="cpu")
    assert all(raw.device.type == "cpu" and raw.dtype == torch.float32 for raw in raws(empty).values())


@every_learned
@every_half
def test_a_cast_to_half_precision_with_parametrizations(case, half):
    transform = trained(case)
    for name in [name for name, _ in transform.named_parameters()]:
        parametrize.register_parametrization(transform, name, Doubled())
    before = {name: raw.detach().clone() for name, raw in raws(transform).items()}
    nn.Sequential(transform).to(half)
    for name, raw in raws(transform).items():
        assert raw.dtype == torch.float32
        assert torch.equal(raw, before[name])


@every_case
@every_half
def test_a_half_precision_default_is_widened(case, half):
    torch.set_default_dtype(half)
    try:
        transform = built(case)
        assert transform().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(raw.dtype == torch.float32 for raw in raws(transform).values())
    assert torch.equal(transform(), built(case)())


@pytest.mark.parametrize("case", [case for case in BUILT if BUILT[case][1]])
def test_dtype_of_construction(case):
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"dtype must be torch\.float32 or .*, got {dtype}: .*lost to rounding"):
            built(case, dtype=dtype)
    for dtype in (torch.float32, torch.float64):
        assert all(raw.dtype == dtype for raw in raws(built(case, dtype=dtype)).values())
    torch.set_default_dtype(torch.float64)
    try:
        assert all(raw.dtype == torch.float64 for raw in raws(built(case)).values())
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_optimiser_moves_a_transform_in_a_half_precision_model_and_not_half_precision_slopes():
    def step(raw: nn.Parameter) -> Tensor:
        start = raw.detach().clone()
        raw.grad = torch.linspace(-1, 1, 50, dtype=raw.dtype)
        torch.optim.AdamW([raw], lr=1e-3).step()
        return raw.detach() != start

    transform = PLIF(50).bfloat16()
    assert step(transform.raw_slope).all()
    assert not step(nn.Parameter(PLIF(50).raw_slope.detach().bfloat16())).any()


# --- devices ----------------------------------------------------------------------------------------------------------


@every_case
def test_a_default_device_is_not_where_anything_is_computed(case):
    transform = trained(case)
    expected = [transform(), *(function(Z) for function in functions_of(case, transform))]
    with torch.device("meta"):
        found = [transform(), *(function(Z) for function in functions_of(case, transform))]
    for mine, theirs in zip(found, expected, strict=True):
        assert not mine.is_meta
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@every_case
def test_on_the_meta_device(case):
    transform = built(case).to("meta")
    for function in functions_of(case, transform):
        result = function(Z.to("meta"))
        assert result.is_meta
        assert result.shape == Z.shape
    assert transform().shape == built(case)().shape
    assert transform.to_dict() == built(case).to_dict()


@every_case
def test_under_fake_tensors(case):
    with FakeTensorMode():
        transform = built(case)
        z = torch.empty(4, 3)
        for function in functions_of(case, transform):
            assert function(z).shape == (4, 3)
            assert function(z).device.type == "cpu"
        assert transform().shape == built(case)().shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_coefficients_that_were_rounded_on_their_way_are_refused(backend, half):
    """As FSDP does with the outputs of a module whose policy has an output_dtype, in a hook that runs after it."""
    f = ms.transforms.PLIF()
    f.register_forward_hook(lambda module, args, output: output.to(half))
    for call in (lambda: ms.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), f, backend=backend),
                 lambda: ms.log_softmax(torch.randn(2, 3), f, backend=backend)):  # fmt: skip
        with pytest.raises(TypeError, match=f"coefficients, got {half}: .* without output_dtype"):
            call()


@pytest.mark.parametrize(
    ("device", "dtype", "pieces", "fused"),
    [
        ("cpu", torch.float32, 4, True),
        ("cpu", torch.float64, 2**22 + 1, True),
        ("cuda", torch.float32, 2**22, True),
        ("cuda", torch.float64, 4, False),
        ("cuda", torch.float32, 2**22 + 1, False),
    ],
)
def test_plif_has_kernels_for_what_they_take(
    device: str, dtype: torch.dtype, pieces: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the formula computes the coefficients that the kernels refuse."""
    kernels = object()
    monkeypatch.setattr(plif, "unobserved", lambda tensors: True)
    monkeypatch.setattr(plif, "kernels_for", lambda kind: kernels)
    raw: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=torch.Size([pieces]))
    assert plif._kernels_for(raw) is (kernels if fused else None)
