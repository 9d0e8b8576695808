"""The language models: a body that turns words into hidden states, and an output layer tied to its embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import monosoftmax as ms

if TYPE_CHECKING:
    from .settings import Settings

#: What a body carries from one stretch of text to the next: (h, c) of each LSTM layer; None at the start of a text.
State = list[tuple[Tensor, Tensor]] | None

_TRANSFORMS: dict[str, Callable[[], ms.transforms.MonotonicTransform]] = {
    "linear": ms.transforms.Identity,
    "temperature": ms.transforms.Temperature,
    "plif": ms.transforms.PLIF,
    "plif-frozen": lambda: _frozen(ms.transforms.PLIF(init="random")),
    "plif-published": lambda: _published_plif(),
    "plif-frozen-published": lambda: _frozen(_published_plif()),
    "sigsoftmax": ms.transforms.SigSoftmax,
    "gss": ms.transforms.GSS,
    "softcap": ms.transforms.SoftCap,
    "softcap-learned": lambda: ms.transforms.SoftCap(learnable=True),
    "sigmoidcap": ms.transforms.SigmoidCap,
    "sigmoidcap-learned": lambda: ms.transforms.SigmoidCap(learnable=True),
    "mlp": ms.transforms.MonotonicMLP,
    "spline": ms.transforms.RationalQuadraticSpline,
}
_MIXTURES = ("mos", "moc")
OUTPUTS = (*_TRANSFORMS, *_MIXTURES)
MODELS = ("lstm", "transformer")


def _published_plif() -> ms.transforms.PLIF:
    """PLIF with the pieces, bound and random slopes of Ganea et al., ICML 2019."""
    return ms.transforms.PLIF(100_000, 20.0, min_slope=1e-6, init="random")


def _frozen(transform: ms.transforms.MonotonicTransform) -> ms.transforms.MonotonicTransform:
    """``transform`` with parameters that are never trained: the control of Parthiban et al., AAAI 2021."""
    return transform.requires_grad_(False)


def transform_of(name: str) -> ms.transforms.MonotonicTransform | None:
    """A new f of the output layer ``name`` (one of ``OUTPUTS``); None for a mixture, which has none."""
    return None if name in _MIXTURES else _TRANSFORMS[name]()


@cache
def learns_transform(name: str) -> bool:
    """Whether f of the output layer ``name`` has parameters that are trained."""
    transform = transform_of(name)
    return transform is not None and any(p.requires_grad for p in transform.parameters())


def output_layer(name: str, dim: int, classes: int, experts: int, dropout: float) -> nn.Module:
    """The output layer ``name`` (one of ``OUTPUTS``), with its bias at 0.

    Random slopes are drawn from torch's generator, so that they follow from its seed.
    ``experts`` and ``dropout`` (of the expert vectors, as in Yang et al., ICLR 2018) are for the mixtures only.
    """
    if name in _MIXTURES:
        kind = ms.MixtureOfSoftmaxes if name == "mos" else ms.MixtureOfContexts
        mixture = kind(dim, classes, experts, dropout=dropout)
        nn.init.zeros_(mixture.decoder.bias)  # type: ignore[arg-type]
        return mixture
    layer = ms.MonotonicSoftmax(dim, classes, _TRANSFORMS[name]())
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class LSTMBody(nn.Module):
    """Embedding, then LSTM layers with variational dropout, as in AWD-LSTM (Merity et al., ICLR 2018).

    The last layer has the size of the embedding, so that the output layer can be tied to it. Left out of AWD-LSTM: the
    dropout of recurrent weights and of whole words, the activation regularisers, and averaged SGD.

    Shapes: words (B, T) -> hidden states (B, T, dim).
    """

    def __init__(self, classes: int, dim: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, dim)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        sizes = [dim, *[hidden] * (layers - 1), dim]
        self.layers = nn.ModuleList(nn.LSTM(inputs, outputs, batch_first=True) for inputs, outputs in pairwise(sizes))
        # Dropout1d drops a feature for a whole stretch of text: it is variational dropout on (B, features, T).
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        hidden = self._drop(self.embedding(words))
        carried = []
        for index, layer in enumerate(self.layers):
            hidden, (h, c) = layer(hidden, None if state is None else state[index])
            carried.append((h.detach(), c.detach()))
            hidden = self._drop(hidden)
        return hidden, carried

    def _drop(self, hidden: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(hidden.transpose(1, 2)).transpose(1, 2)
        return dropped


class TransformerBody(nn.Module):
    """A decoder-only Transformer with learned positions; it sees the words of one stretch only.

    Shapes: words (B, T) with T <= length -> hidden states (B, T, dim).
    """

    mask: Tensor

    def __init__(
        self, classes: int, dim: int, hidden: int, layers: int, heads: int, length: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, dim)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.position = nn.Embedding(length, dim)
        nn.init.uniform_(self.position.weight, -0.1, 0.1)
        layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        length = words.shape[1]
        places = torch.arange(length, device=words.device)
        hidden = self.dropout(self.embedding(words) + self.position(places))
        return self.encoder(hidden, mask=self.mask[:length, :length], is_causal=True), None


class LanguageModel(nn.Module):
    """A body and an output layer that shares the weight of its embedding."""

    def __init__(self, body: LSTMBody | TransformerBody, output: Any) -> None:
        super().__init__()
        self.body = body
        self.output = output
        self.output.tie_weights(body.embedding)

    def forward(self, words: Tensor, targets: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """log p of the targets (B, T), their mean loss, and the state to carry on."""
        hidden, state = self.body(words, state)
        output, loss = self.output(hidden, targets)
        return output, loss, state


def build(settings: Settings, classes: int) -> LanguageModel:
    """The model with its initial weights: for one seed, the body is the same whatever the output layer."""
    dim, hidden, layers, dropout = settings.dim, settings.hidden, settings.layers, settings.dropout
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        body = (
            LSTMBody(classes, dim, hidden, layers, dropout)
            if settings.model == "lstm"
            else TransformerBody(classes, dim, hidden, layers, settings.heads, settings.length, dropout)
        )
        return LanguageModel(body, output_layer(settings.output, dim, classes, settings.experts, dropout))
