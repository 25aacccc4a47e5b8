"""Recipes: which module gets which format, from names and shapes alone; TOML; typos."""

from pathlib import Path

import bitfold
import pytest
from bitfold import Recipe, Rule, formats, recipes
from bitfold.quantizers.gptq import GptqOptions
from bitfold.recipes import ModuleInfo

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
LLAMA = {
    "model.embed_tokens": ModuleInfo("embedding", (100, 64)),
    **{f"model.layers.{i}.{name}": ModuleInfo("linear", (64, 64)) for i in range(2) for name in LAYERS},
    "lm_head": ModuleInfo("linear", (100, 64), is_head=True),
}
TIED = {**LLAMA, "lm_head": ModuleInfo("linear", (100, 64), is_head=True, tied_to="model.embed_tokens")}
EXPERTS = {
    **LLAMA,
    "model.layers.1.mlp.experts.gate_up_proj": ModuleInfo("experts", (8, 64, 32), obstacle="it is a stack"),
}


def recipe(*rules):
    return Recipe("mine", "", tuple(Rule(*rule) for rule in rules))


def assigned(rules, modules=LLAMA):
    return {name: item.format for name, item in recipes.assign(recipe(*rules), modules).items()}


# ---- presets ----

PRESETS = {
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8-channel",
    "int8-g128": "int8-g128",
    "int4-g128": "int4-g128",
    "int4-g32": "int4-g32",
    "int4-g128-asym": "int4-g128-asym",
    "int3-g64": "int3-g64",
    "int2-g64": "int2-g64",
    "nf4": "nf4-b64",
    "nf4-dq": "nf4-b64-dq",
    "fp4": "fp4-b64",
    "fp8": "fp8-e4m3-channel",
    "fp8-block": "fp8-e4m3-b128x128",
    "w8a8": "int8-channel",
    "w8a8-static": "int8-channel",
    "smoothquant-w8a8": "int8-channel",
    "llm-int8": "int8-channel-sfp32",
    "llm-int8-exact": "int8-channel-sfp32",
    "fp8-w8a8": "fp8-e4m3-channel",
    "fp8-w8a8-static": "fp8-e4m3-channel",
    "gptq-int4-g128": "int4-g128",
    "gptq-int3-g64": "int3-g64",
    "awq-int4-g128": "int4-g128",
    "awq-int3-g128": "int3-g128",
}


def test_the_presets_are_the_promised_ones():
    assert set(bitfold.RECIPES) == {*PRESETS, "int4-mixed"}
    for name, preset in bitfold.RECIPES.items():
        assert preset.name == name
        assert preset.description
        assert "\n" not in preset.description


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_linears_and_keep_embeddings_and_head(name):
    result = recipes.assign(recipes.get(name), LLAMA)
    assert list(result) == list(LLAMA)
    for module, assignment in result.items():
        kept = module in ("model.embed_tokens", "lm_head")
        assert assignment.format == (None if kept else PRESETS[name])
        assert (assignment.rule is None) == kept
        assert assignment.reason
    assert "embedding" in result["model.embed_tokens"].reason
    assert "output head" in result["lm_head"].reason


INPUTS = {
    "w8a8": "int8",
    "w8a8-static": "int8-static",
    "smoothquant-w8a8": "int8",
    "llm-int8": "llm-int8",
    "llm-int8-exact": "llm-int8-exact",
    "fp8-w8a8": "fp8",
    "fp8-w8a8-static": "fp8-static",
}


def test_presets_that_need_calibration_say_so_by_their_name():
    """By a method in front, or by activations that a layer can't have from its weight alone behind."""
    for name, preset in bitfold.RECIPES.items():
        methods = {rule.method for rule in preset.rules}
        for method in ("gptq", "awq", "smoothquant"):
            assert name.startswith(f"{method}-") == (methods == {method})
        assert preset.needs_calibration == (methods != {"rtn"} or name.endswith(("-static", "-exact")))


def test_presets_whose_inputs_are_rounded():
    for name, preset in bitfold.RECIPES.items():
        assert {str(rule.activations) for rule in preset.rules} == {INPUTS.get(name, "float")}


@pytest.mark.parametrize("name", [name for name in INPUTS if not name.startswith("smoothquant")])
def test_a_method_stands_in_front_of_presets_whose_inputs_are_rounded(name):
    (rule,) = recipes.get(f"gptq-{name}").rules
    assert rule == Rule("*", PRESETS[name], "gptq", activations=INPUTS[name])
    with pytest.raises(ValueError, match="is unknown"):
        recipes.get(f"gptq-smoothquant-{name}")


