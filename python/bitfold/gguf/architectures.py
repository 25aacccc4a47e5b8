"""Which models GGUF and transformers both know, as data: names, shapes and hyperparameters, in both directions.

One row of ARCHITECTURES for each kind of model. A row's weights say which tensor of a Hugging Face checkpoint is which
tensor of the file, and what happens to its values on the way; its keys say which field of the configuration is which
value of the metadata. Nothing here reads a weight or needs the extra `gguf`.

Names and shapes: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (standardized tensor names).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitfold.fields import shown
from bitfold.shards import CheckpointError, is_whole


@dataclass(frozen=True)
class Source:
    """Where a tensor lies in a Hugging Face checkpoint.

    name: behind "model.layers.N." (of a layer) or whole; `{e}`: one matrix for each expert, stacked in the file.
    part: (i, count): of each matrix only the i-th of `count` equal runs of rows.
    """

    name: str
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Weight:
    """A tensor of the model, or of each of its layers.

    gguf: its name there, behind "blk.N." in a layer; dims: its dimensions by name, outermost first (`dimensions`);
    sources: where it may lie, the way transformers saves it today first; bias: whether it has a bias too ("": never,
    "always", or the field of the configuration that says so); heads: of a projection to be rotated, the dimension whose
    heads have their two halves interleaved, since transformers rotates row i of a head with i + head_dim / 2, and
    llama.cpp's llama 2i with 2i + 1.
    """

    gguf: str
    dims: str
    sources: tuple[Source, ...]
    bias: str = ""
    heads: str = ""


def _one(gguf: str, dims: str, name: str, bias: str = "", heads: str = "") -> Weight:
    return Weight(gguf, dims, (Source(name),), bias, heads)


def _attention(bias: str = "", output_bias: str = "", rotated: bool = False) -> tuple[Weight, ...]:
    """Separate projections; rotated: the rows of q and k are interleaved."""
    return (
        _one("attn_q", "q d", "self_attn.q_proj", bias, "q" if rotated else ""),
        _one("attn_k", "k d", "self_attn.k_proj", bias, "k" if rotated else ""),
        _one("attn_v", "k d", "self_attn.v_proj", bias),
        _one("attn_output", "d q", "self_attn.o_proj", output_bias),
    )


def _experts(gate: str, up: str, down: str, router: str, size: str = "f") -> tuple[Weight, ...]:
    """A stack of experts; gate, up and down are their names in checkpoints that keep each expert by itself."""
    fused = "mlp.experts.gate_up_proj"
    return (
        Weight("ffn_gate_inp", "e d", tuple(map(Source, dict.fromkeys(("mlp.gate", router))))),
        Weight("ffn_gate_exps", f"e {size} d", (Source(fused, (0, 2)), Source(gate))),
        Weight("ffn_up_exps", f"e {size} d", (Source(fused, (1, 2)), Source(up))),
        Weight("ffn_down_exps", f"e d {size}", (Source("mlp.experts.down_proj"), Source(down))),
    )


_ENDS = (
    _one("token_embd", "v d", "model.embed_tokens"),
    _one("output_norm", "d", "model.norm"),
    _one("output", "v d", "lm_head"),
)
_NORMS = (
    _one("attn_norm", "d", "input_layernorm"),
    _one("ffn_norm", "d", "post_attention_layernorm"),
)
_SANDWICH = (  # Gemma 2 and 3: a norm in front of and one behind each half of a layer
    _one("attn_norm", "d", "input_layernorm"),
    _one("post_attention_norm", "d", "post_attention_layernorm"),
    _one("ffn_norm", "d", "pre_feedforward_layernorm"),
    _one("post_ffw_norm", "d", "post_feedforward_layernorm"),
)
_HEAD_NORMS = (
    _one("attn_q_norm", "h", "self_attn.q_norm"),
    _one("attn_k_norm", "h", "self_attn.k_norm"),
)


def _mlp(bias: str = "") -> tuple[Weight, ...]:
    return (
        _one("ffn_gate", "f d", "mlp.gate_proj", bias),
        _one("ffn_up", "f d", "mlp.up_proj", bias),
        _one("ffn_down", "d f", "mlp.down_proj", bias),
    )


_QWEN_EXPERTS = _experts(
    "mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj", "mlp.gate", "m"
)

# Keys of the metadata behind "<architecture>.", and the field of the configuration with the same value.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "vocab_size": "vocab_size",
}
_MIXTURE = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN_MIXTURE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    name: general.architecture; model_types: of transformers' configurations, the one that a file becomes first;
    weights: of each layer, beside _ENDS; keys: as in _KEYS; fixed: fields of the configuration that llama.cpp takes for
    granted, so that another value can't be said in a file; shifted: norms multiply by 1 + weight in transformers and by
    the weight in the file.
    """

    name: str
    model_types: tuple[str, ...]
    weights: tuple[Weight, ...]
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    shifted: bool = False

    @property
    def mixture(self) -> bool:
        return "expert_count" in self.keys


