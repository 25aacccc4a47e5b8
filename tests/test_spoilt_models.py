"""What a model directory may lack or contradict: one sentence on stderr, exit code 2, nothing left behind.

tests/fuzz_checkpoint.py spoils them at random.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from refusals import refuse
from tiny import one_thread  # noqa: F401

UP = "model.layers.1.mlp.up_proj.weight"


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def missing_weights(model):
    (model / "model.safetensors").unlink()


def only_bin(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncated_data(model):
    file = model / "model.safetensors"
    truncate(file, file.stat().st_size - 100)


def truncated_header(model):
    truncate(model / "model.safetensors", 100)


def empty_file(model):
    truncate(model / "model.safetensors", 0)


def trailing_bytes(model):
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"123")


def not_safetensors(model):
    (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json at all" + b"x" * 100)


def missing_config(model):
    (model / "config.json").unlink()


def broken_config(model):
    (model / "config.json").write_text("{")


def unknown_architecture(model):
    tiny.rewrite_config(model, model_type="transfomer9000")


def no_architecture(model):
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))


def impossible_config(model):
    tiny.rewrite_config(model, num_attention_heads="four")


def other_hidden_size(model):
    tiny.rewrite_config(model, hidden_size=96, head_dim=16)


def more_layers(model):
    tiny.rewrite_config(model, num_hidden_layers=3)


def fewer_layers(model):
    tiny.rewrite_config(model, num_hidden_layers=1)


def nan_weight(model):
    tiny.rewrite(model, lambda tensors: tensors[UP].__setitem__((5, 7), float("nan")))


def infinite_weight(model):
    tiny.rewrite(model, lambda tensors: tensors[UP].__setitem__((127, 63), float("inf")))


def nan_norm(model):
    tiny.rewrite(model, lambda tensors: tensors["model.norm.weight"].__setitem__(9, float("nan")))


def nan_embedding(model):
    tiny.rewrite(model, lambda t: t["model.embed_tokens.weight"].__setitem__((200, 3), float("nan")))


def missing_tensor(model):
    tiny.rewrite(model, lambda tensors: tensors.pop(UP))


def extra_tensor(model):
    tiny.rewrite(model, lambda tensors: tensors.update({"model.layers.0.mlp.extra": torch.ones(2)}))


def other_quantization(model):
    tiny.rewrite_config(model, quantization_config={"quant_method": "gptq", "bits": 4})


def index_without_its_shard(model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {UP: "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_lies(model):
    index = {"weight_map": {"nothing.weight": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_outside(model):
    index = {"weight_map": {UP: "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


SPOILT = {
    missing_weights: ("neither model.safetensors nor",),
    only_bin: (".bin", "convert"),
    truncated_data: ("model.safetensors is truncated", "bytes"),
    truncated_header: ("model.safetensors is truncated",),
    empty_file: ("truncated", "0 bytes"),
    trailing_bytes: ("model.safetensors is damaged",),
    not_safetensors: ("no safetensors file",),
    missing_config: ("config.json is missing",),
    broken_config: ("config.json is no JSON",),
    unknown_architecture: ("config.json", "transfomer9000"),
    no_architecture: ("model_type",),
    impossible_config: ("config.json",),
    other_hidden_size: ("[258, 64]", "[258, 96]", "config.json"),
    more_layers: ("lacks 9 tensors", "model.layers.2."),
    fewer_layers: ("9 tensors", "model.layers.1.", "config.json"),
    nan_weight: (UP, "NaN", "[5, 7]"),
    infinite_weight: (UP, "inf", "[127, 63]"),
    nan_norm: ("model.norm.weight", "nan", "[9]"),
    nan_embedding: ("model.embed_tokens.weight", "[200, 3]"),
    missing_tensor: ("lacks 1 tensor", UP),
    extra_tensor: ("1 tensor", "model.layers.0.mlp.extra"),
    other_quantization: ("quantized already", "gptq"),
    index_without_its_shard: ("model-00001-of-00002.safetensors is missing",),
    index_that_lies: ("model.safetensors", "lacks", "nothing.weight"),
    index_that_leads_outside: ("not in the directory",),
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_spoilt_model(capsys, model, tmp_path, spoil):
    spoil(model)
    refuse(capsys, tmp_path, ["quantize", model, tmp_path / "out", "--recipe", "int4-g32"], *SPOILT[spoil])


@pytest.mark.parametrize("spoil", [missing_tensor, other_hidden_size, more_layers, truncated_data])
def test_spoilt_model_is_not_run(capsys, model, tmp_path, spoil):
    """transformers would fill what is missing with random numbers."""
    spoil(model)
    refuse(capsys, tmp_path, ["generate", model, "--prompt", "x"], *SPOILT[spoil])


@pytest.mark.parametrize(
    "command", ["plan {}", "quantize {} out", "generate {} --prompt x", "convert {} out", "check {}"]
)
def test_names_of_the_hub(capsys, tmp_path, command):
    """Nothing is downloaded; who gives a name is told how to."""
    name = "some-one/A-Model-1.5B"
    refuse(capsys, tmp_path, command.format(name).split(), f"{name} does not exist", f"hf download {name}")
    refuse(capsys, tmp_path, command.format(tmp_path / "x").split(), "x does not exist.")


@pytest.fixture(scope="module")
def narrow(pristine) -> Path:
    """A model whose tokenizer has more tokens than its embedding has rows."""
    folder = pristine.parent / "narrow"
    shutil.copytree(pristine, folder)
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    tiny.rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:90].clone() for name in ends}))
    tiny.rewrite_config(folder, vocab_size=90)
    (pristine.parent / "text.txt").write_text(tiny.TEXT)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "generate {model} --prompt zebra",
        "eval {model} --text {text} --context 32",
        "outliers {model} --text {text}",
        "sensitivity {model} --text {text} --context 32 --tokens 200 --formats int4-g32",
        "imatrix {model} --text {text} --output {out}.gguf --chunk-size 32",
        "quantize {model} {out} --recipe gptq-int4-g32 --calibration {text} --samples 2 --sequence-length 32",
    ],
)
def test_a_tokenizer_of_another_model(capsys, narrow, tmp_path, command):
    words = command.format(model=narrow, text=narrow.parent / "text.txt", out=tmp_path / "out").split()
    refuse(
        capsys, tmp_path, words, "the text has the token", "90 rows", "the tokenizer must be the model's own"
    )


def newer_version(quantized):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] |= {"format_version": 2, "bitfold_version": "9.9.9"}
    (quantized / "config.json").write_text(json.dumps(config))


def malformed_section(quantized):
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["shape"]
    (quantized / "config.json").write_text(json.dumps(config))


def format_from_the_future(quantized):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["format"] = "int5-g32"
    (quantized / "config.json").write_text(json.dumps(config))


def other_format(quantized):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["format"] = "int8-g32"
    (quantized / "config.json").write_text(json.dumps(config))


def scales_of_another_dtype(quantized):
    def change(tensors):
        name = "model.layers.0.mlp.up_proj.scales"
        tensors[name] = tensors[name].float()

    tiny.rewrite(quantized, change)


def lost_plane(quantized):
    tiny.rewrite(quantized, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.scales"))


SPOILT_QUANTIZED = {
    newer_version: ("version 2", "9.9.9", "newer"),
    malformed_section: ("modules['model.layers.0.mlp.up_proj'].shape is missing", "a list"),
    format_from_the_future: ("int5",),
    other_format: ("model.layers.0.mlp.up_proj.codes", "[128, 32]", "[128, 64]"),
    scales_of_another_dtype: ("model.layers.0.mlp.up_proj.scales", "float32", "float16"),
    lost_plane: ("lacks 1 tensor", "model.layers.0.mlp.up_proj.scales"),
    truncated_data: ("truncated",),
    missing_weights: ("neither",),
    other_hidden_size: ("[64, 64]", "96"),
    fewer_layers: ("model.layers.1.",),
    extra_tensor: ("model.layers.0.mlp.extra",),
}


def test_a_report_that_is_none(capsys, quantized, tmp_path):
    """What quantizing noted beside the weights."""
    report = json.loads((quantized / "bitfold_report.json").read_text())
    report["modules"][3]["name"] = ["x"]
    (quantized / "bitfold_report.json").write_text(json.dumps(report))
    said = "bitfold_report.json: modules[3].name is ['x']; it must be a text"
    refuse(capsys, tmp_path, ["inspect", quantized], said)
    refuse(capsys, tmp_path, ["report", quantized, "--output", tmp_path / "report.html"], said)


def test_planes_that_no_module_has(capsys, quantized, tmp_path):
    """A conversion would take them for tensors that aren't quantized."""
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]
    (quantized / "config.json").write_text(json.dumps(config))
    refuse(
        capsys,
        tmp_path,
        ["convert", quantized, tmp_path / "out", "--to", "gptq"],
        "2 tensors",
        "model.layers.0.mlp.up_proj.scales",
        "of modules that its quantization_config doesn't name",
    )


