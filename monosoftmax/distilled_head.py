"""Two heads and the divergence between them: the operators of distillation, of products and a backend's row kernels.

The teacher's logits of a chunk of rows become log-probabilities by the kernel of log_softmax, and are let go of. Then
come the student's logits. The kernel of the divergence reads both while they are hot, and overwrites the student's
logits with their gradient. So memory beyond inputs and gradients is two buffers of a chunk, however many the rows are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import ops
from .float16 import float16_power
from .groups import HeadGradients, Upstream
from .head_products import HeadProducts, chunk_rows, rows_in, sum_of_chunks, without_autocast
from .row_kernels import row_kernels


class _Heads:
    """The products of a student, with its gradients, and of a teacher."""

    def __init__(self, call: ops.LinearDistillation | ops.LinearDistillationBackward) -> None:
        *mask, self.need_coefficients = call.output_mask
        self.call, self.kernels = call, row_kernels(call.backend)
        input, weight, _ = call.head
        rows = self._rows(weight.shape[0], input)
        self.student = HeadProducts(call.head, mask, rows)
        # The teacher's log-probabilities are of the arithmetic type: rounded to half precision, those of rare classes
        # would be a few per cent off.
        self.dtype = call.transform.coefficients.dtype
        self.teacher = HeadProducts(call.teacher.head(), rows_in_chunk=rows)
        self.grad_coefficients: Tensor | None = None

    @staticmethod
    def _rows(classes: int, input: Tensor) -> int:
        """Fewer rows of a chunk than of a single head: there are two buffers.

        On the CPU so few that glibc takes a buffer from its heap, which it does below 32 MiB. A larger one has new
        pages for each chunk: touching them takes as long as a kernel that reads them.
        """
        rows = chunk_rows(classes, input.dtype, input.device.type)
        most = 31 * 2**20 // (classes * input.dtype.itemsize)
        return max(3 * rows // 4, 1) if input.device.type != "cpu" else max(min(3 * rows // 4, most), rows // 2, 1)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The chunks of rows, with the logits of the student and the log-probabilities of the teacher."""
        students, f = iter(self.student), self.call.teacher.transform()
        for rows, of_teacher in self.teacher:
            log_q, _ = self.kernels.log_softmax(
                of_teacher, f, self.dtype, of_teacher if of_teacher.dtype == self.dtype else None
            )
            del of_teacher
            _, logits = next(students)
            yield rows, logits, log_q
            del logits, log_q

    def losses(self, logits: Tensor, log_q: Tensor) -> Sequence[Tensor]:
        """The loss, lse and row_stats of some rows."""
        return self.kernels.divergence(logits, log_q, self.call.transform, self.call.divergence)[:3]

    def add_gradients(self, rows: slice, logits: Tensor, log_q: Tensor, *, upstream: Tensor, stats: Tensor) -> None:
        """Take in the gradients under ``upstream`` [n], which overwrite ``logits``."""
        wanted = self.student.gradients(logits, self.need_coefficients)
        results = self.kernels.divergence(
            logits, log_q, self.call.transform, self.call.divergence,
            upstream=Upstream(upstream), row_stats=stats, **wanted,
        )  # fmt: skip
        self.grad_coefficients = sum_of_chunks(self.grad_coefficients, results[4])
        self.student.add_gradients(rows, logits)

    def summed(self) -> HeadGradients:
        found = self.grad_coefficients
        return self.student.summed(self.call.transform.coefficients.new_empty(0) if found is None else found)


def _linear_distillation(call: ops.LinearDistillation) -> ops.DistillationLosses:
    heads, scale = _Heads(call), call.scale
    if scale is not None and any(call.output_mask) and call.head.input.dtype == torch.float16:
        scale = scale * float16_power(scale.amax())
    gathered = heads.student.gathered((heads.dtype, 1), (heads.dtype, 3))
    for rows, logits, log_q in heads:
        loss, _, row_stats = heads.losses(logits, log_q)
        gathered.put(rows, (loss, row_stats))
        if any(call.output_mask):
            assert scale is not None
            heads.add_gradients(rows, logits, log_q, upstream=rows_in(scale, rows), stats=row_stats)
        del logits, log_q, loss, row_stats
    loss, stats = gathered.results
    total = loss.new_empty(0) if call.scale is None else (loss * call.scale).sum()
    return ops.DistillationLosses(loss, stats, total, *heads.summed())


def _linear_distillation_backward(call: ops.LinearDistillationBackward) -> HeadGradients:
    heads, upstream = _Heads(call), call.grad_loss
    power: Tensor | None = None
    if call.head.input.dtype == torch.float16 and upstream.numel() > 0:
        power = float16_power(upstream.abs().amax())
        upstream = upstream * power
    for rows, logits, log_q in heads:
        stats = call.row_stats[:, rows]
        heads.add_gradients(rows, logits, log_q, upstream=rows_in(upstream, rows), stats=stats)
        del logits, log_q
    gradients = heads.summed()
    return gradients if power is None else HeadGradients(*(each.div_(power) for each in gradients))


ops.linear_distillation.computes(without_autocast(_linear_distillation))
ops.linear_distillation_backward.computes(without_autocast(_linear_distillation_backward))