_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_act": "gelu_pytorch_tanh"}
_GELU_TOO = {"hidden_activation": "gelu_pytorch_tanh"}
_UNBIASED = {"attention_bias": False}
_QWEN_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}

ARCHITECTURES = (
    Architecture(
        "llama",
        ("llama", "mistral"),
        (*_NORMS, *_attention("attention_bias", "attention_bias", rotated=True), *_mlp("mlp_bias")),
        _KEYS,
        _SILU,
    ),
    Architecture(
        "llama",
        ("mixtral",),
        (
            *_NORMS,
            *_attention(rotated=True),
            *_experts(
                "block_sparse_moe.experts.{e}.w1",
                "block_sparse_moe.experts.{e}.w3",
                "block_sparse_moe.experts.{e}.w2",
                "block_sparse_moe.gate",
            ),
        ),
        _KEYS | _MIXTURE,
        _SILU,
    ),
    Architecture("qwen2", ("qwen2",), (*_NORMS, *_attention("always"), *_mlp()), _KEYS, _SILU),
    Architecture(
        "qwen2moe",
        ("qwen2_moe",),
        (
            *_NORMS,
            *_attention("qkv_bias"),
            *_QWEN_EXPERTS,
            _one("ffn_gate_inp_shexp", "d", "mlp.shared_expert_gate"),
            _one("ffn_gate_shexp", "s d", "mlp.shared_expert.gate_proj"),
            _one("ffn_up_shexp", "s d", "mlp.shared_expert.up_proj"),
            _one("ffn_down_shexp", "d s", "mlp.shared_expert.down_proj"),
        ),
        _KEYS | _QWEN_MIXTURE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        _SILU | _QWEN_SPARSE | {"norm_topk_prob": False},
    ),
    Architecture(
        "qwen3",
        ("qwen3",),
        (*_NORMS, *_attention(), *_HEAD_NORMS, *_mlp()),
        _KEYS,
        _SILU | _UNBIASED,
    ),
    Architecture(
        "qwen3moe",
        ("qwen3_moe",),
        (*_NORMS, *_attention(), *_HEAD_NORMS, *_QWEN_EXPERTS),
        _KEYS | _QWEN_MIXTURE,
        _SILU | _UNBIASED | _QWEN_SPARSE | {"norm_topk_prob": True},
    ),
    Architecture(
        "gemma", ("gemma",), (*_NORMS, *_attention(), *_mlp()), _KEYS, _GELU | _UNBIASED, shifted=True
    ),
    Architecture(
        "gemma2",
        ("gemma2",),
        (*_SANDWICH, *_attention(), *_mlp()),
        _KEYS | _CAPS | _WINDOW,
        _GELU_TOO | _UNBIASED,
        shifted=True,
    ),
    Architecture(
        "gemma3",
        ("gemma3_text", "gemma3"),
        (*_SANDWICH, *_attention(), *_HEAD_NORMS, *_mlp()),
        _KEYS | _WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
        _GELU_TOO | _UNBIASED | {"attn_logit_softcapping": None, "use_bidirectional_attention": False},
        shifted=True,
    ),
    Architecture(
        "phi3",
        ("phi3",),
        (
            *_NORMS,
            _one("attn_qkv", "p d", "self_attn.qkv_proj"),
            _one("attn_output", "d q", "self_attn.o_proj"),
            _one("ffn_up", "g d", "mlp.gate_up_proj"),
            _one("ffn_down", "d f", "mlp.down_proj"),
        ),
        _KEYS | _WINDOW,
        _SILU,
    ),
)
SUPPORTED = tuple(kind for architecture in ARCHITECTURES for kind in architecture.model_types)


