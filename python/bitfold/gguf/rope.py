"""Rotary embeddings: what a configuration says of their frequencies, and how a GGUF file says the same.

A pair of numbers i of a head turns by position * base^(-2i / d). Longer texts than a model was trained on make that
frequency smaller, by a law that is "linear" or "yarn" (keys in the file), or by a factor for each i: Llama 3's law
("llama3") and a table ("longrope") become tensors of factors, by which llama.cpp divides the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bitfold.fields import Fields
from bitfold.gguf.keys import Keys
from bitfold.shards import CheckpointError

Scalar = bool | int | float | str

LLAMA3_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROTARY = (LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS)
_LOW, _HIGH, _TRAINED = 1.0, 4.0, 8192  # of every model of Llama 3 so far
_TOLERANCE = 1e-5  # of a factor that was rounded to float32


def parameters(text: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The parameters of the layers that see everything, and those of the layers with a sliding window if they have
    their own. text: a model's configuration as transformers reads it, whichever form it was written in.
    """
    given = _fields(text.rope_parameters)
    if "full_attention" in given:
        return given.take("full_attention", dict), given.take("sliding_attention", dict)
    return dict(text.rope_parameters), None


def _fields(parameters: Mapping[str, Any]) -> Fields:
    return Fields(parameters, "the configuration", "rope_parameters")


def rotated(text: Any, head: int) -> int:
    """How many numbers of a head are rotated."""
    return int(head * _fields(parameters(text)[0]).real("partial_rotary_factor", 1.0))


def to_metadata(text: Any, head: int) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
    """The keys behind "<architecture>." and the tensors of factors; head: numbers in a head.

    Raises CheckpointError for a law that GGUF has no word for.
    """
    full, sliding = parameters(text)
    keys: dict[str, Scalar] = {
        "rope.dimension_count": rotated(text, head),
        "rope.freq_base": _fields(full).real("rope_theta"),
    }
    if sliding is not None:
        if sliding.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"the configuration scales the rotary frequencies of windowed layers by '{sliding['rope_type']}'; "
                "GGUF can only scale those of the others"
            )
        keys["rope.freq_base_swa"] = _fields(sliding).real("rope_theta")
    law = _fields(full).take("rope_type", str, "default")
    if law not in _TO_METADATA:
        raise CheckpointError(
            f"the configuration scales rotary frequencies by '{law}'; GGUF knows {', '.join(_TO_METADATA)}"
        )
    more, factors = _TO_METADATA[law](text, full, head)
    return keys | more, factors


def _default(
    text: Any, full: Mapping[str, Any], head: int
) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
    return {}, {}


def _linear(
    text: Any, full: Mapping[str, Any], head: int
) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
    return {"rope.scaling.type": "linear", "rope.scaling.factor": _fields(full).real("factor")}, {}


def _yarn(text: Any, full: Mapping[str, Any], head: int) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
    taken = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}
    taken["attention_factor"] = None
    for name, value in taken.items():
        if full.get(name, value) not in (value, None):
            raise CheckpointError(
                f"the configuration scales by yarn with {name} {full[name]!r}; bitfold writes only {value!r}"
            )
    trained = _fields(full).real("original_max_position_embeddings", text.max_position_embeddings)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": _fields(full).real("factor"),
        "rope.scaling.original_context_length": int(trained),
    }, {}


def _llama3(
    text: Any, full: Mapping[str, Any], head: int
) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
    numbers = (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    return {}, {LLAMA3_FACTORS: llama3_factors(rotated(text, head), *map(_fields(full).real, numbers))}


def _longrope(
    text: Any, full: Mapping[str, Any], head: int
) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
    fields = _fields(full)
    trained = int(fields.real("original_max_position_embeddings"))
    if trained < 2:
        fields.refuse("original_max_position_embeddings", "at least 2")
    stretch = fields.real("factor", text.max_position_embeddings / trained)
    usual = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(trained))
    factor = fields.real("attention_factor", usual)
    half = rotated(text, head) // 2
    tables = {LONG_FACTORS: fields.reals("long_factor"), SHORT_FACTORS: fields.reals("short_factor")}
    for name, table in tables.items():
        if len(table) != half:
            raise CheckpointError(
                f"the configuration has {len(table)} factors for {name}; half of the {2 * half} rotated numbers of a "
                f"head makes {half}"
            )
    keys: dict[str, Scalar] = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": trained,
        "rope.scaling.attn_factor": factor,
    }
    return keys, tables


