"""The high-rank baselines: mixture of softmaxes and mixture of contexts, in the same interface as MonotonicSoftmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import reference
from .backends import BackendName, Call, choose
from .checks import check_floating, check_target, check_tensor
from .functional import cross_entropy, log_softmax
from .linear import linear_cross_entropy
from .modules import MonotonicSoftmax, OutputAndLoss
from .transforms.base import arithmetic_dtype, require_count

if TYPE_CHECKING:
    from typing_extensions import Self

#: The most bytes of logits, in the type of the arithmetic, of one chunk of MixtureOfSoftmaxes.
LOGITS_BUDGET = 64 * 2**20


class _Sizes(NamedTuple):
    in_features: int
    n_classes: int
    n_experts: int
    #: None: as many as in_features.
    expert_features: int | None


class _Experts(nn.Module):
    """K context vectors tanh(U_k g) with weights pi = softmax(V g), and their common decoder.

    ``decoder``: keyword arguments of :class:`MonotonicSoftmax`.
    """

    def __init__(
        self,
        sizes: _Sizes,
        *,
        dropout: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **decoder: Any,
    ) -> None:
        super().__init__()
        in_features, n_classes, n_experts, expert_features = sizes
        self.in_features = require_count("in_features", in_features)
        self.n_classes = require_count("n_classes", n_classes)
        self.n_experts = require_count("n_experts", n_experts)
        self.expert_features = require_count(
            "expert_features", in_features if expert_features is None else expert_features
        )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
        self.dropout = dropout
        self.prior = nn.Linear(in_features, n_experts, bias=False, device=device, dtype=dtype)
        self.latent = nn.Linear(in_features, n_experts * self.expert_features, device=device, dtype=dtype)
        self.decoder = MonotonicSoftmax(self.expert_features, n_classes, device=device, dtype=dtype, **decoder)

    def reset_parameters(self) -> None:
        """Set everything to the values of a new layer, with random values as in :class:`torch.nn.Linear`.

        A tied weight is drawn anew, too (:meth:`MonotonicSoftmax.reset_parameters`).
        """
        for part in (self.prior, self.latent, self.decoder):
            part.reset_parameters()

    def tie_weights(self, embedding: nn.Embedding) -> Self:
        """Use the weight of ``embedding`` (V, d) as the weight of the decoder; returns the layer.

        Raises:
            TypeError, ValueError: as in :meth:`MonotonicSoftmax.tie_weights`.
        """
        self.decoder.tie_weights(embedding)
        return self

    def _experts(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """The expert vectors, (..., K, d), and log pi, (..., K)."""
        check_floating("input", input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must have shape (..., {self.in_features}), got {tuple(input.shape)}")
        for name, part in (("prior.weight", self.prior), ("latent.weight", self.latent)):
            # A weight sharded with the layer is whole only inside of forward. Sharded alone, it has its own hook.
            if hasattr(part.weight, "full_tensor") and not part._forward_pre_hooks:
                check_tensor(name, part.weight)
        latent = torch.tanh(self.latent(input)).view(*input.shape[:-1], self.n_experts, self.expert_features)
        latent = F.dropout(latent, self.dropout, self.training)
        score = self.prior(input)
        return latent, F.log_softmax(score.to(arithmetic_dtype(score.dtype)), dim=-1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, n_classes={self.n_classes}, n_experts={self.n_experts}, "
            f"expert_features={self.expert_features}, dropout={self.dropout:g}"
        )


class MixtureOfSoftmaxes(_Experts):
    r"""Output layer :math:`p(x \mid g) = \sum_k \pi_k \,\mathrm{softmax}_x(\langle w_x, \tanh(U_k g) \rangle + b_x)`.

    It has the interface of :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`. The loss is computed in log space,

    .. math:: -\log p(t \mid g) = -\mathrm{logsumexp}_k (\log \pi_k - \ell_k),
        \qquad \ell_k = \text{cross entropy of component } k, \qquad \pi = \mathrm{softmax}(V g)

    over chunks of rows, and the backward pass computes the logits of a chunk again. So the N x K x V logits and
    probabilities never exist for more than one chunk. If a fused backend takes it, one
    :func:`monosoftmax.linear_cross_entropy` computes all components, otherwise checkpointed chunks. The gradient of the
    decoder is summed over chunks in float32.

    Each component takes four matrix products, where :class:`MonotonicSoftmax` takes three in all. The upstream gradient
    of a component depends on the losses of all components, and no operator makes this second pass over the logits of a
    chunk in the forward pass.

    There is no label smoothing: it needs log p of every class, and the chunked loss avoids just that.

    Source: Yang, Dai, Salakhutdinov, Cohen, "Breaking the Softmax Bottleneck: A High-Rank RNN Language Model", ICLR
    2018; settings there: Penn Treebank K=15, d=280, dropout 0.29, WikiText-2 K=15, d=300, dropout 0.29. The published
    code uses one dropout mask for all time steps of a sequence, this layer uses one for each step.

    Args:
        in_features: width of g.
        n_classes: V.
        n_experts: K.
        expert_features: d, the width of the decoder and of an embedding tied with it; ``in_features`` by default.
        bias: whether there is a b.
        dropout: dropout probability of :math:`\tanh(U_k g)`, in [0, 1).
        published: compute as the published code does: probabilities of all components, mixed, then
            :math:`\log(p + 10^{-8})`. It holds several tensors of N x K x V, and no loss exceeds 18.4.
        chunk_rows: rows in a checkpointed chunk; if given, a fused backend takes such chunks, too. By default as many
            rows as have 64 MiB of float32 (or float64) logits, at least one.
        ignore_index, backend: as in :func:`monosoftmax.cross_entropy`.

    Shapes: prior.weight (K, in_features), latent.weight (K d, in_features), latent.bias (K d), decoder.weight (V, d),
    decoder.bias (V).

    Raises:
        TypeError, ValueError: a size is not an int >= 1, ``dropout`` is out of range, or ``chunk_rows`` or ``backend``
            is given with ``published``, which does not use them.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_experts: int = 15,
        expert_features: int | None = None,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        published: bool = False,
        chunk_rows: int | None = None,
        ignore_index: int = -100,
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            _Sizes(in_features, n_classes, n_experts, expert_features),
            dropout=dropout,
            device=device,
            dtype=dtype,
            bias=bias,
            ignore_index=ignore_index,
            backend=backend,
        )
        if chunk_rows is not None:
            require_count("chunk_rows", chunk_rows)
        for name, given in (("chunk_rows", chunk_rows is not None), ("backend", backend != "auto")):
            if published and given:
                raise ValueError(f"{name} has no effect with published=True: leave it out")
        self.published = published
        self.chunk_rows = chunk_rows

    def forward(self, input: Tensor, target: Tensor) -> OutputAndLoss:
        """Log-probabilities of the targets, of the shape of ``target`` (0 where ignored), and the mean loss.

        Args:
            input: (..., in_features).
            target: (...), int64.

        Raises:
            TypeError, ValueError, IndexError: as in :func:`monosoftmax.cross_entropy`.
        """
        target = check_target(target, input.device, input.shape[:-1])
        latent, log_prior = self._experts(input)
        if target.shape != input.shape[:-1]:
            raise ValueError(
                f"target must have the shape of input without its last dimension, {tuple(input.shape[:-1])}, "
                f"got {tuple(target.shape)}"
            )
        latent = latent.reshape(-1, self.n_experts, self.expert_features)
        log_prior = log_prior.reshape(-1, self.n_experts)
        compute_losses = self._published_losses if self.published else self._losses
        losses = compute_losses(latent, log_prior, target.reshape(-1))
        valid = target != self.decoder.ignore_index
        losses = torch.where(valid, losses.reshape(target.shape), 0.0)
        return OutputAndLoss(-losses, losses.sum() / valid.sum())

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes, (..., V), one component at a time."""
        latent, log_prior = self._experts(input)
        if self.published:
            return self._published_log_prob(latent, log_prior)
        mixed: Tensor | None = None
        for expert, log_weight in zip(latent.unbind(-2), torch.split(log_prior, 1, -1), strict=True):
            component = log_softmax(self.decoder.logits(expert), backend=self.decoder.backend) + log_weight
            mixed = component if mixed is None else _logaddexp(mixed, component)
        assert mixed is not None  # there is at least one expert
        return mixed

    def predict(self, input: Tensor) -> Tensor:
        """The most probable class of the mixture, (...). It need not be the most probable class of any component."""
        return self.log_prob(input).argmax(-1)

    def _losses(self, latent: Tensor, log_prior: Tensor, target: Tensor) -> Tensor:
        """-log p(target) of each row, for latent [N, K, d], log_prior [N, K] and target [N]."""
        check_tensor("decoder.weight", self.decoder.weight)
        matrix, bias = self.decoder.matrix_and_bias()
        call = Call("linear_cross_entropy", latent.device.type, latent.dtype, self.decoder.transform)
        if self.chunk_rows is None and choose(call, self.decoder.backend) != "reference":
            losses = linear_cross_entropy(
                latent.flatten(0, 1),
                matrix,
                target.repeat_interleave(self.n_experts),
                linear_bias=bias,
                ignore_index=self.decoder.ignore_index,
                reduction="none",
                backend=self.decoder.backend,
            )
            return _mixed(log_prior, losses)
        # In the arithmetic type, so that autograd sums the gradients of chunks in this type. _chunk_losses rounds back.
        compute = arithmetic_dtype(matrix.dtype)
        weight = matrix.to(compute)
        bias = None if bias is None else bias.to(compute)
        rows = self.chunk_rows or max(1, LOGITS_BUDGET // (self.n_experts * self.n_classes * compute.itemsize))
        chunks = list(zip(*(torch.split(whole, rows) for whole in (latent, log_prior, target)), strict=True))
        # A single chunk is within the budget anyway, so it is not computed twice.
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [self._chunk_losses(weight, bias, *chunk) for chunk in chunks]
        else:
            # A chunk has no random operation, so no state of a generator must be preserved.
            parts = [
                checkpoint(self._chunk_losses, weight, bias, *chunk, use_reentrant=False, preserve_rng_state=False)
                for chunk in chunks
            ]
        return torch.cat(parts)

    def _chunk_losses(
        self, weight: Tensor, bias: Tensor | None, latent: Tensor, log_prior: Tensor, target: Tensor
    ) -> Tensor:
        dtype = latent.dtype
        logits = F.linear(latent.flatten(0, 1), weight.to(dtype), None if bias is None else bias.to(dtype))
        losses = cross_entropy(
            logits,
            target.repeat_interleave(self.n_experts),
            ignore_index=self.decoder.ignore_index,
            reduction="none",
            backend=self.decoder.backend,
        )
        return _mixed(log_prior, losses)

    def _published_log_prob(self, latent: Tensor, log_prior: Tensor) -> Tensor:
        logits = self.decoder.logits(latent)
        component = F.softmax(logits, dim=-1, dtype=arithmetic_dtype(logits.dtype))
        return torch.log((log_prior.exp().unsqueeze(-1) * component).sum(-2) + 1e-8)

    def _published_losses(self, latent: Tensor, log_prior: Tensor, target: Tensor) -> Tensor:
        ignore_index = self.decoder.ignore_index
        outside = (target != ignore_index) & ((target < 0) | (target >= self.n_classes))
        reference.raise_if_any(outside, target, self.n_classes, ignore_index)
        inside = (target >= 0) & (target < self.n_classes)
        log_p = self._published_log_prob(latent, log_prior)
        losses = -log_p.gather(1, torch.where(inside, target, 0).unsqueeze(1)).squeeze(1)
        return torch.where(outside, torch.nan, losses)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, published={self.published}, chunk_rows={self.chunk_rows}"


class MixtureOfContexts(_Experts):
    r"""Output layer :math:`p(x \mid g) = \mathrm{softmax}_x(\langle w_x, \sum_k \pi_k \tanh(U_k g) \rangle + b_x)`.

    The control for :class:`MixtureOfSoftmaxes`, with the same parameters: it mixes the context vectors instead of the
    probabilities, so that the matrix of log-probabilities has rank at most d + 2 (d + 1 without b). It is one softmax.
    The published form, log(softmax), differs from it only in rounding.

    Source: Yang, Dai, Salakhutdinov, Cohen, ICLR 2018, section 2.4.

    Args:
        in_features, n_classes, n_experts, expert_features, bias, dropout: as in :class:`MixtureOfSoftmaxes`.
        ignore_index, label_smoothing, z_loss, backend: as in :func:`monosoftmax.linear_cross_entropy`.

    Shapes: as in :class:`MixtureOfSoftmaxes`.

    Raises:
        TypeError, ValueError: a size is not an int >= 1, or ``dropout`` is out of range.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_experts: int = 15,
        expert_features: int | None = None,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            _Sizes(in_features, n_classes, n_experts, expert_features),
            dropout=dropout,
            device=device,
            dtype=dtype,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            backend=backend,
        )

    def logits(self, input: Tensor) -> Tensor:
        """The logits, (..., V)."""
        return self.decoder.logits(self._context(input))

    def forward(self, input: Tensor, target: Tensor) -> OutputAndLoss:
        """Log-probabilities of the targets, of the shape of ``target`` (0 where ignored), and the mean loss.

        Args:
            input: (..., in_features).
            target: (...), int64.

        Raises:
            TypeError, ValueError, IndexError: as in :func:`monosoftmax.linear_cross_entropy`.
        """
        output: OutputAndLoss = self.decoder(self._context(input), target)
        return output

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes, (..., V)."""
        return self.decoder.log_prob(self._context(input))

    def predict(self, input: Tensor) -> Tensor:
        """The most probable class, (...)."""
        return self.decoder.predict(self._context(input))

    def _context(self, input: Tensor) -> Tensor:
        latent, log_prior = self._experts(input)
        return (log_prior.exp().unsqueeze(-1) * latent).sum(-2).to(latent.dtype)


def _mixed(log_prior: Tensor, losses: Tensor) -> Tensor:
    """-log p(target) of the mixture, from the log_prior.numel() losses of its components."""
    return -torch.logsumexp(log_prior - losses.reshape(log_prior.shape), dim=1)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b). If both are -inf, as for a class masked by its bias, torch.logaddexp has a NaN gradient."""
    masked = torch.isneginf(a) & torch.isneginf(b)
    return torch.logaddexp(a.masked_fill(masked, 0.0), b.masked_fill(masked, 0.0)).masked_fill(masked, -torch.inf)