@pytest.mark.parametrize("attention", ["self_attn", "attn", "attention", "self_attention"])
def test_mixed_finds_attention_whatever_it_is_called(attention):
    modules = {name.replace("self_attn", attention): info for name, info in LLAMA.items()}
    result = recipes.assign(recipes.get("int4-mixed"), modules)
    for name in modules:
        if "layers" in name:
            expected = "int8-channel" if attention in name else "int4-g128"
            assert result[name].format == expected


def test_mixed_needs_attention():
    with pytest.raises(ValueError, match="matches no module"):
        recipes.assign(recipes.get("int4-mixed"), {"mlp.up": ModuleInfo("linear", (8, 8))})


def test_any_format_is_a_recipe():
    tensor = recipes.get("int4-tensor")
    assert tensor.name == "int4-tensor"
    assert tensor.rules == (Rule("*", "int4-tensor"),)
    assert recipes.get("int4").rules[0].format == "int4-g128"
    assert recipes.get(tensor) is tensor


def test_any_format_with_a_method_in_front_is_a_recipe():
    found = recipes.get("gptq-nf4-b32")
    assert found.name == "gptq-nf4-b32"
    assert found.rules == (Rule("*", "nf4-b32", "gptq"),)
    assert found.needs_calibration
    assert not recipes.get("nf4-b32").needs_calibration


@pytest.mark.parametrize(
    ("typo", "suggestion"),
    [
        ("int4-mixd", "int4-mixed"),
        ("nf4dq", "nf4-dq"),
        ("q4", "int4-g128"),
        ("fb16", "bf16"),
        ("int4-g8", "16"),
        ("gptq-int4-g8", "gptq-int4-g128"),
        ("gptq-int4-128", "gptq-int4-g128"),
        ("gtpq-int4-g128", "gptq-int4-g128"),
        ("gptq", "gptq-int4-g128"),
        ("w8a8-statik", "w8a8-static"),
        ("llmint8", "llm-int8"),
        ("smothquant-w8a8", "smoothquant-w8a8"),
    ],
)
def test_unknown_recipes_get_suggestions(typo, suggestion):
    with pytest.raises(ValueError, match=suggestion) as error:
        recipes.get(typo)
    assert repr(typo) in str(error.value)
    assert "\n" not in str(error.value)


# ---- rules ----


def test_first_match_wins_and_the_rest_is_kept():
    result = assigned([("*.0.mlp.*", None), ("*.mlp.*", "int4"), ("model.layers.1.*", "int8")])
    assert result["model.layers.0.mlp.gate_proj"] is None
    assert result["model.layers.1.mlp.gate_proj"] == "int4-g128"
    assert result["model.layers.1.self_attn.q_proj"] == "int8-channel"
    assert result["model.layers.0.self_attn.q_proj"] is None


def test_keep_is_none():
    assert Rule("*", "keep") == Rule("*", None)


@pytest.mark.parametrize(
    "pattern", ["lm_head", "*.lm_head", "model.embed_tokens", "*.embed_tokens", "*embed_tokens"]
)
def test_embeddings_and_head_must_be_named(pattern):
    modules = {f"x.{name}": info for name, info in LLAMA.items()} if pattern == "*.lm_head" else LLAMA
    rules = [(pattern, "int8"), ("*", "int4")]
    if pattern == "*embed_tokens":
        with pytest.raises(ValueError, match=r"must be named.*'model\.embed_tokens'"):
            assigned(rules, modules)
        return
    result = assigned(rules, modules)
    special = {name: format for name, format in result.items() if "layers" not in name}
    named = pattern.rpartition(".")[2]
    assert special == {name: "int8-channel" if name.endswith(named) else None for name in special}


def test_broad_patterns_leave_the_embedding_alone():
    assert assigned([("model.*", "int4")])["model.embed_tokens"] is None


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("*.self_atn.*", "did you mean 'self_attn'"),
        ("*.q_porj", "did you mean 'q_proj'"),
        ("decoder.*", "10, such as 'lm_head'"),
        ("lm_haed", "did you mean 'lm_head'"),
    ],
)
def test_a_rule_that_matches_nothing(pattern, hint):
    with pytest.raises(ValueError, match="matches no module") as error:
        assigned([(pattern, "int8"), ("*", "int4")])
    assert hint in str(error.value)
    assert repr(pattern) in str(error.value)


