"""Lightning: a language model of bytes whose head has f, trained on the README; its checkpoint says which f it has."""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import monosoftmax as ms

README = Path(__file__).resolve().parents[1] / "README.md"


class ByteModel(L.LightningModule):
    """
    Args:
        transform: f as ``to_dict()`` of it gives it. Among the hyperparameters, it is in every checkpoint, so that
            ``load_from_checkpoint(path)`` needs no f.
    """

    def __init__(self, transform: dict[str, Any], lr: float = 3e-3, transform_lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(256, 64)
        self.body = nn.GRU(64, 64, batch_first=True)
        self.head = ms.MonotonicSoftmax(64, 256, ms.transforms.from_dict(transform))

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of each token given those before it."""
        hidden, _ = self.body(self.embedding(tokens[:, :-1]))
        return self.head(hidden, tokens[:, 1:]).loss

    def training_step(self, tokens: Tensor, batch_index: int) -> Tensor:
        loss = self(tokens)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # f's parameters want a learning rate of their own, and no weight decay.
        groups = ms.parameter_groups(self, lr=self.hparams.lr, transform_lr=self.hparams.transform_lr, weight_decay=0.1)
        return torch.optim.AdamW(groups)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning's own clips f and the model together. math.inf only measures.
        norms = ms.clip_grad_norm_(self, gradient_clip_val or math.inf)
        self.log_dict({"gradient_norm": norms.model, "gradient_norm_of_f": norms.transform})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    L.seed_everything(0)
    text = torch.tensor(list(README.read_bytes()))
    blocks = text[: len(text) // 65 * 65].view(-1, 65)

    model = ByteModel(ms.transforms.PLIF().to_dict())
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            gradient_clip_val=1.0,
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(blocks, batch_size=32, shuffle=True))
        print(", ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items()))
        loaded = ByteModel.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    print(loaded.head.transform)
    with torch.no_grad():
        print(f"loss of the saved model {model(blocks):.6f}, of the loaded one {loaded(blocks):.6f}")


if __name__ == "__main__":
    main()
