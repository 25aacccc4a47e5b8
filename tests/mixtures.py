"""Small mixtures of experts for tests: of each kind of model that bitfold knows, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

EXPERTS, HIDDEN, EXPERT = 4, 64, 32

_COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe")


def config(kind: str, **fields: Any) -> Any:
    fields = {**_COMMON, **fields}
    if kind == "mixtral":
        return transformers.MixtralConfig(
            **{"intermediate_size": EXPERT, "num_local_experts": EXPERTS, **fields}
        )
    fields = {"moe_intermediate_size": EXPERT, "intermediate_size": 96, "num_experts": EXPERTS, **fields}
    if kind == "qwen2_moe":
        return transformers.Qwen2MoeConfig(**{"shared_expert_intermediate_size": 64, **fields})
    # The first layer has no experts.
    return transformers.Qwen3MoeConfig(
        **{"head_dim": 16, "mlp_only_layers": [0], "norm_topk_prob": True, **fields}
    )


def model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """A model in eval mode, which multiplies with one expert after the other."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(kind, **fields), dtype=dtype).eval()
    made.generation_config.eos_token_id = None
    for name, parameter in made.named_parameters():
        if name.endswith("mlp.gate.weight"):  # zeros in transformers, for Qwen's
            nn.init.normal_(parameter, std=0.3)
        if name.endswith("norm.weight"):
            parameter.data.mul_(torch.randn(len(parameter)).exp())
        if name.endswith("gate_up_proj"):  # so that what goes into down_proj has large and small columns
            parameter.data.mul_(torch.randn(parameter.shape[:2])[..., None].exp())
    made.set_experts_implementation("eager")
    return made


def write(path: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    """A model directory with tokenizer, as transformers writes it: a tensor for each expert."""
    shard = fields.pop("shard", "5GB")
    model(kind, dtype, **fields).save_pretrained(path, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(path)
    return path


def fuse(path: Path) -> Path:
    """The experts of each layer of a single-file directory in one tensor, under transformers' names."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {name.replace(".block_sparse_moe.", ".mlp."): value for name, value in tensors.items()}
        tensors.clear()
        homes = {name.split(".experts.")[0] for name in renamed if ".experts." in name}
        for home in homes:
            gate, up, down = ("w1", "w3", "w2") if f"{home}.experts.0.w1.weight" in renamed else _PROJECTIONS
            take = {
                part: torch.stack([renamed.pop(f"{home}.experts.{e}.{part}.weight") for e in range(EXPERTS)])
                for part in (gate, up, down)
            }
            renamed[f"{home}.experts.gate_up_proj"] = torch.cat([take[gate], take[up]], 1).contiguous()
            renamed[f"{home}.experts.down_proj"] = take[down]
        tensors.update(renamed)

    tiny.rewrite(path, change)
    return path


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