def test_a_rule_behind_one_that_takes_all():
    with pytest.raises(ValueError, match=r"'\*\.mlp\.\*' .* never wins: put it before rule '\*'"):
        assigned([("*", "int4"), ("*.mlp.*", "int8")])
    # A catch-all at the end is no mistake, even where nothing is left for it.
    assigned([("model.layers.*", "int4"), ("*", None)])


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="no linear layer"):
        recipes.assign(recipes.get("int8"), {})


def test_tied_modules_need_one_format():
    assert assigned([("*", "int4")], TIED)["lm_head"] is None
    both = assigned([("lm_head", "int8"), ("*.embed_tokens", "int8"), ("*", "int4")], TIED)
    assert both["lm_head"] == both["model.embed_tokens"] == "int8-channel"
    for rules in (
        [("lm_head", "int8"), ("*", "int4")],
        [("lm_head", "int8"), ("*.embed_tokens", "int4"), ("*", "int4")],
    ):
        with pytest.raises(ValueError, match=r"model\.embed_tokens and lm_head share one weight"):
            assigned(rules, TIED)


def test_experts_are_never_skipped_in_silence():
    for rules in ([("*", "int4")], [("*.self_attn.*", "int4")]):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts.*gate_up_proj.*keep"):
            assigned(rules, EXPERTS)
    result = assigned([("*.experts", None), ("*", "int4")], EXPERTS)
    assert result["model.layers.1.mlp.experts.gate_up_proj"] is None
    assert result["model.layers.1.mlp.down_proj"] == "int4-g128"


MIXTURE = {
    **LLAMA,
    "model.layers.1.mlp.gate": ModuleInfo("linear", (8, 64), is_router=True, obstacle="it is a Router"),
    "model.layers.1.mlp.shared_gate": ModuleInfo("linear", (1, 64), is_router=True),
    "model.layers.1.mlp.experts.gate_up_proj": ModuleInfo("experts", (8, 64, 32)),
    "model.layers.1.mlp.experts.down_proj": ModuleInfo("experts", (8, 32, 32)),
}


def test_experts_are_reached_by_their_name_and_their_home():
    gate_up, down = (f"model.layers.1.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
    assert assigned([("*", "int4-g32")], MIXTURE)[down] == "int4-g32"
    both = assigned([("*.experts", "int8"), ("*", "int4-g32")], MIXTURE)
    assert both[gate_up] == both[down] == "int8-channel"
    one = assigned([("*.experts.down_proj", "int8"), ("*", "int4-g32")], MIXTURE)
    assert (one[gate_up], one[down]) == ("int4-g32", "int8-channel")
    with pytest.raises(ValueError, match=r"order 'groups'.*'static' or 'none'"):
        recipes.assign(
            Recipe("mine", "", (Rule("*", "int4-g32", "gptq", GptqOptions(order="groups")),)), MIXTURE
        )


def test_routers_are_kept_unless_a_rule_spells_their_name():
    found = recipes.assign(recipe(("*", "int4-g32")), MIXTURE)
    for name in ("model.layers.1.mlp.gate", "model.layers.1.mlp.shared_gate"):
        assert found[name].format is None
        assert found[name].reason == "the router of the experts is kept by default"
    spelled = assigned([("*.shared_gate", "int8"), ("*", "int4-g32")], MIXTURE)
    assert spelled["model.layers.1.mlp.shared_gate"] == "int8-channel"
    with pytest.raises(
        ValueError, match=r"mlp\.gate \(of shape \[8, 64\]\) can't be quantized, it is a Router"
    ):
        assigned([("*.gate", "int8"), ("*", "int4-g32")], MIXTURE)


def test_subclasses_are_never_touched_in_silence():
    odd = ModuleInfo("linear", (8, 8), obstacle="it is a Lora, a subclass of nn.Linear")
    with pytest.raises(ValueError, match=r"module a\.b .*it is a Lora"):
        assigned([("*", "int4")], {**LLAMA, "a.b": odd})
    assert assigned([("a.b", None), ("*", "int4")], {**LLAMA, "a.b": odd})["a.b"] is None
    embedding = ModuleInfo("embedding", (8, 8), obstacle="it is a Scaled, a subclass of nn.Embedding")
    assert assigned([("*", "int4")], {**LLAMA, "a.b": embedding})["a.b"] is None
    with pytest.raises(ValueError, match=r"a\.b"):
        assigned([("a.b", "int4"), ("*", "int4")], {**LLAMA, "a.b": embedding})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("*", "int5"), "int5"),
        (("*", "int4", "gptqq"), "method of rule .* is 'gptqq'"),
        (("", "int4"), "pattern"),
    ],
)
def test_bad_rules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(*arguments)


