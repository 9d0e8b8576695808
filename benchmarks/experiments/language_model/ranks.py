"""A language model that processes of ``torchrun`` train together, with the losses of one process but for rounding.

The processes are a mesh of ``data`` x ``vocabulary``. Those of a row share out the words of the embedding and of the
output layer; the rows share out the streams of a batch. Each process reads all of a split whose perplexity it measures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import monosoftmax as ms

from ...engine.experiment import ExperimentError
from .corpora import Corpus
from .models import MIXTURES, LanguageModel
from .settings import Settings
from .training import Trainer, prepared


@contextmanager
def joined(settings: Settings, vocabulary: int) -> Iterator[RanksTrainer]:
    """The part of this process of a training by all processes of torchrun, ``vocabulary`` of them in a row."""
    size = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if vocabulary < 1 or size % vocabulary:
        raise ExperimentError(
            f"vocabulary_parallel must divide the number of processes of torchrun, {size}, got {vocabulary}"
        )
    device = torch.device(settings.device)
    if device.index is not None:
        raise ExperimentError(f"device must be cpu or cuda, as each process has a GPU, got {settings.device!r}")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        mesh = init_device_mesh(device.type, (size // vocabulary, vocabulary), mesh_dim_names=("data", "vocabulary"))
        yield RanksTrainer(prepared(settings), settings, mesh)
    finally:
        dist.destroy_process_group()


class RanksTrainer(Trainer):
    """A :class:`Trainer` that the processes of ``mesh``, data x vocabulary, are together.

    The masks of dropout are those of one process, too.
    """

    def __init__(self, corpus: Corpus, settings: Settings, mesh: DeviceMesh, steps: int | None = None) -> None:
        self.mesh, data = mesh, mesh["data"]
        self._data, self._shares, self._share = data.get_group(), data.size(), data.get_local_rank()
        if settings.batch_size % self._shares:
            raise ExperimentError(f"batch_size must be a multiple of {self._shares}, got {settings.batch_size}")
        if self.mesh["vocabulary"].size() > 1 and settings.output in MIXTURES:
            raise ExperimentError(f"vocabulary_parallel must be 1 for the output layer {settings.output}")
        fused = settings.device != "cpu" and (settings.model == "transformer" or settings.output in MIXTURES)
        if self._shares > 1 and settings.dropout > 0 and fused:
            # Kernels draw these masks, out of reach of _WholeMasks: each share of the streams would have the same.
            raise ExperimentError(
                f"dropout must be 0 where processes share out streams on GPUs, got {settings.dropout}"
            )
        super().__init__(corpus, settings, steps)

    def _new_model(self) -> LanguageModel:
        model = super()._new_model()
        if self.mesh["vocabulary"].size() > 1:
            of_embedding = RowwiseParallel(input_layouts=Replicate())
            styles = {"body.embedding": of_embedding, "output": ms.distributed.VocabParallel()}
            parallelize_module(model, self.mesh["vocabulary"], styles)
            # Each has been given a share of its own.
            model.body.embedding.weight = model.output.weight
        return model

    def _batch(self) -> tuple[Tensor, Tensor]:
        words, targets = super()._batch()
        return words.chunk(self._shares)[self._share], targets.chunk(self._shares)[self._share]

    def _gradients(self, words: Tensor, targets: Tensor) -> Tensor:
        with _WholeMasks(self._shares, self._share):
            loss = self._loss(words, targets)
        loss.backward()
        # All shares have equally many words, so that the mean of their means is the mean.
        gradients = [self._average(each.grad) for each in self.model.parameters() if each.grad is not None]
        # The norm of 576,000 numbers that torch finds on a CPU is off by 1e-4, that of two halves by less. To be off by
        # as much as one process, this gathers the gradients, which ms.clip_grad_norm_ would not.
        whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in gradients]
        norm = torch.nn.utils.get_total_norm(whole)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.settings.clip, norm, foreach=False)
        return self._average(loss.detach().clone())

    def _average(self, tensor: Tensor) -> Tensor:
        """Overwrites ``tensor`` with its mean over the rows of the mesh, and returns it."""
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        dist.all_reduce(local, group=self._data)
        local /= self._shares
        return tensor


class _WholeMasks(TorchDispatchMode):
    """Draws random masks for all streams, which come first in them, and takes the part of one of equal ``shares``."""

    def __init__(self, shares: int, share: int) -> None:
        super().__init__()
        self._shares, self._share = shares, share

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.bernoulli_.float or self._shares == 1:
            return func(*args, **(kwargs or {}))
        mask, *others = args
        # Numbers may be drawn in the order of the memory.
        order = sorted(range(mask.dim()), key=mask.stride, reverse=True)
        sizes = [mask.shape[dim] * (1 if dim else self._shares) for dim in order]
        whole = mask.new_empty(sizes).permute([order.index(dim) for dim in range(mask.dim())])
        return mask.copy_(func(whole, *others, **(kwargs or {})).chunk(self._shares)[self._share])