@dataclass(frozen=True)
class Span:
    """Rows [begin, end) of a stored tensor of the shape `shape`, seen as a matrix [rows, columns]."""

    source: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Placement:
    """One tensor of the file: its shape (outermost dimension first) and where its rows come from.

    sources: one way or several in which a checkpoint may hold it, each the runs of rows that make it, one after the
    other; heads: its rows are that many heads whose halves are interleaved (0: rows stay in order); shift: what is
    added to each value.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[Span, ...], ...]
    heads: int = 0
    shift: float = 0.0

    @property
    def keeps_f32(self) -> bool:
        """Whether it is F32 in a file of halves: vectors, norms, biases and the router of experts are."""
        return (
            len(self.shape) < 2
            or not self.name.endswith(".weight")
            or self.name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
        )


def of_config(config: Any) -> Architecture:
    """The architecture of a model, by its configuration as transformers reads it.

    Raises CheckpointError for one that isn't supported, and for fields that GGUF has no word for.
    """
    kind = config.model_type
    for architecture in ARCHITECTURES:
        if kind in architecture.model_types:
            _check_fixed(architecture, config)
            return architecture
    raise CheckpointError(
        f"models of the type '{kind}' can't be made GGUF by bitfold, only those of {', '.join(SUPPORTED)}"
    )


def _check_fixed(architecture: Architecture, config: Any) -> None:
    text = config.get_text_config()
    for field, wanted in architecture.fixed.items():
        value = getattr(text, field, wanted)
        if value != wanted:
            raise CheckpointError(
                f"the configuration has {field} {value!r}; GGUF's {architecture.name} can only say {wanted!r}"
            )


def of_metadata(name: str, mixture: bool) -> Architecture:
    """The architecture of a file by general.architecture and by whether it has experts."""
    for architecture in ARCHITECTURES:
        if architecture.name == name and architecture.mixture == mixture:
            return architecture
    known = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
    kind = f"'{name}'" + (" with experts" if mixture else "")
    raise CheckpointError(f"the file's architecture is {kind}, and bitfold runs those of {known}")


def dimensions(config: Any) -> dict[str, int]:
    """The dimensions that shapes are made of, by the letters that Weight.dims uses.

    d: hidden size; q, k: rows of the query and of the key projection; h: of a head; f: feed-forward size;
    v: vocabulary; e: experts; m, s: feed-forward size of an expert and of the shared one; p, g: rows of Phi-3's fused
    projections.

    Raises CheckpointError where one that every model has is no size.
    """
    text = config.get_text_config()
    heads, hidden, inner = (
        _size(text, f) for f in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    head = int(getattr(text, "head_dim", None) or hidden // heads)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    return {
        "d": hidden,
        "h": head,
        "q": heads * head,
        "k": shared * head,
        "p": (heads + 2 * shared) * head,
        "f": inner,
        "g": 2 * inner,
        "v": _size(text, "vocab_size"),
        "e": int(experts),
        "m": int(getattr(text, "moe_intermediate_size", None) or 0),
        "s": int(getattr(text, "shared_expert_intermediate_size", None) or 0),
    }


def _size(text: Any, field: str) -> int:
    value = getattr(text, field, None)
    if not is_whole(value) or not value:
        raise CheckpointError(
            f"the configuration has {field} {shown(value)}; it must be a whole number from 1 on"
        )
    return int(value)


def placements(config: Any) -> dict[str, Placement]:
    """The tensors of the GGUF file of a model, by name, from its configuration (as transformers reads it) alone.

    A tied output head has none. What the configuration itself gives values to (the factors of rotary frequencies) is
    not among them. Raises CheckpointError as `of_config`.
    """
    architecture = of_config(config)
    text = config.get_text_config()
    sizes = dimensions(config)
    found: dict[str, Placement] = {}

    def place(prefix: str, home: str, weight: Weight) -> None:
        for kind in ("weight", "bias"):
            if kind == "bias" and not (weight.bias == "always" or getattr(text, weight.bias or " ", False)):
                continue
            letters = weight.dims.split()
            shape = tuple(sizes[letter] for letter in letters)
            placement = Placement(
                f"{prefix}{weight.gguf}.{kind}",
                shape if kind == "weight" else shape[:1],
                tuple(_spans(home, source, kind, shape) for source in weight.sources),
                sizes[weight.heads] // sizes["h"] if weight.heads else 0,
                1.0 if architecture.shifted and weight.gguf.endswith("_norm") else 0.0,
            )
            found[placement.name] = placement

    embedding, norm, head = _ENDS
    place("", "", embedding)
    for layer in range(int(text.num_hidden_layers)):
        for weight in architecture.weights:
            place(f"blk.{layer}.", f"model.layers.{layer}.", weight)
    place("", "", norm)
    if not text.tie_word_embeddings:
        place("", "", head)
    return found


def _spans(home: str, source: Source, kind: str, shape: tuple[int, ...]) -> tuple[Span, ...]:
    """The runs of rows of a tensor of the shape `shape` (a weight's, also for its bias)."""
    part, count = source.part
    name = f"{home}{source.name}"
    if "{e}" in name:
        stored, rows = shape[1:], math.prod(shape[1:-1])
        return tuple(Span(f"{name.format(e=e)}.{kind}", stored, 0, rows) for e in range(shape[0]))
    if len(shape) == 3:  # a stack as transformers has it: a parameter by itself, with no ".weight"
        rows = shape[1]
        stored = (shape[0], count * rows, shape[2])
        starts = [(count * e + part) * rows for e in range(shape[0])]
        return tuple(Span(name, stored, start, start + rows) for start in starts)
    if kind == "bias":
        return (Span(f"{name}.bias", shape[:1], 0, 1),)
    if name.endswith("shared_expert_gate"):  # a matrix of one row there, a vector here
        return (Span(f"{name}.weight", (1, *shape), 0, 1),)
    return (Span(f"{name}.weight", shape, 0, math.prod(shape[:-1])),)
