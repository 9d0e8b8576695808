"""Hands that take away what modules were given as parameters: they compute, replace, move or wrap it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import monosoftmax as ms

Raws = Mapping[str, Tensor]


class Hand(NamedTuple):
    """A module in a hand: what is there for each call, what is trained, and the raw values that the bare module had."""

    for_a_call: Callable[[], Any]
    leaves: dict[str, Tensor]
    raws: Callable[[Raws], dict[str, Tensor]]


def registered(module: nn.Module) -> Hand:
    return Hand(lambda: module, dict(module.named_parameters()), dict)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, raw: Tensor) -> Tensor:
        return self.scale * raw


def names_of_f(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters() if name.startswith("transform.")]


def names_of_weight(module: nn.Module) -> list[str]:
    return ["weight"]


def computed(
    enter: Callable[[nn.Module, str], Any],
    parts: Mapping[str, str],
    value: Callable[..., Tensor],
    names: Callable[[nn.Module], list[str]],
) -> Callable[[nn.Module], Hand]:
    """The hand that ``enter`` puts each of ``names`` in, whose ``value`` comes of leaves called as in ``parts``."""

    def hand(module: nn.Module) -> Hand:
        replaced = {}
        for name in names(module):
            owner, last = owner_of(module, name)
            enter(owner, last)
            path = name[: len(name) - len(last)]
            replaced[name] = {part: path + pattern.format(last) for part, pattern in parts.items()}
        used = {leaf for leaves in replaced.values() for leaf in leaves.values()}
        assert used <= {name for name, _ in module.named_parameters()}

        def raws(leaves: Raws) -> dict[str, Tensor]:
            found = {name: leaf for name, leaf in leaves.items() if name not in used}
            return found | {
                name: value(**{part: leaves[leaf] for part, leaf in of.items()}) for name, of in replaced.items()
            }

        return Hand(lambda: module, dict(module.named_parameters()), raws)

    return hand


def mask_of(raw: Tensor) -> Tensor:
    """Every third element pruned, the first one not: some transforms have one only."""
    return (torch.arange(raw.numel()) % 3 != 2).reshape(raw.shape)


def by_norm(g: Tensor, v: Tensor) -> Tensor:
    return g * v / v.norm()


_ORIGINALS = {"g": "parametrizations.{}.original0", "v": "parametrizations.{}.original1"}
_SCALED = {"raw": "parametrizations.{}.original", "scale": "parametrizations.{}.0.scale"}

COMPUTED: dict[str, tuple[Callable[[nn.Module, str], Any], Mapping[str, str], Callable[..., Tensor]]] = {
    "register_parametrization": (
        lambda module, name: parametrize.register_parametrization(module, name, Scaled()),
        _SCALED,
        lambda raw, scale: scale * raw,
    ),
    "prune": (
        lambda module, name: prune.custom_from_mask(module, name, mask_of(getattr(module, name))),
        {"raw": "{}_orig"},
        lambda raw: raw * mask_of(raw),
    ),
    "old weight_norm": (
        lambda module, name: nn.utils.weight_norm(module, name, dim=None), {"g": "{}_g", "v": "{}_v"}, by_norm
    ),
    "parametrizations.weight_norm": (
        lambda module, name: parametrizations.weight_norm(module, name, dim=None), _ORIGINALS, by_norm
    ),
}  # fmt: skip


def replica(module: nn.Module) -> Hand:
    """As DataParallel before every call: modules without parameters, whose attributes are copies with a history."""

    def replicated(original: nn.Module) -> nn.Module:
        found: Any = original._replicate_for_data_parallel()
        for name, child in original.named_children():
            setattr(found, name, replicated(child))
        for name, parameter in original.named_parameters(recurse=False):
            setattr(found, name, parameter * 1)
        assert not list(found.parameters())
        return found  # type: ignore[no-any-return]

    return registered(module)._replace(for_a_call=lambda: replicated(module))


def functional(module: nn.Module) -> Hand:
    leaves = {name: (1.2 * raw.detach()).requires_grad_() for name, raw in module.named_parameters()}
    return Hand(lambda: lambda *operands: functional_call(module, leaves, operands), dict(leaves), dict)


class ModulesToSaveWrapper(nn.Module):
    """That of PEFT up to 0.4, as far as it is about one module that is trained in full: one adapter is in use."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original).requires_grad_(True)})
        self._active_adapter: str | list[str] = "default"
        self._disable_adapters = False

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active_adapter

    def enable_adapters(self, enabled: bool) -> None:
        self.original_module.requires_grad_(not enabled)
        self.modules_to_save.requires_grad_(enabled)
        self._disable_adapters = not enabled

    def set_adapter(self, name: str) -> None:
        self._active_adapter = [name] if isinstance(self._active_adapter, list) else name
        self.modules_to_save.requires_grad_(name in self.modules_to_save)
        self.original_module.requires_grad_(name not in self.modules_to_save)

    def in_use(self) -> nn.Module:
        names = [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter
        if self.disable_adapters or not names or any(name not in self.modules_to_save for name in names):
            return self.original_module
        return self.modules_to_save[names[0]]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.in_use(), name)

    def forward(self, *operands: Any) -> Any:
        return self.in_use()(*operands)


