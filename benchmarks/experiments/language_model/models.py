"""The language models: a body that turns words into hidden states, and an output layer tied to its embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import monosoftmax as ms

if TYPE_CHECKING:
    from .settings import Settings

#: What a body carries from one stretch of text to the next: (h, c) of each LSTM layer; None at the start of a text.
State = list[tuple[Tensor, Tensor]] | None

#: The pieces, bound and random slopes of Ganea et al., ICML 2019.
_published_plif = partial(ms.transforms.PLIF, 100_000, 20.0, min_slope=1e-6, init="random")
#: f by output layer. Frozen ones are never trained: the control of Parthiban et al., AAAI 2021.
TRANSFORMS: dict[str, Callable[[], ms.transforms.MonotonicTransform]] = {
    "linear": ms.transforms.Identity,
    "temperature": ms.transforms.Temperature,
    "plif": ms.transforms.PLIF,
    "plif-frozen": lambda: ms.transforms.PLIF(init="random").requires_grad_(False),
    "plif-published": _published_plif,
    "plif-frozen-published": lambda: _published_plif().requires_grad_(False),
    "sigsoftmax": ms.transforms.SigSoftmax,
    "gss": ms.transforms.GSS,
    "softcap": ms.transforms.SoftCap,
    "softcap-learned": partial(ms.transforms.SoftCap, learnable=True),
    "sigmoidcap": ms.transforms.SigmoidCap,
    "sigmoidcap-learned": partial(ms.transforms.SigmoidCap, learnable=True),
    "mlp": ms.transforms.MonotonicMLP,
    "spline": ms.transforms.RationalQuadraticSpline,
}
MIXTURES = {"mos": ms.MixtureOfSoftmaxes, "moc": ms.MixtureOfContexts}
OUTPUTS = (*TRANSFORMS, *MIXTURES)


@cache
def learns_transform(output: str) -> bool:
    """Whether the output layer has an f with parameters that are trained."""
    return output in TRANSFORMS and any(p.requires_grad for p in TRANSFORMS[output]().parameters())


def _output_layer(settings: Settings, classes: int) -> nn.Module:
    """The output layer, with its bias at 0. Mixtures have dropout of expert vectors, as in Yang et al., ICLR 2018."""
    if settings.output in MIXTURES:
        layer = MIXTURES[settings.output](settings.dim, classes, settings.experts, dropout=settings.dropout)
        nn.init.zeros_(layer.decoder.bias)
    else:
        layer = ms.MonotonicSoftmax(settings.dim, classes, TRANSFORMS[settings.output]())
        nn.init.zeros_(layer.bias)
    return layer


def _embedding(count: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(count, dim)
    nn.init.uniform_(embedding.weight, -0.1, 0.1)
    return embedding


class LSTMBody(nn.Module):
    """Embedding, then LSTM layers with variational dropout, as in AWD-LSTM (Merity et al., ICLR 2018).

    The last layer has the size of the embedding, so that the output layer can be tied to it. Left out of AWD-LSTM: the
    dropout of recurrent weights and of whole words, the activation regularisers, and averaged SGD.

    Shapes: words (B, T) -> hidden states (B, T, dim).
    """

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        self.embedding = _embedding(classes, settings.dim)
        sizes = [settings.dim, *[settings.hidden] * (settings.layers - 1), settings.dim]
        self.layers = nn.ModuleList(nn.LSTM(inputs, outputs, batch_first=True) for inputs, outputs in pairwise(sizes))
        # Dropout1d drops a feature for a whole stretch of text: it is variational dropout on (B, features, T).
        self.dropout = nn.Dropout1d(settings.dropout)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        hidden = self._drop(self.embedding(words))
        carried = []
        for index, layer in enumerate(self.layers):
            hidden, (h, c) = layer(hidden, None if state is None else state[index])
            carried.append((h.detach(), c.detach()))
            hidden = self._drop(hidden)
        return hidden, carried

    def _drop(self, hidden: Tensor) -> Tensor:
        return self.dropout(hidden.transpose(1, 2)).transpose(1, 2)


class TransformerBody(nn.Module):
    """A decoder-only Transformer with learned positions; it sees the words of one stretch only.

    Shapes: words (B, T) with T <= length -> hidden states (B, T, dim).
    """

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        dim, hidden, dropout = settings.dim, settings.hidden, settings.dropout
        self.embedding = _embedding(classes, dim)
        self.position = _embedding(settings.length, dim)
        kind = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(dim, settings.heads, hidden, dropout, **kind)
        self.encoder = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        length = words.shape[1]
        hidden = self.dropout(self.embedding(words) + self.position.weight[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length, words.device)
        return self.encoder(hidden, mask=mask, is_causal=True), None


BODIES = {"lstm": LSTMBody, "transformer": TransformerBody}


class LanguageModel(nn.Module):
    """A body and an output layer that shares the weight of its embedding.

    For one seed, the body is the same at first whatever the output layer.
    """

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.body = BODIES[settings.model](settings, classes)
            self.output = _output_layer(settings, classes)
        self.output.tie_weights(self.body.embedding)
