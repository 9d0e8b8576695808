"""Runs Triton kernels on the CPU, in Triton's interpreter, within a process that also compiles them.

``triton.jit`` looks at TRITON_INTERPRET when it decorates a function: that would be for a whole process. Here compiled
functions stay what they are, and :func:`interpreting` replaces them while it lasts.

The interpreter is patched where that of Triton 3.7 is silently wrong: floats given to a kernel stay Python floats (a
GPU gets float32), float32 is truncated to bfloat16, maximum and minimum keep NaN where a GPU drops it, products of
bfloat16 are those of its bits. libdevice's functions are numpy's. Other arithmetic on bfloat16 itself stays wrong: the
kernels convert to float32 first. That of Triton 3.6 makes an index of an array in a way that numpy 2.4 no longer has.

What only a GPU would suffer from is an error here: loads and stores outside the storages of the kernel's tensors, an
address that two programs store to, or that one loads after another one has stored to it, and two lanes that store
different values to one address at once. Atomics are checked for their bounds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_PACKAGES = ("triton.language", "monosoftmax.triton_kernels")
_functions: dict[int, Any] = {}  # by id: the hash of a JITFunction compiles it


def as_interpreted(function: Any) -> Any:
    """The interpreter's counterpart of a compiled function, or of a tuple of them; anything else as it is."""
    if isinstance(function, tuple):
        return tuple(as_interpreted(each) for each in function)
    if not isinstance(function, JITFunction):
        return function
    return _functions.setdefault(id(function), interpreter.InterpretedFunction(function.fn))


