"""What a fused backend computes for :func:`monosoftmax.linear_token_loss`, chunk of rows by chunk of rows.

The results of a chunk, a few numbers for each token, are leaves of a small graph, which the caller's ``loss_fn`` makes.
Its gradients are the upstream gradients of the kernel of the loss, which overwrites the logits of the chunk with their
gradient. The logits of ``classes`` are taken out before, [n, k], and their gradients are put into their places after
the kernel, computed from float32: a log p next to 0 has two parts that cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .float16 import float16_shift
from .groups import Head, HeadGradients, LossOptions, TokenStatistics, Transform, Upstream
from .head_products import HeadProducts, rows_in, sum_of_chunks
from .row_kernels import row_kernels
from .transforms import MonotonicTransform

LossFunction = Callable[..., Tensor]


class Tokens(NamedTuple):
    """Some tokens of a head, for the ``loss_fn`` of :func:`monosoftmax.linear_token_loss`: [n] each, differentiable."""

    #: log p of the target; 0 where the target is ignored.
    log_prob: Tensor
    #: Of each token, ignored or not, and so is lse.
    entropy: Tensor
    lse: Tensor
    #: log p of the ``classes`` of each token, [n, k]; [n, 0] without them.
    class_log_prob: Tensor
    #: Whether no class has a larger logit than the target: bool, without a gradient.
    is_top1: Tensor


class TokenLoss(NamedTuple):
    """A call, checked, for the rows [N, d] of a head."""

    loss_fn: LossFunction
    target: Tensor
    #: [N, k]; k may be 0.
    classes: Tensor
    per_token: Sequence[Tensor]
    transform: MonotonicTransform
    temperature: Tensor | None
    ignore_index: int
    backend: str


class _Chunk(NamedTuple):
    """What is known of a chunk of rows before its gradients: the gradients of the loss for the numbers of its tokens.

    ``of_classes`` [n, k] are those of ``class_log_prob``, the log p of the classes.
    """

    rows: slice
    loss: Tensor
    upstream: Upstream
    of_classes: Tensor
    class_log_prob: Tensor
    statistics: TokenStatistics

    def scaled(self, factor: Tensor) -> _Chunk:
        upstream = Upstream(*(None if each is None else each * factor for each in self.upstream))
        return self._replace(upstream=upstream, of_classes=self.of_classes * factor)

    def largest(self) -> Tensor:
        every = [each.abs().amax() for each in (*self.upstream, self.of_classes) if each is not None and each.numel()]
        return torch.stack(every).amax()


def loss_of(call: TokenLoss, tokens: Tokens, rows: slice) -> Tensor:
    """What ``loss_fn`` makes of these tokens, checked."""
    loss = call.loss_fn(tokens, *(rows_in(each, rows) for each in call.per_token))
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        got = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a 0-dim floating-point tensor, the sum over its tokens, got {got}")
    return loss.to(tokens.log_prob.dtype)


def loss_and_gradients(
    call: TokenLoss, operands: Head, transform: Transform, needed: Sequence[bool]
) -> tuple[Tensor, HeadGradients]:
    """The sum of the losses of the chunks, and its gradients for the operands and the coefficients of f."""
    *head_mask, need_coefficients = needed
    head, target = HeadProducts(operands, head_mask), call.target
    classes = head.weight.shape[0]
    for each, ignored in ((target, target == call.ignore_index), (call.classes.flatten(), None)):
        outside = (each < 0) | (each >= classes)
        reference.raise_if_any(outside if ignored is None else outside & ~ignored, each, classes, call.ignore_index)
    shift: Tensor | None = None
    known: dict[int, _Chunk] = {}
    if head.input.dtype == torch.float16 and any(needed) and target.numel() > 0:
        # Their scale comes from the gradients of all tokens, so that they are found first.
        for rows, logits in head:
            known[rows.start] = _chunk(call, transform, rows, logits, gradients=True)
            del logits
        largest = torch.stack([each.largest() for each in known.values()]).amax()
        shift = float16_shift(largest, target, None, call.ignore_index)
        known = {start: each.scaled(shift) for start, each in known.items()}
    total, grad_coefficients = transform.coefficients.new_zeros(()), transform.coefficients.new_empty(0)
    for rows, logits in head:
        chunk = known.get(rows.start) or _chunk(call, transform, rows, logits, gradients=any(needed))
        total += chunk.loss
        if any(needed):
            part = _gradients(call, transform, chunk, logits, (head.needs_logit_gradient, need_coefficients))
            grad_coefficients = part if rows.start == 0 else sum_of_chunks(grad_coefficients, part)
            head.add_gradients(rows, logits)
        del logits
    gradients = head.summed(grad_coefficients)
    return total, gradients if shift is None else HeadGradients(*(each.div_(shift) for each in gradients))


def _chunk(call: TokenLoss, transform: Transform, rows: slice, logits: Tensor, *, gradients: bool) -> _Chunk:
    """Calls ``loss_fn``, and differentiates it where ``gradients`` are asked for."""
    target, classes = rows_in(call.target, rows), rows_in(call.classes, rows)
    kernel = row_kernels(call.backend).token_statistics
    found = TokenStatistics(*kernel(logits, target, transform, call.ignore_index))
    # Relative to the largest y, which is that of the largest logit. The rounding of lse would be the error of a log p
    # next to 0, and could carry it beyond 0.
    places = torch.cat([classes, found.argmax.unsqueeze(1)], 1)
    z = logits.gather(1, places).to(found.lse.dtype)
    y = reference.evaluated(z, call.transform, transform.coefficients, call.temperature)
    class_log_prob = (y[:, :-1] - y[:, -1:]).clamp_(max=0.0) - found.row_stats[1].log().unsqueeze(1)
    leaves = [found.log_prob, found.entropy, found.lse, class_log_prob]
    with torch.set_grad_enabled(gradients):
        leaves = [each.detach().requires_grad_(gradients) for each in leaves]
        log_prob, entropy, lse, of_classes = leaves
        loss = loss_of(call, Tokens(log_prob, entropy, lse, of_classes, found.rank == 0), rows)
        if gradients:
            _check_leaves(loss, leaves)
    if not loss.requires_grad:
        nothing = torch.zeros_like(class_log_prob)
        upstream = Upstream(torch.zeros_like(found.lse))
        return _Chunk(
            rows, loss.detach(), upstream, of_classes=nothing, class_log_prob=class_log_prob, statistics=found
        )
    a, e, h, u = torch.autograd.grad(loss, leaves, allow_unused=True)
    of_classes = torch.zeros_like(class_log_prob) if u is None else u
    if u is not None:
        h = -u.sum(1) if h is None else h - u.sum(1)
    upstream = Upstream(torch.zeros_like(found.lse) if a is None else -a, h, None, e)
    return _Chunk(rows, loss.detach(), upstream, of_classes=of_classes, class_log_prob=class_log_prob, statistics=found)


def _check_leaves(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """An error where ``loss`` depends on something else that requires a gradient, which would get none."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is each for each in leaves):
            raise ValueError(
                "loss_fn must depend on what requires a gradient through its tokens only, it depends on a tensor of "
                f"shape {tuple(variable.shape)} that would get no gradient"
            )
        todo += [each for each, _ in node.next_functions]


