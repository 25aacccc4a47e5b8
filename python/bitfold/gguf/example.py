"""Llama-2-7B as a list of tensors: the model that sizes of file types are quoted for."""

from __future__ import annotations

from bitfold.gguf.assign import Choice, Facts, Item, assign, tensor_bytes
from bitfold.gguf.mixes import Mix

NAME = "Llama-2-7B"
FACTS = Facts("llama", layers=32, heads=32, kv_heads=32)
_HIDDEN, _FFN, _VOCAB = 4096, 11008, 32000


def items() -> list[Item]:
    """Its tensors, in 16 bits but for the norms."""
    found = [("token_embd", (_VOCAB, _HIDDEN)), ("output_norm", (_HIDDEN,)), ("output", (_VOCAB, _HIDDEN))]
    for layer in range(FACTS.layers):
        shapes = {
            "attn_norm": (_HIDDEN,),
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (_HIDDEN, _HIDDEN)),
            "ffn_norm": (_HIDDEN,),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (_FFN, _HIDDEN)),
            "ffn_down": (_HIDDEN, _FFN),
        }
        found += [(f"blk.{layer}.{name}", shape) for name, shape in shapes.items()]
    return [Item(f"{name}.weight", shape, "F32" if len(shape) == 1 else "F16") for name, shape in found]


def choices(mix: Mix, *, has_importance: bool = False) -> list[Choice]:
    """What its tensors become. Q2_K_S is never made without importance."""
    return assign(mix, FACTS, items(), has_importance=has_importance or mix.name == "Q2_K_S")


def size(mix: Mix, *, has_importance: bool = False) -> tuple[int, float]:
    """Bytes of its tensor data and bits per weight."""
    chosen = choices(mix, has_importance=has_importance)
    total = sum(map(tensor_bytes, chosen))
    return total, 8 * total / sum(choice.parameters for choice in chosen)
