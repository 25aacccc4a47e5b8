"""What a name means: a recipe, a format string, or a GGUF type or file name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from bitfold import recipes
from bitfold.explain import gguf
from bitfold.figures import demo_figures
from bitfold.formats import FORMATS, Format, parse, stored_bytes
from bitfold.gguf import example, mixes
from bitfold.gguf.mixes import Mix
from bitfold.presets import RECIPES
from bitfold.rules import KEEP, Recipe

SIZE = 4096  # rows and columns of the matrix that bits per weight are quoted for

_GRIDS = {
    "cast": "each weight is a float by itself; there is no scale",
    "minifloat": "each code is an 8-bit float, times the scale",
    "integer": "codes are evenly spaced integers, times the scale",
    "block": "codes, scales and all else of a block lie together, as in GGUF files",
    "codebook": "codes are indices into a table of 16 levels between -1 and 1, times the scale",
}
_USES = {
    "fp16": "16 bits for weights up to 65504",
    "bf16": "16 bits with the range of 32-bit floats and fewer digits",
    "fp8-e4m3": "weights of very different sizes under one scale; the more precise of the two 8-bit floats",
    "fp8-e5m2": "the wider range of the two 8-bit floats, with fewer digits",
    "int8": "when next to nothing may be lost",
    "int4": "the usual choice for a quarter of the size",
    "int3": "when 4 bits don't fit; the loss shows",
    "int2": "to see what breaks: by rounding alone, too much does",
    "nf4": "4 bits for weights that are spread like a bell; what QLoRA trains on",
    "fp4": "to compare with bitsandbytes' fp4; nf4 has the better placed levels",
    "q4_0": "llama.cpp's oldest 4 bits, simple to compute with",
    "q4_1": "q4_0 with a minimum",
    "q5_0": "q4_0 with a bit more",
    "q5_1": "q4_1 with a bit more",
    "q8_0": "llama.cpp's 8 bits: when next to nothing may be lost",
    "q2_k": "when nothing larger fits",
    "q3_k": "when 4 bits don't fit",
    "q4_k": "the usual 4 bits of GGUF files: a scale and a minimum for 32 weights",
    "q5_k": "q4_k with a bit more",
    "q6_k": "for the tensors that suffer most, beside q4_k and q5_k",
    "iq4_nl": "4 bits with levels placed for bell-shaped weights, for rows that are no multiple of 256",
    "iq4_xs": "the smallest of the 4-bit blocks",
    "mxfp4": "4-bit floats under a power of two; the format of gpt-oss",
}


@dataclass(frozen=True)
class Meaning:
    """name: as it is spelled canonically; kind: "recipe", "format" or "GGUF"; facts: label and text, to be read in
    this order; bits_per_weight: None where it depends on the model."""

    name: str
    kind: str
    facts: tuple[tuple[str, str], ...]
    bits_per_weight: float | None


def explain_name(text: str) -> list[Meaning]:
    """What a preset, a recipe's TOML file, a format string, a GGUF type or the name of a GGUF file means. A recipe
    is followed by its formats, a format by the file type of that name.

    Raises ValueError, with near matches, for a name that is none of them.
    """
    mix = gguf.find(text)
    if mix is not None and text not in RECIPES:
        return [*([_format(parse(text))] if text in FORMATS else []), _gguf(mix)]
    if text.lower().endswith(".gguf"):
        raise ValueError(
            f"{text!r} has no type in its name that bitfold knows; these are {', '.join(mixes.MIXES)}; "
            "'bitfold inspect' says what is in a file"
        )
    if text in RECIPES or text.endswith(".toml") or recipes.is_pair(text):
        recipe = recipes.get(text)
        formats = {rule.format: None for rule in recipe.rules if rule.format is not None}
        return [_recipe(recipe), *(_format(parse(format)) for format in formats)]
    try:
        return [_format(parse(text))]
    except ValueError as error:
        raise ValueError(_unknown(text, error)) from error


def _unknown(text: str, error: ValueError) -> str:
    if text.partition("-")[0] in {family.partition("-")[0] for family in FORMATS}:
        return str(error)
    known = dict.fromkeys([*RECIPES, *FORMATS, *(name.lower() for name in mixes.MIXES)])
    near = difflib.get_close_matches(text.lower(), known)
    hint = f"did you mean {' or '.join(near)}?" if near else "give numbers, a recipe, a format or a GGUF type"
    return f"{text!r} is no number and no name that bitfold knows: {hint}"


def _recipe(recipe: Recipe) -> Meaning:
    facts = [("what", recipe.description or "a recipe of your own")]
    if recipe.kv_cache:
        facts.append(("KV cache", f"{recipe.kv_cache}, that the formats were chosen along with"))
    for rule in recipe.rules:
        method = "" if rule.method == "rtn" else f" by {rule.method}"
        inputs = "" if rule.activations.is_float else f"; {rule.activations}: {rule.activations.says}"
        bound = rule.keep_outlier_layers
        passed = "" if bound is None else f"; not layers that, on a text, {bound}"
        facts.append(("rule", f"{rule.pattern!r} gets {rule.format or KEEP}{method}{inputs}{passed}"))
    facts.append(
        ("kept", "embeddings, output head, norms and routers of experts, unless a rule spells their name")
    )
    if recipe.use:
        facts.append(("use", recipe.use))
    bits = None
    figures = demo_figures()
    if RECIPES.get(recipe.name) == recipe and recipe.name in figures.recipes:
        figure = figures.recipes[recipe.name]
        bits = figure.bits_per_weight if len(recipe.rules) > 1 else None
        facts.append(
            (
                "measured",
                f"on the demo model {figure.bits_per_weight:.2f} bits per weight, KL {1e3 * figure.mean_kl:.3g} "
                f"+- {1e3 * figure.mean_kl_error:.1g} thousandths of a nat, the same top token in {figure.top1:.1%}",
            )
        )
    return Meaning(recipe.name, "recipe", tuple(facts), bits)


def _format(format: Format) -> Meaning:
    bits = 8 * stored_bytes(format, SIZE, SIZE) / SIZE**2
    facts = [("codes", f"{format.bits} bits a weight: {_GRIDS[format.grid]}")]
    if format.grid == "integer":
        half = 1 << (format.bits - 1)
        levels = f"0 to {2 * half - 1}, and a zero point" if format.asymmetric else f"{-half} to {half - 1}"
        facts.append(
            ("levels", f"{levels}; {'an extra code a group' if format.asymmetric else 'symmetric about 0'}")
        )
    if format.grid == "block":
        facts.append(("a block", f"{format.group} weights: {gguf.STRUCTURES[format.family.upper()]}"))
    elif format.grid != "cast":
        facts.append(("scale", f"one in {_scale_dtype(format)} for {_granularity(format)}"))
    size = f"{bits:.4g} bits per weight"
    if bits > format.bits:
        size += f" ({SIZE} x {SIZE} weights), {bits - format.bits:.3g} of them for scales"
    facts.append(("size", size))
    used = [
        name for name, recipe in RECIPES.items() if format.canonical in {rule.format for rule in recipe.rules}
    ]
    if used:
        facts.append(("recipes", ", ".join(used)))
    facts.append(("use", _USES[format.family]))
    return Meaning(format.canonical, "format", tuple(facts), bits)


def _scale_dtype(format: Format) -> str:
    return "8 bits, with a scale of its own for 256 of them" if format.scale == "nested" else format.scale


def _granularity(format: Format) -> str:
    if format.group == 0:
        return "the whole matrix"
    if format.group_rows > 1:
        return f"{format.group} consecutive weights of each of {format.group_rows} rows"
    return "each row" if format.group < 0 else f"{format.group} consecutive weights of a row"


def _gguf(mix: Mix) -> Meaning:
    kind, (total, bits) = mix.default, example.size(mix)
    block = mixes.block_values(kind)
    count, nbytes = f"{block} weights in " if block > 1 else "", mixes.row_bytes(kind, block)
    facts = [
        ("most tensors", f"{kind}, {mixes.bits_per_weight(kind):g} bits per weight"),
        ("a block" if block > 1 else "a weight", f"{count}{nbytes} bytes: {gguf.STRUCTURES[kind]}"),
        *(("mix", text) for text in gguf.exceptions(mix)),
        ("size", f"{example.NAME}: {total / 1e9:.2f} GB, {bits:.2f} bits per weight"),
        ("use", mix.use),
        ("bitfold", f"bitfold quantize MODEL out.gguf --recipe {mix.name.lower()}"),
    ]
    return Meaning(mix.name, "GGUF", tuple(facts), bits)
