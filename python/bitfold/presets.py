"""The recipes that have a name: one row for each."""

from __future__ import annotations

from bitfold.activations import FLOAT, KINDS, Activations
from bitfold.rules import Recipe, Rule


def linears(
    name: str,
    description: str,
    format: str,
    use: str = "",
    method: str = "rtn",
    activations: str | Activations = FLOAT,
) -> Recipe:
    rule = Rule("*", format, method, activations=activations)  # type: ignore[arg-type]
    return Recipe(name, description, (rule,), use)


LLM_INT8 = KINDS["llm-int8"].format
ATTENTION = "*[._]att*n*.*"
"""Names of attention blocks: self_attn, self_attention, attention, attn."""

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        linears(
            "fp16",
            "16-bit floats (IEEE half)",
            "fp16",
            "halves a model that is stored in 32 bits; what the others are compared with",
        ),
        linears(
            "bf16",
            "16-bit floats (bfloat16)",
            "bf16",
            "as fp16, for weights beyond fp16's range; fewer digits",
        ),
        linears(
            "int8",
            "8-bit integers, one scale a row",
            "int8-channel",
            "when next to nothing may be lost: half the size",
        ),
        linears(
            "int8-g128",
            "8-bit integers, one scale for 128 weights",
            "int8-g128",
            "int8 where a row has a few weights far larger than the rest",
        ),
        linears(
            "int4-g128",
            "4-bit integers, one scale for 128 weights",
            "int4-g128",
            "the usual start: about a quarter of the size, a small loss",
        ),
        linears(
            "int4-g32",
            "4-bit integers, one scale for 32 weights",
            "int4-g32",
            "int4 with more scales: a smaller loss, a little larger",
        ),
        linears(
            "int4-g128-asym",
            "4-bit integers, scale and zero point for 128 weights",
            "int4-g128-asym",
            "int4 where weights lie to one side of zero",
        ),
        linears(
            "int3-g64",
            "3-bit integers, one scale for 64 weights",
            "int3-g64",
            "when 4 bits don't fit; the loss shows",
        ),
        linears(
            "int2-g64",
            "2-bit integers, one scale for 64 weights",
            "int2-g64",
            "to see what breaks: by rounding alone, too much does",
        ),
        linears(
            "nf4",
            "4-bit normal floats, blocks of 64",
            "nf4-b64",
            "levels placed for bell-shaped weights; what QLoRA trains on",
        ),
        linears(
            "nf4-dq",
            "4-bit normal floats, blocks of 64, 8-bit scales",
            "nf4-b64-dq",
            "nf4 with its scales in 8 bits: smaller, hardly worse",
        ),
        linears(
            "fp4",
            "4-bit floats, blocks of 64",
            "fp4-b64",
            "to compare with bitsandbytes' fp4; nf4 has the better placed levels",
        ),
        linears(
            "fp8",
            "8-bit floats (e4m3), one scale a row",
            "fp8-e4m3-channel",
            "8 bits for weights of very different sizes within a row",
        ),
        linears(
            "fp8-block",
            "8-bit floats (e4m3), one scale for 128 rows and 128 columns",
            "fp8-e4m3-b128x128",
            "8-bit floats as DeepSeek-V3 has them: the scales take next to no room",
        ),
        linears(
            "w8a8",
            "8-bit integers, one scale a row; inputs too, row by row",
            "int8-channel",
            "the fastest where many rows are multiplied at once; outliers in the inputs spoil it",
            activations="int8",
        ),
        linears(
            "w8a8-static",
            "8-bit integers, one scale a row; inputs too, with one step for each layer",
            "int8-channel",
            "with a text for calibration: steps known beforehand; smoothquant-w8a8-static loses less",
            activations="int8-static",
        ),
        linears(
            "smoothquant-w8a8",
            "w8a8, columns with large inputs scaled down and their weights up",
            "int8-channel",
            "with a text for calibration: w8a8 where some columns of inputs are larger than others",
            method="smoothquant",
            activations="int8",
        ),
        linears(
            "llm-int8",
            "8-bit integers, one scale a row; inputs too, but for columns with outliers",
            LLM_INT8,
            "w8a8 for models whose inputs have outliers; with a text it becomes llm-int8-exact",
            activations="llm-int8",
        ),
        linears(
            "llm-int8-exact",
            "llm-int8, usual outlier columns of the weight in 16 bits",
            LLM_INT8,
            "with a text for calibration: models whose outliers make int8 weights lose too much",
            activations="llm-int8-exact",
        ),
        linears(
            "fp8-w8a8",
            "8-bit floats (e4m3), one scale a row; inputs too, row by row",
            "fp8-e4m3-channel",
            "for GPUs that multiply 8-bit floats; elsewhere fp8 has the same size and a smaller loss",
            activations="fp8",
        ),
        linears(
            "fp8-w8a8-static",
            "8-bit floats (e4m3), one scale a row; inputs too, with one scale for each layer",
            "fp8-e4m3-channel",
            "with a text for calibration: fp8-w8a8 with scales known beforehand",
            activations="fp8-static",
        ),
        Recipe(
            "int4-mixed",
            "attention in 8-bit integers, the rest in 4-bit",
            (Rule(ATTENTION, "int8-channel"), Rule("*", "int4-g128")),
            "between int4 and int8: attention in 8 bits, the larger MLPs in 4",
        ),
        linears(
            "gptq-int4-g128",
            "int4-g128, each column making up for the errors before it",
            "int4-g128",
            "with a text for calibration: a smaller loss than int4-g128 at the same size",
            method="gptq",
        ),
        linears(
            "gptq-int3-g64",
            "int3-g64, each column making up for the errors before it",
            "int3-g64",
            "with a text for calibration, when 4 bits don't fit",
            method="gptq",
        ),
        linears(
            "awq-int4-g128",
            "int4-g128, columns with large inputs scaled up, ranges clipped",
            "int4-g128",
            "with a text for calibration: a smaller loss than int4-g128 at the same size",
            method="awq",
        ),
        linears(
            "awq-int3-g128",
            "int3-g128, columns with large inputs scaled up, ranges clipped",
            "int3-g128",
            "with a text for calibration, when 4 bits don't fit",
            method="awq",
        ),
    )
}
"""The presets: linear layers only; embeddings, output head and norms keep their source dtype."""

PAIRS: dict[str, Rule] = {
    name: rule
    for name, recipe in RECIPES.items()
    for rule in recipe.rules
    if rule.method == "rtn" and not rule.activations.is_float
}
"""Weights and activations that go together: presets that a method can stand in front of ("gptq-w8a8")."""
