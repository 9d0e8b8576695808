"""Every name of torch's that is private: who stands in for a tensor's values, and derivatives at the dispatcher.

``tests/build/test_private_names.py`` fails where another file uses one. All of them exist in every supported version of
torch; ``scripts/check_versions.py`` runs the tests in each.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd.function import _SingleLevelFunction

_functorch = torch._C._functorch
_PLAIN = (Tensor, torch.nn.Parameter)

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: An autograd function that may be applied inside a kernel, and costs less than torch.autograd.Function. Where
#: :func:`unobserved` is false, nested ``torch.func`` transforms need more: see :func:`register_autograd`.
SingleLevelFunction = _SingleLevelFunction


def has_values(tensor: Tensor) -> bool:
    """Whether ``tensor`` has values, rather than standing in for the values of another tensor, or of many.

    Whoever traces shows tensors of a type of his own: ``torch.compile``, ``torch.export``, FakeTensorMode. Two do not:
    Dynamo, and ``make_fx``, which may have the values but must not be asked for them. The batches of ``torch.vmap`` and
    of ``torch.autograd.grad(..., is_grads_batched=True)`` are plain tensors that have no one value.
    """
    if torch.compiler.is_compiling() or type(tensor) not in _PLAIN or (_has_modes() and _makes_fx()):
        return False
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return not (_functorch.is_batchedtensor(tensor) or _functorch.is_legacy_batchedtensor(tensor))


def _has_modes() -> bool:
    """Whether a TorchDispatchMode is active, before autograd or after it."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


def _makes_fx() -> bool:
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")  # what nobody has imported, nobody traces with
    return tracer is not None and tracer.get_proxy_mode() is not None


def tells_values(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and has_values(tensor)


def within_functorch() -> bool:
    """Whether ``torch.func.grad`` or another transform of functions is running; what is traced does not tell."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def keeps_graph() -> bool:
    """Whether the backward pass that is running was asked to retain the graph, so that another one may follow."""
    # Dynamo, which reads the backward pass for compiled autograd, has no word for it.
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def outside_of_graphs(function: _Function) -> _Function:
    """Lets ``torch.compile`` call ``function`` between its graphs, as it is."""

    @functools.wraps(function)
    def between_graphs(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            from . import outside_of_graphs

            return outside_of_graphs.run(function, *args, **kwargs)
        return function(*args, **kwargs)

    return between_graphs  # type: ignore[return-value]


def assume_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, without importing all of the compiler.

    torch.compile calls ``function`` when it traces, and takes what it returns for a constant.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def onednn_linear() -> Callable[..., Tensor] | None:
    """oneDNN's linear, which torch.compile uses, too: of input, weight and bias. None where torch has none."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is None:
        return None
    linear = product.default  # the overload, so that a call need not look for it
    return lambda input, weight, bias: linear(input, weight, bias, attr="none", scalars=[], algorithm="")


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16, and torch uses them."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def unobserved(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nobody would notice that an operator on ``tensors`` did not pass through torch's dispatcher.

    A tracer, a mode, a profiler, forward-mode AD, a transform of functions or a subclass of Tensor would.
    """
    if (
        torch.compiler.is_compiling()
        or _has_modes()
        or torch._C._len_torch_function_stack()
        or _functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for each in tensors:
        if each is not None:
            if type(each) not in _PLAIN or _functorch.is_legacy_batchedtensor(each):
                return False
            # Graphs outlive the transforms of functions whose tensors they hold.
            if _functorch.is_functorch_wrapped_tensor(each):
                return False
    return True


def register_autograd(
    op: torch._ops.OpOverload,
    backward: Callable[..., Any],
    /,
    *,
    setup_context: Callable[..., None],
    lib: Any,
) -> Any:
    """``torch.library.register_autograd``, which nested ``torch.func`` transforms get right and torch's does not.

    The kernel for the Autograd key is an autograd function that redispatches below autograd. That is what lets one
    operator work in eager mode, under ``torch.compile``, under ``torch.func.grad`` and under both at once; a
    ``torch.autograd.Function`` around an operator without a derivative of its own gives silent zeros for
    ``torch.compile(torch.func.grad(...))``, and cannot be applied inside a kernel: its single-level base class can.
    Such a function switches gradients off while its forward runs, where the levels of nested transforms below want
    them as the caller had them. To be deleted once torch has mended pytorch#168393 and #191995.
    """

    class Derivative(SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, run = arguments
            output = run()
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                "the fused backends have no forward-mode derivatives (jvp, jacfwd, hessian), and no second ones: use "
                'backend="reference"'
            )

        @staticmethod
        def _compiled_autograd_key(ctx: Any) -> tuple[int, ...]:
            """What compiled autograd tells backward passes apart by: all that ctx holds beside saved tensors."""
            return ctx._autograd_function_id, zlib.crc32(repr(sorted(vars(ctx).items())).encode())

    def kernel(*inputs: Any) -> Any:
        grad_enabled = torch.is_grad_enabled()

        def run() -> Any:
            with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(grad_enabled):
                return op(*inputs)

        with enable_single_level_autograd_function():
            return Derivative.apply(*inputs, run)  # type: ignore[attr-defined]

    lib.impl(op, kernel, "Autograd")
    return Derivative


def _states_of_fsdp() -> Mapping[torch.nn.Module, Any]:
    """What ``fully_shard`` knows of each module that it was called with. Empty where nobody has loaded it."""
    loaded = sys.modules.get("torch.distributed._composable_state")
    return {} if loaded is None else loaded._module_state_mapping


def _parameters_of_fsdp() -> Iterator[Any]:
    for reference in list(_states_of_fsdp().values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)  # of torch 2.13; before, there is one or none
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            yield from () if group is None else group.fsdp_params


def is_sharded_by_fsdp(tensor: Tensor) -> bool:
    """Whether ``tensor`` is the sharded form of a parameter of ``fully_shard``, which has no mark of its own."""

    def memory(each: Any) -> int:
        return each._local_tensor.untyped_storage().data_ptr()  # type: ignore[no-any-return]

    for each in _parameters_of_fsdp():
        sharded = each.sharded_param
        if sharded is tensor or (memory(sharded) == memory(tensor) != 0):
            return True
    return False


def number_of_fsdp_modules() -> int:
    """How many modules there are that ``fully_shard`` was called with."""
    return len(_states_of_fsdp())


def managed_by_fsdp() -> set[tuple[torch.nn.Module, str]]:
    """The parameters of all calls of ``fully_shard``, sharded or whole, as their modules and their names there."""
    found = set()
    for each in _parameters_of_fsdp():
        info = each._module_info
        found.add((info.module, info.param_name))
        found.update(zip(info.shared_modules, info.shared_param_names, strict=True))
    return found


def in_one_fsdp_unit(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether one call of ``fully_shard`` was given both modules."""
    states = _states_of_fsdp()
    return first in states and second in states and states[first]() is states[second]()
