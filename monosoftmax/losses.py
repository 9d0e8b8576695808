"""Losses of preference optimisation and reinforcement learning, thin functions on the log-probabilities of a head."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends import BackendName
from .checks import IGNORE_INDEX, check_floating, check_head, check_tensor
from .groups import Head
from .token_log_prob import linear_log_prob
from .token_loss import linear_token_loss
from .token_loss_head import Tokens
from .transforms import MonotonicTransform
from .transforms.base import arithmetic_dtype, require_finite

__all__ = ["PolicyLoss", "dpo", "kl_to_reference", "linear_policy_loss", "sequence_log_prob"]

Estimator = Literal["k1", "k2", "k3"]
PreferenceKind = Literal["sigmoid", "ipo"]
PolicyReduction = Literal["token", "sequence", "sum"]


def sequence_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    linear_bias: Tensor | None = None,
    average: bool = False,
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    backend: BackendName = "auto",
) -> Tensor:
    r"""log p of whole sequences: the sums of :func:`monosoftmax.linear_log_prob` over the last dimension of ``target``.

    Args:
        input: (..., T, d), already shifted: row t predicts ``target[..., t]``.
        target: (..., T); ``ignore_index`` where a token does not count, such as prompt and padding.
        linear_weight, transform, linear_bias, ignore_index, temperature, backend: as in
            :func:`monosoftmax.linear_cross_entropy`.
        average: divide each sum by the number of its tokens that count, as IPO and length-normalised DPO do; NaN where
            there are none.

    Returns:
        (...), differentiable.

    Raises:
        As :func:`monosoftmax.linear_cross_entropy`.

    Example:
        >>> hidden, weight, target = torch.randn(4, 16, 64), torch.randn(1_000, 64), torch.randint(1_000, (4, 16))
        >>> monosoftmax.losses.sequence_log_prob(hidden, weight, target).shape
        torch.Size([4])
    """
    check_tensor("target", target)
    if target.dim() == 0:
        raise ValueError("target must have at least 1 dimension, (..., T), got a scalar")
    found = linear_log_prob(
        input, linear_weight, target, transform, linear_bias=linear_bias, ignore_index=ignore_index,
        temperature=temperature, outputs=("log_prob",), backend=backend,
    )  # fmt: skip
    assert found.log_prob is not None
    total = found.log_prob.sum(-1)
    return total / (target != ignore_index).sum(-1) if average else total


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    kind: PreferenceKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Direct preference optimisation: the loss of each pair of sequences.

    .. math:: \delta = (\log p_c - \log p_r) - (\log p^{ref}_c - \log p^{ref}_r), \qquad
        \ell = -(1 - \epsilon) \log \sigma(\beta\delta) - \epsilon \log \sigma(-\beta\delta) \quad\text{or (IPO)}\quad
        \ell = \left(\delta - \tfrac{1}{2\beta}\right)^2

    Args:
        chosen, rejected: [B], :func:`sequence_log_prob` of the policy for the preferred and the other sequence; for
            ``"ipo"`` with ``average=True``, as its authors do.
        reference_chosen, reference_rejected: the same of the reference policy, without gradients.
        beta: how strongly the policy is held to the reference, > 0.
        kind: ``"sigmoid"`` (DPO) or ``"ipo"``.
        label_smoothing: the probability that a preference is the wrong way round, in [0, 0.5]; for ``"sigmoid"``.

    Returns:
        [B].

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Source: Rafailov et al., *Direct Preference Optimization*, 2023; Azar et al., *A General Theoretical Paradigm to
    Understand Learning from Human Preferences*, 2024; label smoothing: Mitchell, *A note on DPO with noisy
    preferences*, 2023.

    Example:
        >>> hidden, weight = torch.randn(2, 4, 16, 64), torch.randn(1_000, 64, requires_grad=True)
        >>> target, reference = torch.randint(1_000, (2, 4, 16)), -100 * torch.rand(2, 4)
        >>> chosen, rejected = monosoftmax.losses.sequence_log_prob(hidden, weight, target)
        >>> monosoftmax.losses.dpo(chosen, rejected, *reference).mean().backward()
        >>> weight.grad.shape
        torch.Size([1000, 64])
    """
    for name, each in (
        ("chosen", chosen), ("rejected", rejected), ("reference_chosen", reference_chosen),
        ("reference_rejected", reference_rejected),
    ):  # fmt: skip
        check_floating(name, each)
        if each.shape != chosen.shape:
            raise ValueError(f"{name} must have the shape of chosen, {tuple(chosen.shape)}, got {tuple(each.shape)}")
    if require_finite("beta", beta) <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if kind not in get_args(PreferenceKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(PreferenceKind))}, got {kind!r}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must be between 0 and 0.5, got {label_smoothing}")
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    if kind == "ipo":
        if label_smoothing > 0:
            raise ValueError(f'label_smoothing is for kind="sigmoid", got {label_smoothing} with kind="ipo"')
        return (margin - 1 / (2 * beta)).square()
    return -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)


