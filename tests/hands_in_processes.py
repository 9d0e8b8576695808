"""What processes that compute together have of a module: for the hands that need a second process."""

from __future__ import annotations

from torch import Tensor, nn

WORLD = 2
#: Seconds that all hands take at most.
TIMEOUT = 600.0


def whole(tensor: Tensor) -> Tensor:
    """What a DTensor is a piece of."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The whole values of parameters, by the names that they have where nobody has wrapped anything."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    found: dict[str, Tensor] = {}
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        for name, parameter in module.named_parameters():
            for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
                name = name.replace(wrapper, "")
            found[name.removeprefix("module.")] = whole(parameter)
    return found
