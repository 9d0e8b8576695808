"""Tiny random models of transformers, and f for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

import monosoftmax as ms
from monosoftmax.integrations.transformers import add_transform

#: No multiple of a vector width or of 2 ranks.
VOCABULARY = 515

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SHARED)),
    # Tied to the embedding.
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SHARED, tie_word_embeddings=True)),
    # With a cap of its own.
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_SHARED, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0)
    ),
    # Tied; with a name that transformers has no loss for.
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    # A mixture of experts, whose loss has a second term.
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**_SHARED, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)
    ),
    # With scales of their own.
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**_SHARED, logits_scaling=0.25)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_SHARED, logit_scale=0.5)),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(**_SHARED, lm_head_multiplier=3.0, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8)
    ),
    # With a bias in the head.
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_SHARED)),
}


def plain(name: str = "llama", seed: int = 0, spread: float = 3.0) -> Any:
    """A model without f, in training mode; ``spread`` widens its logits."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(spread)
    return model.train()


def rough(bound: float = 4.0) -> ms.transforms.MonotonicTransform:
    """An f far from the identity."""
    return ms.transforms.PLIF(40, bound, init="random", generator=torch.Generator().manual_seed(5))


def pair(name: str = "llama", transform: Any = None, **arguments: Any) -> tuple[Any, Any]:
    """A model without f, and the same with f."""
    without = plain(name)
    return without, add_transform(copy.deepcopy(without), rough() if transform is None else transform, **arguments)


def batch(rows: int = 3, length: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which some are ignored."""
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :4] = -100
    return tokens, labels


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor, transform: Any) -> torch.Tensor:
    """The loss of plain logits (B, T, V) with f, on the reference backend."""
    rows, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return ms.cross_entropy(rows.float(), target, transform, backend="reference")
