"""Llama and Mixtral forward in numpy and float64, slowly and without a cache: what goes into each matrix, by GGUF name.

From the papers' formulas (RMSNorm, rotary embedding by halves, grouped attention, SwiGLU, top-k experts), with tensors
named as in a Hugging Face checkpoint.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """[heads, tokens, size]: value i of a head turns with value i + size / 2."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
        ],
        axis=-1,
    )


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


class Inputs:
    """Sums of squares and counts: `sums[name][expert]` float64 [columns], `counts[name][expert]`."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        self.counts: dict[str, dict[int, int]] = defaultdict(dict)

    def add(self, name: str, rows: np.ndarray, expert: int = 0) -> None:
        self.sums[name][expert] = self.sums[name].get(expert, 0) + (rows**2).sum(axis=0)
        self.counts[name][expert] = self.counts[name].get(expert, 0) + len(rows)


def forward(ids: np.ndarray, w: dict[str, np.ndarray], config, inputs: Inputs) -> None:
    """Runs one sequence; `inputs` gets what goes into the matrices."""
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    tokens = len(ids)
    causal = np.where(np.tril(np.ones((tokens, tokens))) > 0, 0.0, -np.inf)
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        here, there = f"model.layers.{layer}.", f"blk.{layer}."

        def apply(name: str, gguf: str, rows: np.ndarray, here=here, there=there) -> np.ndarray:
            inputs.add(f"{there}{gguf}.weight", rows)
            return rows @ w[f"{here}{name}.weight"].T

        normed = norm(x, w[f"{here}input_layernorm.weight"], eps)
        q, k, v = (
            apply(f"self_attn.{letter}_proj", f"attn_{letter}", normed)
            .reshape(tokens, -1, size)
            .swapaxes(0, 1)
            for letter in "qkv"
        )
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = (np.repeat(t, heads // shared, axis=0) for t in (k, v))
        attended = softmax(q @ k.swapaxes(1, 2) / np.sqrt(size) + causal) @ v
        attended = attended.swapaxes(0, 1).reshape(tokens, -1)
        x = x + apply("self_attn.o_proj", "attn_output", attended)
        normed = norm(x, w[f"{here}post_attention_layernorm.weight"], eps)
        if f"{here}mlp.gate.weight" in w:
            x = x + experts(normed, w, config, inputs, here, there)
        else:
            inner = silu(apply("mlp.gate_proj", "ffn_gate", normed)) * apply("mlp.up_proj", "ffn_up", normed)
            x = x + apply("mlp.down_proj", "ffn_down", inner)
    inputs.add("output.weight", norm(x, w["model.norm.weight"], eps))


def experts(
    x: np.ndarray, w: dict[str, np.ndarray], config, inputs: Inputs, here: str, there: str
) -> np.ndarray:
    """Mixtral's mixture: the k likeliest experts of each token, weighed by their likelihoods."""
    inputs.add(f"{there}ffn_gate_inp.weight", x)
    likely = softmax(x @ w[f"{here}mlp.gate.weight"].T)
    result = np.zeros_like(x)
    for token, row in enumerate(x):
        chosen = np.argsort(-likely[token])[: config.num_experts_per_tok]
        for expert in chosen:
            gate, up = np.split(w[f"{here}mlp.experts.gate_up_proj"][expert] @ row, 2)
            inner = silu(gate) * up
            for name in ("gate", "up"):
                inputs.add(f"{there}ffn_{name}_exps.weight", row[None], int(expert))
            inputs.add(f"{there}ffn_down_exps.weight", inner[None], int(expert))
            out = w[f"{here}mlp.experts.down_proj"][expert] @ inner
            result[token] += likely[token, expert] / likely[token, chosen].sum() * out
    return result
