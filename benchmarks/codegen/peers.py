"""The loss kernels of other packages, launched by their own launchers and compiled as ours are.

Their code is imported where it is installed, and is no part of this project.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from unittest import mock

import torch

from .figures import Row
from .launches import Launch, launches_of

#: What Liger's launcher asks the device for, by target.
_LIGER_ARCHITECTURES = {
    "sm_80": "ampere_ada",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "sm_120": "blackwell_consumer",
}
#: Where the kernels of a package are launched.
PACKAGES = {"liger-kernel": "liger_kernel.ops.cross_entropy", "cut-cross-entropy": "cut_cross_entropy.cce_lse_forward"}
#: Rows and width of a head's input.
_ROWS, _WIDTH = 512, 2048


@dataclass(frozen=True)
class Peer:
    """A kernel of another package: that of Liger's loss, or of cut-cross-entropy's head."""

    package: str
    gradient: bool
    softcap: float | None
    classes: int

    def __str__(self) -> str:
        what = "loss, d logits" if self.gradient else "loss"
        what = "head" if self.package == "cut-cross-entropy" else what
        cap = f"soft cap {self.softcap:g}" if self.softcap else "no cap"
        return f"{self.package} {version(self.package)}: {what}, {cap} (bf16, V={self.classes})"

    def launch(self, target: str) -> Launch:
        """The one launch, as it is made on ``target``."""
        module = importlib.import_module(PACKAGES[self.package])
        action = self._liger(module) if self.package == "liger-kernel" else self._head(module)
        if self.package == "liger-kernel":
            with mock.patch.object(module, "infer_device_arch", lambda: _LIGER_ARCHITECTURES[target]):
                (launch,) = launches_of(action)
        else:
            (launch,) = launches_of(action)
        return launch

    def row(self, launch: Launch) -> Row | None:
        """What the kernel does with a row; None of a head, which has none."""
        if self.package != "liger-kernel":
            return None
        tile = launch.values["BLOCK_SIZE"]
        bound = "0, n_cols, BLOCK_SIZE"
        trips = {bound: float(math.ceil(self.classes / tile))}
        return Row(self.classes, tile, 2, trips, (bound,), full_tiles_in="/ops/cross_entropy.py")

    def _liger(self, module: ModuleType) -> Callable[[], object]:
        logits = torch.empty(2, self.classes, dtype=torch.bfloat16, requires_grad=self.gradient)
        target = torch.zeros(2, dtype=torch.int64)
        forward = torch.no_grad()(module.cross_entropy_forward)
        return partial(forward, logits, target, None, -100, 0.0, 0.0, "mean", self.softcap, False)

    def _head(self, module: ModuleType) -> Callable[[], object]:
        input, weight = (torch.empty(rows, _WIDTH, dtype=torch.bfloat16) for rows in (_ROWS, self.classes))
        return partial(module.cce_lse_forward_kernel, input, weight, softcap=self.softcap)


def peers(classes: int) -> list[Peer]:
    """The kernels of the packages that are installed."""
    found = [Peer("liger-kernel", gradient, softcap, classes) for gradient in (False, True) for softcap in (None, 30.0)]
    found += [Peer("cut-cross-entropy", False, softcap, classes) for softcap in (None, 30.0)]
    return [each for each in found if is_installed(each.package)]


def is_installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
