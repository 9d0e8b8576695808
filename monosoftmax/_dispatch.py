"""What torch has no public name for: who stands in for a tensor's values while a program is traced or transformed."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def has_values(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values, rather than standing in for those of some other tensor, or of many.

    While ``torch.compile`` or ``torch.export`` trace, what stands in is of a type of its own, whoever traces and
    whatever he says of it in a global variable: those are not the same in all versions of torch. Only Dynamo shows a
    plain tensor to the code that it reads, and ``make_fx``, which may have the values but must not be asked for them. A
    subclass of Tensor counts as a stand-in, too. The batches of ``torch.vmap`` and of
    ``torch.autograd.grad(..., is_grads_batched=True)`` are plain tensors that have no one value.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # what nobody has imported, nobody traces with
    if tracer is not None and tracer.get_proxy_mode() is not None:
        return False
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return not (functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def tells_values(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and has_values(tensor)


def within_functorch() -> bool:
    """Whether ``torch.func.grad`` or another transform of functions is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def keeps_graph() -> bool:
    """Whether the backward pass that is running was asked to retain the graph, so that another one may follow."""
    # Dynamo, which reads the backward pass for compiled autograd, has no word for it.
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
