"""Small GGUF files for tests: written by the gguf package, or put together byte by byte where it refuses."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """dims: row length first, as the file has them."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pair_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file of one architecture key and what is given; the counts are those of what is given unless told."""
    pairs = [pair("general.architecture", STRING, string("llama")), *(pairs or [])]
    tensors = tensors or []
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def write_llama(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 256,
    ffn: int = 512,
    vocab: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    experts: int = 0,
    tied: bool = False,
    dtype: str = "F16",
    architecture: str = "llama",
    seed: int = 0,
    split_tensors: int = 0,
    change=None,
) -> Path:
    """A model of random weights with a vocabulary; norms in F32. change: called with each (name, array) before it is
    written, returns the array; split_tensors: in files of at most so many tensors."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_tensors)
    writer.add_name("a model of random weights")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[dtype])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>é" for i in range(vocab)])
    writer.add_token_scores([-0.5 * i for i in range(vocab)])
    writer.add_token_types([1] * vocab)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        values = values if change is None else change(name, values)
        kind = dtype if len(shape) > 1 and "gate_inp" not in name else "F32"
        if kind == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        elif kind == "BF16":
            bits = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", vocab, hidden)
    keys = hidden // heads * kv_heads
    for layer in range(layers):
        for name, *shape in (
            ("attn_norm", hidden),
            ("attn_q", hidden, hidden),
            ("attn_k", keys, hidden),
            ("attn_v", keys, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_norm", hidden),
        ):
            add(f"blk.{layer}.{name}.weight", *shape)
        stack, suffix = ((experts,), "_exps") if experts else ((), "")
        if experts:
            add(f"blk.{layer}.ffn_gate_inp.weight", experts, hidden)
        add(f"blk.{layer}.ffn_gate{suffix}.weight", *stack, ffn, hidden)
        add(f"blk.{layer}.ffn_up{suffix}.weight", *stack, ffn, hidden)
        add(f"blk.{layer}.ffn_down{suffix}.weight", *stack, hidden, ffn)
    add("output_norm.weight", hidden)
    if not tied:
        add("output.weight", vocab, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape (outermost first) and bytes of every tensor, by the reader of the gguf package."""
    return {
        one.name: (one.tensor_type.name, tuple(int(d) for d in reversed(one.shape)), one.data.tobytes())
        for one in gguf.GGUFReader(path).tensors
    }


def keys_of(path: Path) -> list[str]:
    """The keys of the metadata in their order, by the gguf package."""
    return [key for key in gguf.GGUFReader(path).fields if not key.startswith("GGUF.")]