def kl_to_reference(log_prob: Tensor, reference_log_prob: Tensor, *, estimator: Estimator = "k3") -> Tensor:
    r"""Estimates of KL(p, reference) from the log-probabilities of tokens that were sampled from p, each elementwise.

    With :math:`r = \log p^{ref} - \log p`: ``"k1"`` is :math:`-r` (unbiased), ``"k2"`` :math:`r^2 / 2` (small
    variance), ``"k3"`` :math:`e^r - r - 1` (unbiased and never negative, as in GRPO).

    Args:
        log_prob: of the policy, differentiable.
        reference_log_prob: of the reference policy, of the same shape.
        estimator: see above.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape.

    Source: Schulman, *Approximating KL Divergence*, 2020.

    Example:
        >>> monosoftmax.losses.kl_to_reference(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -3.0]))
        tensor([0.0000, 0.3679])
    """
    check_floating("log_prob", log_prob)
    check_floating("reference_log_prob", reference_log_prob)
    if log_prob.shape != reference_log_prob.shape:
        raise ValueError(
            f"reference_log_prob must have the shape of log_prob, {tuple(log_prob.shape)}, got "
            f"{tuple(reference_log_prob.shape)}"
        )
    _check_estimator(estimator)
    r = reference_log_prob - log_prob
    return -r if estimator == "k1" else r.square() / 2 if estimator == "k2" else torch.expm1(r) - r


class PolicyLoss(NamedTuple):
    """What :func:`linear_policy_loss` returns: scalars, all but the loss without a gradient."""

    loss: Tensor
    #: The mean entropy of the tokens that count.
    entropy: Tensor
    #: The mean of the estimates of KL(p, reference); 0 without a reference.
    kl: Tensor
    #: The share of tokens whose ratio was clipped.
    clip_fraction: Tensor


