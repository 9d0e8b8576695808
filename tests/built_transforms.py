"""Every transform with arguments that are not the defaults, for the tests of transforms as modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

#: Every transform with arguments that are not the defaults; those of the scalars both learned and fixed.
BUILT = {
    "identity": ("identity", {}),
    "temperature": ("temperature", {"tau": 2.0, "learnable": True}),
    "temperature_fixed": ("temperature", {"tau": 0.7, "learnable": False}),
    "plif": ("plif", {"num_pieces": 6, "bound": 4.0, "min_slope": 0.1, "init": "identity", "init_std": 0.5}),
    "sigsoftmax": ("sigsoftmax", {}),
    "gss": ("gss", {"k": 2.5, "c": -1.5, "learnable": True}),
    "gss_fixed": ("gss", {"k": 2.0, "c": 1.0, "learnable": False}),
    "soft_cap": ("soft_cap", {"cap": 9.0, "learnable": True}),
    "soft_cap_fixed": ("soft_cap", {"cap": 30.0, "learnable": False}),
    "sigmoid_cap": ("sigmoid_cap", {"a": 20.0, "b": -3.0, "c": 5.0, "learnable": True}),
    "sigmoid_cap_fixed": ("sigmoid_cap", {"a": 23.0, "b": 5.0, "c": 7.5, "learnable": False}),
    "monotonic_mlp": ("monotonic_mlp", {"num_units": 3, "bound": 5.0}),
    "spline": ("spline", {"num_bins": 5, "bound": 3.0}),
}
LEARNED = [case for case, (name, arguments) in BUILT.items() if arguments.get("learnable", len(arguments) > 0)]
WITHOUT_INVERSE = ("gss", "gss_fixed", "monotonic_mlp")

every_case = pytest.mark.parametrize("case", BUILT)
every_learned = pytest.mark.parametrize("case", LEARNED)
every_half = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])

Z = torch.linspace(-6, 6, 25)


def built(case: str, **where) -> MonotonicTransform:
    name, arguments = BUILT[case]
    return ms.transforms.make(name, **arguments, **where)


def trained(case: str) -> MonotonicTransform:
    """The transform of ``case`` with other values than it was built with."""
    transform = built(case)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return transform


def raws(transform: MonotonicTransform) -> dict[str, Tensor]:
    return {**dict(transform.named_parameters()), **dict(transform.named_buffers())}


def functions_of(case: str, transform: MonotonicTransform):
    functions = [transform, transform.derivative]
    return functions if case in WITHOUT_INVERSE else [*functions, transform.inverse]


class Doubled(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return 2 * raw
