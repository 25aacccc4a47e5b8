"""bitfold as a quantization method of transformers: from_pretrained, save_pretrained, and what both refuse."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import bitfold
import pytest
import torch
from bitfold import versions
from bitfold.dequantize import dequantize
from bitfold.integration.hook import after_import
from bitfold.shards import CheckpointError
from tiny import one_thread, rewrite, rewrite_config, tensors_of, write_llama  # noqa: F401
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

IDS = torch.arange(12)[None]
EVERYTHING = """
[[rules]]
match = "model.embed_tokens"
format = "int8-channel"
[[rules]]
match = "lm_head"
format = "int8-channel"
[[rules]]
format = "int4-g32"
"""


def load(path: Path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def states_equal(one, other) -> bool:
    """Bit for bit, in names, dtypes and values."""
    left, right = one.state_dict(), other.state_dict()
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def tied_source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("tied") / "model", tied=True)


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "everything.toml"
    path.write_text(EVERYTHING)
    return path


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("nf4") / "model"
    bitfold.quantize_checkpoint(source, target, "nf4-dq")
    return target


@pytest.fixture(scope="module")
def tied_checkpoint(tied_source, everything, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("everything") / "model"
    bitfold.quantize_checkpoint(tied_source, target, everything)
    return target


# ---- loading, quantizing while loading, saving ----


@pytest.mark.parametrize("recipe", ["nf4-dq", "int4-g32-asym", "int8", "fp8", "int3-g64", "fp16", "q8_0"])
def test_the_ways_to_a_quantized_model_are_one(source, tmp_path, recipe):
    """A checkpoint through transformers and through bitfold, and a model quantized while it loads."""
    bitfold.quantize_checkpoint(source, tmp_path / "quantized", recipe)
    ours = bitfold.load(tmp_path / "quantized")
    theirs = load(tmp_path / "quantized")
    made = load(source, quantization_config=bitfold.Config(recipe))
    assert any(isinstance(module, bitfold.QuantLinear) for module in theirs.modules())
    assert states_equal(ours, theirs)
    assert states_equal(ours, made)
    made.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert states_equal(made, again)
    assert states_equal(made, bitfold.load(tmp_path / "saved"))
    again.save_pretrained(tmp_path / "again")
    one, other = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "again")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


def test_shared_planes_stay_shared(tied_source, tied_checkpoint, everything, tmp_path):
    ours = bitfold.load(tied_checkpoint)
    made = load(tied_source, quantization_config=bitfold.Config(everything))
    made.tie_weights()  # as accelerate and resize_token_embeddings do
    made.save_pretrained(tmp_path / "saved")
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert section["tied"] == {
        "lm_head.codes": "model.embed_tokens.codes",
        "lm_head.scales": "model.embed_tokens.scales",
    }
    for model in (made, load(tied_checkpoint), load(tmp_path / "saved"), bitfold.load(tmp_path / "saved")):
        assert model.lm_head.codes is model.model.embed_tokens.codes
        assert model.model.embed_tokens.dtype == torch.bfloat16
        assert states_equal(ours, model)


def test_tied_weights_that_are_kept_stay_tied(tied_source, tmp_path):
    made = load(tied_source, quantization_config=bitfold.Config("int4-g32"))
    made.save_pretrained(tmp_path / "saved")
    for model in (made, load(tmp_path / "saved"), bitfold.load(tmp_path / "saved")):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_weight_that_is_stored_twice_is_compared(tied_source, everything, tmp_path):
    source = write_llama(tmp_path / "model", tied=True)
    rewrite(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    made = load(source, quantization_config=bitfold.Config(everything))
    assert made.lm_head.codes is made.model.embed_tokens.codes
    rewrite(source, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match="both are stored and their values differ"):
        load(source, quantization_config=bitfold.Config(everything))


def test_biases_stay_and_train_but_no_plane_does(tmp_path):
    source = write_llama(tmp_path / "model")
    rewrite_config(source, attention_bias=True)
    config = json.loads((source / "config.json").read_text())

    def add_biases(tensors):
        for name in [name for name in tensors if "self_attn" in name]:
            tensors[name.replace("weight", "bias")] = torch.randn(
                tensors[name].shape[0], dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)
            )

    rewrite(source, add_biases)
    assert config["attention_bias"]
    made = load(source, quantization_config=bitfold.Config("nf4"))
    bitfold.quantize_checkpoint(source, tmp_path / "quantized", "nf4")
    for model in (made, load(tmp_path / "quantized")):
        assert states_equal(bitfold.load(tmp_path / "quantized"), model)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert "model.layers.0.self_attn.q_proj.bias" in trainable
        assert not any(name.endswith((".codes", ".scales")) for name in trainable)


# ---- what from_pretrained offers ----


def test_dtype_is_that_of_what_is_not_quantized(checkpoint, tied_checkpoint):
    for path in (checkpoint, tied_checkpoint):
        stored = bitfold.load(path)
        for dtype in (torch.float32, torch.float16):
            model = load(path, dtype=dtype)
            assert states_equal(bitfold.load(path, dtype=dtype), model)
            layer = "model.layers.0.mlp.up_proj"
            for name, plane in stored.get_submodule(layer).qtensor.planes.items():
                assert torch.equal(plane, model.get_submodule(layer).qtensor.planes[name])
            assert model(IDS).logits.dtype == dtype


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(checkpoint, device_map):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    assert torch.equal(load(checkpoint, device_map=device_map)(IDS).logits, load(checkpoint)(IDS).logits)


def test_modules_on_the_disk(checkpoint, source, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    devices = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    model = load(checkpoint, device_map=devices, offload_folder=tmp_path)
    assert torch.equal(model(IDS).logits, load(checkpoint)(IDS).logits)
    with pytest.raises(ValueError, match="puts modules on the disk"):
        load(
            source,
            device_map=devices,
            offload_folder=tmp_path,
            quantization_config=bitfold.Config("nf4"),
        )


def test_other_classes_of_model(checkpoint):
    """Without a head, whose names have no prefix, and with another head."""
    whole = load(checkpoint)
    body = AutoModel.from_pretrained(checkpoint)
    assert torch.equal(body(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert isinstance(classifier.model.layers[0].mlp.up_proj, bitfold.QuantLinear)


def test_generation_and_pipelines(checkpoint):
    model = load(checkpoint)
    want = bitfold.load(checkpoint).generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), want)
    made = pipeline("text-generation", model=str(checkpoint))("The quick", max_new_tokens=4, do_sample=False)
    assert made[0]["generated_text"].startswith("The quick")
    assert isinstance(model.model.layers[0].mlp.up_proj, bitfold.QuantLinear)


def test_dequantize(checkpoint, tied_checkpoint):
    for path in (checkpoint, tied_checkpoint):
        model, planes = load(path, dtype=torch.float32), load(path, dtype=torch.float32)
        model.dequantize()
        assert not any(isinstance(module, bitfold.QuantLinear) for module in model.modules())
        assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
        torch.testing.assert_close(model(IDS).logits, planes(IDS).logits, rtol=1e-4, atol=1e-5)
        weight = planes.model.layers[1].mlp.down_proj.qtensor.decode(torch.float32)
        assert torch.equal(model.model.layers[1].mlp.down_proj.weight, weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")


# ---- the import ----


def run(script: str, *arguments: object) -> tuple[str, str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout, result.stderr


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["quantize", "load"])
def test_a_model_that_bitfold_made_saves_itself_as_quantized(
    source, tied_source, tied_checkpoint, checkpoint, everything, tmp_path, way, tied
):
    """transformers' own save_pretrained of what bitfold.quantize and bitfold.load return."""
    if way == "load":
        model = bitfold.load(tied_checkpoint if tied else checkpoint)
    else:
        model = load(tied_source if tied else source)
        bitfold.quantize(model, everything if tied else "nf4-dq", quiet=True)
    model.save_pretrained(tmp_path / "saved")
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert section["recipe"] == ("everything" if tied else "nf4-dq")
    for again in (load(tmp_path / "saved"), bitfold.load(tmp_path / "saved")):
        assert states_equal(again, model)
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["dequantize", "model.dequantize", "peft.merge"])
def test_a_model_whose_weights_were_decoded_saves_itself_as_plain(
    checkpoint, tied_checkpoint, tmp_path, way, tied
):
    path = tied_checkpoint if tied else checkpoint
    if way == "dequantize":
        model = dequantize(bitfold.load(path))
    elif way == "model.dequantize":
        model = load(path).dequantize()
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = bitfold.peft.prepare(peft.LoraConfig(target_modules=["q_proj"]))
        model = bitfold.peft.merge(peft.get_peft_model(load(path), config), torch.float32)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert ("lm_head.weight" in tensors_of(tmp_path / "saved")) != tied
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_without_bitfold_transformers_warns_and_skips(checkpoint):
    """It says so itself; config.json says what to do."""
    script = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__, "bitfold" in sys.modules)
