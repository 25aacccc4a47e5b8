"""Quantizing a directory: as in memory, but in the memory of a shard."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import bitfold
import pytest
import tiny
import torch
from bitfold.pipeline import check_finite
from bitfold.recipes import Recipe, Rule
from bitfold.shards import CheckpointError
from safetensors.torch import save_file
from tiny import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

TIED_INT8 = Recipe(
    "tied", "", (Rule("lm_head", "int8"), Rule("*.embed_tokens", "int8"), Rule("*", "int4-g32"))
)


@pytest.mark.parametrize(
    ("recipe", "dtype", "tied"),
    [
        ("int4-g32", torch.bfloat16, False),
        ("nf4-dq", torch.float16, True),
        ("bf16", torch.float32, False),
        (TIED_INT8, torch.float32, True),
    ],
    ids=["int4", "nf4-dq-tied", "bf16", "embedding-tied"],
)
def test_same_tensors_as_in_memory(recipe, dtype, tied, tmp_path):
    source = tiny.write_llama(tmp_path / "m", dtype, shard="60KB", tied=tied)
    bitfold.quantize_checkpoint(source, tmp_path / "streamed", recipe, shard_bytes=50_000)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    bitfold.quantize(model, recipe, quiet=True)
    bitfold.save(model, tmp_path / "memory")
    streamed, memory = tiny.tensors_of(tmp_path / "streamed"), tiny.tensors_of(tmp_path / "memory")
    assert streamed.keys() == memory.keys()
    for name, tensor in memory.items():
        assert streamed[name].dtype == tensor.dtype
        assert torch.equal(streamed[name], tensor), name
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("streamed", "memory")]
    sections = [config["quantization_config"] for config in configs]
    assert sections[0]["modules"] == sections[1]["modules"]
    assert sections[0]["tied"] == sections[1]["tied"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(bitfold.load(tmp_path / "streamed")(ids).logits, model(ids).logits)


def test_report_and_summary(tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    seen = []
    summary = bitfold.quantize_checkpoint(
        source, tmp_path / "q", "int4-g32", progress=lambda *args: seen.append(args)
    )
    before, after = tiny.tensors_of(source), tiny.tensors_of(tmp_path / "q")
    assert summary.bytes_before == sum(tensor.nbytes for tensor in before.values())
    assert summary.bytes_after == sum(tensor.nbytes for tensor in after.values())
    assert summary.parameters == sum(tensor.numel() for tensor in before.values())
    linears = {name: tensor for name, tensor in before.items() if name.endswith("_proj.weight")}
    assert summary.quantized_parameters == sum(tensor.numel() for tensor in linears.values())
    report = json.loads((tmp_path / "q" / "bitfold_report.json").read_text())
    assert report["share"] == pytest.approx(summary.share)
    assert {module["name"] + ".weight" for module in report["modules"]} == linears.keys()
    for module in report["modules"]:
        name = module["name"]
        source_weight = linears[name + ".weight"].double()
        n, k = source_weight.shape
        stored = {plane: after[f"{name}.{plane}"] for plane in ("codes", "scales")}
        decoded = bitfold.QTensor("int4-g32", (n, k), stored).decode(torch.float64)
        error = ((decoded - source_weight).norm() / source_weight.norm()).item()
        assert module["relative_rmse"] == pytest.approx(error, rel=1e-5)
        assert module["bits_per_weight"] == pytest.approx(4.5)
    done = [row[1] for row in seen]
    assert done == sorted(done)
    assert {row[2] for row in seen} == {done[-1]} == {summary.bytes_before}
    assert {row[0] for row in seen} == before.keys()


def test_files_go_along_but_no_weights_and_no_code(tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    for name in (
        "modeling_x.py",
        "pytorch_model.bin",
        "merges.txt",
        "LICENSE",
        "chat_template.jinja",
        "README.md",
    ):
        (source / name).write_text("x")
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int8")
    assert {path.name for path in (tmp_path / "q").iterdir()} == {
        "LICENSE",
        "bitfold_report.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


MEASURED = """
import json, sys, threading, time
import torch, transformers, safetensors
import bitfold
from bitfold.pipeline import quantize_checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig
def level():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
torch.set_num_threads(2)
warm = bitfold.encode(torch.randn(64, 64), "int4-g32")  # the thread pools belong to the imports
bitfold.linear(torch.randn(64, 64), warm)
quantize_checkpoint(sys.argv[1], sys.argv[2] + "-warm", "int4-g128")
start = peak = level()
running = True
def watch():
    global peak
    while running:
        peak = max(peak, level())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
