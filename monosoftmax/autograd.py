"""Derivatives of the fused operators: what is saved, and what is differentiated.

A loss that was called with an ``output_mask`` has computed the gradients of ``total``, its scaled sum, while the logits
were at hand: see :mod:`monosoftmax.gradients_ahead`. Each backward pass scales them by total's upstream gradient and
hands them out. It computes them from the logits again where something else has a gradient too (the losses of the rows,
lse), and where they may be differentiated in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from . import gradients_ahead, ops
from ._dispatch import has_values, keeps_graph, within_functorch
from .float16 import float16_power, float16_shift
from .groups import LossOptions, TokenStatistics, Upstream
from .ops import Arguments, Operator, Results
from .row_kernels import row_kernels

_HALF = (torch.float16, torch.bfloat16)


class _Derivative(Generic[Arguments, Results]):
    """The derivative of an operator with respect to the arguments ``names``, of which a subclass has the gradients."""

    def __init__(self, operator: Operator[Arguments, Results], *names: str) -> None:
        self.operator, self.places = operator, [operator.names.index(each) for each in names]
        operator.differentiate(self.backward, self.setup_context)

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        raise NotImplementedError

    def backward(self, ctx: Any, *upstream: Tensor | None) -> Any:
        raise NotImplementedError

    def save(self, ctx: Any, inputs: Sequence[Any], *more: Tensor) -> None:
        """Keep the arguments of the operator, tensors as autograd keeps them: checkpoints, saved-tensor hooks and
        compiled autograd see all of them.
        """
        places, ctx.others = self.operator.tensors, list(inputs)
        for place in places:
            ctx.others[place] = None
        ctx.save_for_backward(*[inputs[place] for place in places], *more)
        ctx.set_materialize_grads(False)

    def saved(self, ctx: Any) -> tuple[list[Any], Sequence[Tensor]]:
        """The arguments of the operator, and what else was kept."""
        tensors, inputs, places = ctx.saved_tensors, list(ctx.others), self.operator.tensors
        for place, each in zip(places, tensors, strict=False):
            inputs[place] = each
        return inputs, tensors[len(places) :]

    def needs(self, ctx: Any) -> tuple[bool, ...]:
        """Which gradients autograd asks for: an output_mask."""
        return tuple(ctx.needs_input_grad[each] for each in self.places)

    @staticmethod
    def computed(backward: Operator[Any, Any], call: Any, **more: Any) -> Sequence[Tensor]:
        """What ``backward`` computes from the arguments of ``call``, as far as it takes them, and from ``more``."""
        given, arguments = call._asdict() | more, backward.arguments
        results: Sequence[Tensor] = backward(arguments(**{name: given[name] for name in arguments._fields}))
        return results

    def placed(self, gradients: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        """``gradients``, as far as they are needed, at the places of the arguments."""
        by_place: list[Tensor | None] = [None] * len(self.operator.names)
        for place, gradient, needed in zip(self.places, gradients, needs, strict=True):
            by_place[place] = gradient if needed else None
        return by_place


class _OfLoss(_Derivative[Any, Any]):
    """Of :class:`.ops.CrossEntropy` and :class:`.ops.LinearCrossEntropy`."""

    def __init__(self, operator: Operator[Any, Any], backward: Operator[Any, Any], *names: str) -> None:
        super().__init__(operator, *names)
        self.gradients, self.linear = backward, "linear_weight" in names
        place = operator.names.index
        self.target, self.mask, self.reduction = place("target"), place("output_mask"), place("reduction")
        fields = operator.results._fields
        self.row_stats, self.scale, self.total = (fields.index(each) for each in ("row_stats", "scale", "total"))
        #: Results that may be differentiated where an argument asks for them: their places, and those of the arguments.
        self.asked = [(fields.index("lse"), place("return_lse"))]
        if self.linear:
            self.asked.append((fields.index("log_prob"), place("return_log_prob")))
        self.statistics = [fields.index(each) for each in ("entropy", "argmax", "rank")] if self.linear else []

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        if ctx.needs_input_grad[self.target]:
            raise ValueError(f"target must not require a gradient: {self.operator.name} has none for it")
        ctx.ahead = mask = tuple(inputs[self.mask])
        gradients = output[-len(mask) :]
        ahead = [each for each, computed in zip(gradients, mask, strict=True) if computed]
        # What a trace computes ahead waits when the program runs, if it does: nobody counts it.
        if ahead and type(ahead[0]) is Tensor and not torch.compiler.is_compiling():
            gradients_ahead.let_wait(ahead)
        row_stats, scale, total = output[self.row_stats], output[self.scale], output[self.total]
        self.save(ctx, inputs, row_stats, scale, *ahead)
        unasked = [output[result] for result, argument in self.asked if not inputs[argument]]
        if inputs[self.reduction] == "none":
            unasked.append(total)
        statistics = [output[each] for each in self.statistics]
        ctx.mark_non_differentiable(row_stats, scale, *statistics, *gradients, *unasked)

    def backward(self, ctx: Any, *upstream: Tensor | None) -> Any:
        grads = dict(zip(self.operator.results._fields, upstream, strict=True))
        loss, lse, total, log_prob = (grads.get(name) for name in ("loss", "lse", "total", "log_prob"))
        needs = self.needs(ctx)
        if (loss is None and lse is None and total is None and log_prob is None) or not any(needs):
            return self.placed([None] * len(needs), needs)
        inputs, (row_stats, scale, *ahead) = self.saved(ctx)
        call = self.operator.named(inputs)
        parts: list[Sequence[Tensor | None]] = []
        # With gradients enabled, these may be differentiated: that must end in an error, not in zeros.
        covered = all(computed or not needed for computed, needed in zip(ctx.ahead, needs, strict=True))
        scaled = None
        if ahead and covered and total is not None and loss is None and lse is None and not torch.is_grad_enabled():
            scaled = self._scaled(call, row_stats, scale, ahead, total)
        if scaled is not None:
            waiting = iter(scaled)
            parts.append([next(waiting) if computed else None for computed in ctx.ahead])
            total = None
        if total is not None:
            of_rows = (total * scale).expand(row_stats.shape[1:])
            loss = of_rows if loss is None else loss + of_rows
        if loss is not None or lse is not None:
            parts.append(self._of_rows(call, row_stats, Upstream(loss, lse), needs))
        if log_prob is not None:
            plain = LossOptions(None, call.options.ignore_index, 0.0, 0.0, False)
            parts.append(self._of_rows(call._replace(options=plain), row_stats, Upstream(-log_prob), needs))
        gradients = [
            sum(each[1:], start=each[0]).to(inputs[place].dtype) if needed else None
            for each, place, needed in zip(zip(*parts, strict=True), self.places, needs, strict=True)
        ]
        return self.placed(gradients, needs)

    def _of_rows(self, call: Any, row_stats: Tensor, upstream: Upstream, needs: tuple[bool, ...]) -> list[Tensor]:
        """The gradients, computed now."""
        grads = {"grad_loss": upstream.loss, "grad_lse": upstream.lse}
        return list(self.computed(self.gradients, call, row_stats=row_stats, output_mask=needs, **grads))

    def _scaled(
        self, call: Any, row_stats: Tensor, scale: Tensor, ahead: list[Tensor], total: Tensor
    ) -> Sequence[Tensor] | None:
        """The gradients ``ahead`` times ``total``; None where they must be computed from the logits again."""
        input = call.head.input if self.linear else call.input
        in_place, kernels = not keeps_graph(), row_kernels(call.backend)
        if in_place:
            gradients_ahead.let_go(ahead)
        if self.linear and input.dtype == torch.float16:
            total = total / float16_shift(scale, call.target, call.options.weight, call.options.ignore_index)
        rounded = not self.linear and input.dtype in _HALF
        scaled = gradients_ahead.scaled(ahead, total, rounded=rounded, in_place=in_place, kernels=kernels)
        if scaled is not None or call.backend == "cpu" or within_functorch() or not has_values(total):
            return scaled
        # On a device that does not tell whether total is 1, the kernel decides: rows in half precision are computed
        # again, so that no gradient is rounded twice.
        own = ahead if in_place else [each.clone() for each in ahead]
        for each in own:
            if each.dtype not in _HALF:
                each.mul_(total)
                continue
            kernels.cross_entropy(
                call.input, call.target, call.transform, call.options, upstream=Upstream(scale, None, total),
                row_stats=row_stats, output_mask=(True, False), grad_rows=each,
            )  # fmt: skip
        return own


class _OfLogSoftmax(_Derivative[ops.LogSoftmax, ops.LogProbabilities]):
    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        self.save(ctx, inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    def backward(self, ctx: Any, *upstream: Tensor | None) -> Any:
        needs = self.needs(ctx)
        if upstream[0] is None:
            return self.placed([None, None], needs)
        inputs, (row_stats,) = self.saved(ctx)
        backend, input, transform, _ = self.operator.named(inputs)
        call = ops.LogSoftmaxBackward(
            backend=backend,
            grad_output=upstream[0],
            input=input,
            transform=transform,
            row_stats=row_stats,
            output_mask=needs,
        )
        return self.placed(ops.log_softmax_backward(call), needs)


class _OfTokenStatistics(_Derivative[Any, TokenStatistics]):
    """Of :class:`.ops.LinearTokenStatistics` and :class:`.ops.RowTokenStatistics`, from the logits again."""

    def __init__(self, operator: Operator[Any, Any], backward: Operator[Any, Any], *names: str) -> None:
        super().__init__(operator, *names)
        self.gradients = backward

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        statistics = TokenStatistics(*output)
        self.save(ctx, inputs, statistics.row_stats)
        ctx.mark_non_differentiable(statistics.argmax, statistics.rank, statistics.row_stats)

    def backward(self, ctx: Any, *upstream: Tensor | None) -> Any:
        needs, grads = self.needs(ctx), TokenStatistics(*upstream)  # type: ignore[arg-type]
        if (grads.log_prob is None and grads.entropy is None and grads.lse is None) or not any(needs):
            return self.placed([None] * len(needs), needs)
        inputs, (row_stats,) = self.saved(ctx)
        given = {f"grad_{name}": getattr(grads, name) for name in ("log_prob", "entropy", "lse")}
        call = self.operator.named(inputs)
        found = self.computed(self.gradients, call, row_stats=row_stats, output_mask=needs, **given)
        gradients = [
            each.to(inputs[place].dtype) if needed else None
            for each, place, needed in zip(found, self.places, needs, strict=True)
        ]
        return self.placed(gradients, needs)


class _OfDistillation(_Derivative[ops.LinearDistillation, ops.DistillationLosses]):
    """With gradients of ``total`` computed ahead, all that are needed or none; from the logits again for the losses."""

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        results, call = ops.DistillationLosses(*output), self.operator.named(inputs)
        gradients = output[3:]
        ctx.ahead = tuple(call.output_mask)
        ahead = [each for each, computed in zip(gradients, ctx.ahead, strict=True) if computed]
        if ahead and type(ahead[0]) is Tensor and not torch.compiler.is_compiling():
            gradients_ahead.let_wait(ahead)
        self.save(ctx, inputs, results.row_stats, *ahead)
        unasked = [results.total] if call.scale is None else []
        ctx.mark_non_differentiable(results.row_stats, *gradients, *unasked)

    def backward(self, ctx: Any, *upstream: Tensor | None) -> Any:
        needs, (loss, _, total) = self.needs(ctx), upstream[:3]
        if (loss is None and total is None) or not any(needs):
            return self.placed([None] * len(needs), needs)
        inputs, (row_stats, *ahead) = self.saved(ctx)
        call = self.operator.named(inputs)
        covered = all(computed or not needed for computed, needed in zip(ctx.ahead, needs, strict=True))
        if ahead and covered and total is not None and loss is None and not torch.is_grad_enabled():
            gradients = self._scaled(call, ahead, total, ctx.ahead)
        else:
            if total is not None:
                assert call.scale is not None
                loss = call.scale * total if loss is None else loss + call.scale * total
            gradients = list(
                self.computed(
                    ops.linear_distillation_backward, call, grad_loss=loss, row_stats=row_stats, output_mask=needs
                )
            )
        cast = [
            each.to(inputs[place].dtype) if needed and each is not None else None
            for each, place, needed in zip(gradients, self.places, needs, strict=True)
        ]
        return self.placed(cast, needs)

    @staticmethod
    def _scaled(
        call: ops.LinearDistillation, ahead: list[Tensor], total: Tensor, computed: tuple[bool, ...]
    ) -> list[Tensor | None]:
        kernels, in_place = row_kernels(call.backend), not keeps_graph()
        if in_place:
            gradients_ahead.let_go(ahead)
        if call.head.input.dtype == torch.float16:
            assert call.scale is not None
            total = total / float16_power(call.scale.amax())
        scaled = gradients_ahead.scaled(ahead, total, rounded=False, in_place=in_place, kernels=kernels)
        assert scaled is not None  # which is for gradients that must not be rounded twice
        waiting = iter(scaled)
        return [next(waiting) if each else None for each in computed]


class _WithoutDerivative(_Derivative[Any, Any]):
    """An error that gives the reason, where an operator is differentiated that has no derivative."""

    def __init__(self, operator: Operator[Any, Any], reason: str) -> None:
        super().__init__(operator)
        self.reason = reason

    def setup_context(self, ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        self.save(ctx, inputs)

    def backward(self, ctx: Any, *upstream: Tensor | None) -> Any:
        inputs, _ = self.saved(ctx)
        message = f"{self.operator.name} has no derivative: {self.reason.format(backend=inputs[0])}"
        given = [each for each in upstream if each is not None]
        return [
            torch.ops.monosoftmax.no_derivative(each, given, message) if needed else None
            for each, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]


_HEAD = ("input", "linear_weight", "linear_bias")
_OfLoss(ops.cross_entropy, ops.cross_entropy_backward, "input", "coefficients")
_OfLoss(ops.linear_cross_entropy, ops.linear_cross_entropy_backward, *_HEAD, "coefficients")
_OfLogSoftmax(ops.log_softmax, "input", "coefficients")
_OfTokenStatistics(ops.token_statistics, ops.token_statistics_backward, "input", "coefficients")
_OfTokenStatistics(ops.linear_token_statistics, ops.linear_token_statistics_backward, *_HEAD, "coefficients")
_OfDistillation(ops.linear_distillation, *_HEAD, "coefficients")
for _operator in (
    ops.cross_entropy_backward,
    ops.linear_cross_entropy_backward,
    ops.log_softmax_backward,
    ops.token_statistics_backward,
    ops.linear_token_statistics_backward,
    ops.linear_distillation_backward,
):
    _WithoutDerivative(_operator, 'the {backend} backend does not support double backward; use backend="reference"')