@contextmanager
def interpreting(*kernels: JITFunction) -> Iterator[None]:
    """Kernels of the package, and those of the modules of ``kernels``, run in the interpreter, checked."""
    undo: list[Any] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    of_kernels = {kernel.fn.__module__ for kernel in kernels}
    modules = [m for n, m in list(sys.modules.items()) if n.startswith(_PACKAGES) or n in of_kernels]
    replace(triton.knobs.runtime, "interpret", True)
    try:
        for owner in (*modules, tl.core.tensor):
            for name, value in list(vars(owner).items()):
                if isinstance(value, JITFunction):
                    replace(owner, name, as_interpreted(value))
        # Looked up when they are called: the language is patched below.
        replace(libdevice, "exp2", lambda x: tl.exp2(x))
        replace(libdevice, "fast_log2f", lambda x: tl.log2(x))
        replace(libdevice, "fast_dividef", lambda a, b: a / b)
        builder = interpreter.InterpreterBuilder
        replace(interpreter.GridExecutor, "_init_args_hst", _noting_storages(interpreter.GridExecutor._init_args_hst))
        replace(builder, "create_masked_load", _checked_load(builder.create_masked_load))
        replace(builder, "create_masked_store", _checked_store(builder.create_masked_store))
        replace(builder, "create_atomic_rmw", _checked_atomic(builder.create_atomic_rmw))
        replace(builder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax))
        replace(builder, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin))
        replace(builder, "create_dot", _of_numbers(builder.create_dot))
        replace(builder, "cast_impl", _rounding_to_bfloat16(builder.cast_impl))
        replace(interpreter.GridExecutor, "__call__", _with_interpreted_functions(interpreter.GridExecutor.__call__))
        replace(interpreter, "_implicit_cvt", _with_float32_scalars(interpreter._implicit_cvt))
        # Once here, and not at every call of a device function, which would also leave the language patched.
        scope = interpreter._patch_lang(_AnyModule)
        undo.append(scope.restore)
        replace(tl.core.tensor, "__index__", lambda self: self.handle.data.item())
        replace(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        with np.errstate(all="ignore"):  # a GPU does not warn of infinities either
            yield
    finally:
        for each in reversed(undo):
            each()


class _AnyModule:
    """Stands in for a function: it is asked under which names its module knows the language."""

    __globals__: ClassVar = {"tl": tl, "core": tl.core}


class _Storage:
    """The memory of a kernel's tensor, and which program has stored to each pair of bytes: its number + 1, or 0."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.first = tensor.untyped_storage().data_ptr()
        self.end = self.first + tensor.untyped_storage().nbytes()
        self.owner = np.zeros((self.end - self.first) // 2 + 1, np.int32)  # memory only where it is touched


_storages: list[_Storage] = []


def _noting_storages(init: Any) -> Any:
    def noting(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = init(self, args, kwargs)
        tensors = [each for group in on_host for each in (group.values() if isinstance(group, dict) else group)]
        # What a descriptor describes is memory of the kernel, too.
        tensors = [each.base if isinstance(each, TensorDescriptor) else each for each in tensors]
        found = {each.untyped_storage().data_ptr(): each for each in tensors if isinstance(each, torch.Tensor)}
        _storages[:] = [_Storage(each) for each in found.values()]
        return on_host

    return noting


def _addresses(pointers: Any, mask: Any, what: str) -> np.ndarray:
    """The addresses that are accessed, all of which must lie in a tensor."""
    addresses, mask = np.broadcast_arrays(pointers.data, mask.data)
    addresses, size = addresses[mask.astype(bool)], max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, bool)
    for storage in _storages:
        inside |= (addresses >= storage.first) & (addresses + size <= storage.end)
    if not inside.all():
        raise IndexError(f"{what} out of the bounds of every tensor: {(~inside).sum()} of {inside.size} lanes")
    return addresses


def _of_other_programs(builder: Any, addresses: np.ndarray, store: bool) -> bool:
    """Whether another program has stored to one of the addresses; a store is noted."""
    x, y, z = builder.grid_idx
    program = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z) + 1
    for storage in _storages:
        at = (addresses[(addresses >= storage.first) & (addresses < storage.end)] - storage.first) // 2
        owner = storage.owner[at]
        if ((owner != 0) & (owner != program)).any():
            return True
        if store:
            storage.owner[at] = program
    return False


def _checked_load(load: Any) -> Any:
    def checked(self: Any, pointers: Any, mask: Any, *arguments: Any, **options: Any) -> Any:
        if _of_other_programs(self, _addresses(pointers, mask, "load"), store=False):
            raise RuntimeError("race: a program loads what another one stores")
        return load(self, pointers, mask, *arguments, **options)

    return checked


def _checked_store(store: Any) -> Any:
    def checked(self: Any, pointers: Any, value: Any, mask: Any, *arguments: Any) -> Any:
        addresses = _addresses(pointers, mask, "store")
        if _of_other_programs(self, addresses, store=True):
            raise RuntimeError("race: two programs store to one address")
        unique, first, inverse = np.unique(addresses, return_index=True, return_inverse=True)
        if len(unique) < len(addresses):
            values = np.broadcast_to(value.data, np.broadcast_shapes(pointers.data.shape, value.data.shape))
            values = values[np.broadcast_to(mask.data, values.shape).astype(bool)]
            if not np.array_equal(values, values[first][inverse.reshape(-1)], equal_nan=values.dtype.kind == "f"):
                raise RuntimeError("race: two lanes store different values to one address")
        return store(self, pointers, value, mask, *arguments)

    return checked


def _checked_atomic(atomic: Any) -> Any:
    def checked(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *arguments: Any) -> Any:
        _addresses(pointers, mask, "atomic")
        return atomic(self, operation, pointers, value, mask, *arguments)

    return checked


def _with_interpreted_functions(call: Any) -> Any:
    def calling(self: Any, *arguments: Any, **options: Any) -> Any:
        return call(self, *arguments, **{name: as_interpreted(each) for name, each in options.items()})

    return calling


def _of_numbers(dot: Any) -> Any:
    """A product of the numbers that bfloat16 operands are, not of their bits; those of float16 in float32."""

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(operand.data).view(np.int16))
            return interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)
        if operand.dtype.scalar == tl.float16:
            return interpreter.TensorHandle(operand.data.astype(np.float32), tl.float32)
        return operand

    def multiplying(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return dot(self, widened(a), widened(b), *arguments)

    return multiplying


def _rounding_to_bfloat16(cast: Any) -> Any:
    def casting(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, to)

    return casting


def _with_float32_scalars(convert: Any) -> Any:
    def converting(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    return converting