class AuxiliaryTrainingWrapper(ModulesToSaveWrapper):
    """That of PEFT today: a list of adapters."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self._active_adapter = ["default"]

    @property
    def active_adapters(self) -> list[str]:
        return [self._active_adapter] if isinstance(self._active_adapter, str) else self._active_adapter


def wrapped(
    wrap: Callable[[nn.Module], nn.Module], path: str, then: Callable[[Any], Any] = lambda wrapper: None
) -> Callable[[nn.Module], Hand]:
    """f in a wrapper, put there as PEFT does it: in the place of a module that is there already."""

    def hand(module: Any) -> Hand:
        module.transform = wrap(module.transform)
        then(module.transform)
        with torch.no_grad():  # so that it tells which of several copies is used
            for raw in module.transform.get_submodule(path).parameters():
                raw.mul_(1.2)
        inside = f"transform.{path}."
        leaves = {
            name: raw
            for name, raw in module.named_parameters()
            if name.startswith(inside) or not name.startswith("transform.")
        }
        return Hand(
            lambda: module,
            leaves,
            lambda leaves: {name.replace(inside, "transform."): leaf for name, leaf in leaves.items()},
        )

    return hand


def with_a_parameter_of_its_own(module: Any) -> Hand:
    kind = type(module.transform)

    class Gaining(kind):  # type: ignore[misc,valid-type]
        def coefficients(self) -> Tensor:
            return super().coefficients() * self.log_gain.exp()

    module.transform.__class__ = Gaining
    module.transform.log_gain = nn.Parameter(torch.tensor([0.2]))
    return registered(module)


def views_of_one(module: nn.Module) -> Hand:
    """As FullyShardedDataParallel without original parameters: attributes are views of one that they are cut from."""
    raws = dict(module.named_parameters())
    flat = nn.Parameter(torch.cat([torch.empty(0), *(raw.detach().reshape(-1) for raw in raws.values())]))
    shapes = {name: raw.shape for name, raw in raws.items()}
    for name in raws:
        owner, last = owner_of(module, name)
        delattr(owner, last)

    def cut(whole: Tensor) -> dict[str, Tensor]:
        pieces = whole.split([shape.numel() for shape in shapes.values()])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def with_views() -> nn.Module:
        for name, view in cut(flat).items():
            owner, last = owner_of(module, name)
            setattr(owner, last, view)
        assert not list(module.parameters())
        return module

    return Hand(with_views, {"flat": flat}, lambda leaves: cut(leaves["flat"]))


def loaded_by_hooks(module: nn.Module) -> Hand:
    """As offloading does: parameters are on the meta device, but while the module that owns them is called."""
    leaves = dict(module.named_parameters())
    for path, owner in module.named_modules():
        own = dict(owner.named_parameters(recurse=False))
        for last in own:
            setattr(owner, last, nn.Parameter(own[last].detach().to("meta")))

        def load(owner: nn.Module, operands: Any, path: str = path, own: Any = own) -> None:
            for last in own:
                del owner._parameters[last]
                setattr(owner, last, leaves[f"{path}.{last}" if path else last] * 1)

        def unload(owner: nn.Module, operands: Any, output: Any, own: Any = own) -> None:
            for last in own:
                delattr(owner, last)
                setattr(owner, last, nn.Parameter(own[last].detach().to("meta")))

        owner.register_forward_pre_hook(load)
        owner.register_forward_hook(unload)
    return Hand(lambda: module, leaves, dict)


def deferred(module: nn.Module) -> Hand:
    start = {name: raw.detach().clone() for name, raw in module.named_parameters()}
    module.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for raw in module.parameters():
            raw.fill_(torch.nan)
    for part in module.modules():
        if isinstance(part, ms.transforms.MonotonicTransform):
            part.reset_parameters()
    with torch.no_grad():
        for name, raw in module.named_parameters():
            # f starts at its initial values; the matrix is that of the users.
            raw.copy_(start[name]) if not name.startswith("transform.") else None
    return registered(module)


def pickled(module: nn.Module) -> Hand:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return registered(torch.load(buffer, weights_only=False))


HANDS: dict[str, Callable[[nn.Module], Hand]] = {
    "registered": registered,
    **{f"{name} of f": computed(*how, names_of_f) for name, how in COMPUTED.items()},
    "replica of DataParallel": replica,
    "functional_call": functional,
    "ModulesToSaveWrapper, active": wrapped(AuxiliaryTrainingWrapper, "modules_to_save.default"),
    "ModulesToSaveWrapper, disabled": wrapped(
        AuxiliaryTrainingWrapper, "original_module", lambda wrapper: wrapper.enable_adapters(False)
    ),
    "ModulesToSaveWrapper, unknown adapter": wrapped(
        AuxiliaryTrainingWrapper, "original_module", lambda wrapper: wrapper.set_adapter("other")
    ),
    "ModulesToSaveWrapper of old": wrapped(ModulesToSaveWrapper, "modules_to_save.default"),
    "torch.compile(f)": wrapped(lambda f: torch.compile(f, backend="eager"), "_orig_mod"),
    "subclass with a parameter of its own": with_a_parameter_of_its_own,
    "views of one parameter": views_of_one,
    "loaded by hooks": loaded_by_hooks,
    "meta, to_empty, reset_parameters": deferred,
    "deepcopy": lambda module: registered(copy.deepcopy(module)),
    "pickle": pickled,
}  # fmt: skip

OF_THE_MATRIX: dict[str, Callable[[nn.Module], Hand]] = {
    f"{name} of the matrix": computed(*how, names_of_weight) for name, how in COMPUTED.items()
}
