"""A loss with f for a loop like torchtitan's: of hidden states, and divided by the number of tokens of all ranks.

One process, or one for each share of the vocabulary, which gives the same losses:

    python examples/torchtitan_loss.py
    torchrun --nproc-per-node 2 examples/torchtitan_loss.py
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import monosoftmax as ms

README = Path(__file__).resolve().parents[1] / "README.md"


class MonotonicHead(nn.Linear):
    """The model's ``lm_head``. f is a part of it, so that optimizers, FSDP and checkpoints know f."""

    def __init__(self, in_features: int, out_features: int, transform: ms.transforms.MonotonicTransform) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.transform = transform

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """The logits z, (..., V); with ``labels`` (...) the sum of the losses of softmax(f(z)), without logits."""
        if labels is None:
            return super().forward(hidden)
        return ms.linear_cross_entropy(hidden, self.weight, labels, self.transform, reduction="sum")


class MonotonicLoss:
    """Called as torchtitan 0.3 calls its losses; a weight or logits that are sharded DTensors are fine.

    torchtitan's trainer calls ``set_lm_head``, and lets the model skip its head, for subclasses of its
    ``ChunkedLossWrapper`` only: there, make this one of them.

    Args:
        fused: whether ``pred`` are hidden states, (..., d); else they are logits, (..., V). FSDP needs the former: it
            gathers f within the head's forward only, and an error says so for the latter.
    """

    def __init__(self, *, fused: bool = True) -> None:
        self.fused = fused

    def set_lm_head(self, lm_head: MonotonicHead) -> None:
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, over ``global_valid_tokens`` if given, and no metrics.

        ``loss_inputs``, such as the positions of the tokens, are for other losses.
        """
        if self.fused:
            # By the head's forward, for which FSDP gathers the weight and f.
            loss = self.lm_head(pred, labels)
        else:
            rows = pred.flatten(0, -2)
            loss = ms.cross_entropy(rows, labels.flatten(), self.lm_head.transform, reduction="sum")
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class ByteModel(nn.Module):
    _skip_lm_head = False  # as models of torchtitan have it

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.body = nn.GRU(64, 64, batch_first=True)
        self.lm_head = MonotonicHead(64, 256, ms.transforms.PLIF())

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.body(self.embedding(tokens))
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def train(fused: bool, steps: int) -> Tensor:
    """The loss of the last step."""
    torch.manual_seed(0)
    model, loss_function = ByteModel(), MonotonicLoss(fused=fused)
    if torch.distributed.is_initialized():
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        parallelize_module(model, mesh, {"lm_head": ms.distributed.VocabParallel()})
    loss_function.set_lm_head(model.lm_head)
    model._skip_lm_head = fused
    optimizer = torch.optim.AdamW(ms.parameter_groups(model, lr=3e-3, transform_lr=0.01, weight_decay=0.1))

    text = torch.tensor(list(README.read_bytes()))
    blocks = text[: len(text) // 65 * 65].view(-1, 65)
    for _ in range(steps):
        microbatches = blocks[torch.randint(len(blocks), (2, 16))]
        # torchtitan adds this up over the ranks that have other tokens: here all have the same.
        global_valid_tokens = microbatches[..., 1:].count_nonzero()
        total = torch.zeros(())
        for tokens in microbatches:
            loss, _ = loss_function(model(tokens[:, :-1]), tokens[:, 1:], global_valid_tokens)
            loss.backward()
            total += loss.detach()
        ms.clip_grad_norm_(model, 1.0)  # f apart from the rest
        optimizer.step()
        optimizer.zero_grad()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    if "RANK" in os.environ:  # of torchrun
        torch.distributed.init_process_group("gloo")
    for fused in (True, False):
        loss = train(fused, steps)
        if os.environ.get("RANK", "0") == "0":
            print(f"{'fused with the head' if fused else 'from logits'}: loss {loss:.5f} after {steps} steps")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