# ---- TOML ----


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_toml(tmp_path):
    path = write(
        tmp_path,
        """
        name = "attention-int8"
        description = "attention in 8 bits"
        [[rules]]
        match = "*.self_attn.*"
        format = "int8-g128"
        [[rules]]
        match = "*.1.mlp.*"
        format = "keep"
        [[rules]]
        format = "int4"
        method = "rtn"
        """,
    )
    expected = (Rule("*.self_attn.*", "int8-g128"), Rule("*.1.mlp.*", None), Rule("*", "int4-g128"))
    for given in (path, str(path)):
        assert recipes.get(given) == Recipe("attention-int8", "attention in 8 bits", expected)
    assert recipes.read(write(tmp_path, '[[rules]]\nformat = "nf4"')).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rules]\n", "is not TOML"),
        ("name = 'x'\n", r"at least one \[\[rules\]\]"),
        ("rules = 3\n", r"at least one \[\[rules\]\]"),
        ("[[rules]]\nfromat = 'int4'\n", "rule 1 has the unknown key 'fromat': did you mean 'format'"),
        ("nmae = 'x'\n[[rules]]\nformat = 'int4'\n", "did you mean 'name'"),
        ("[[rules]]\nmatch = '*'\n", "rule 1 has no format"),
        ("[[rules]]\nformat = 4\n", "format is 4; it must be a string"),
        ("[[rules]]\nformat = 'int44'\n", "int44"),
        ("[[rules]]\nformat = 'int4'\nmethod = 'magic'\n", "method of rule"),
    ],
)
def test_bad_toml(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        recipes.get(path)
    assert "mine.toml" in str(error.value)


def test_missing_toml():
    with pytest.raises(ValueError, match=r"nowhere\.toml can't be read: No such file"):
        recipes.get("nowhere.toml")


def test_rules_hold_canonical_formats():
    for preset in bitfold.RECIPES.values():
        for rule in preset.rules:
            assert formats.parse(rule.format).canonical == rule.format


def test_rows_that_are_no_whole_blocks_are_told_before_anything_changes():
    modules = {"layers.0.up": ModuleInfo("linear", (8, 200)), "layers.0.down": ModuleInfo("linear", (8, 256))}
    with pytest.raises(ValueError, match=r"layers\.0\.up can't .* rule '\*': k is 200; .* multiple of 256"):
        recipes.assign(Recipe("blocks", "", (Rule("*", "q4_k"),)), modules)
    kept = Recipe("blocks", "", (Rule("*.up"), Rule("*", "q4_k")))
    assert [item.format for item in recipes.assign(kept, modules).values()] == [None, "q4_k"]


# ---- methods ----


def test_options_of_a_method_in_toml(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[rules]]\nmatch = "*.self_attn.*"\nformat = "int4"\n'
        'method = "gptq"\ndamping = 1\norder = "none"\nsearch = false\n'
        '[[rules]]\nformat = "int3-g64"\nmethod = "gptq"\n'
    )
    one, two = recipes.get(path).rules
    assert one == Rule("*.self_attn.*", "int4", "gptq", GptqOptions(damping=1, order="none", search=False))
    assert two == Rule("*", "int3-g64", "gptq")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('method = "gptqq"', "must be one of rtn, gptq, awq"),
        ("damping = 0.1", "unknown key 'damping'"),
        ('method = "gptq"\ndampin = 0.1', "did you mean 'damping'"),
        ('method = "gptq"\ndamping = "much"', "damping is 'much'; it must be a float"),
        ('method = "gptq"\nsearch = 1', "search is 1; it must be a bool"),
        ('method = "gptq"\ndamping = -1', "damping is -1"),
    ],
)
def test_options_that_will_not_do(line, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f'[[rules]]\nformat = "int4"\n{line}\n')
    with pytest.raises(ValueError, match=message):
        recipes.get(path)


def test_options_belong_to_their_method():
    with pytest.raises(ValueError, match=r"options of rule '\*' are GptqOptions; for rtn they must be None"):
        Rule("*", "int4", "rtn", GptqOptions())