"""
    out, err = run(script, checkpoint)
    assert out.split() == ["Linear", "False"]
    assert "Unknown quantization type, got bitfold" in err
    section = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert "import bitfold" in section["load_with"]


IMPORTS = """
import sys, importlib.util
import bitfold
def waiting():
    return {finder.name for finder in sys.meta_path if type(finder).__module__.startswith("bitfold.")}
TABLES, ATTENTION = "transformers.quantizers.auto", "transformers.modeling_utils"
assert "transformers" not in sys.modules and waiting() == {TABLES, ATTENTION}
assert importlib.util.find_spec("transformers.quantizers") is not None
assert waiting() == {TABLES, ATTENTION}, "looking alone spent it"
import transformers.quantizers.auto as auto
assert waiting() == {ATTENTION}
assert type(auto.__loader__).__module__ == "_frozen_importlib_external", type(auto.__loader__)
assert auto.__spec__.loader is auto.__loader__
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["bitfold"] is bitfold.Config
assert auto.AUTO_QUANTIZER_MAPPING["bitfold"].__module__.startswith("bitfold.")
import transformers.modeling_utils as modeling
assert not waiting()
assert "bitfold" in modeling.ALL_ATTENTION_FUNCTIONS
"""
MEASURED = """
import threading, time, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
torch.set_num_threads(1)
def anonymous():
    text = open("/proc/self/status").read()
    return sum(int(text.split(name)[1].split()[0]) for name in ("RssAnon:", "RssShmem:")) * 1024
peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=bitfold.Config("nf4-dq"))
running = False
thread.join()
print(peak - before, sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_imports_and_memory(tmp_path):
    """bitfold before transformers: it waits, acts once, and leaves no trace in Python's imports. Then a model larger
    than all that is held of it: peak of anonymous memory over what the imports take."""
    hidden, ffn = 768, 3072
    source = write_llama(tmp_path / "model", layers=6, hidden=hidden, ffn=ffn, shard="40MB")
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    assert len(list(source.glob("*.safetensors"))) > 2
    peak, quantized = map(int, run(IMPORTS + MEASURED, source)[0].split())
    matrix = hidden * ffn * 4  # bytes in fp32
    assert peak < quantized + 2 * matrix + 10e6, f"{peak / 1e6:.1f} MB; the model is {quantized / 1e6:.1f} MB"
    assert peak < 0.6 * size


def test_the_hook_acts_once_and_at_once_where_the_module_is_there(tmp_path, monkeypatch):
    (tmp_path / "bitfold_test_late.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    finders = list(sys.meta_path)
    after_import("bitfold_test_late", lambda: seen.append(sys.modules["bitfold_test_late"].value))
    assert not seen
    import bitfold_test_late

    assert seen == [1]
    importlib.reload(bitfold_test_late)
    assert seen == [1]
    assert sys.meta_path == finders
    after_import("bitfold_test_late", lambda: seen.append(2))
    assert seen == [1, 2]


# ---- bad input ----


def test_a_newer_checkpoint_is_refused(checkpoint, tmp_path):
    copy = _copied(checkpoint, tmp_path)
    section = json.loads((copy / "config.json").read_text())["quantization_config"]
    rewrite_config(copy, quantization_config={**section, "format_version": 99})
    with pytest.raises(
        CheckpointError, match=r"checkpoint version 99 .* reads up to version 1: install a newer"
    ):
        load(copy)
    rewrite_config(copy, quantization_config={**section, "modules": {"x": {}}})
    with pytest.raises(CheckpointError, match=r"modules\['x'\].kind is missing; it must be a text"):
        load(copy)


def test_a_checkpoint_that_lacks_something_is_refused(checkpoint, tmp_path):
    """transformers would fill it with random numbers."""
    copy = _copied(checkpoint, tmp_path)
    plane = "model.layers.1.mlp.up_proj.scales"
    rewrite(copy, lambda tensors: tensors.update({plane: tensors[plane].to(torch.float32)}))
    with pytest.raises(CheckpointError, match=r"up_proj.scales' is torch.float32 .* it must be torch.uint8"):
        load(copy)
    rewrite(copy, lambda tensors: tensors.pop(plane))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor \('model.layers.1.mlp.up_proj.scales'\)"):
        load(copy)


def test_a_bad_weight_is_named(tmp_path):
    source = write_llama(tmp_path / "model")

    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    rewrite(source, spoil)
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj.weight: weight\[3, 5\] is NaN"):
        load(source, quantization_config=bitfold.Config("nf4"))


def test_what_config_refuses(source, checkpoint):
    with pytest.raises(ValueError, match="recipe 'nf5' is unknown"):
        bitfold.Config("nf5")
    with pytest.raises(ValueError, match="needs a text to calibrate on"):
        load(source, quantization_config=bitfold.Config("gptq-int4-g128"))
    with pytest.raises(ValueError, match="is that of a quantized model"):
        load(source, quantization_config=load(checkpoint).config.quantization_config)
    with pytest.raises(ValueError, match="has the unknown key 'bits'"):
        load(source, quantization_config={"quant_method": "bitfold", "bits": 4})
    with pytest.raises(ValueError, match="quantized already, by 'bitfold'"):
        bitfold.quantize_checkpoint(checkpoint, checkpoint.parent / "twice", "nf4")


def test_another_version_of_transformers_is_named(monkeypatch):
    support = versions.FROM_PRETRAINED
    for version in ("4.57.6", "5.19.0", "6.0.0"):
        with pytest.raises(versions.MissingExtraError, match=rf"transformers 5.20 or newer .* not {version}"):
            support.check("loading", version)
    for version in (*support.tested, "5.25.0.dev0"):
        support.check("loading", version)
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    with pytest.raises(
        versions.MissingExtraError, match=r"bitfold.Config needs transformers 5.20 .* not 5.1.0"
    ):
        bitfold.Config("nf4")


def _copied(checkpoint: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy
