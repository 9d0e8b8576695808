"""Python source of f, and of a model with f, that needs no monosoftmax. ``torch.fx`` reads f's off ``evaluate``."""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Iterator
from string import Template
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ...transforms import MonotonicTransform
from .classes import REPLACED

#: The longest line that statements of f are joined to.
_WIDTH = 96

#: What transformers copies and runs for ``trust_remote_code=True``.
_MODELING = Template('''\
"""$model with f on its logits.

    f = $f

Written by monosoftmax.integrations.transformers.export. It needs torch and transformers only:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import functools
import json

import torch
$imports

#: A plain config wants numbers where this is, so that no plain model reads the checkpoint and leaves f out.
READ_BY = "$read_by"


class LogitTransform(torch.nn.Module):
    """f, whose coefficients are in the checkpoint. They are no parameters: training them might make f decrease."""

    def __init__(self):
        super().__init__()
        self.register_buffer("coefficients", torch.empty($shape, dtype=torch.float32))

    def forward(self, logits):
        """f(logits), computed and returned in float32 (in float64 for float64)."""
        z = logits if logits.dtype == torch.float64 else logits.float()
        coefficients = self.coefficients.to(z.device, z.dtype)
$body

    def _apply(self, fn, recurse=True):
        whole = self.coefficients
        super()._apply(fn, recurse)
        if self.coefficients.dtype != torch.float32:  # model.bfloat16() must not round them
            self.coefficients = whole.to(self.coefficients.device)
        return self


class Monotonic$config($config):
    model_type = "$model_type"

    def to_json_file(self, json_file_path, use_diff=True):
        content = json.loads(self.to_json_string(use_diff=use_diff))
        content |= {"$width": READ_BY, "$replaced": {"$width": content["$width"]}}
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\\n")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        own = {**config_dict, **config_dict.get("$replaced", {})}
        own.pop("$replaced", None)
        return super().from_dict(own, **kwargs)


class Monotonic$model($model):
    """``forward(...).logits`` is f(z), and so are the logits in the loss.

    What a plain model does to its logits, such as a cap, is inside f.
    """

    config_class = Monotonic$config
    _keep_in_fp32_modules_strict = {"logit_transform", *($model._keep_in_fp32_modules_strict or ())}
    _before_f = False  # while the forward of $model runs, whose logits are z

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.logit_transform = LogitTransform()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, LogitTransform):
            raise ValueError("the checkpoint must have logit_transform.coefficients, which nothing else can initialise")
        super()._init_weights(module)

    @$model.loss_function.getter
    def loss_function(self):
        loss = $model.loss_function.fget(self)
        if not self._before_f:
            return loss
        return lambda logits, *args, **kwargs: loss(self.logit_transform(logits), *args, **kwargs)

    @functools.wraps($model.forward)
    def forward(self, *args, return_dict=None, **kwargs):
        self._before_f = True
        try:
            output = super().forward(*args, **kwargs, return_dict=True)
        finally:
            self._before_f = False
        output.logits = self.logit_transform(output.logits).to(output.logits.dtype)
        return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()
''')


def modeling_of(plain: type, f: MonotonicTransform, model_type: str, read_by: str) -> str:
    """The source of a module with models like ``plain`` that have f.

    Raises:
        NotImplementedError: ``plain`` is from elsewhere than transformers, or f is not made of calls of torch.
        RuntimeError: the source does not compute what f computes.
    """
    config = plain.config_class  # type: ignore[attr-defined]
    foreign = [each for each in (plain, config) if not each.__module__.startswith("transformers.")]
    if foreign:
        raise NotImplementedError(
            f"model must be of a class of transformers, got {plain.__name__}: {foreign[0].__module__}, where "
            f"{foreign[0].__name__} is from, would be needed to load what export writes"
        )
    coefficients = f().detach().float()
    source = _MODELING.substitute(
        model=plain.__name__,
        config=config.__name__,
        f="\n    ".join(textwrap.wrap(" ".join(str(f).split()), 110)),
        imports="\n".join(f"from {each.__module__} import {each.__name__}" for each in (config, plain)),
        read_by=read_by,
        width=config.attribute_map.get("hidden_size", "hidden_size"),
        replaced=REPLACED,
        shape=tuple(coefficients.shape),
        body="\n".join(f"        {line}" for line in _statements(f, coefficients)),
        model_type=model_type,
    )
    _check(source, f, coefficients)
    return source


