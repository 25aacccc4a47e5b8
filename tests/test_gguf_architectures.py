"""Names and shapes of GGUF tensors: against transformers' own models, and against the gguf package's names."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from bitfold.gguf import architectures  # noqa: E402
from bitfold.shards import CheckpointError  # noqa: E402
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden size / heads
    "vocab_size": 128,
}
MORE = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "phi3": {"pad_token_id": 0},
}
KINDS = [
    kind for kind in architectures.SUPPORTED if kind != "gemma3"
]  # that one is gemma3_text within another


def config_of(kind: str, **fields):
    return transformers.AutoConfig.for_model(kind, **{**SIZES, **MORE.get(kind, {}), **fields})


def state_of(config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}], ids=["plain", "biased"])
def test_every_tensor_of_the_model_has_its_place(kind, fields):
    if fields and kind.startswith(("gemma", "mistral", "qwen3")):
        pytest.skip("llama.cpp's Gemma and Qwen 3 and transformers' Mistral have no biases")
    config = config_of(kind, **fields)
    state = state_of(config)
    rows = {
        name: torch.zeros(torch.Size(shape).numel() // shape[-1], dtype=int) for name, shape in state.items()
    }
    for placement in architectures.placements(config).values():
        total = 0
        for span in placement.sources[0]:
            assert span.shape == state[span.source], placement
            if len(span.shape) > 1:
                rows[span.source][span.begin : span.end] += 1
            else:
                rows[span.source] += 1
            total += (span.end - span.begin) * span.shape[-1]
        assert total == torch.Size(placement.shape).numel(), placement
    unused = {name for name, counts in rows.items() if not torch.equal(counts, torch.ones_like(counts))}
    assert unused == ({"lm_head.weight"} if config.tie_word_embeddings else set())


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_the_gguf_package(kind):
    config = config_of(kind)
    wanted = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[architectures.of_config(config).name]
    names = get_tensor_name_map(wanted, config.num_hidden_layers)
    checked = 0
    for placement in architectures.placements(config).values():
        source = re.sub(
            r"experts\.\d+\.", "experts.", placement.sources[-1][0].source
        )  # each expert by itself
        assert names.get_name(source, (".weight", ".bias")) == placement.name
        checked += 1
    assert checked > 10


def test_other_architectures_are_refused_with_the_list():
    config = transformers.AutoConfig.for_model("gpt2")
    with pytest.raises(CheckpointError, match=r"^models of the type 'gpt2' .* llama, mistral, .*, phi3$"):
        architectures.placements(config)


def test_what_a_file_cannot_say_is_refused():
    with pytest.raises(CheckpointError, match="hidden_act 'gelu'; GGUF's llama can only say 'silu'"):
        architectures.placements(config_of("llama", hidden_act="gelu"))