@pytest.mark.parametrize(
    "fields", [{"dtype": 4}, {"shape": None}, {"data_offsets": [0.5, 1]}, {"shape": ["x"]}]
)
def test_a_header_of_something_else(capsys, model, tmp_path, fields):
    file = model / "model.safetensors"
    held = file.read_bytes()
    end = 8 + int.from_bytes(held[:8], "little")
    header = json.loads(held[8:end])
    header[UP] |= fields
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + held[end:])
    refuse(capsys, tmp_path, ["inspect", model], "no dtype, shape and data_offsets", UP)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eos_token_id": "x"}, ("eos_token_id is 'x'", "the number of a token")),
        ({"bos_token_id": {}}, ("bos_token_id is {}", "the number of a token")),
        (["x"], ("generation_config.json",)),
    ],
)
def test_generation_settings_that_are_none(capsys, quantized, tmp_path, fields, words):
    file = quantized / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, **fields} if isinstance(fields, dict) else fields))
    refuse(capsys, tmp_path, ["generate", quantized, "--prompt", "x", "--json"], *words)


@pytest.mark.parametrize("spoil", SPOILT_QUANTIZED, ids=lambda spoil: spoil.__name__)
def test_spoilt_checkpoint(capsys, quantized, tmp_path, spoil):
    spoil(quantized)
    refuse(capsys, tmp_path, ["generate", quantized, "--prompt", "x", "--json"], *SPOILT_QUANTIZED[spoil])


@pytest.mark.parametrize("spoil", [missing_weights, truncated_data, missing_config, unknown_architecture])
def test_spoilt_base(capsys, model, tmp_path, spoil):
    spoil(model)
    (tmp_path / "text").write_text(tiny.TEXT)
    refuse(capsys, tmp_path, ["eval", model, "--text", tmp_path / "text"])


@pytest.mark.parametrize("spoil", [truncated_data, truncated_header, not_safetensors])
def test_inspect_of_a_spoilt_file(capsys, model, tmp_path, spoil):
    spoil(model)
    refuse(capsys, tmp_path, ["inspect", model / "model.safetensors"], "model.safetensors")
