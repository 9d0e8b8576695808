"""A plain PyTorch loop: a language model of bytes whose head has f, trained on the README, saved and loaded."""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import monosoftmax as ms

README = Path(__file__).resolve().parents[1] / "README.md"


class ByteModel(nn.Module):
    def __init__(self, f: ms.transforms.MonotonicTransform) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.body = nn.GRU(64, 64, batch_first=True)
        self.head = ms.MonotonicSoftmax(64, 256, f)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of each token given those before it."""
        hidden, _ = self.body(self.embedding(tokens[:, :-1]))
        return self.head(hidden, tokens[:, 1:]).loss

    @torch.no_grad()
    def continued(self, text: str, length: int) -> str:
        tokens, state = torch.tensor([list(text.encode())]), None
        written = tokens
        for _ in range(length):
            hidden, state = self.body(self.embedding(tokens), state)
            tokens = self.head.sample(hidden[:, -1:])
            written = torch.cat([written, tokens], dim=1)
        return bytes(written[0].tolist()).decode(errors="replace")


def save(model: ByteModel, path: Path) -> None:
    torch.save({"transform": model.head.transform.to_dict(), "weights": model.state_dict()}, path)


def load(path: Path) -> ByteModel:
    saved = torch.load(path)
    model = ByteModel(ms.transforms.from_dict(saved["transform"]))
    model.load_state_dict(saved["weights"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    text = torch.tensor(list(README.read_bytes()))
    blocks = text[: len(text) // 65 * 65].view(-1, 65)

    model = ByteModel(ms.transforms.PLIF())
    # f's parameters want a learning rate of their own, and no weight decay.
    optimizer = torch.optim.AdamW(ms.parameter_groups(model, lr=3e-3, transform_lr=0.01, weight_decay=0.1))
    for step in range(1, steps + 1):
        loss = model(blocks[torch.randint(len(blocks), (32,))])
        optimizer.zero_grad()
        loss.backward()
        norms = ms.clip_grad_norm_(model, 1.0)  # f apart from the rest
        optimizer.step()
        if step == 1 or step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, gradient norms {norms.model:.2f} and {norms.transform:.2f} (f)")

    slopes = model.head.transform.derivative(torch.linspace(-10, 10, 100))
    print(f"slopes of f: {slopes.min():.3f} to {slopes.max():.3f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save(model, path)
        loaded = load(path)
    with torch.no_grad():
        print(f"loss of the saved model {model(blocks):.6f}, of the loaded one {loaded(blocks):.6f}")
    print(repr(loaded.continued("monosoftmax", 60)))


if __name__ == "__main__":
    main()
