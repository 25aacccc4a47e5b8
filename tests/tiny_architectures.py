"""Tiny random models of every architecture that calibration knows, with all the biases that each may have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},  # q, k and v have biases
    "qwen3": {"head_dim": 16, "attention_bias": True},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "attention_bias": True, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"num_key_value_heads": 4},
    "phi3-grouped": {"model_type": "phi3", "num_key_value_heads": 1},
}
"""By a name for the test: what differs from the sizes above. The name is the model_type unless that is given."""
KEPT = [
    (name, kept)
    for name in MODELS
    for kept in ("", "*.o_proj", "*.down_proj", "*.qkv_proj" if name.startswith("phi3") else "*.v_proj")
]
"""Each with all of a block quantized, and with some of its layers kept."""


def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model in eval mode; norms and biases are random too, as nothing that is 0 or 1 shows a mistake."""
    torch.manual_seed(seed)
    fields = {"model_type": name, **_SIZES, **MODELS[name]}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith(".bias"):
                parameter.normal_(0, 0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    return made


def logits(model: nn.Module, seed: int = 1) -> torch.Tensor:
    """Of two random sequences of 24 tokens: float64 [2, 24, vocabulary]."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())