def _gradients(
    call: TokenLoss, transform: Transform, chunk: _Chunk, logits: Tensor, output_mask: tuple[bool, bool]
) -> Tensor:
    """Overwrites ``logits`` with their gradient, and returns that of the coefficients; as far as the mask asks."""
    target, classes = rows_in(call.target, chunk.rows), rows_in(call.classes, chunk.rows)
    dy, present = _gradient_of_y(call, chunk)
    # What a row without a gradient holds must not reach the gradients.
    z = torch.where(present, logits.gather(1, classes).to(dy.dtype), 0.0)
    options = LossOptions(None, call.ignore_index, 0.0, 0.0, False)
    results = row_kernels(call.backend).cross_entropy(
        logits, target, transform, options, upstream=chunk.upstream, row_stats=chunk.statistics.row_stats,
        output_mask=output_mask, grad_rows=logits if output_mask[0] else None,
    )  # fmt: skip
    if classes.shape[1] == 0:
        return results[4]
    with torch.enable_grad():
        z, coefficients = z.requires_grad_(), transform.coefficients.detach().requires_grad_()
        y = reference.evaluated(z, call.transform, coefficients, call.temperature)
    if output_mask[0]:
        (dz,) = torch.autograd.grad(y, z, dy, retain_graph=True)
        logits.scatter_(1, classes, dz.to(logits.dtype))
    if not output_mask[1]:
        return results[4]
    # The kernel has the part of lse.
    (more,) = torch.autograd.grad(y, coefficients, chunk.of_classes, allow_unused=True)
    return results[4] if more is None else results[4] + more


def _gradient_of_y(call: TokenLoss, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """dL/dy of the ``classes``, from all upstream gradients; and [n, 1], whether a row has any that is not 0."""
    target, classes = rows_in(call.target, chunk.rows), rows_in(call.classes, chunk.rows)
    loss, lse, _, entropy = (None if each is None else each.unsqueeze(1) for each in chunk.upstream)
    assert loss is not None
    loss = loss.masked_fill(target.unsqueeze(1) == call.ignore_index, 0.0)
    p = chunk.class_log_prob.exp()
    dy = loss * (p - (classes == target.unsqueeze(1)).to(p.dtype)) + chunk.of_classes
    present = (loss != 0) | (chunk.of_classes != 0).any(1, keepdim=True)
    if lse is not None:
        dy, present = dy + lse * p, present | (lse != 0)
    if entropy is not None:
        log_p = chunk.class_log_prob.clamp(min=torch.finfo(p.dtype).min)
        dy = dy - entropy * p * (log_p + chunk.statistics.entropy.unsqueeze(1))
        present = present | (entropy != 0)
    return torch.where(present, dy, 0.0), present
