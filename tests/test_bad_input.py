"""Bad input: one sentence on stderr that names what is wrong, exit code 2, nothing left behind. Of models that
are damaged, test_spoilt_models.py.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from refusals import check_sentence, listing, refuse
from tiny import one_thread  # noqa: F401

UP = "model.layers.1.mlp.up_proj.weight"

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
    tiny.rewrite(model, lambda tensors: tensors["model.norm.weight"].__setitem__(9, float("nan")))
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
