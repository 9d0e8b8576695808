"""f under Lightning: precisions, accumulation with clipping, checkpoints. The usual case is in examples/."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn

import monosoftmax as ms

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning


class Module(lightning.LightningModule):
    def __init__(self, spec: dict[str, Any], fused: bool) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(tiny.VOCABULARY, 32)
        f = ms.transforms.from_dict(spec)
        if fused:
            self.head: Any = ms.MonotonicSoftmax(32, tiny.VOCABULARY, f)
        else:
            self.head, self.loss = nn.Linear(32, tiny.VOCABULARY), ms.MonotonicCrossEntropyLoss(f)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        tokens, target = batch
        hidden = self.embedding(tokens)
        if self.hparams["fused"]:
            return self.head(hidden, target).loss
        return self.loss(self.head(hidden).flatten(0, 1), target.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ms.parameter_groups(self, lr=1e-2, transform_lr=0.05, weight_decay=0.1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_f_is_trained_in_float32_and_saved(fused: bool, precision: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    module = Module(ms.transforms.PLIF(40, 4.0).to_dict(), fused)
    tokens, _ = tiny.batch(16)
    data = torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])
    trainer = lightning.Trainer(
        max_steps=4, accumulate_grad_batches=2, gradient_clip_val=1.0, precision=precision, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, devices=1,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    f = (module.head if fused else module.loss).transform
    assert f.raw_slope.dtype == torch.float32
    start = ms.transforms.PLIF(40, 4.0).raw_slope
    assert (f.raw_slope - start).abs().max() > 0.01
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert torch.equal((again.head if fused else again.loss).transform.raw_slope, f.raw_slope)