def _check(source: str, f: MonotonicTransform, coefficients: Tensor) -> None:
    steps = torch.linspace(-60, 60, 2**12 + 1, device=coefficients.device)
    logits = torch.cat([steps, steps**3, steps.new_tensor([torch.inf, -torch.inf, torch.nan, 0.0])])
    names: dict[str, Any] = {"__name__": "modeling_monosoftmax"}
    exec(compile(source, "modeling_monosoftmax.py", "exec"), names)
    written = names["LogitTransform"]()
    written.coefficients = coefficients
    if not torch.equal(written(logits).nan_to_num(nan=12345.0), f(logits).nan_to_num(nan=12345.0)):
        raise RuntimeError(f"the code written for {f} does not compute what it computes: this is a fault of export")


class _Tracer(fx.Tracer):
    """Lets ``evaluate`` iterate over tensors, whose lengths it knows from examples."""

    def __init__(self, *examples: Tensor) -> None:
        super().__init__()
        self._examples = examples

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[number] for number in range(len(self._value(obj.node)))])

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return dict(zip(("z", "coefficients"), self._examples, strict=True))[node.name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def _statements(f: MonotonicTransform, coefficients: Tensor) -> list[str]:
    """The lines of a function of z and coefficients that returns f(z)."""
    tracer = _Tracer(coefficients.new_zeros(2), coefficients)
    try:
        graph = tracer.trace(lambda z, coefficients: f.evaluate(z, coefficients))
    except fx.proxy.TraceError as error:
        raise NotImplementedError(f"f must be made of calls of torch, {f} is not: {error}") from error
    if any(node.op in ("get_attr", "call_module") for node in graph.nodes):
        raise NotImplementedError(f"f must be made of z, coefficients and numbers, {f} has tensors beside them")
    graph.eliminate_dead_code()
    source = graph.python_code("self").src
    for node in graph.nodes:
        public = next((name for name, each in vars(F).items() if each is node.target), None)
        if public is not None:  # torch.fx writes where it is defined, which may be private
            written = f"{node.target.__module__}.{node.target.__name__}("
            source = source.replace(written, f"torch.nn.functional.{public}(")
    (function,) = ast.parse(source.strip()).body
    assert isinstance(function, ast.FunctionDef)
    return _joined([_Slices().visit(each) for each in function.body if not _frees_memory(each)])


def _frees_memory(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Assign) else None
    return isinstance(value, ast.Constant) and value.value is None


class _Slices(ast.NodeTransformer):
    """``x[(slice(None, None, None), i)]`` as ``x[:, i]``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if not (isinstance(node.func, ast.Name) and node.func.id == "slice"):
            return node
        given = [None if isinstance(each, ast.Constant) and each.value is None else each for each in node.args]
        return ast.Slice(*given)


def _joined(statements: list[Any]) -> list[str]:
    """Puts what one later statement uses into that statement, while lines stay short."""
    uses = Counter(node.id for each in statements for node in ast.walk(each.value) if isinstance(node, ast.Name))
    lines: list[str] = []
    waiting: dict[str, ast.expr] = {}
    for each in statements:
        names = [node.id for node in ast.walk(each.value) if isinstance(node, ast.Name) and node.id in waiting]
        before = ast.unparse(each)
        whole: Any = _Insert(waiting).visit(ast.parse(before).body[0])
        if len(ast.unparse(whole)) > _WIDTH:
            lines += [f"{name} = {ast.unparse(waiting[name])}" for name in names]
            whole = ast.parse(before).body[0]
        for name in names:
            del waiting[name]
        targets = getattr(whole, "targets", None)
        name = targets[0].id if targets else ""
        if uses[name] == 1:
            waiting[name] = whole.value
        else:
            lines.append(ast.unparse(whole))
    return lines


class _Insert(ast.NodeTransformer):
    def __init__(self, expressions: dict[str, ast.expr]) -> None:
        self._expressions = expressions

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._expressions.get(node.id, node)