quantize_checkpoint(sys.argv[3], sys.argv[2], "int4-g128", shard_bytes=int(sys.argv[4]))
running = False
thread.join()
print(json.dumps({"above": peak - start}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc/self/status")
def test_memory_stays_below_a_shard(tmp_path):
    """A model of six shards; what is beyond the imports stays well below one of them."""
    shard = 32 << 20  # the level wavers by 17 MB, whatever the size of the model
    source = tiny.write_llama(tmp_path / "m", shard="32MB", layers=22, hidden=512, ffn=2048)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert total > 5 * shard
    small = tiny.write_llama(tmp_path / "small")
    script = [sys.executable, "-c", MEASURED, small, tmp_path / "q", source, str(shard)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    above = json.loads(done.stdout.splitlines()[-1])["above"]
    assert above < shard, f"{above / 1e6:.1f} MB above the imports, a shard is {shard / 1e6:.1f} MB"


def test_half_a_range_is_an_error_or_is_clamped(tmp_path):
    source = tiny.write_llama(tmp_path / "m", torch.bfloat16)
    name = "model.layers.1.mlp.up_proj.weight"
    tiny.rewrite(source, lambda tensors: tensors[name].__setitem__((3, 5), 1e5))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj") as error:
        bitfold.quantize_checkpoint(source, tmp_path / "q", "fp16")
    assert "[3, 5]" in str(error.value)
    assert not (tmp_path / "q").exists()
    bitfold.quantize_checkpoint(source, tmp_path / "q", "fp16", clamp=True)
    assert tiny.tensors_of(tmp_path / "q")[name.replace("weight", "codes")][3, 5] == 65504


def test_rotary_frequencies_of_old_checkpoints_are_left_out(tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tiny.rewrite(source, lambda tensors: tensors.update({old: torch.ones(8)}))
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int8")
    assert old not in tiny.tensors_of(tmp_path / "q")


def test_tied_head_that_is_stored_too(tmp_path):
    source = tiny.write_llama(tmp_path / "m", tied=True)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tiny.rewrite(source, add)
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int8")
    assert "lm_head.weight" not in tiny.tensors_of(tmp_path / "q")
    tiny.rewrite(source, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="differ"):
        bitfold.quantize_checkpoint(source, tmp_path / "q2", "int8")


def test_tied_weight_under_the_name_of_the_head(tmp_path):
    source = tiny.write_llama(tmp_path / "m", tied=True)
    tiny.rewrite(source, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    bitfold.quantize_checkpoint(source, tmp_path / "q", TIED_INT8)
    loaded = bitfold.load(tmp_path / "q")
    assert loaded.lm_head.codes is loaded.model.embed_tokens.codes


def test_the_source_is_never_the_target(tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    with pytest.raises(CheckpointError, match="not overwritten"):
        bitfold.quantize_checkpoint(source, source, "int8", force=True)
    outer = tmp_path / "q"
    bitfold.quantize_checkpoint(source, outer, "int8")
    inner = tiny.write_llama(outer / "inner")
    with pytest.raises(CheckpointError, match="is or contains"):
        bitfold.quantize_checkpoint(inner, outer, "int8", force=True)


def test_a_quantized_model_is_not_quantized_again(tmp_path):
    source = tiny.write_llama(tmp_path / "m")
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        bitfold.quantize_checkpoint(tmp_path / "q", tmp_path / "q2", "int4-g32")


def test_integer_weights_are_no_weights_to_quantize(tmp_path):
    source = tiny.write_llama(tmp_path / "m")

    def change(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    tiny.rewrite(source, change)
    with pytest.raises(CheckpointError, match=r"up_proj.*I8"):
        bitfold.quantize_checkpoint(source, tmp_path / "q", "int8")


def test_mixed_dtypes_load_in_the_dtype_of_the_config(tmp_path):
    """Norms in float32 beside bfloat16 weights: transformers casts them when it loads, and so does load."""
    source = tiny.write_llama(tmp_path / "m", torch.bfloat16)

    def change(tensors):
        for name in [name for name in tensors if "norm" in name]:
            tensors[name] = tensors[name].float()

    tiny.rewrite(source, change)
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int8")
    assert tiny.tensors_of(tmp_path / "q")["model.norm.weight"].dtype == torch.float32
    loaded = bitfold.load(tmp_path / "q")
    with torch.no_grad():
        assert loaded(torch.arange(8)[None]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_the_place(value):
    tensor = torch.zeros(3000, 500, dtype=torch.bfloat16)
    check_finite("w", tensor)
    tensor[2345, 67] = value
    with pytest.raises(ValueError, match=r"^w: element \[2345, 67\] is -?(nan|inf)"):
        check_finite("w", tensor)
    check_finite("i", torch.zeros(3, dtype=torch.int32))


def test_shards_without_an_index_entry_are_not_read(tmp_path):
    """A stray file beside the index is not part of the model."""
    source = tiny.write_llama(tmp_path / "m", shard="60KB")
    save_file({"stray": torch.ones(3)}, source / "stray.safetensors")
    bitfold.quantize_checkpoint(source, tmp_path / "q", "int8")
    assert "stray" not in tiny.tensors_of(tmp_path / "q")
