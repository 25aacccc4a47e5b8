"""The file types of GGUF and which tensor gets which type in them, as one table of rules. Needs no gguf package.

A file type ("Q4_K_M") names the type of most tensors and how generously those are treated that suffer most: S small,
M medium, L large. The rules are those of llama-quantize (llama.cpp 0.5.0-dev of October 2026), so that files come out
alike; assign.py applies them.

How a tensor finds its type: ROLES gives it a role by its name; the first row of RULES with its role, its file type and
a condition that holds says the type; where none does, it is the file type's own. Then LIFTS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bitfold.formats import FORMATS, parse, stored_bytes
from bitfold.presets import RECIPES

# ---- types of tensors ----

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Types without blocks: bytes of a value."""

BLOCKS = tuple(name.upper() for name, format in FORMATS.items() if format.grid == "block")
"""The block types; in lower case they are formats of bitfold."""

TYPES = (*FLOATS, *BLOCKS)


def block_values(kind: str) -> int:
    """Values of a block; 1 for floats."""
    return 1 if kind in FLOATS else parse(kind.lower()).group


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of so many values, a multiple of the block's."""
    return FLOATS[kind] * columns if kind in FLOATS else stored_bytes(kind.lower(), 1, columns)


def bits_per_weight(kind: str) -> float:
    values = block_values(kind)
    return 8 * row_bytes(kind, values) / values


# ---- file types ----


@dataclass(frozen=True)
class Mix:
    """A file type. number: general.file_type; default: the type of most tensors; use: when to take it."""

    name: str
    number: int
    default: str
    use: str

    @property
    def is_quantized(self) -> bool:
        return self.default not in FLOATS


MIXES: dict[str, Mix] = {
    mix.name: mix
    for mix in (
        Mix("Q2_K", 10, "Q2_K", "when nothing larger fits; try a smaller model in 4 bits beside it"),
        Mix("Q2_K_2023", 10, "Q2_K", "Q2_K as files of 2023 have it: larger, to compare with them"),
        Mix("Q2_K_S", 21, "Q2_K", "smaller than Q2_K; needs an importance file"),
        Mix("Q3_K_S", 11, "Q3_K", "when Q3_K_M doesn't fit"),
        Mix("Q3_K_M", 12, "Q3_K", "when 4 bits don't fit"),
        Mix("Q3_K_L", 13, "Q3_K", "between Q3_K_M and Q4_K_S"),
        Mix("IQ4_XS", 30, "IQ4_XS", "the smallest of the 4-bit types"),
        Mix("Q4_0", 2, "Q4_0", "the oldest 4-bit type, simple to compute with"),
        Mix("IQ4_NL", 25, "IQ4_NL", "IQ4_XS for rows that are no multiple of 256"),
        Mix("Q4_K_S", 14, "Q4_K", "Q4_K_M, a little smaller"),
        Mix("Q4_K_M", 15, "Q4_K", "the usual first choice"),
        Mix("Q4_1", 3, "Q4_1", "Q4_0 with a minimum; replaced by Q4_K and Q5_K"),
        Mix("Q5_0", 8, "Q5_0", "replaced by Q5_K_S: the same size"),
        Mix("Q5_K_S", 16, "Q5_K", "Q5_K_M, a little smaller"),
        Mix("Q5_K_M", 17, "Q5_K", "when there is room for more than 4 bits"),
        Mix("Q5_1", 9, "Q5_1", "replaced by Q5_K_M and Q6_K"),
        Mix("Q6_K", 18, "Q6_K", "between Q5_K_M and Q8_0"),
        Mix("Q8_0", 7, "Q8_0", "when nothing may be lost, or as the source of other quantizations"),
        Mix("MXFP4_MOE", 38, "MXFP4", "mixtures of experts; the format of gpt-oss"),
        Mix("F16", 1, "F16", "the unquantized model"),
        Mix("BF16", 32, "BF16", "the unquantized model"),
        Mix("F32", 0, "F32", "the unquantized model, larger than most were trained in"),
    )
}

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
"""llama-quantize takes the first three too.

In lower case they are formats of bitfold as well ("q4_k" for all linear layers of a directory); of a GGUF file they
mean the file types.
"""


def find(text: str) -> Mix | None:
    """The file type that is meant, in any case: its name or an alias ("q4_k" is Q4_K_M). None where none is."""
    name = text.upper()
    return MIXES.get(ALIASES.get(name, name))


def get(text: str) -> Mix:
    """As `find`; raises ValueError, naming all file types, where none is meant."""
    mix = find(text)
    if mix is None:
        names = ", ".join(name.lower() for name in MIXES)
        raise ValueError(f"{text!r} is no file type of GGUF; it must be one of {names}")
    return mix


def is_mix_alone(text: str) -> bool:
    """Whether the name means a file type and no recipe and no format: "q4_k_m" does, "q4_k" doesn't."""
    return find(text) is not None and text not in (*RECIPES, *FORMATS)


