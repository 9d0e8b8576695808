"""Runs Triton kernels on the CPU, in Triton's interpreter, within a process that also compiles them.

``triton.jit`` looks at TRITON_INTERPRET when it decorates a function: that would be for a whole process. Here compiled
functions stay what they are, and :func:`interpreted` replaces them while it lasts.

The interpreter of Triton 3.7 is patched where it is silently wrong: floats given to a kernel stay Python floats (a GPU
gets float32), and float32 is truncated to bfloat16. Arithmetic on bfloat16 itself stays wrong: the kernels convert to
float32 first. Loads and stores outside the storages of the kernel's tensors raise.
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
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_PACKAGES = ("triton.language", "monosoftmax.triton_kernels")
_functions: dict[int, Any] = {}  # by id: the hash of a JITFunction compiles it


def as_interpreted(function: Any) -> Any:
    """The interpreter's counterpart of a compiled function; anything else as it is."""
    if not isinstance(function, JITFunction):
        return function
    return _functions.setdefault(id(function), interpreter.InterpretedFunction(function.fn))


@contextmanager
def interpreted(kernel: JITFunction) -> Iterator[Any]:
    """``kernel`` as the interpreter runs it, with bounds checked."""
    undo: list[Any] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, old))
        setattr(owner, name, value)

    modules = [m for n, m in list(sys.modules.items()) if n.startswith(_PACKAGES) or n == kernel.fn.__module__]
    replace(triton.knobs.runtime, "interpret", True)
    try:
        for owner in (*modules, tl.core.tensor):
            for name, value in list(vars(owner).items()):
                if isinstance(value, JITFunction):
                    replace(owner, name, as_interpreted(value))
        builder = interpreter.InterpreterBuilder
        replace(interpreter.GridExecutor, "_init_args_hst", _noting_storages(interpreter.GridExecutor._init_args_hst))
        replace(builder, "create_masked_load", _checked(builder.create_masked_load, "load", mask_at=0))
        replace(builder, "create_masked_store", _checked(builder.create_masked_store, "store", mask_at=1))
        replace(builder, "cast_impl", _rounding_to_bfloat16(builder.cast_impl))
        replace(interpreter.GridExecutor, "__call__", _with_interpreted_functions(interpreter.GridExecutor.__call__))
        replace(interpreter, "_implicit_cvt", _with_float32_scalars(interpreter._implicit_cvt))
        # Once here, and not at every call of a device function, which would also leave the language patched.
        scope = interpreter._patch_lang(_AnyModule)
        undo.append(scope.restore)
        replace(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        yield as_interpreted(kernel)
    finally:
        for each in reversed(undo):
            each()


class _AnyModule:
    """Stands in for a function: it is asked under which names its module knows the language."""

    __globals__: ClassVar = {"tl": tl, "core": tl.core}


_storages: list[tuple[int, int]] = []


def _noting_storages(init: Any) -> Any:
    def noting(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = init(self, args, kwargs)
        tensors = [each for group in on_host for each in (group.values() if isinstance(group, dict) else group)]
        _storages[:] = [
            (each.untyped_storage().data_ptr(), each.untyped_storage().data_ptr() + each.untyped_storage().nbytes())
            for each in tensors
            if isinstance(each, torch.Tensor)
        ]
        return on_host

    return noting


def _checked(access: Any, what: str, mask_at: int) -> Any:
    def checked(self: Any, pointers: Any, *arguments: Any) -> Any:
        addresses, mask = np.broadcast_arrays(pointers.data, arguments[mask_at].data)
        addresses, size = addresses[mask.astype(bool)], max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for first, end in _storages:
            inside |= (addresses >= first) & (addresses + size <= end)
        if not inside.all():
            raise IndexError(f"{what} out of the bounds of every tensor: {(~inside).sum()} of {inside.size} lanes")
        return access(self, pointers, *arguments)

    return checked


def _with_interpreted_functions(call: Any) -> Any:
    def calling(self: Any, *arguments: Any, **options: Any) -> Any:
        return call(self, *arguments, **{name: as_interpreted(each) for name, each in options.items()})

    return calling


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
