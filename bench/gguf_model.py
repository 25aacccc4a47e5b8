"""Writes an F16 GGUF of a Llama with random weights, for the benchmarks of whole files.

    python bench/gguf_model.py model-f16.gguf [--layers 22]

The shape is TinyLlama's: 1.1 B parameters, 2.2 GB. The tokenizer is of llama.cpp's SentencePiece kind, with the byte
tokens that it must have and made-up pieces for the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

HIDDEN, FEED, HEADS, KV_HEADS, VOCAB, CONTEXT = 2048, 5632, 32, 4, 32000, 2048
HEAD = HIDDEN // HEADS
EPSILON = 1e-5
LAYERS = 22
SPREAD = 0.02  # standard deviation of the weights


def write(path: Path, layers: int = LAYERS, seed: int = 0) -> int:
    """Writes the model, tensor by tensor. Returns its number of parameters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random llama of {layers} layers")
    writer.add_block_count(layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer)
    shapes = _shapes(layers)
    for name, shape in shapes.items():
        dtype = np.float32 if len(shape) == 1 else np.float16
        writer.add_tensor_info(name, shape, np.dtype(dtype), np.prod(shape) * np.dtype(dtype).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for shape in shapes.values():
        writer.write_tensor_data(_weights(random, shape))
    writer.close()
    return sum(int(np.prod(shape)) for shape in shapes.values())


def _weights(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)  # a norm
    x = random.standard_normal(shape, np.float32)
    x *= SPREAD
    return x.astype(np.float16)


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    kv = KV_HEADS * HEAD
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        parts = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FEED, HIDDEN),
            "ffn_up": (FEED, HIDDEN),
            "ffn_down": (HIDDEN, FEED),
        }
        shapes |= {f"blk.{i}.{part}.weight": shape for part, shape in parts.items()}
    return {**shapes, "output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    special = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [f"▁{number:x}" for number in range(VOCAB - len(special) - len(octets))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*special, *octets, *pieces])
    writer.add_token_scores([0.0] * (len(special) + len(octets)) + [-float(i) for i in range(len(pieces))])
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * len(octets)
        + [kinds.NORMAL] * len(pieces)
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    print(f"{write(args.path, args.layers)} parameters, {args.path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