def find_in_file_name(path: str) -> Mix | None:
    """The file type in the name of a GGUF file ("llama-7b.Q4_K_M.gguf"); None where it has none."""
    name = path.replace("\\", "/").rpartition("/")[2]
    if not name.lower().endswith(".gguf"):
        return None
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", name[: -len(".gguf")])
    found = (find(word) for word in reversed(re.split(r"[.\-]", stem)))
    return next((mix for mix in found if mix is not None), None)


# ---- roles ----

HEAD, EMBEDDING = "output head", "embedding"
V, K, Q, O = "attn_v", "attn_k", "attn_q", "attn_output"  # noqa: E741  (the field's names)
UP, GATE, DOWN, OTHER = "ffn_up", "ffn_gate", "ffn_down", "other"

ROLES = (
    ("output.weight", HEAD),
    ("token_embd.weight", EMBEDDING),  # in a file without output.weight it stands in for it, and has its role
    ("per_layer_token_embd.weight", EMBEDDING),
    ("*attn_qkv.weight*", V),  # fused, and treated as the part that suffers most
    ("*attn_kv_b.weight*", V),
    ("*attn_v.weight*", V),
    ("*attn_k.weight*", K),
    ("*attn_q.weight*", Q),
    ("*attn_output.weight*", O),
    ("*ffn_up*", UP),
    ("*ffn_gate*", GATE),
    ("*ffn_down*", DOWN),
    ("*", OTHER),
)


def role_of(name: str) -> str:
    """The role of a tensor: that of the first pattern that its name matches."""
    return next(role for pattern, role in ROLES if fnmatchcase(name, pattern))


# ---- conditions ----


@dataclass(frozen=True)
class Case:
    """What a condition may ask.

    architecture: of the model; shape, role: of the tensor; block: values of a block of the file type's default; place,
    of: which one it is in the count that its role goes by, and how many there are; sharing: heads that share keys and
    values; experts: of the model; is_70b: of the size that llama.cpp calls so; has_importance: given a file of it.
    """

    architecture: str
    role: str
    shape: tuple[int, ...]
    block: int
    place: int
    of: int
    sharing: int
    experts: int
    is_70b: bool
    has_importance: bool


@dataclass(frozen=True)
class When:
    """A condition, and how to say it. usual: whether it may hold in models that people still run."""

    text: str
    holds: Callable[[Case], bool]
    usual: bool = True


def _more(place: int, of: int) -> bool:
    eighth = of // 8
    return place < eighth or place >= 7 * of // 8 or (place - eighth) % 3 == 2


