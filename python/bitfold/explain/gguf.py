"""What the names of GGUF files mean. bitfold reads and writes no GGUF yet: these are facts about others' files.

A GGUF file mixes block types. Its name ("Q4_K_M") says which type most tensors have and how generously the tensors
that suffer most are treated: S small, M medium, L large. Source: the block structs and the tensor rules of llama.cpp
(ggml-common.h, llama-quant.cpp; version 0.5.0-dev of October 2026).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """values weights are stored in nbytes bytes; structure: what these bytes are."""

    name: str
    values: int
    nbytes: int
    structure: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.values


@dataclass(frozen=True)
class Mix:
    """A file type: the block type of most tensors, that of the output head (or of the embedding that stands in for
    it), and the exceptions; use: when to take it; llama_2_7b: bytes of tensor data of that model."""

    name: str
    block: str
    head: str
    exceptions: tuple[str, ...]
    use: str
    llama_2_7b: int


LLAMA_2_7B_PARAMETERS = 6_738_415_616

BLOCKS: dict[str, BlockType] = {
    block.name: block
    for block in (
        BlockType("F32", 1, 4, "32-bit floats"),
        BlockType("F16", 1, 2, "16-bit floats"),
        BlockType("BF16", 1, 2, "bfloat16"),
        BlockType("Q4_0", 32, 18, "one fp16 scale, 4-bit codes"),
        BlockType("Q4_1", 32, 20, "one fp16 scale and one fp16 minimum, 4-bit codes"),
        BlockType("Q5_0", 32, 22, "one fp16 scale, 5-bit codes"),
        BlockType("Q5_1", 32, 24, "one fp16 scale and one fp16 minimum, 5-bit codes"),
        BlockType("Q8_0", 32, 34, "one fp16 scale, 8-bit codes"),
        BlockType("Q2_K", 256, 84, "16 groups of 16, each a 4-bit scale and a 4-bit minimum; 2-bit codes"),
        BlockType("Q3_K", 256, 110, "16 groups of 16, each a 6-bit scale; 3-bit codes"),
        BlockType("Q4_K", 256, 144, "8 groups of 32, each a 6-bit scale and a 6-bit minimum; 4-bit codes"),
        BlockType("Q5_K", 256, 176, "8 groups of 32, each a 6-bit scale and a 6-bit minimum; 5-bit codes"),
        BlockType("Q6_K", 256, 210, "16 groups of 16, each an 8-bit scale; 6-bit codes"),
        BlockType("IQ4_NL", 32, 18, "one fp16 scale, 4-bit codes into a table of 16 uneven levels"),
        BlockType("IQ4_XS", 256, 136, "8 groups of 32, each a 6-bit scale; 4-bit codes into IQ4_NL's table"),
        BlockType("MXFP4", 32, 17, "one power of two as the scale, 4-bit floats (e2m1)"),
    )
}

_MORE = "the first and the last eighth of the layers and every third between"

MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("Q2_K", "Q2_K", "Q6_K",
            ("attn_v Q3_K, or Q4_K where 4 or more heads share keys and values", "ffn_down and attn_output Q3_K"),
            "when nothing larger fits; try a smaller model in 4 bits beside it",
            2_532_122_624),
        Mix("Q2_K_S", "Q2_K", "Q6_K",
            ("attn_v Q4_K where 4 or more heads share keys and values",
             "ffn_down Q4_K in the first eighth of the layers"),
            "smaller than Q2_K; wants an importance file", 2_318_802_944),
        Mix("Q3_K_S", "Q3_K", "Q6_K", (), "when Q3_K_M doesn't fit", 2_947_563_520),
        Mix("Q3_K_M", "Q3_K", "Q6_K",
            ("attn_v Q5_K in the first two layers, Q4_K in the others",
             "ffn_down Q5_K in the first sixteenth of the layers, Q4_K in the others", "attn_output Q4_K"),
            "when 4 bits don't fit", 3_297_263_616),
        Mix("Q3_K_L", "Q3_K", "Q6_K", ("attn_v, attn_output and ffn_down Q5_K",),
            "between Q3_K_M and Q4_K_S", 3_596_369_920),
        Mix("Q4_0", "Q4_0", "Q6_K", (), "the oldest 4-bit type, simple to compute with",
            3_825_065_984),
        Mix("Q4_1", "Q4_1", "Q6_K", (), "Q4_0 with a minimum; replaced by Q4_K and Q5_K", 4_238_008_320),
        Mix("IQ4_XS", "IQ4_XS", "Q6_K",
            ("ffn_down Q5_K in the first eighth of the layers, unless there is an importance file",
             "attn_v Q5_K where 4 or more heads share keys and values"),
            "the smallest of the 4-bit types", 3_646_775_296),
        Mix("IQ4_NL", "IQ4_NL", "Q6_K",
            ("ffn_down Q5_K in the first eighth of the layers, unless there is an importance file",
             "attn_v Q5_K where 4 or more heads share keys and values"),
            "IQ4_XS for rows that are no multiple of 256", 3_847_610_368),
        Mix("Q4_K_S", "Q4_K", "Q6_K",
            ("attn_v Q5_K in the first four layers", "ffn_down Q5_K in the first eighth of the layers"),
            "Q4_K_M, a little smaller", 3_855_998_976),
        Mix("Q4_K_M", "Q4_K", "Q6_K", (f"attn_v and ffn_down Q6_K in about half of the layers: {_MORE}",),
            "the usual first choice", 4_080_263_168),
        Mix("Q5_0", "Q5_0", "Q6_K", (), "replaced by Q5_K_S: the same size", 4_650_950_656),
        Mix("Q5_1", "Q5_1", "Q6_K", (), "replaced by Q5_K_M and Q6_K", 5_063_892_992),
        Mix("Q5_K_S", "Q5_K", "Q6_K", (), "Q5_K_M, a little smaller", 4_650_950_656),
        Mix("Q5_K_M", "Q5_K", "Q6_K", (f"attn_v and ffn_down Q6_K in about half of the layers: {_MORE}",),
            "when there is room for more than 4 bits", 4_782_415_872),
        Mix("Q6_K", "Q6_K", "Q6_K", (), "between Q5_K_M and Q8_0", 5_528_453_120),
        Mix("Q8_0", "Q8_0", "Q8_0", (), "when nothing may be lost, or as the source of other quantizations",
            7_160_348_672),
        Mix("MXFP4_MOE", "MXFP4", "Q8_0", ("only the experts are MXFP4; every other matrix is Q8_0",),
            "mixtures of experts; the format of gpt-oss", 7_160_348_672),
        Mix("F16", "F16", "F16", (), "the unquantized model", 13_477_363_712),
        Mix("BF16", "BF16", "BF16", (), "the unquantized model", 13_477_363_712),
        Mix("F32", "F32", "F32", (), "the unquantized model, larger than most were trained in",
            26_953_662_464),
    )
}  # fmt: skip
"""llama_2_7b: what llama-quantize makes without an importance file (Q2_K_S: with one); norms stay in 32 bits."""

# llama-quantize takes these too.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}


def find(text: str) -> str | None:
    """The name of the mix that a type's name ("q4_k_m") or a file's ("llama-7b.Q4_K_M.gguf") carries; None where
    it carries none."""
    name = text.replace("\\", "/").rpartition("/")[2]
    is_file = name.lower().endswith(".gguf")
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", name[: -len(".gguf")] if is_file else name)
    words = re.split(r"[.\-]", stem) if is_file else [stem]
    for word in reversed(words):
        upper = word.upper()
        if upper in MIXES or upper in ALIASES:
            return ALIASES.get(upper, upper)
    return None
