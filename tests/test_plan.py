"""What a recipe will cost: the bytes are those that quantizing then writes, the rest is what a run allocates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import bitfold
import pytest
import tiny
import torch
from bitfold import budget, hf, layout
from bitfold.cli.plan import parse_size
from bitfold.gguf.mixes import MIXES
from bitfold.kv.blocks import FORMATS
from bitfold.recipes import RECIPES, Recipe, Rule
from bitfold.shards import CheckpointError
from command import call, call_json
from libraries import needs_kv_cache
from tiny import LLAMA_2_7B, one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2Config, GptOssConfig

DEMO = Path(__file__).parents[1] / "examples" / "demo" / "model"


def write_config(path: Path, fields: dict) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    return path


@pytest.fixture(scope="module")
def llama_2_7b(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("plan") / "llama", LLAMA_2_7B)


def config_only(source: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copy(source / "config.json", target)
    return target


# ---- the checkpoint ----

EMBEDDINGS_TOO = Recipe(
    "all", "", (Rule("lm_head", "int8"), Rule("*.embed_tokens", "nf4-b64-dq"), Rule("*", "int3-g48-asym"))
)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bytes_are_those_that_are_written(tied, tmp_path):
    """For every preset without calibration, from config.json alone and from the headers; to the byte of tensor data."""
    source = tiny.write_llama(tmp_path / "model", torch.bfloat16, tied=tied, hidden=96, ffn=160)
    alone = config_only(source, tmp_path / "config")
    rounding = [recipe for recipe in RECIPES.values() if not recipe.needs_calibration]
    for recipe in [*rounding, *([] if tied else [EMBEDDINGS_TOO])]:
        plan = bitfold.plan_checkpoint(alone, recipe)
        bitfold.quantize_checkpoint(source, tmp_path / "q", recipe, force=True)
        written = tiny.tensors_of(tmp_path / "q")
        assert plan.nbytes == sum(tensor.nbytes for tensor in written.values()), recipe.name
        assert set(plan.entries) == set(bitfold.plan_checkpoint(source, recipe).entries)
        assert sum(plan.class_bytes().values()) == plan.nbytes
        for entry in plan.entries:
            mine = [
                t
                for name, t in written.items()
                if name == entry.name or name.rpartition(".")[0] == entry.name
            ]
            assert entry.nbytes == sum(tensor.nbytes for tensor in mine), entry.name


def test_headers_win_over_the_dtype_of_the_configuration(tmp_path):
    source = tiny.write_llama(tmp_path / "m", torch.float32)
    tiny.rewrite_config(source, dtype="bfloat16")
    plan = bitfold.plan_checkpoint(source, "int4-g32")
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int4-g32")
    assert plan.nbytes == sum(tensor.nbytes for tensor in tiny.tensors_of(tmp_path / "q").values())


def test_biases_and_other_architectures(tmp_path):
    """GPT-2 has biases, position embeddings and Conv1D layers, which are kept: the plan is what is written."""
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    recipe = Recipe("wte", "", (Rule("*.wte", "int8"),))
    source = layout.read_source(config_only(tmp_path / "m", tmp_path / "c"), config_suffices=True)
    plan = budget.unquantized(source, budget.run_of(source))
    stored = tiny.tensors_of(tmp_path / "m")
    assert plan.nbytes == sum(tensor.nbytes for tensor in stored.values())
    with pytest.raises(ValueError, match="share one weight"):
        bitfold.plan_checkpoint(tmp_path / "m", recipe)


def test_classes_and_reasons(llama_2_7b):
    plan = bitfold.plan_checkpoint(llama_2_7b, "int4-mixed")
    layers, hidden, ffn, vocab = 32, 4096, 11008, 32000
    assert plan.class_bytes() == {
        "embeddings": 2 * vocab * hidden,
        "attention": layers * 4 * (hidden * hidden + 2 * hidden),
        "MLP": layers * 3 * hidden * ffn * 33 // 64,  # 4 bits and an fp16 scale for 128 weights
        "head": 2 * vocab * hidden,
        "rest": 2 * (2 * layers + 1) * hidden,
    }
    reasons = {entry.name: entry.reason for entry in plan.entries}
    assert reasons["lm_head.weight"] == "the output head is kept by default"
    assert reasons["model.layers.3.mlp.up_proj"] == "rule '*'"
    assert any("model.embed_tokens.weight stays float16" in note for note in plan.notes)


def test_exceptions_have_their_reasons(tmp_path):
    source = tiny.write_llama(tmp_path / "tied", tied=True, hidden=96, ffn=160)
    notes = "\n".join(bitfold.plan_checkpoint(source, "int4-g40").notes)
    assert "lm_head shares the weight of model.embed_tokens" in notes
    assert "the last group of a row has fewer than 40 columns in model.layers.0." in notes
    assert "and 11 more" in notes  # all but the down projections, whose 160 columns are four groups
    assert "tiled kernel: the group is no multiple of" in notes
    assert "more than the model was made for, 64" in "\n".join(
        bitfold.plan_checkpoint(source, "int8", context=65).notes
    )


def test_known_counts(capsys, llama_2_7b):
    """The figures that people quote for Llama-2-7B."""
    data = call_json(capsys, "plan", llama_2_7b)
    assert data["parameters"] == 6_738_415_616
    assert [round(value / 1e9, 2) for value in data["nominal_bytes"].values()] == [26.95, 13.48, 6.74, 3.37]
    assert round(data["recipes"]["int4-g128"]["bytes"] / 1e9, 2) == 3.86
    assert data["recipes"]["unquantized"]["bytes"] == 2 * 6_738_415_616
    assert data["sizes_from"] == "config.json"


@pytest.mark.parametrize(("count", "gigabytes"), [("7e9", [28, 14, 7, 3.5]), ("70e9", [280, 140, 70, 35])])
def test_classic_table(capsys, count, gigabytes):
    data = call_json(capsys, "plan", "--params", count)
    assert data["bytes"] == dict(
        zip(("fp32", "fp16", "int8", "int4"), (1e9 * g for g in gigabytes), strict=True)
    )
    code, out, _ = call(capsys, "plan", "--params", count)
    assert code == 0
    assert out.splitlines()[0].split()[-4:] == ["fp32", "fp16", "int8", "int4"]
    assert out.splitlines()[1].split()[-8:] == [word for g in gigabytes for word in (f"{g:g}", "GB")]


# ---- memory ----


@needs_kv_cache
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_is_what_a_run_fills(dtype, tmp_path):
    source = tiny.write_llama(tmp_path / "m", dtype)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        cache = model(torch.zeros(3, 20, dtype=torch.long), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    plan = bitfold.plan_checkpoint(source, "int8", context=20, batch=3)
    assert plan.memory.kv_cache == held
    for format in FORMATS:
        for context in (20, 700):
            cache = bitfold.QuantizedCache(model.config, format)
            model(torch.zeros(3, context, dtype=torch.long), cache=cache)
            plan = bitfold.plan_checkpoint(source, "int8", context=context, batch=3, kv_format=format)
            assert plan.memory.kv_cache == cache.nbytes


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gemma2", {"head_dim": 32, "num_key_value_heads": 2, "intermediate_size": 96, "sliding_window": 64}),
        ("falcon", {"multi_query": True}),
        ("gpt_neox", {"intermediate_size": 96}),
        ("phi3", {"pad_token_id": 0, "intermediate_size": 96}),
    ],
)
def test_kv_cache_of_other_architectures(kind, fields, tmp_path):
    path = write_config(tmp_path / kind, {"model_type": kind, "dtype": "bfloat16", **SMALL, **fields})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(torch.ones(1, 20, dtype=torch.long), use_cache=True).past_key_values
    source = layout.read_source(path, config_suffices=True)
    plan = budget.unquantized(source, budget.run_of(source, context=20))
    assert plan.memory.kv_cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert plan.nbytes == sum({id(p): p.nbytes for p in model.parameters()}.values())


def test_sliding_windows_bound_the_cache(tmp_path):
    fields = {**SMALL, "model_type": "gemma2", "dtype": "bfloat16", "head_dim": 32, "num_key_value_heads": 2}
    path = write_config(tmp_path / "m", {**fields, "sliding_window": 100})
    source = layout.read_source(path, config_suffices=True)
    plan = budget.unquantized(source, budget.run_of(source, context=1000))
    assert plan.memory.kv_cache == 2 * (100 + 1000) * 2 * 32 * 2  # one layer of the two slides


def test_what_has_no_ordinary_cache_is_said(tmp_path):
    path = write_config(tmp_path / "m", {"model_type": "mamba", **SMALL, "state_size": 8})
    plan = bitfold.plan_checkpoint(path, "int8")
    assert plan.memory.kv_cache is None
    assert plan.memory.total > plan.nbytes
    assert any(note.startswith("the KV cache is left out: ") for note in plan.notes)


def test_memory_adds_up(llama_2_7b):
    plan = bitfold.plan_checkpoint(llama_2_7b, "int4-g128", context=1000, batch=2)
    memory = plan.memory
    assert memory.weights == plan.nbytes
    assert memory.repacked == 0
    assert memory.kv_cache == 2 * 32 * 32 * 128 * 1000 * 2 * 2
    # gate, up and down of one layer, and the hidden state twice, in 16 bits
    assert memory.activation == 2000 * (11008 + 2 * 11008 + 4096 + 2 * 4096) * 2
    total = memory.weights + memory.kv_cache + memory.activation + memory.workspace
    assert memory.total == total


class Track(TorchDispatchMode):
    """The most bytes that the results of operations take at once; `held` are storages that were there before."""

    def __init__(self, held):
        super().__init__()
        self.live = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in held), 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata)
        return result

    def free(self, key):
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize(("context", "batch"), [(512, 1), (64, 4)])
def test_activation_is_near_what_a_prompt_takes(context, batch):
    """On the demo model, whose code is transformers': an estimate, so within a third."""
    plan = bitfold.plan_checkpoint(DEMO, "int8", context=context, batch=batch)
    model = hf.load_causal_lm(DEMO)
    ids = torch.zeros(batch, context, dtype=torch.long)
    with torch.no_grad(), Track([*model.parameters(), *model.buffers(), ids]) as tracked:
        kept = model(ids, use_cache=True, logits_to_keep=1)
    assert kept.logits.shape[1] == 1
    assert tracked.peak - plan.memory.kv_cache == pytest.approx(plan.memory.activation, rel=1 / 3)