ALWAYS = When("", lambda case: True)
FIRST_2 = When("in the first 2 layers", lambda case: case.place < 2)
FIRST_4 = When("in the first 4 layers", lambda case: case.place < 4)
SIXTEENTH = When("in the first sixteenth of the layers", lambda case: case.place < case.of // 16)
EIGHTH = When("in the first eighth of the layers", lambda case: case.place < case.of // 8)
MORE = When(
    "in the first and the last eighth of the layers and every third between",
    lambda case: _more(case.place, case.of),
)
SHARED = When("where 4 or more heads share keys and values", lambda case: case.sharing >= 4)
EIGHT_EXPERTS = When("with 8 experts", lambda case: case.experts == 8)
SIZE_70B = When("in models of 70B", lambda case: case.is_70b)
STACKED = When(
    "of experts",
    lambda case: (
        len(case.shape) == 3
        and case.shape[0] > 1
        and (case.architecture != "bailingmoe3" or case.role in (UP, GATE, DOWN))
    ),
)
ODD_ROWS = When("where rows are no whole blocks", lambda case: case.shape[-1] % case.block != 0)
FALCON = When("in Falcon", lambda case: case.architecture == "falcon", usual=False)
OTHERS = When("", lambda case: case.architecture != "falcon")
WITH = When("with an importance file", lambda case: case.has_importance)
WITHOUT = When("without an importance file", lambda case: not case.has_importance)


def both(one: When, other: When) -> When:
    text = ", ".join(filter(None, (one.text, other.text)))
    return When(text, lambda case: one.holds(case) and other.holds(case), one.usual and other.usual)


# ---- rules ----

DEFAULT = None  # the file type's own type
ANY = ()  # all roles, or all file types that quantize


@dataclass(frozen=True)
class Rule:
    """roles: ANY or some; mixes: file types, ANY or some; type: what it gets, DEFAULT or a name."""

    roles: tuple[str, ...]
    mixes: tuple[str, ...]
    when: When
    type: str | None

    def reaches(self, role: str, mix: str) -> bool:
        return (not self.roles or role in self.roles) and (not self.mixes or mix in self.mixes)


_NOT_8_BIT = tuple(mix.name for mix in MIXES.values() if mix.default not in ("Q8_0", "MXFP4"))
_2_BIT = ("Q2_K", "Q2_K_2023")
_IQ4 = ("IQ4_NL", "IQ4_XS")

RULES = (
    # roles         file types            condition                 type
    Rule((HEAD,),   ("MXFP4_MOE",),       ALWAYS,                   "Q8_0"),
    Rule(ANY,       ("MXFP4_MOE",),       STACKED,                  "MXFP4"),
    Rule(ANY,       ("MXFP4_MOE",),       ALWAYS,                   "Q8_0"),

    Rule((HEAD,),   ANY,                  FALCON,                   "Q8_0"),
    Rule((HEAD,),   ANY,                  ODD_ROWS,                 "Q8_0"),
    Rule((HEAD,),   _NOT_8_BIT,           ALWAYS,                   "Q6_K"),

    Rule((V, K),    ANY,                  EIGHT_EXPERTS,            "Q8_0"),
    Rule((V,),      (*_2_BIT, "Q2_K_S"),  SHARED,                   "Q4_K"),
    Rule((V,),      _2_BIT,               ALWAYS,                   "Q3_K"),
    Rule((V,),      ("Q3_K_M",),          FIRST_2,                  "Q5_K"),
    Rule((V,),      ("Q3_K_M",),          ALWAYS,                   "Q4_K"),
    Rule((V,),      ("Q3_K_L",),          ALWAYS,                   "Q5_K"),
    Rule((V,),      _IQ4,                 SHARED,                   "Q5_K"),
    Rule((V,),      ("Q4_K_S",),          FIRST_4,                  "Q5_K"),
    Rule((V,),      ("Q4_K_M", "Q5_K_M"), MORE,                     "Q6_K"),

    Rule((DOWN,),   _2_BIT,               ALWAYS,                   "Q3_K"),
    Rule((DOWN,),   ("Q2_K_S",),          EIGHTH,                   "Q4_K"),
    Rule((DOWN,),   ("Q3_K_M",),          SIXTEENTH,                "Q5_K"),
    Rule((DOWN,),   ("Q3_K_M",),          both(FALCON, MORE),       "Q4_K"),
    Rule((DOWN,),   ("Q3_K_M",),          FALCON,                   "Q3_K"),
    Rule((DOWN,),   ("Q3_K_M",),          ALWAYS,                   "Q4_K"),
    Rule((DOWN,),   ("Q3_K_L",),          FALCON,                   "Q4_K"),
    Rule((DOWN,),   ("Q3_K_L",),          ALWAYS,                   "Q5_K"),
    Rule((DOWN,),   ("Q4_0",),            both(EIGHTH, WITH),       "Q4_1"),
    Rule((DOWN,),   ("Q5_0",),            both(EIGHTH, WITH),       "Q5_1"),
    Rule((DOWN,),   _IQ4,                 both(EIGHTH, WITHOUT),    "Q5_K"),
    Rule((DOWN,),   ("Q4_K_S",),          both(EIGHTH, OTHERS),     "Q5_K"),
    Rule((DOWN,),   ("Q4_K_M",),          both(FALCON, SIXTEENTH),  "Q6_K"),
    Rule((DOWN,),   ("Q4_K_M",),          both(FALCON, MORE),       "Q5_K"),
    Rule((DOWN,),   ("Q4_K_M",),          FALCON,                   "Q4_K"),
    Rule((DOWN,),   ("Q4_K_M", "Q5_K_M"), MORE,                     "Q6_K"),

    Rule((O,),      ("Q3_K_L",),          FALCON,                   "Q4_K"),
    Rule((O,),      ANY,                  FALCON,                   DEFAULT),
    Rule((O,),      ("Q2_K", "Q2_K_2023", "Q3_K_S", "Q3_K_M", *_IQ4, "Q4_K_S", "Q4_K_M"),
                                          EIGHT_EXPERTS,            "Q5_K"),
    Rule((O,),      ANY,                  EIGHT_EXPERTS,            DEFAULT),
    Rule((O,),      _2_BIT,               ALWAYS,                   "Q3_K"),
    Rule((O,),      ("Q3_K_M",),          ALWAYS,                   "Q4_K"),
    Rule((O,),      ("Q3_K_L",),          ALWAYS,                   "Q5_K"),

    Rule((UP, GATE), ("Q2_K_2023",),      ALWAYS,                   "Q3_K"),
)  # fmt: skip


@dataclass(frozen=True)
class Lift:
    """Tensors of a role that came out as one of `types` get another."""

    role: str
    types: tuple[str, ...]
    when: When
    type: str


LIFTS = (Lift(V, ("Q3_K", "Q4_K"), SIZE_70B, "Q5_K"),)

# ---- exceptions ----

NEVER = (
    ("*_norm.weight*", "a norm"),
    ("*ffn_gate_inp.weight*", "the router of experts"),
    ("*ffn_gate_tid2eid.weight*", "a table of experts"),
    ("position_embd.weight", "an embedding of positions"),
    ("*.position_embd*", "an embedding of positions"),
    ("token_types.weight", "an embedding of token types"),
    *((f"*{name}*", "small and sensitive") for name in (
        "altup", "laurel", "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
        "indexer.q_proj.weight", "attn_rel_b.weight", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos",
        ".patch_embd", ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
    )),
    *((f"*time_mix_{name}.weight*", "small and sensitive") for name in (
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused",
    )),
)  # fmt: skip
"""Weights that are never quantized, and what they are. Neither are vectors, nor what isn't called a weight."""

FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What tensors get instead whose rows are no whole blocks; where that doesn't fit either, LAST_RESORT."""

LAST_RESORT = "F16"