def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    transform: MonotonicTransform | None = None,
    *,
    advantage: Tensor,
    old_log_prob: Tensor | None = None,
    reference_log_prob: Tensor | None = None,
    linear_bias: Tensor | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    entropy_weight: float = 0.0,
    kl_weight: float = 0.0,
    estimator: Estimator = "k3",
    reduction: PolicyReduction = "token",
    ignore_index: int = IGNORE_INDEX,
    temperature: float | Tensor = 1.0,
    backend: BackendName = "auto",
) -> PolicyLoss:
    r"""The clipped loss of PPO and GRPO, with an entropy bonus and a KL to a reference, from hidden states.

    .. math:: \ell_t = -\min(r_t A_t, \mathrm{clip}(r_t, 1 - c_1, 1 + c_2) A_t) - b H_t + k\,\mathrm{KL}_t, \qquad
        r_t = p(t) / p^{old}(t)

    All gradients come from three products, with the gradients of each chunk of rows computed at once
    (:func:`monosoftmax.linear_token_loss`), so that no logits exist in full.

    Args:
        input, linear_weight, target, transform, linear_bias, ignore_index, temperature, backend: as in
            :func:`monosoftmax.linear_cross_entropy`; ``target`` are the sampled tokens, (..., T), and ``ignore_index``
            where a token does not count.
        advantage: of the shape of ``target``, or without its last dimension: one for each sequence.
        old_log_prob: log p of the tokens under the policy that sampled them, of the shape of ``target``; ``None``: the
            present policy did, and all ratios are 1.
        reference_log_prob: the same under a reference policy; needed for ``kl_weight``.
        clip: :math:`c_1, c_2`; (0.2, 0.28) is "clip higher", (math.inf, math.inf) clips nothing.
        entropy_weight: b.
        kl_weight: k.
        estimator: as in :func:`kl_to_reference`.
        reduction: ``"token"``: the mean over all tokens that count (DAPO); ``"sequence"``: the mean over sequences of
            the means over their tokens (GRPO), where sequences without such tokens count as 0; ``"sum"``. A batch of
            which no token counts has the loss 0.

    Returns:
        The loss and what one wants to log.

    Raises:
        TypeError, ValueError, NotImplementedError, IndexError: as in :func:`monosoftmax.linear_cross_entropy`.

    Source: Schulman et al., *Proximal Policy Optimization Algorithms*, 2017; Shao et al., *DeepSeekMath*, 2024 (GRPO);
    Yu et al., *DAPO*, 2025.

    Example:
        >>> head, f = torch.nn.Linear(64, 1_000, bias=False), monosoftmax.transforms.SoftCap(30.0)
        >>> hidden, action, advantage = torch.randn(4, 16, 64), torch.randint(1_000, (4, 16)), torch.randn(4)
        >>> found = monosoftmax.losses.linear_policy_loss(
        ...     hidden, head.weight, action, f, advantage=advantage, entropy_weight=0.01
        ... )
        >>> found.loss.backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 64])
    """
    target = check_head(Head(input, linear_weight, linear_bias), target)
    low, high = _check_policy(clip, estimator, reduction)
    if kl_weight != 0 and reference_log_prob is None:
        raise ValueError(f"reference_log_prob must be given where kl_weight is not 0, got kl_weight={kl_weight}")
    dtype = arithmetic_dtype(input.dtype)
    per_token = [
        _policy_scale(target, ignore_index, reduction, dtype),
        (target != ignore_index).to(dtype) / (target != ignore_index).sum().clamp(min=1),
        _per_token("advantage", advantage, target, dtype),
        *(
            _per_token(name, each, target, dtype)
            for name, each in (("old_log_prob", old_log_prob), ("reference_log_prob", reference_log_prob))
            if each is not None
        ),
    ]
    logged = torch.zeros(3, dtype=dtype, device=input.device)

    def loss_fn(tokens: Tokens, scale: Tensor, share: Tensor, advantage: Tensor, *log_probs: Tensor) -> Tensor:
        given = list(log_probs)
        old = tokens.log_prob.detach() if old_log_prob is None else given.pop(0)
        # A token that does not count has no share in the loss, whatever was given for it.
        counts = share > 0
        ratio = torch.where(counts, tokens.log_prob - old, 0.0).exp()
        gain, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
        loss = -torch.minimum(gain, clipped)
        if entropy_weight != 0:
            loss = loss - entropy_weight * tokens.entropy
        kl = torch.zeros_like(loss)
        if reference_log_prob is not None:
            reference = torch.where(counts, given.pop(0), tokens.log_prob.detach())
            kl = kl_to_reference(tokens.log_prob, reference, estimator=estimator)
            loss = loss + kl_weight * kl if kl_weight != 0 else loss
        with torch.no_grad():
            each = torch.stack([tokens.entropy, kl, (clipped < gain).to(loss.dtype)])
            logged.add_(torch.where(counts, each * share, 0.0).sum(1))
        return torch.where(counts, loss * scale, 0.0).sum()

    loss = linear_token_loss(
        loss_fn, input, linear_weight, target, transform, linear_bias=linear_bias, per_token=per_token,
        ignore_index=ignore_index, temperature=temperature, backend=backend,
    )  # fmt: skip
    return PolicyLoss(loss, *logged.unbind())


def _check_estimator(estimator: str) -> None:
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")


def _check_policy(clip: tuple[float, float], estimator: str, reduction: str) -> tuple[float, float]:
    _check_estimator(estimator)
    if reduction not in get_args(PolicyReduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(PolicyReduction))}, got {reduction!r}")
    if not isinstance(clip, (tuple, list)) or len(clip) != 2 or not all(each >= 0 for each in clip):
        raise ValueError(f"clip must be two numbers that are not negative, got {clip!r}")
    return clip[0], clip[1]


def _per_token(name: str, tensor: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    check_floating(name, tensor)
    if name == "advantage" and target.dim() > 0 and tensor.shape == target.shape[:-1]:
        tensor = tensor.unsqueeze(-1).expand(target.shape)
    if tensor.shape != target.shape:
        raise ValueError(f"{name} must have the shape of target, {tuple(target.shape)}, got {tuple(tensor.shape)}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: the loss is not differentiated with respect to it")
    return tensor.to(dtype)


def _policy_scale(target: Tensor, ignore_index: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """The factor of each token's loss, 0 where it does not count."""
    counts = (target != ignore_index).to(dtype)
    if reduction == "sum":
        return counts
    if reduction == "token" or target.dim() == 0:
        return counts / counts.sum().clamp(min=1)
    lengths = counts.sum(-1, keepdim=True)
    return counts / lengths.clamp(min=1) / max(lengths.numel(), 1)
