"""The file types of GGUF: which tensor gets which type, as llama-quantize has it; sizes; what users want otherwise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bitfold.formats import FORMATS
from bitfold.gguf import example, mixes
from bitfold.gguf.assign import Facts, Item, Overrides, assign, fallback_notes, in_file_order, tensor_bytes
from bitfold.gguf.mixes import MIXES, TYPES
from bitfold.shards import CheckpointError
from command import call, call_json
from tiny import LLAMA_2_7B

GOLDEN = json.loads((Path(__file__).parent / "data" / "gguf" / "mixes.json").read_text())

# Bytes of tensor data of Llama-2-7B, norms in F32: what files of these types have, from their published sizes and
# llama-quantize.
BYTES = {
    "Q2_K": 2_532_122_624,
    "Q2_K_2023": 2_825_199_616,
    "Q2_K_S": 2_318_802_944,
    "Q3_K_S": 2_947_563_520,
    "Q3_K_M": 3_297_263_616,
    "Q3_K_L": 3_596_369_920,
    "Q4_0": 3_825_065_984,
    "Q4_1": 4_238_008_320,
    "IQ4_XS": 3_646_775_296,
    "IQ4_NL": 3_847_610_368,
    "Q4_K_S": 3_855_998_976,
    "Q4_K_M": 4_080_263_168,
    "Q5_0": 4_650_950_656,
    "Q5_K_S": 4_650_950_656,
    "Q5_1": 5_063_892_992,
    "Q5_K_M": 4_782_415_872,
    "Q6_K": 5_528_453_120,
    "Q8_0": 7_160_348_672,
    "MXFP4_MOE": 7_160_348_672,
    "F16": 13_477_363_712,
    "BF16": 13_477_363_712,
    "F32": 26_953_662_464,
}
WITH_IMPORTANCE = BYTES | {
    "Q4_0": 3_836_338_176,
    "Q5_0": 4_662_222_848,
    "IQ4_XS": 3_618_594_816,
    "IQ4_NL": 3_825_065_984,
}


def model(
    architecture: str,
    layers: int,
    hidden: int,
    ffn: int,
    vocab: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    tied: bool = False,
    fused: bool = False,
    head_dim: int = 0,
) -> tuple[Facts, list[Item]]:
    """A model of these sizes: in F16, vectors and routers in F32; fused: one matrix for queries, keys and values."""
    head_dim = head_dim or hidden // heads
    stack, suffix = ((experts,), "_exps") if experts else ((), "")
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if not tied:
        shapes["output"] = (vocab, hidden)
    for layer in range(layers):
        rows = {
            "attn_norm": (hidden,),
            "attn_output": (hidden, heads * head_dim),
            "ffn_norm": (hidden,),
            f"ffn_down{suffix}": (*stack, hidden, ffn),
            f"ffn_up{suffix}": (*stack, ffn, hidden),
        }
        if fused:
            rows["attn_qkv"] = ((heads + 2 * kv_heads) * head_dim, hidden)
        else:
            rows["attn_q"] = (heads * head_dim, hidden)
            rows |= dict.fromkeys(("attn_k", "attn_v"), (kv_heads * head_dim, hidden))
            rows[f"ffn_gate{suffix}"] = (*stack, ffn, hidden)
        if experts:
            rows["ffn_gate_inp"] = (experts, hidden)
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in rows.items()}
    items = [
        Item(f"{name}.weight", shape, "F32" if len(shape) == 1 or "gate_inp" in name else "F16")
        for name, shape in shapes.items()
    ]
    return Facts(architecture, layers, heads, kv_heads, experts), items


def small(**sizes) -> tuple[Facts, list[Item]]:
    defaults = {
        "architecture": "llama", "layers": 4, "hidden": 512, "ffn": 1024, "vocab": 300, "heads": 8, "kv_heads": 4,
    }  # fmt: skip
    return model(**(defaults | sizes))


def types(
    mix: str, what: tuple[Facts, list[Item]], overrides: Overrides | None = None, **options
) -> dict[str, str]:
    chosen = assign(MIXES[mix], *what, overrides or Overrides(), **options)
    return {choice.name: choice.after for choice in chosen}


# ---- as llama-quantize has it ----


def unpacked(text: str) -> list[str]:
    """ "Q6_K*2 Q4_K" is Q6_K, Q6_K, Q4_K."""
    pairs = [word.partition("*") for word in text.split()]
    return [kind for kind, _, count in pairs for _ in range(int(count or 1))]


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_types_are_those_of_llama_quantize(name):
    facts, items = model(**GOLDEN["models"][name])
    assert len(GOLDEN["types"][name]) >= len(MIXES) - 4
    for key, expected in GOLDEN["types"][name].items():
        mix, _, importance = key.partition("+")
        found: dict[str, list[str]] = {}
        for choice in assign(MIXES[mix], facts, items, has_importance=bool(importance)):
            if len(choice.shape) > 1:
                role = re.sub(r"^blk\.\d+\.|\.weight$", "", choice.name)
                found.setdefault(role, []).append(choice.after)
        assert found == {role: unpacked(text) for role, text in expected.items()}, key


@pytest.mark.parametrize("name", MIXES)
def test_llama_2_7b_has_the_published_size(name):
    mix = MIXES[name]
    parameters = sum(choice.parameters for choice in example.choices(mix))
    assert parameters == 6_738_415_616
    assert example.size(mix) == (BYTES[name], 8 * BYTES[name] / parameters)
    assert example.size(mix, has_importance=True)[0] == WITH_IMPORTANCE[name]
    facts, items = model(**GOLDEN["models"]["llama-2-7b"])
    chosen = assign(mix, facts, items, has_importance=name == "Q2_K_S")
    assert sum(map(tensor_bytes, chosen)) == BYTES[name]


def test_q2_k_of_2023():
    before, after = (types(name, example_model()) for name in ("Q2_K", "Q2_K_2023"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"blk.{i}.ffn_{which}.weight" for i in range(32) for which in ("gate", "up")}
    assert {after[name] for name in changed} == {"Q3_K"}


def example_model() -> tuple[Facts, list[Item]]:
    return example.FACTS, example.items()


def test_order_of_the_file():
    names = ["blk.10.attn_q.weight", "blk.9.ffn_up.weight", "token_embd.weight", "blk.9.attn_v.weight",
             "output_norm.weight", "output.weight", "rope_freqs.weight", "blk.9.attn_v.bias"]  # fmt: skip
    assert in_file_order(names) == [
        "output.weight", "output_norm.weight", "rope_freqs.weight", "token_embd.weight", "blk.9.attn_v.bias",
        "blk.9.attn_v.weight", "blk.9.ffn_up.weight", "blk.10.attn_q.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "layers", "heads", "kv_heads", "is_70b"),
    [
        ("llama", 80, 64, 8, True),
        ("llama", 80, 64, 64, False),
        ("llama", 81, 64, 8, False),
        ("qwen2", 80, 64, 64, True),
        ("deci", 80, 64, 8, True),
        ("olmo", 80, 64, 8, True),
        ("jais2", 68, 64, 8, True),
        ("qwen3", 80, 64, 8, False),
    ],
)
def test_what_llama_cpp_takes_for_70b(architecture, layers, heads, kv_heads, is_70b):
    assert Facts(architecture, layers, heads, kv_heads).is_70b == is_70b
    what = small(architecture=architecture, layers=layers, heads=heads, kv_heads=kv_heads, hidden=512)
    assert types("Q4_K_S", what)["blk.40.attn_v.weight"] == ("Q5_K" if is_70b else "Q4_K")


def test_stacks_of_experts_in_mxfp4():
    found = types("MXFP4_MOE", small(experts=4))
    assert found["blk.0.ffn_up_exps.weight"] == "MXFP4"
    assert found["blk.0.ffn_gate_inp.weight"] == "F32"
    assert {found[name] for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")} == {"Q8_0"}


def test_experts_go_by_the_layer_that_their_name_says():
    facts, items = small(experts=4, layers=16)
    without = [item for item in items if item.name != "blk.0.ffn_down_exps.weight"]
    assert types("Q4_K_S", (facts, without))["blk.1.ffn_down_exps.weight"] == "Q5_K"
    assert types("Q4_K_S", (facts, without))["blk.2.ffn_down_exps.weight"] == "Q4_K"
    stray = [*items, Item("mtp.ffn_down.weight", (512, 512), "F16")]
    with pytest.raises(CheckpointError, match=r"'mtp.ffn_down.weight' is in none of the 16 layers"):
        types("Q4_K_S", (facts, stray))


# ---- what is never quantized, and what doesn't fit ----


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_norm.weight",
        "blk.0.attn_q_norm.weight",
        "blk.0.ffn_gate_inp.weight",
        "blk.0.attn_q.bias",
        "blk.0.ssm_conv1d.weight",
        "blk.0.shortconv.conv.weight",
        "blk.0.indexer.k_proj.weight",
        "blk.0.attn_rel_b.weight",
        "blk.0.time_mix_w1.weight",
        "blk.0.time_mix_lerp_fused.weight",
        "blk.0.altup_proj.weight",
        "per_layer_model_proj.weight",
        "position_embd.weight",
        "token_types.weight",
        "v.patch_embd.weight",
        "v.position_embd.weight",
    ],
)
def test_small_and_sensitive_tensors_are_kept(name):
    facts, items = small()
    (choice,) = [
        c for c in assign(MIXES["Q4_0"], facts, [*items, Item(name, (256, 256), "F16")]) if c.name == name
    ]
    assert (choice.after, choice.quantized) == ("F16", False)
    assert choice.reason.endswith("never quantized")


def test_time_mix_matrices_that_are_no_small_ones_are_quantized():
    facts, items = small()
    found = types("Q4_0", (facts, [*items, Item("blk.0.time_mix_key.weight", (256, 256), "F16")]))
    assert found["blk.0.time_mix_key.weight"] == "Q4_0"


FALLBACKS = {
    "Q2_K_S": "Q4_0", "Q3_K_S": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K_S": "Q5_0", "Q5_K_S": "Q5_1", "Q6_K": "Q8_0",
    "Q4_0": "Q4_0", "Q8_0": "Q8_0",
}  # fmt: skip


@pytest.mark.parametrize("mix", FALLBACKS)
def test_rows_that_are_no_whole_blocks_get_another_type_and_a_reason(mix):
    for hidden, expected in ((96 * 4, FALLBACKS[mix]), (100, "F16")):
        chosen = assign(MIXES[mix], *small(hidden=hidden, ffn=hidden), has_importance=True)
        (choice,) = [one for one in chosen if one.name == "blk.3.ffn_up.weight"]
        assert choice.after == expected
        assert choice.wanted == MIXES[mix].default
        if expected == choice.wanted:
            assert choice.fallback == ""
            continue
        assert f"rows of {hidden} are no multiple of" in choice.fallback
        assert any(
            f"wanted as {choice.wanted}" in note and expected in note for note in fallback_notes(chosen)
        )


def test_a_fallback_is_said_once_for_all_alike():
    chosen = assign(MIXES["Q4_K_S"], *small(hidden=384, ffn=1024))
    notes = fallback_notes(chosen)
    assert len(notes) == 2, "of Q4_K and of Q5_K"
    assert sum(int(note.split()[0]) for note in notes) == sum(bool(choice.fallback) for choice in chosen)


# ---- what the user wants otherwise ----

# What llama-quantize makes of a model of 4 layers in Q4_K_M, where it is not the file type's own.
Q4_K_M = {
    "output.weight": "Q6_K",
    "blk.0.attn_v.weight": "Q4_K", "blk.1.attn_v.weight": "Q4_K", "blk.2.attn_v.weight": "Q6_K",
    "blk.3.attn_v.weight": "Q6_K", "blk.2.ffn_down.weight": "Q6_K", "blk.3.ffn_down.weight": "Q6_K",
}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (Overrides(), {}),
        (Overrides(pure=True), dict.fromkeys(Q4_K_M, "Q4_K")),
        (Overrides(keep_output=True), {"output.weight": "F16"}),
        (Overrides(output="q4_0"), {"output.weight": "Q4_0"}),
        (Overrides(embedding="Q8_0"), {"token_embd.weight": "Q8_0"}),
        (Overrides(pure=True, output="q8_0"), {**dict.fromkeys(Q4_K_M, "Q4_K"), "output.weight": "Q8_0"}),
        (Overrides(patterns=(("attn_k", "q8_0"), ("attn_", "q2_k"))), {
            "blk.0.attn_k.weight": "Q8_0", "blk.0.attn_q.weight": "Q2_K", "blk.2.attn_v.weight": "Q2_K"}),
        # The counts of the rules pass over what is overridden: layer 3 is the third value matrix of those left.
        (Overrides(patterns=((r"blk\.0\.attn_v", "f16"),)), {
            "blk.0.attn_v.weight": "F16", "blk.2.attn_v.weight": "Q4_K", "blk.3.attn_v.weight": "Q6_K"}),
        (Overrides(patterns=(("^output.weight$", "q3_k"),)), {"output.weight": "Q3_K"}),
    ],
)  # fmt: skip
def test_overrides(overrides, expected):
    plain = types("Q4_K_M", small())
    assert {name: plain[name] for name in Q4_K_M} == Q4_K_M
    found = types("Q4_K_M", small(), overrides)
    assert {name: found[name] for name in expected} == expected
    touched = {name for name in found if found[name] != plain[name]}
    if not overrides.patterns:
        assert touched == {name for name in expected if expected[name] != plain[name]}


def test_overrides_of_a_tied_embedding():
    tied = small(tied=True)
    assert types("Q4_K_M", tied)["token_embd.weight"] == "Q6_K"
    assert types("Q4_K_M", tied, Overrides(output="q8_0"))["token_embd.weight"] == "Q8_0"
    both = Overrides(output="q8_0", embedding="q5_k")
    assert types("Q4_K_M", tied, both)["token_embd.weight"] == "Q5_K"


def test_given_types_of_head_and_embedding_hold_for_float_files_too():
    found = types("F16", small(), Overrides(embedding="q8_0", output="q6_k", patterns=(("attn", "q4_0"),)))
    assert (found["token_embd.weight"], found["output.weight"]) == ("Q8_0", "Q6_K")
    assert found["blk.0.attn_q.weight"] == "F16", "patterns are for file types that quantize"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"output": "q9"}, "the type of the output is 'q9'; it must be one of f32, f16, bf16, q4_0"),
        ({"patterns": (("attn", "q4_k_m"),)}, "the type of 'attn' is 'q4_k_m'"),
        ({"patterns": (("(", "q4_k"),)}, r"'\(' is no regular expression"),
    ],
)
def test_overrides_that_mean_nothing(fields, words):
    with pytest.raises(ValueError, match=words):
        Overrides(**fields)


# ---- names ----


def test_names_and_numbers_are_those_of_llama_cpp():
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    assert {name.lower() for name in mixes.BLOCKS} == {n for n, f in FORMATS.items() if f.grid == "block"}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        values = mixes.block_values(name)
        assert gguf.GGML_QUANT_SIZES[kind] == (values, mixes.row_bytes(name, values))
    for mix in MIXES.values():
        name = {"F32": "ALL_F32", "Q2_K_2023": "MOSTLY_Q2_K"}.get(mix.name, f"MOSTLY_{mix.name}")
        assert mix.number == gguf.LlamaFileType[name], mix.name


def test_every_name_in_the_table_exists():
    for rule in mixes.RULES:
        assert set(rule.mixes) <= set(MIXES)
        assert rule.type in (None, *TYPES)
        assert set(rule.roles) <= {role for _, role in mixes.ROLES}
    for wanted, other in mixes.FALLBACKS.items():
        assert mixes.block_values(wanted) == 256
        assert mixes.block_values(other) == 32


@pytest.mark.parametrize(
    ("text", "name"),
    [("q4_k_m", "Q4_K_M"), ("Q4_K_M", "Q4_K_M"), ("q4_k", "Q4_K_M"), ("Q3_K", "Q3_K_M"), ("q5_k", "Q5_K_M"),
     ("mxfp4", "MXFP4_MOE"), ("q2_k_2023", "Q2_K_2023"), ("bf16", "BF16")],
)  # fmt: skip
def test_find(text, name):
    assert mixes.get(text).name == name


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'q4' is no file type of GGUF; it must be one of q2_k, .*q4_k_m"):
        mixes.get("q4")


def test_capitals_tell_file_types_from_formats():
    assert mixes.is_mix_alone("q4_k_m")
    assert mixes.is_mix_alone("Q8_0")
    assert not mixes.is_mix_alone("q8_0")
    assert not mixes.is_mix_alone("bf16")
    assert not mixes.is_mix_alone("int4-g128")


# ---- the plan ----


def write_config(path: Path, **fields: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA_2_7B | fields))
    return path


def test_the_plan_of_llama_2_7b_has_the_published_sizes(capsys, tmp_path):
    data = call_json(capsys, "plan", write_config(tmp_path / "llama"))
    for name, nbytes in BYTES.items():
        if MIXES[name].is_quantized:
            one = data["recipes"][name]
            assert one["bytes"] == nbytes, name
            assert one["bytes"] == sum(one["class_bytes"].values()) == one["memory"]["weights"]
    assert data["recipes"]["Q4_K_M"]["bits_per_weight"] == pytest.approx(4.844, abs=5e-4)


def test_the_plan_takes_file_types_and_formats_of_one_name(capsys, tmp_path):
    model = write_config(tmp_path / "m", hidden_size=512, intermediate_size=1024, num_hidden_layers=2)
    data = call_json(capsys, "plan", model, "--recipe", "q8_0", "--recipe", "Q8_0", "--recipe", "q4_k_m")
    assert list(data["recipes"]) == ["q8_0", "Q8_0", "Q4_K_M"]
    kept = [entry["name"] for entry in data["recipes"]["Q8_0"]["modules"] if not entry["quantized"]]
    assert len(kept) == 5
    assert all("norm" in name for name in kept)


def test_the_plan_says_fallbacks(capsys, tmp_path):
    model = write_config(tmp_path / "m", hidden_size=384, intermediate_size=1000, num_hidden_layers=2)
    notes = call_json(capsys, "plan", model, "--recipe", "q4_k_m")["recipes"]["Q4_K_M"]["notes"]
    assert any("which rows of 384 are no multiple of" in note for note in notes)
    assert any("wanted as Q6_K is F16: Q6_K has blocks of 256, which rows of 1000" in note for note in notes)
    code, out, _ = call(capsys, "plan", model)
    assert code == 0
    assert "GGUF: output_norm.weight and 4 more stay f32" in " ".join(out.split())


def test_the_plan_of_another_architecture_says_why_not(capsys, tmp_path):
    (tmp_path / "m").mkdir()
    config = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 64,
        "n_positions": 32,
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    code, out, err = call(capsys, "plan", tmp_path / "m")
    assert code == 0, err
    assert "'gpt2' can't be made GGUF by bitfold" in " ".join(out.split())


def test_plan_recipes_and_explain_need_no_gguf_package(tmp_path):
    model = write_config(tmp_path / "m", hidden_size=512, intermediate_size=512, num_hidden_layers=1)
    script = (
        "import sys\n"
        "sys.modules['gguf'] = None\n"
        "from bitfold.cli.app import run\n"
        f"sys.exit(max(run(['plan', {str(model)!r}]), run(['recipes']), run(['explain', 'q4_k_m'])))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Q4_K_M" in done.stdout


def test_recipes_list_the_file_types(capsys):
    listed = call_json(capsys, "recipes")["gguf"]
    assert list(listed) == [name.lower() for name in MIXES]
    assert listed["q4_k_m"]["bytes"] == BYTES["Q4_K_M"]
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^q4_k_m +Q4_K +4\.08 +4\.84$", out, re.MULTILINE)
