"""A model's configuration as the metadata of a GGUF file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitfold.gguf import rope
from bitfold.gguf.architectures import Architecture, dimensions, of_config, of_metadata
from bitfold.gguf.keys import Keys
from bitfold.gguf.rope import Scalar
from bitfold.shards import CheckpointError

if TYPE_CHECKING:  # the plan of a configuration needs no gguf package
    from bitfold.gguf.library import GGUFValue

# What llama.cpp takes for granted of an architecture, so that there is no key for it.
_WINDOWED = {"gemma2": 2, "gemma3": 6}  # of so many layers in turn all but the last have a sliding window
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, which scales scores by hidden size / heads


def to_metadata(config: Any) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
    """All keys of "<architecture>.", typed as Python's numbers are, and the tensors of rotary factors (1-D, F32).

    config: as transformers reads it. Raises CheckpointError for what GGUF has no word for.
    """
    architecture = of_config(config)
    text = config.get_text_config()
    head = dimensions(config)["h"]
    _check_layers(architecture, text)
    found: dict[str, Scalar] = {}
    for key, field in architecture.keys.items():
        value = head if field == "head_dim" else getattr(text, field, None)
        if field == "num_local_experts" and value is None:
            value = dimensions(config)["e"]
        if field == "num_key_value_heads" and value is None:
            value = text.num_attention_heads
        if field == "sliding_window" and value is None:
            value = 0
        if value is None and field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if architecture.name == "gemma2":  # llama.cpp would take Gemma 2's own
                raise CheckpointError(f"the configuration has no {field}, which GGUF's gemma2 needs")
            continue
        assert value is not None, field
        found[key] = float(value) if field in _FLOATS else int(value)
    keys, factors = rope.to_metadata(text, head)
    return {f"{architecture.name}.{key}": value for key, value in (found | keys).items()}, factors


_FLOATS = ("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping")


def remarks(config: Any) -> list[str]:
    """What of a configuration a GGUF file doesn't say, though its model runs."""
    architecture = of_config(config)
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or []
    uses = "sliding_attention" in kinds if kinds else bool(window)
    if uses and window and window < text.max_position_embeddings and architecture.name not in _WINDOWED:
        return [
            f"its layers look back {window} tokens; llama.cpp's {architecture.name} reads longer texts in full"
        ]
    return []


def _check_layers(architecture: Architecture, text: Any) -> None:
    period = _WINDOWED.get(architecture.name)
    if period is None:
        return
    wanted = layer_types(architecture.name, int(text.num_hidden_layers))
    if list(text.layer_types) != wanted:
        raise CheckpointError(
            f"the configuration's layer_types are not those of {architecture.name}, where of {period} layers in turn "
            "all but the last have a sliding window"
        )
    scale = score_scale(architecture.name, text.to_dict())
    if text.query_pre_attn_scalar != scale:
        raise CheckpointError(
            f"the configuration has query_pre_attn_scalar {text.query_pre_attn_scalar}; GGUF's {architecture.name} of "
            f"this size can only say {scale}"
        )


def layer_types(name: str, layers: int) -> list[str]:
    """Which layers of Gemma 2 and 3 have a sliding window."""
    period = _WINDOWED[name]
    return [
        "full_attention" if layer % period == period - 1 else "sliding_attention" for layer in range(layers)
    ]


def score_scale(name: str, fields: Mapping[str, Any]) -> int:
    """By the root of what Gemma 2 and 3 divide attention scores: the size of a head, but for the largest model."""
    if fields["num_hidden_layers"] == _LARGEST[name]:
        return fields["hidden_size"] // fields["num_attention_heads"]
    return fields["head_dim"]


# ---- back ----


def to_config(
    metadata: Mapping[str, GGUFValue],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """The fields of config.json, model_type among them, of the model in a file.

    shapes: of the file's tensors; factors: the values of its tensors of rotary factors. Raises CheckpointError for an
    architecture that bitfold doesn't run, and for missing or odd keys.
    """
    name = Keys(metadata, "general.").text("architecture")
    keys = Keys(metadata, f"{name}.")
    experts = keys.whole("expert_count", 0, least=0)
    architecture = of_metadata(name, experts > 0)
    fields: dict[str, Any] = {"model_type": architecture.model_types[0]}
    fields |= _numbers(architecture, keys, shapes)
    head = fields["head_dim"]
    if keys.whole("attention.value_length", head) != head:
        raise CheckpointError(f"the file's heads have keys of {head} numbers and values of another length")
    fields["tie_word_embeddings"] = "output.weight" not in shapes
    biases = {
        "attention_bias": "blk.0.attn_q.bias",
        "qkv_bias": "blk.0.attn_q.bias",
        "mlp_bias": "blk.0.ffn_up.bias",
    }
    used = {weight.bias for weight in architecture.weights}
    fields |= {field: tensor in shapes for field, tensor in biases.items() if field in used}
    fields |= dict(architecture.fixed)
    full, sliding = rope.to_config(keys, factors, head)
    fields["rope_parameters"] = full
    if name == "gemma3":
        fields["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}
    if name in _WINDOWED:
        fields["layer_types"] = layer_types(name, fields["num_hidden_layers"])
        fields["query_pre_attn_scalar"] = score_scale(name, fields)
    if fields.get("sliding_window") == 0:
        fields["sliding_window"] = None
    if full["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = full["original_max_position_embeddings"]
    tokens, last = Keys(metadata, "tokenizer.ggml."), fields["vocab_size"] - 1
    for field, key in _TOKENS.items():
        fields[field] = tokens.whole(key, least=0, most=last) if key in tokens else None
    return fields


def _numbers(architecture: Architecture, keys: Keys, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of _KEYS and its like; a file that says nothing of them means the usual."""
    if "token_embd.weight" not in shapes:
        raise CheckpointError("the file lacks the tensor 'token_embd.weight'")
    layers = keys.whole("block_count", most=len(shapes))  # each has tensors: a file can't have more
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    usual: dict[str, int | None] = {
        "attention.head_count_kv": heads,
        "attention.key_length": max(1, hidden // heads),
        "vocab_size": shapes["token_embd.weight"][0],
    }
    fields: dict[str, Any] = {}
    for key, field in architecture.keys.items():
        if key == "attention.value_length":
            continue
        if field in _FLOATS:
            if key in keys or field == "rms_norm_eps":
                fields[field] = keys.real(key)
        elif field != "sliding_window":
            fields[field] = keys.whole(key, usual.get(key))
        elif key in keys:
            fields[field] = keys.whole(key, least=0)
    return fields | {"num_hidden_layers": layers, "vocab_size": shapes["token_embd.weight"][0]}


_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}
