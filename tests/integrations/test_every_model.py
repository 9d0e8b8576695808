"""f on every causal language model of transformers that can be made tiny: the loss by hand, or a refusal."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from monosoftmax.integrations.transformers import add_transform

#: Settings of configs by the names that models have for them; each takes those that it knows.
_TINY: dict[str, Any] = {
    "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64, "is_decoder": True, "state_size": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "mamba_d_state"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "mamba_d_ssm": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip

_MOST_PARAMETERS = 3_000_000


def _made(model_type: str, tokens: torch.Tensor) -> Any:
    """A tiny model of that type, which has been run, or a skipped test."""
    try:
        kind = CONFIG_MAPPING[model_type]
        known = {*inspect.signature(kind).parameters, *getattr(kind, "attribute_map", {})}
        config = kind(**{name: value for name, value in _TINY.items() if name in known})
        with torch.device("meta"):  # some have other names for their sizes
            size = sum(each.numel() for each in MODEL_FOR_CAUSAL_LM_MAPPING[kind](config).parameters())
        assert size <= _MOST_PARAMETERS
        torch.manual_seed(0)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](config)
        for each in model.modules():
            if isinstance(each, nn.Dropout):
                each.p = 0.0
        model.train()(tokens, labels=tokens)
        return model
    except Exception as error:  # without f: nothing of ours has run
        pytest.skip(f"cannot be made tiny: {type(error).__name__}")


def _with_noise_of(seed: int, model: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return model(*args, **kwargs)


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_loss_and_logits(model_type: str) -> None:
    tokens = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(3))
    plain = _made(model_type, tokens)
    model, f = copy.deepcopy(plain), tiny.rough(2.0)
    try:
        add_transform(model, f)
    except NotImplementedError as error:
        assert "does not compute its loss by loss_function" in str(error)
        return
    output = _with_noise_of(1, plain, tokens, labels=tokens)
    added = output.loss - tiny.loss_by_hand(output.logits, tokens, None)
    wanted = tiny.loss_by_hand(output.logits, tokens, copy.deepcopy(f)) + added
    for _ in range(2):
        found = _with_noise_of(1, model, tokens, labels=tokens)
        torch.testing.assert_close(found.loss, wanted, rtol=0, atol=2e-5)
        found.loss.backward()
        assert f.raw_slope.grad is not None
    logits = _with_noise_of(1, model, tokens).logits
    torch.testing.assert_close(logits, f(_with_noise_of(1, plain, tokens).logits), rtol=1e-5, atol=1e-5)
