"""What the sources keep to: torch's private names in one file, and lists of arguments that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import monosoftmax as ms

ROOT = Path(__file__).parents[2]
#: The one file that uses what torch may change in any version.
PRIVATE = ROOT / "monosoftmax/_dispatch.py"
SOURCES = sorted(path for folder in ("monosoftmax", "triton_kernels") for path in (ROOT / folder).rglob("*.py"))

MOST_POSITIONAL, MOST_PARAMETERS = 5, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def _private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _chain(node: ast.AST) -> list[str]:
    """The parts of ``a.b.c``; none where it does not begin with a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def _imports(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Everything that is imported from torch: the line, the name that it is bound to, and its name in full."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] == "torch":
                    yield node.lineno, each.asname or "torch", each.name if each.asname else "torch"
                    yield node.lineno, "", each.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            for each in node.names:
                yield node.lineno, each.asname or each.name, f"{node.module}.{each.name}"


def private_names(text: str) -> list[tuple[int, str]]:
    """The lines in which a private name of torch's is used, and the name."""
    tree = ast.parse(text)
    imports = list(_imports(tree))
    bound = {name: full for _, name, full in imports if name}
    found = {(line, full) for line, _, full in imports}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *others = _chain(node) or [""]
            if first in bound:
                found.add((node.lineno, ".".join([bound[first], *others])))
            found.add((node.lineno, f"torch.{node.attr}" if node.attr.startswith("_dynamo_") else ""))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # What is imported, looked up or set by its name.
            if re.fullmatch(r"torch(\.\w+)+", node.value):
                found.add((node.lineno, node.value))
            found.add((node.lineno, f"torch.{node.value}" if re.fullmatch(r"_dynamo_\w+", node.value) else ""))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            chain, name = _chain(node.args[0]), node.args[1]
            if chain and chain[0] in bound and isinstance(name, ast.Constant):
                found.add((node.lineno, ".".join([bound[chain[0]], *chain[1:], str(name.value)])))
    return sorted((line, name) for line, name in found if any(map(_private, name.split("."))))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import torch\ntorch._C._jit()", "torch._C._jit"),
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch._dynamo as d", "torch._dynamo"),
        ("import torch.library as l\nl._scoped()", "torch.library._scoped"),
        ("from torch import _dynamo", "torch._dynamo"),
        ("from torch._functorch import apis", "torch._functorch.apis"),
        ("from torch.autograd.function import _Context as C", "torch.autograd.function._Context"),
        ("from torch import ops\nops.mkldnn._x", "torch.ops.mkldnn._x"),
        ("import torch\ndef f(op: torch._ops.OpOverload): ...", "torch._ops.OpOverload"),
        ("from __future__ import annotations\nimport torch\nop: torch._ops.OpOverload", "torch._ops.OpOverload"),
        ("import torch\ngetattr(torch.ops.mkldnn, '_x', None)", "torch.ops.mkldnn._x"),
        ("import importlib\nimportlib.import_module('torch._inductor.config')", "torch._inductor.config"),
        ("f._dynamo_marked_constant = True", "torch._dynamo_marked_constant"),
        ("setattr(f, '_dynamo_marked_constant', True)", "torch._dynamo_marked_constant"),
    ],
)  # fmt: skip
def test_private_names_are_found(text: str, name: str) -> None:
    assert name in [found for _, found in private_names(text)]


def test_other_names_are_none_of_torchs_private_ones() -> None:
    text = """
import torch
from torch.nn import functional as F
from . import _dispatch
_private = torch.__version__ + "torch._C is private" + F.__name__
_dispatch._anything, torch.ops.monosoftmax.cross_entropy.default
"""
    assert private_names(text) == []


def test_one_file_uses_private_names_of_torch() -> None:
    assert private_names(PRIVATE.read_text(encoding="utf-8"))
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in SOURCES
        if path != PRIVATE
        for line, name in private_names(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def _on_device(node: ast.AST) -> bool:
    """Whether ``node`` is a function in Triton's language, which has positional arguments only."""
    if not isinstance(node, ast.FunctionDef):
        return False
    decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(_chain(each) in (["triton", "jit"], ["jit"]) for each in decorators)


def _on_host(node: ast.AST, within: Sequence[str] = ()) -> Iterator[tuple[ast.AST, Sequence[str]]]:
    """What is in ``node`` and not in Triton's language, with the names of the classes and functions around it."""
    for child in ast.iter_child_nodes(node):
        if not _on_device(child):
            yield child, within
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _on_host(child, [*within, child.name] if named else within)  # type: ignore[attr-defined]


def long_calls(text: str) -> list[tuple[int, int]]:
    """The lines with calls of many positional arguments, and how many. Launches of kernels have what kernels want."""
    calls = [node for node, _ in _on_host(ast.parse(text)) if isinstance(node, ast.Call)]
    counts = [(each.lineno, len(each.args)) for each in calls if not isinstance(each.func, ast.Subscript)]
    return [(line, count) for line, count in counts if count > MOST_POSITIONAL]


def long_signatures(text: str, public: Sequence[str] = ()) -> list[tuple[int, str, int]]:
    """The lines with functions of many parameters beside self and cls, their names, and how many they are.

    What users see is left out: the functions and classes ``public``.
    """
    found = []
    for node, within in _on_host(ast.parse(text)):
        if isinstance(node, Function):
            name = "lambda" if isinstance(node, ast.Lambda) else node.name
            if (within or [name])[0] in public:
                continue
            given = node.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            count = sum(each is not None and each.arg not in ("self", "cls") for each in parameters)
            if count > MOST_PARAMETERS:
                found.append((node.lineno, ".".join([*within, name]), count))
    return found


def _public(path: Path) -> Sequence[str]:
    """Those that are public of what ``path`` defines; only transforms have the names of theirs to themselves."""
    if path == ROOT / "monosoftmax/losses.py":
        return ms.losses.__all__
    return ms.transforms.__all__ if path.is_relative_to(ROOT / "monosoftmax/transforms") else ms.__all__


def test_long_lists_are_found() -> None:
    text = """
f(1, 2, 3, 4, 5, 6)
f(1, 2, 3, *rest, *more, last)
f(1, 2, 3, 4, 5, x=6, **more)
kernel[grid](1, 2, 3, 4, 5, 6)

@triton.jit(do_not_specialize=["n"])
def on_device(a, b, c, d, e, f, g, h, i):
    g(1, 2, 3, 4, 5, 6)

def helper(a, b, c, d, e, f, *, g, h, i): ...

class Table:
    def eight(self, a, b, c, d, e, f, g, h): ...
    def nine(self, a, b, c, d, e, f, *g, h, **i): ...

class Seen:
    def nine(self, a, b, c, d, e, f, g, h, i): ...
"""
    assert long_calls(text) == [(2, 6), (3, 6)]
    assert long_signatures(text, ["Seen"]) == [(11, "helper", 9), (15, "Table.nine", 9)]


def test_no_call_has_many_positional_arguments() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {count} positional arguments"
        for path in SOURCES
        for line, count in long_calls(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_no_function_has_many_parameters() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name} has {count} parameters"
        for path in SOURCES
        for line, name, count in long_signatures(path.read_text(encoding="utf-8"), _public(path))
    ]
    assert not found, "\n".join(found)
