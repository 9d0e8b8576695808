"""What is kept of a transform: state dicts, what it was built with and comes back to, the values it has now."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from built_transforms import (
    BUILT,
    LEARNED,
    Doubled,
    Z,
    built,
    every_case,
    every_half,
    every_learned,
    raws,
    trained,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import monosoftmax as ms
from monosoftmax.transforms import PLIF, REGISTRY, Identity, MonotonicTransform, SoftCap, Temperature

# --- state dicts ------------------------------------------------------------------------------------------------------


@every_case
def test_no_raw_tensor_is_a_scalar(case):
    assert all(raw.dim() == 1 for raw in raws(built(case)).values())


@every_case
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("parametrized", [False, True])
def test_scalars_of_older_state_dicts_load(case, assign, parametrized):
    transform, other = built(case), trained(case)
    if parametrized and case in LEARNED:
        for each in (transform, other):
            for name in [name for name, _ in each.named_parameters()]:
                parametrize.register_parametrization(each, name, Doubled())
    model, saved = nn.Sequential(transform), nn.Sequential(other).state_dict()
    old = {name: value.reshape(()) if value.shape == (1,) else value for name, value in saved.items()}
    given = {name: (value, value.shape) for name, value in old.items()}
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    assert model.load_state_dict(old, assign=assign) == ([], [])
    assert torch.equal(transform(), other())
    assert old.keys() == given.keys()
    assert all(old[name] is value and value.shape == shape for name, (value, shape) in given.items())
    assert all(value.shape == saved[name].shape for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad


@every_case
@every_half
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])
def test_half_precision_state_dicts_do_not_make_half_precision_parameters(case, half, assign, kind):
    saved = {name: value.to(half) for name, value in trained(case).state_dict().items()}
    given = {name: nn.Parameter(value) if kind is nn.Parameter else value for name, value in saved.items()}
    transform = built(case)
    transform.load_state_dict(given, assign=assign)
    assert all(value.dtype == half for value in given.values())
    for name, raw in raws(transform).items():
        assert raw.dtype == torch.float32
        assert raw.is_leaf
        assert torch.equal(raw, saved[name].float())
    assert [*transform.named_parameters()] == [
        (name, raw) for name, raw in raws(transform).items() if raw.requires_grad
    ]


@every_case
def test_a_state_dict_of_another_shape_is_refused(case):
    transform = built(case)
    for name, value in transform.state_dict().items():
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            transform.load_state_dict({**transform.state_dict(), name: torch.cat([value, value])})


# --- initialisation ---------------------------------------------------------------------------------------------------


@every_case
def test_reset_parameters_restores_what_it_was_built_with(case):
    transform, fresh = trained(case), built(case)
    with torch.no_grad():
        for buffer in transform.buffers():
            buffer.fill_(torch.nan)
    transform.reset_parameters()
    assert all(torch.equal(raw, raws(fresh)[name]) for name, raw in raws(transform).items())


@every_case
def test_a_transform_that_was_built_on_the_meta_device(case):
    with torch.device("meta"):
        transform = built(case)
    assert all(raw.is_meta for raw in raws(transform).values())
    transform.to_empty(device="cpu")
    with torch.no_grad():
        for raw in raws(transform).values():
            raw.fill_(torch.nan)
    transform.reset_parameters()
    fresh = built(case)
    assert all(torch.equal(raw, raws(fresh)[name]) for name, raw in raws(transform).items())
    assert [name for name, _ in transform.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    assert torch.equal(transform(Z), fresh(Z))
    assert repr(transform) == repr(fresh)


def test_reset_parameters_draws_a_random_start_anew():
    transform = PLIF(6, init="random", generator=torch.Generator().manual_seed(1))
    start = transform.raw_slope.detach().clone()
    transform.reset_parameters()
    assert not torch.equal(transform.raw_slope, start)
    transform.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(transform.raw_slope, start)


@every_learned
def test_reset_parameters_does_not_write_to_what_is_computed(case):
    pruned, parametrized = trained(case), trained(case)
    name = next(name for name, _ in pruned.named_parameters())
    prune.identity(pruned, name)
    parametrize.register_parametrization(parametrized, name, Doubled())
    for transform in (pruned, parametrized):
        with pytest.raises(RuntimeError, match=f"{name} is not a parameter or buffer of this .*pruning"):
            transform.reset_parameters()


class Square(MonotonicTransform):
    """A transform of a user: increasing for logits above 0."""

    def __init__(self, scale: float = 1.0, **raw: Tensor | nn.Parameter) -> None:
        super().__init__()
        self.scale = scale
        for name, value in raw.items():
            setattr(self, name, value) if isinstance(value, nn.Parameter) else self.register_buffer(name, value)

    def coefficients(self) -> Tensor:
        return torch.tensor([self.scale])

    def evaluate(self, z: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients[0] * z * z


def test_reset_parameters_of_a_subclass():
    Square().reset_parameters()
    for raw in (torch.zeros(2), nn.Parameter(torch.zeros(2))):
        with pytest.raises(NotImplementedError, match=r"Square has parameters or buffers and must define reset_param"):
            Square(raw=raw).reset_parameters()


# --- configuration ----------------------------------------------------------------------------------------------------


@every_case
def test_round_trip_of_the_configuration(case):
    name, arguments = BUILT[case]
    transform = trained(case)
    assert transform.arguments() == arguments
    config = transform.to_dict()
    assert config == {"type": name, **arguments}
    assert list(config) == ["type", *arguments]
    read = json.loads(json.dumps(config))
    again = ms.transforms.from_dict(read)
    assert read == config
    assert type(again) is REGISTRY[name]
    assert again.to_dict() == config
    assert torch.equal(again(), built(case)())
    again.load_state_dict(transform.state_dict())
    assert torch.equal(again(), transform())


@pytest.mark.parametrize("name", REGISTRY)
def test_a_type_alone_gives_the_defaults(name):
    assert repr(ms.transforms.from_dict({"type": name})) == repr(REGISTRY[name]())


def test_arguments_are_values_of_json_whatever_number_was_given():
    assert Temperature(2).to_dict() == {"type": "temperature", "tau": 2.0, "learnable": True}
    assert type(Temperature(2).arguments()["tau"]) is float
    assert type(PLIF(bound=3).arguments()["bound"]) is float


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (None, TypeError, "config must be a dict, got NoneType"),
        ([("type", "plif")], TypeError, "config must be a dict, got list"),
        ({}, ValueError, 'config must have a "type", one of identity, .*spline'),
        ({"tau": 1.0}, ValueError, 'config must have a "type"'),
        ({"type": "plf"}, ValueError, r'config\["type"\] must be one of identity, .*, got .plf.'),
        ({"type": ["plif"]}, ValueError, r'config\["type"\] must be one of .*, got \[.plif.\]'),
        ({"type": "plif", "pieces": 3, "bund": 1}, TypeError, "plif has no pieces, bund: its arguments are num_pieces"),
        ({"type": "plif", 1: 2}, TypeError, "plif has no 1: its arguments are num_pieces"),
        ({"type": "identity", "tau": 1.0}, TypeError, "identity has no tau: its arguments are none at all"),
        ({"type": "gss", "device": "cpu"}, TypeError, "gss has no device: its arguments are k, c, learnable"),
        ({"type": "plif", "num_pieces": 0}, ValueError, "num_pieces must be at least 1, got 0"),
    ],
)
def test_bad_configurations(config, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ms.transforms.from_dict(config)


@pytest.fixture
def registry() -> Iterator[dict[str, type[MonotonicTransform]]]:
    before = dict(REGISTRY)
    yield REGISTRY
    REGISTRY.clear()
    REGISTRY.update(before)


def test_an_unregistered_subclass_is_told_to_register():
    class Capped(SoftCap):
        pass

    with pytest.raises(ValueError, match=r"^Capped has no name.*add a row to monosoftmax\.transforms\.REGISTRY"):
        Capped().to_dict()
    assert repr(Capped()) == "Capped(cap=30.0, learnable=False)"


def test_a_registered_subclass(registry):
    class Steep(PLIF):
        def __init__(self, steepness: float = 1.0, **settings) -> None:
            super().__init__(**settings)
            self.steepness = steepness

        def arguments(self):
            return {"steepness": self.steepness, **super().arguments()}

    class Plain(Identity):
        pass

    registry["steep"] = Steep
    registry["plain"] = Plain
    transform = Steep(3.0, num_pieces=4, device="cpu")
    parametrize.register_parametrization(transform, "raw_slope", Doubled())
    config = transform.to_dict()
    assert config["type"] == "steep"
    assert config["steepness"] == 3.0
    again = ms.transforms.from_dict(config)
    assert type(again) is Steep
    assert again.to_dict() == config
    assert ms.transforms.from_dict(Plain().to_dict()).to_dict() == {"type": "plain"}
    with pytest.raises(TypeError, match="steep has no slope: its arguments are steepness, num_pieces, bound"):
        ms.transforms.from_dict({"type": "steep", "slope": 1})


def test_a_subclass_whose_arguments_are_not_those_of_its_constructor(registry):
    class Lossy(PLIF):
        def __init__(self, steepness: float = 1.0, offset: float = 0.0, **settings) -> None:
            super().__init__(**settings)

    class Narrow(PLIF):
        def __init__(self, num_pieces: int = 4) -> None:
            super().__init__(num_pieces)

    registry["lossy"] = Lossy
    registry["narrow"] = Narrow
    registry["square"] = Square
    with pytest.raises(NotImplementedError, match=r"Lossy\.arguments\(\) must return .* differ in offset, steepness$"):
        Lossy().to_dict()
    with pytest.raises(NotImplementedError, match=r"Narrow.* differ in bound, init, init_std, min_slope$"):
        Narrow().to_dict()
    with pytest.raises(NotImplementedError, match=r"Square.* differ in scale$"):
        Square().to_dict()


# --- present values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in BUILT if "learnable" in BUILT[case][1]])
def test_scalars_are_the_present_values(case):
    transform = built(case)
    arguments = transform.arguments()
    learnable = arguments.pop("learnable")
    assert list(transform.scalars()) == list(arguments)
    for name, value in transform.scalars().items():
        assert value.shape == ()
        assert value.item() == pytest.approx(arguments[name], rel=1e-5)
        assert value.requires_grad == learnable
    assert torch.equal(torch.stack([*transform.scalars().values()]), transform())
    with torch.no_grad():
        for raw in raws(transform).values():
            raw.add_(0.5)
    for name, value in transform.scalars().items():
        assert abs(value.item() - arguments[name]) > 0.1
    assert transform.arguments() == {**arguments, "learnable": learnable}
