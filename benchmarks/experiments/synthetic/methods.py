"""The methods: output layers over free context vectors, each with what of it is trained and how."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import monosoftmax as ms
from monosoftmax.transforms import MonotonicTransform

#: Rate of f's parameters as a share of that of the rest: no search of its own.
TRANSFORM_RATE_RATIO = 0.1

T = ms.transforms


@dataclass(frozen=True)
class Method:
    """An output layer and how it is trained: a transform, or a mixture from its dimension and the number of words."""

    description: str
    #: f, made from a source of random numbers for its initial values.
    transform: Callable[[torch.Generator], MonotonicTransform] | None = None
    #: f keeps its initial values.
    frozen: bool = False
    #: The rate of f's parameters, instead of a share of the searched rate, and whether it is SGD's; the rest has Adam.
    transform_lr: float | None = None
    sgd: bool = False
    mixture: Callable[[int, int], ms.MixtureOfSoftmaxes | ms.MixtureOfContexts] | None = None
    #: The method that has about as many parameters as this Linear-Softmax, by the dimension of the latter.
    as_many_as: str | None = None


def _published(generator: torch.Generator) -> MonotonicTransform:
    return T.PLIF(100_000, 20, min_slope=1e-6, init="random", generator=generator)


_PUBLISHED = "PLIF as published: 100,000 pieces on [-20, 20], random slopes, SGD at 0.02"
_EQUAL = "Linear-Softmax with as many parameters as "
_FROZEN = "PLIF, 50 pieces on [-20, 20], random slopes, never trained"
_MOS, _MOC = ms.MixtureOfSoftmaxes, ms.MixtureOfContexts

METHODS: dict[str, Method] = {
    "linear": Method("Linear-Softmax", lambda _: T.Identity()),
    "temperature": Method("learned temperature: the control, it cannot raise the rank", lambda _: T.Temperature()),
    "plif": Method("PLIF, 50 pieces on [-20, 20], starts as the identity", lambda _: T.PLIF()),
    "sigmoidcap-learned": Method("SigmoidCap, a, b, c learned from 23, 5, 7.5", lambda _: T.SigmoidCap(learnable=True)),
    "mlp": Method("MonotonicMLP, 8 units, starts as the identity", lambda _: T.MonotonicMLP()),
    "spline": Method("RationalQuadraticSpline, 16 bins, starts as the identity", lambda _: T.RationalQuadraticSpline()),
    "gss": Method("GSS, k and c learned, starts as the identity", lambda _: T.GSS()),
    "sigsoftmax": Method("SigSoftmax, nothing learned", lambda _: T.SigSoftmax()),
    "softcap-learned": Method("SoftCap, c learned from 30", lambda _: T.SoftCap(learnable=True)),
    "softcap": Method("SoftCap, c = 30 fixed", lambda _: T.SoftCap()),
    "sigmoidcap": Method("SigmoidCap, a, b, c = 23, 5, 7.5 fixed", lambda _: T.SigmoidCap()),
    "gss-published": Method("GSS, k = 2.5, c = -1.5 fixed, as published", lambda _: T.GSS(2.5, -1.5, learnable=False)),
    "plif-20-10": Method("PLIF, 20 pieces on [-10, 10], starts as the identity", lambda _: T.PLIF(20, 10)),
    "plif-200": Method("PLIF, 200 pieces on [-20, 20], starts as the identity", lambda _: T.PLIF(200)),
    "plif-frozen": Method(_FROZEN, lambda generator: T.PLIF(init="random", generator=generator), frozen=True),
    "mlp-1": Method("MonotonicMLP, 1 unit, starts as the identity", lambda _: T.MonotonicMLP(1)),
    "published-sgd": Method(_PUBLISHED, _published, transform_lr=0.02, sgd=True),
    "published-adam": Method("PLIF as published, but Adam at 0.02 for the slopes", _published, transform_lr=0.02),
    "published-frozen": Method("PLIF as published, slopes never trained", _published, frozen=True),
    "mos4": Method("Mixture of Softmaxes, 4 components", mixture=partial(_MOS, n_experts=4)),
    "mos15": Method("Mixture of Softmaxes, 15 components", mixture=partial(_MOS, n_experts=15)),
    "moc4": Method("Mixture of Contexts, 4 components", mixture=partial(_MOC, n_experts=4)),
    "linear-eq-mos4": Method(_EQUAL + "mos4", lambda _: T.Identity(), as_many_as="mos4"),
    "linear-eq-mos15": Method(_EQUAL + "mos15", lambda _: T.Identity(), as_many_as="mos15"),
}


class FreeContexts(nn.Module):
    """N free context vectors under an output layer: all that there is to train.

    Context vectors are standard normal, word vectors normal with standard deviation 1 / sqrt(d), biases 0; matrices of
    mixtures are those of :class:`torch.nn.Linear`. For one seed and dimension all methods start with the same vectors.
    """

    def __init__(self, method: Method, contexts: int, words: int, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.context = nn.Parameter(torch.randn(contexts, dim, generator=generator))
        decoder_weight = torch.randn(words, dim, generator=generator) / math.sqrt(dim)
        if method.mixture is None:
            self.output = decoder = ms.MonotonicSoftmax(dim, words, method.transform(generator))
            decoder.transform.requires_grad_(not method.frozen)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.output = method.mixture(dim, words)
            decoder = self.output.decoder
        with torch.no_grad():
            decoder.weight.copy_(decoder_weight)
        nn.init.zeros_(decoder.bias)

    @property
    def transform(self) -> MonotonicTransform | None:
        """f; None for a mixture."""
        return self.output.transform if isinstance(self.output, ms.MonotonicSoftmax) else None

    def logits(self) -> Tensor:
        """The logits, (N, M); there are none of a Mixture of Softmaxes, which has those of its components."""
        return self.output.logits(self.context)

    def loss_of(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Mean cross entropy of f's softmax with the target distributions, both (N, M)."""
        return ms.cross_entropy(logits, probabilities, self.transform)

    def loss(self, probabilities: Tensor) -> Tensor:
        """Mean cross entropy with the target distributions, (N, M)."""
        if isinstance(self.output, ms.MixtureOfSoftmaxes):
            return -(probabilities * self.log_prob()).sum(1).mean()
        return self.loss_of(self.logits(), probabilities)

    def log_prob(self) -> Tensor:
        """log Q, (N, M)."""
        return self.output.log_prob(self.context)

    @torch.no_grad()
    def backend(self, probabilities: Tensor) -> str:
        """The backend that takes the loss."""
        if isinstance(self.output, ms.MixtureOfSoftmaxes):
            return ms.backends.explain("log_softmax", self.output.decoder.logits(self.context)).backend
        return ms.backends.explain("cross_entropy", self.logits(), self.transform, target=probabilities).backend


def build(name: str, contexts: int, words: int, dim: int, seed: int) -> FreeContexts:
    """The method ``name`` with its initial values, for contexts of ``dim`` features (or as many as it has itself)."""
    method = METHODS[name]
    if method.as_many_as is not None:
        # N d + M d + M numbers are closest to those of the other method.
        dim = round((size(method.as_many_as, contexts, words, dim)[1] - words) / (contexts + words))
    return FreeContexts(method, contexts, words, dim, seed)


def size(name: str, contexts: int, words: int, dim: int) -> tuple[int, int]:
    """The dimension of the method's contexts, and how many numbers are trained, context vectors included."""
    model = build(name, contexts, words, dim, 0)
    return model.context.shape[1], sum(each.numel() for each in model.parameters() if each.requires_grad)