_TO_METADATA: dict[
    str, Callable[[Any, Mapping[str, Any], int], tuple[dict[str, Scalar], dict[str, list[float]]]]
] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def llama3_factors(
    count: int, base: float, factor: float, low: float, high: float, trained: float
) -> list[float]:
    """By what Llama 3 divides each frequency: 1 for waves far shorter than the trained context, `factor` for longer
    ones, a blend between (https://github.com/meta-llama/llama-models, apply_scaling)."""
    factors = []
    for i in range(count // 2):
        wave = 2 * math.pi * base ** (2 * i / count)
        if wave < trained / high:
            factors.append(1.0)
        elif wave > trained / low:
            factors.append(factor)
        else:
            share = (trained / wave - low) / (high - low)
            factors.append(1 / ((1 - share) / factor + share))
    return factors


# ---- back ----


def to_config(
    keys: Keys, factors: Mapping[str, list[float]], head: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `parameters` gave, from the keys behind "<architecture>." and the tensors of factors.

    Raises CheckpointError for a law that transformers has no word for.
    """
    base = keys.real("rope.freq_base", 10000.0)
    full: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    sliding = {"rope_theta": keys.real("rope.freq_base_swa", 10000.0), "rope_type": "default"}
    count = keys.whole("rope.dimension_count", head, least=2, most=head)
    if count != head:
        full["partial_rotary_factor"] = count / head
    law = keys.text("rope.scaling.type", "linear" if "rope.scaling.factor" in keys else "none")
    if LLAMA3_FACTORS in factors:
        full |= _llama3_law(factors[LLAMA3_FACTORS], count, base)
    elif LONG_FACTORS in factors and SHORT_FACTORS in factors:
        trained = keys.whole("rope.scaling.original_context_length")
        full |= {
            "rope_type": "longrope",
            "long_factor": factors[LONG_FACTORS],
            "short_factor": factors[SHORT_FACTORS],
            "original_max_position_embeddings": trained,
            "factor": keys.whole("context_length") / trained,
        }
        if "rope.scaling.attn_factor" in keys:
            full["attention_factor"] = keys.real("rope.scaling.attn_factor")
    elif law == "linear":
        full |= {"rope_type": "linear", "factor": keys.real("rope.scaling.factor")}
    elif law == "yarn":
        full |= {
            "rope_type": "yarn",
            "factor": keys.real("rope.scaling.factor"),
            "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length"),
        }
    elif law != "none":
        raise CheckpointError(f"the file scales rotary frequencies by '{law}', which bitfold can't run")
    return full, sliding


def _llama3_law(factors: list[float], count: int, base: float) -> dict[str, Any]:
    """The numbers of Llama 3's law that make these factors.

    Where the blend begins and ends is a convention (1 and 4); the trained context is the usual one or follows from any
    factor within the blend.
    """
    factor = max(factors)
    contexts = [_TRAINED]
    for i, value in enumerate(factors):
        if 1 < value < factor:
            share = (1 / value - 1 / factor) / (1 - 1 / factor)
            contexts.append(round(2 * math.pi * base ** (2 * i / count) * (_LOW + share * (_HIGH - _LOW))))
    for trained in contexts:
        made = llama3_factors(count, base, factor, _LOW, _HIGH, trained)
        if len(made) == len(factors) and all(
            math.isclose(one, other, rel_tol=_TOLERANCE) for one, other in zip(made, factors, strict=True)
        ):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": trained,
            }
    raise CheckpointError(f"the factors in {LLAMA3_FACTORS} are none that Llama 3's law makes")
