"""Bad input: one sentence on stderr that names what is wrong, exit code 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import bitfold
import pytest
import tiny
import torch
from bitfold.cli.app import run
from tiny import one_thread  # noqa: F401

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture(scope="module")
def pristine_quantized(pristine) -> Path:
    bitfold.quantize_checkpoint(pristine, pristine.parent / "quantized", "int4-g32")
    return pristine.parent / "quantized"


@pytest.fixture
def model(pristine, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def quantized(pristine_quantized, tmp_path) -> Path:
    return Path(shutil.copytree(pristine_quantized, tmp_path / "quantized"))


def listing(path: Path) -> list[str]:
    return sorted(str(entry) for entry in path.rglob("*"))


def check_sentence(err: str, *parts: str) -> None:
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert err.endswith((".\n", "?\n"))
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err


def refuse(capsys, tmp_path: Path, arguments: list, *parts: str) -> None:
    """The command fails as it should, and the directory looks as before."""
    before = listing(tmp_path)
    code = run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert out == ""
    check_sentence(err, *parts)
    assert listing(tmp_path) == before


# What a model directory may lack or contradict.


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


# What may be wrong with the command itself.


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("int4g128", ("int4g128", "int4-g128")),
        ("int4-mixd", ("int4-mixd", "int4-mixed")),
        ("nf5", ("nf5", "nf4")),
        ("int4-g7", ("int4-g7",)),
        ("missing.toml", ("missing.toml",)),
    ],
)
def test_unknown_recipe(capsys, model, tmp_path, recipe, parts):
    refuse(capsys, tmp_path, ["quantize", model, tmp_path / "out", "--recipe", recipe], *parts)


def test_recipe_that_matches_nothing(capsys, model, tmp_path):
    (tmp_path / "r.toml").write_text('[[rules]]\nmatch = "*.self_atn.*"\nformat = "int8"\n')
    refuse(
        capsys,
        tmp_path,
        ["quantize", model, tmp_path / "out", "--recipe", tmp_path / "r.toml"],
        "self_atn",
        "self_attn",
    )


def test_wrong_paths(capsys, model, tmp_path):
    refuse(capsys, tmp_path, ["quantize", tmp_path / "nowhere", tmp_path / "out"], "nowhere does not exist")
    file = model / "config.json"
    refuse(capsys, tmp_path, ["quantize", file, tmp_path / "out"], "no directory")
    refuse(capsys, tmp_path, ["generate", tmp_path / "nowhere", "--prompt", "x"], "nowhere does not exist")
    refuse(capsys, tmp_path, ["eval", model, "--text", tmp_path / "nowhere"], "nowhere", "No such file")
    refuse(capsys, tmp_path, ["inspect", tmp_path / "nowhere"], "nowhere is missing")
    (tmp_path / "file").write_text("x")
    refuse(capsys, tmp_path, ["quantize", model, tmp_path / "file"], "file exists and is no directory")
    refuse(capsys, tmp_path, ["quantize", model, tmp_path / "file" / "out"], "file")


def test_existing_output(capsys, model, quantized, tmp_path):
    refuse(capsys, tmp_path, ["quantize", model, quantized], "exists already", "--force")
    refuse(capsys, tmp_path, ["quantize", model, model, "--force"], "no bitfold checkpoint")


def test_failure_with_force_keeps_the_old_one(capsys, model, quantized, tmp_path):
    nan_norm(model)
    before = tiny.tensors_of(quantized)
    refuse(capsys, tmp_path, ["quantize", model, quantized, "--force"], "nan")
    after = tiny.tensors_of(quantized)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_shorter_than_the_context(capsys, quantized, tmp_path):
    (tmp_path / "text").write_text("short")
    refuse(capsys, tmp_path, ["eval", quantized, "--text", tmp_path / "text"], "5 tokens", "context 64")
    (tmp_path / "text").write_text("")
    refuse(capsys, tmp_path, ["eval", quantized, "--text", tmp_path / "text"], "0 tokens")


def test_text_that_is_no_text(capsys, quantized, tmp_path):
    (tmp_path / "text").write_bytes(b"abc\xff\xfe" * 100)
    refuse(capsys, tmp_path, ["eval", quantized, "--text", tmp_path / "text"], "UTF-8", "byte 3")


def test_wrong_options(capsys, model, quantized, tmp_path):
    (tmp_path / "text").write_text(tiny.TEXT)
    text = ["--text", tmp_path / "text"]
    refuse(capsys, tmp_path, ["eval", quantized, *text, "--dtype", "int8"], "--dtype", "float32")
    refuse(capsys, tmp_path, ["eval", quantized, *text, "--device", "cuda:99"], "--device", "cuda:99")
    refuse(capsys, tmp_path, ["eval", quantized, *text, "--stride", "64"], "stride")
    refuse(capsys, tmp_path, ["eval", quantized], "--text")
    refuse(capsys, tmp_path, ["generate", quantized, "--prompt", "x", "--temperature", "-1"], "temperature")
    refuse(capsys, tmp_path, ["quantize", model, tmp_path / "out", "--shard-size", "0"], "--shard-size")
    refuse(capsys, tmp_path, ["quantize", model, tmp_path / "out", "--recip", "int8"], "--recip")
    refuse(capsys, tmp_path, ["quantise"], "quantise")


# What a calibration may find.


def calibrate(model: Path, tmp_path: Path, *options: object, recipe: str = "gptq-int4-g32") -> list:
    text = tmp_path / "text"
    if not text.exists():
        text.write_text(tiny.TEXT)
    arguments = ["quantize", model, tmp_path / "out", "--recipe", recipe, "--calibration", text]
    return [*arguments, "--samples", 2, "--sequence-length", 16, *options]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("text is empty",)),
        ("\n \n", ("text is empty",)),
        ("too short", ("9 tokens", "samples of 16", "not for 2")),
    ],
)
def test_calibration_text_that_will_not_do(capsys, model, tmp_path, text, parts):
    (tmp_path / "text").write_text(text)
    refuse(capsys, tmp_path, calibrate(model, tmp_path), *parts)


def test_calibration_text_that_is_not_there(capsys, model, tmp_path):
    refuse(
        capsys,
        tmp_path,
        calibrate(model, tmp_path, "--calibration", tmp_path / "nowhere"),
        "nowhere does not exist",
    )


def test_activations_that_are_not_finite_name_the_block(capsys, model, tmp_path):
    def change(tensors):
        tensors["model.layers.0.post_attention_layernorm.weight"].fill_(3e38)

    tiny.rewrite(model, change)
    refuse(
        capsys,
        tmp_path,
        calibrate(model, tmp_path),
        "model.layers.0: the inputs of mlp.gate_proj are not finite",
    )


def test_a_weight_that_is_not_finite(capsys, model, tmp_path):
    tiny.rewrite(model, lambda tensors: tensors[UP.replace("1", "0")].__setitem__((3, 5), float("nan")))
    refuse(
        capsys,
        tmp_path,
        calibrate(model, tmp_path),
        "model.layers.0.mlp.up_proj.weight: element [3, 5] is nan",
    )


def test_a_missing_shard(capsys, tmp_path):
    model = tiny.write_llama(tmp_path / "shards", shard="60KB")
    next(model.glob("model-00002-of-*.safetensors")).unlink()
    refuse(capsys, tmp_path, calibrate(model, tmp_path), "model-00002-of-", "is missing")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--samples", 0], ("samples is 0",)),
        (["--activations", "tape"], ("activations is 'tape'", "ram, disk")),
        (["--dtype", "int8"], ("--dtype is 'int8'",)),
        (["--device", "tpu"], ("--device is 'tpu'",)),
        (["--clamp"], ("--clamp",)),
        (["--recipe", "int4-g32"], ("rounds to nearest", "leave --calibration away")),
        (["--calibration", ""], ("--samples is given", "--calibration")),
    ],
)
def test_wrong_options_of_a_calibration(capsys, model, tmp_path, options, parts):
    refuse(capsys, tmp_path, calibrate(model, tmp_path, *options), *parts)


def test_a_recipe_that_needs_a_text(capsys, model, tmp_path):
    refuse(
        capsys,
        tmp_path,
        ["quantize", model, tmp_path / "out", "--recipe", "gptq-int4-g32"],
        "needs a text to calibrate on",
        "--calibration FILE",
    )


def test_model_without_tokenizer(capsys, quantized, tmp_path):
    for file in quantized.glob("tokenizer*"):
        file.unlink()
    refuse(capsys, tmp_path, ["generate", quantized, "--prompt", "x"], "tokenizer")


# What may be wrong with the disk.


def test_output_larger_than_the_free_space(capsys, model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refuse(capsys, tmp_path, ["quantize", model, tmp_path / "out", "--recipe", "int4-g32"], "needs", "free")


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync"])
@pytest.mark.parametrize("nth", [1, 3])
def test_disk_full_midway(capsys, model, tmp_path, monkeypatch, call, nth):
    calls = []
    original = getattr(os, call)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    monkeypatch.setattr(os, call, full)
    arguments = ["quantize", model, tmp_path / "out", "--recipe", "int4-g32", "--shard-size", "0.00003"]
    refuse(capsys, tmp_path, arguments, str(tmp_path / "out"), "No space left on device")
    assert len(calls) == nth


def test_file_size_limit(model, tmp_path):
    """A real refusal of the kernel, as a full disk is one, in a process of its own."""
    before = listing(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "bitfold", "quantize", model, tmp_path / "out", "--recipe", "int8"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2
    check_sentence(done.stderr, "out", "File too large")
    assert listing(tmp_path) == before


def test_real_full_disk(model, tmp_path):
    """A file system of 64 kB, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bitfold", "quantize", model, disk / "out"], capture_output=True, text=True
        )
        assert done.returncode == 2
        check_sentence(done.stderr, "out", "free")
        assert listing(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_read_only_output(model, tmp_path):
    """Root may write anywhere but on a file system that is mounted read-only."""
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    if os.geteuid() == 0:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", home], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting is not allowed here")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bitfold", "quantize", model, home / "out"], capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        check_sentence(done.stderr, str(home / "out"))
        assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr
        assert listing(home) == []
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", home], check=True)