def test_workspace_bounds_what_the_kernels_allocate():
    """Resident memory around one call, its result taken off: the formula is an upper bound, and no wild one."""
    script = """
import sys, torch, bitfold
from bitfold.activations import read
from bitfold.memory import workspace_bytes
torch.set_num_threads(1)
def peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
for m, n, k, format, inputs in (
    (512, 256, 16384, "int4-g128", "float"),
    (8, 65536, 512, "int4-g128", "float"),
    (1024, 256, 16384, "int8-channel", "int8"),
    (512, 256, 16384, "int8-channel-sfp32", "llm-int8"),
    (600, 256, 16384, "fp8-e4m3-channel", "fp8"),
):
    activations = read(inputs)
    layer = bitfold.QuantLinear(bitfold.encode(torch.randn(n, k), format), activations=activations)
    x = torch.full((m, k), 7.0).to(torch.bfloat16)  # each column has an outlier
    layer(x[:1])
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    layer(x)
    print(peak() - before, workspace_bytes(format, m, n, k, x.dtype, 1, activations), m * n * 2)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("/proc/self/clear_refs, which resets the peak, is Linux's")
    # A fixed threshold: large blocks go back to the system as soon as they are freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        grown, bound, result = map(int, line.split())
        assert grown <= bound + result + (1 << 20)
        assert bound < 3 * grown + (1 << 20)


def test_fit(capsys, llama_2_7b):
    data = call_json(capsys, "plan", llama_2_7b, "--fit", "8GB", "--context", "2048")
    for one in data["recipes"].values():
        assert one["fits"] == (one["memory"]["total"] <= 8e9)
    assert {one["fits"] for one in data["recipes"].values()} == {True, False}
    code, out, _ = call(capsys, "plan", llama_2_7b, "--fit", "8GB", "--context", "2048")
    assert code == 0
    sentence = " ".join(out.split()).partition("Into 8 GB fit: ")[2].partition(".")[0]
    assert sentence.split(", ") == [name for name, one in data["recipes"].items() if one["fits"]]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("1.5 MB", 1_500_000),
        ("512", 512),
        ("2kb", 2000),
        ("8G", 8 * 10**9),
    ],
)
def test_sizes(text, wanted):
    assert parse_size(text) == wanted


# ---- the command ----


def test_text_is_readable_at_80_columns(capsys, llama_2_7b):
    for arguments in (
        (DEMO, "--fit", "8MB"),
        (llama_2_7b, "--params", "7e9", "--fit", "24GB", "--kv-format", "fp8"),
    ):
        code, out, err = call(capsys, "plan", *arguments)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 80
        for recipe in RECIPES:
            assert sum(line.startswith(recipe + " ") for line in out.splitlines()) == 2
    assert "3.7% fewer parameters" in out
    assert "The KV cache in fp8 is bitfold.QuantizedCache" in out


def test_recipes_that_do_not_fit_say_why(capsys, tmp_path):
    """Experts of another kind than bitfold's can't be quantized; the model as it is can be planned for all that."""
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, head_dim=16,
    )  # fmt: skip
    write_config(tmp_path / "m", config.to_dict())
    data = call_json(capsys, "plan", tmp_path / "m")
    assert [name for name in data["recipes"] if name not in MIXES] == ["unquantized"]
    assert "a stack in a GptOssExperts" in data["refused"]["int4-g128"]
    code, out, _ = call(capsys, "plan", tmp_path / "m")
    assert code == 0
    assert out.count("No plan for") == 2  # and GGUF has another word for them
    code, _, err = call(capsys, "plan", tmp_path / "m", "--recipe", "int8")
    assert code == 2
    assert "a stack in a GptOssExperts" in err


def test_only_the_named_recipes(capsys, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('[[rules]]\nmatch = "*.mlp.*"\nformat = "int3-g32"\n')
    data = call_json(capsys, "plan", DEMO, "--recipe", mine, "--recipe", "int4-g64")
    assert list(data["recipes"]) == ["mine", "int4-g64"]
    assert any("no rule matches" in note for note in data["recipes"]["mine"]["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL is missing"),
        ([DEMO, "--fit", "much"], "--fit is 'much'"),
        (
            [DEMO, "--kv-format", "int3"],
            "kv_format is 'int3'; it must be one of fp32, fp16, bf16, int8, fp8, int4",
        ),
        ([DEMO, "--batch", "-1"], "batch is -1"),
        ([DEMO, "--recipe", "int5"], "int5"),
        (["--params", "many"], "--params is 'many'"),
        (["nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, words):
    code, out, err = call(capsys, "plan", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_quantized_already(tmp_path):
    bitfold.quantize_checkpoint(tiny.write_llama(tmp_path / "m"), tmp_path / "q", "int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        bitfold.plan_checkpoint(tmp_path / "q", "int4-g128")


# ---- the dry run ----


def test_dry_run_is_the_assignment(capsys, tmp_path):
    data = call_json(capsys, "quantize", DEMO, "--dry-run", "--recipe", "int4-mixed")
    bitfold.quantize_checkpoint(DEMO, tmp_path / "q", "int4-mixed")
    section = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["modules"]
    formats = {module["name"]: module["format"] for module in data["modules"] if module["quantized"]}
    assert formats == {name: entry["format"] for name, entry in section.items()}
    assert data["bytes"] == sum(tensor.nbytes for tensor in tiny.tensors_of(tmp_path / "q").values())


def test_dry_run_as_text(capsys, llama_2_7b, tmp_path):
    code, out, _ = call(capsys, "quantize", llama_2_7b, tmp_path / "q", "--dry-run", "--recipe", "int4-mixed")
    assert code == 0
    assert not (tmp_path / "q").exists()
    assert max(map(len, out.splitlines())) <= 80
    row = next(line for line in out.splitlines() if line.startswith("model.layers.*.self_attn.q_proj"))
    assert row.split()[1:] == ["32", "4096", "x", "4096", "int8-channel", "537", "MB"]
    assert "Nothing was written." in out
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "file").write_text("mine")
    assert call(capsys, "quantize", llama_2_7b, tmp_path / "q", "--dry-run")[0] == 2
    assert call(capsys, "quantize", llama_2_7b)[0] == 2


def test_layers_that_differ_are_named_one_by_one(capsys, tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('[[rules]]\nmatch = "*.0.mlp.*"\nformat = "int8"\n[[rules]]\nformat = "int4"\n')
    _, out, _ = call(capsys, "quantize", DEMO, "--dry-run", "--recipe", mine)
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "int8-channel" in rows["model.layers.0.mlp.up_proj"]
    assert "int4-g128" in rows["model.layers.*.self_attn.q_proj"]
    assert "int4-g128" in rows["model.layers.3.mlp.up_proj"]


def test_the_model_as_it_is(llama_2_7b):
    source = layout.read_source(llama_2_7b, config_suffices=True)
    plan = budget.unquantized(source, budget.run_of(source))
    assert plan.quantized_bits_per_weight is None
    assert plan.bits_per_weight == 16
    assert plan.memory.workspace == 0
