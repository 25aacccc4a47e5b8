"""The command line: what each command prints, as text and as JSON, and where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bitfold
import pytest
import tiny
import torch
from bitfold import _C
from bitfold.cli.app import run
from command import call, call_json
from tiny import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("cli") / "model", torch.float32)


@pytest.fixture(scope="module")
def quantized(source) -> Path:
    target = source.parent / "quantized"
    bitfold.quantize_checkpoint(source, target, "int4-g32")
    return target


@pytest.fixture(scope="module")
def text(source) -> Path:
    path = source.parent / "text.txt"
    path.write_text(tiny.TEXT)
    return path


def test_quantize_prints_layers_and_sizes(capsys, source, tmp_path):
    code, out, err = call(capsys, "quantize", source, tmp_path / "q", "--recipe", "int4-mixed")
    assert code == 0, err
    lines = out.splitlines()
    row = next(line for line in lines if line.startswith("model.layers.1.mlp.down_proj"))
    assert row.split()[1] == "int4-g128"
    assert "64 x 128" in row
    assert row.endswith("%")
    assert next(line for line in lines if "self_attn.q_proj" in line).split()[1] == "int8-channel"
    assert "int4-mixed" in lines[-1]
    assert "parameters quantized" in lines[-1]
    bitfold.load(tmp_path / "q")


def test_quantize_json_is_the_report(capsys, source, tmp_path):
    data = call_json(capsys, "quantize", source, tmp_path / "q", "--recipe", "nf4")
    output = data.pop("output")
    assert output == str(tmp_path / "q")
    assert data == json.loads((tmp_path / "q" / "bitfold_report.json").read_text())


def test_default_recipe_force_and_shards(capsys, source, tmp_path):
    assert call(capsys, "quantize", source, tmp_path / "q")[0] == 0
    assert call(capsys, "quantize", source, tmp_path / "q")[0] == 2
    code, _, err = call(capsys, "quantize", source, tmp_path / "q", "--force", "--shard-size", "0.00005")
    assert code == 0, err
    assert (tmp_path / "q" / "model.safetensors.index.json").exists()
    assert (
        json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["recipe"]
        == "int4-g128"
    )


def test_recipe_of_ones_own(capsys, source, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[rules]]\nmatch = "*.mlp.*"\nformat = "int3-g32"\n')
    data = call_json(capsys, "quantize", source, tmp_path / "q", "--recipe", recipe)
    assert data["recipe"] == "mine"
    assert {module["format"] for module in data["modules"]} == {"int3-g32"}
    assert len(data["modules"]) == 6


def test_eval_prints_its_protocol(capsys, source, quantized, text):
    code, out, err = call(capsys, "eval", quantized, "--base", source, "--text", text)
    assert code == 0, err
    lines = dict(
        line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(("99", "same", "mean"))
    )
    assert "BOS" in lines["protocol"]
    assert "context 64" in lines["protocol"]
    assert "float32" in lines["protocol"]
    assert "±" in lines["perplexity"]
    for label in ("mean KL", "99 % KL", "same top-1", "bits/byte", "base"):
        assert label in out


def test_eval_json(capsys, source, quantized, text):
    data = call_json(
        capsys, "eval", quantized, "--base", source, "--text", text, "--context", "33", "--stride", "16"
    )
    assert data["protocol"]["context"] == 33
    assert data["protocol"]["stride"] == 16
    assert data["protocol"]["tokens"] == data["protocol"]["scored"] == len(tiny.TEXT)
    assert data["mean_kl"]["value"] > 3 * data["mean_kl"]["error"] > 0
    assert data["p99_kl"]["value"] > data["mean_kl"]["value"]
    assert 0 < data["top1"]["value"] <= 1
    assert data["base"]["perplexity"]["value"] > 1
    alone = call_json(capsys, "eval", source, "--text", text, "--context", "33", "--stride", "16")
    assert alone["perplexity"] == data["base"]["perplexity"]
    assert "mean_kl" not in alone


def test_eval_options(capsys, quantized, text):
    data = call_json(
        capsys, "eval", quantized, "--text", text, "--no-bos", "--max-tokens", "200", "--dtype", "bfloat16"
    )
    protocol = data["protocol"]
    assert (protocol["bos"], protocol["tokens"], protocol["scored"]) == (False, 200, 199)
    assert protocol["dtype"] == "bfloat16"


def test_generate_prints_the_text_and_then_the_speed(capsys, quantized):
    code, out, err = call(capsys, "generate", quantized, "--prompt", "def f", "--max-new-tokens", "8")
    assert code == 0, err
    data = call_json(capsys, "generate", quantized, "--prompt", "def f", "--max-new-tokens", "8")
    assert out == "def f" + data["text"] + "\n"
    assert data["tokens"] == 8
    assert "tokens/s" in err.splitlines()[-1]
    drawn = [
        call_json(capsys, "generate", quantized, "--prompt", "x", "--temperature", "2", "--seed", seed)[
            "text"
        ]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_from_the_base_model(capsys, source):
    assert call_json(capsys, "generate", source, "--prompt", "a", "--max-new-tokens", "4")["tokens"] == 4


def test_inspect_directory(capsys, source, quantized):
    data = call_json(capsys, "inspect", quantized)
    entries = {entry["name"]: entry for entry in data["entries"]}
    layer = entries["model.layers.0.mlp.up_proj"]
    assert (layer["format"], layer["shape"], layer["bits_per_weight"]) == ("int4-g32", [128, 64], 4.5)
    assert 0.01 < layer["relative_rmse"] < 0.2
    assert entries["model.norm.weight"]["format"] == "F32"
    assert data["bytes"] == sum(entry["nbytes"] for entry in data["entries"])
    code, out, _ = call(capsys, "inspect", quantized)
    assert code == 0
    assert "int4-g32" in out
    assert f"{len(entries)} entries" in out
    assert call(capsys, "inspect", source)[0] == 0


def test_inspect_file(capsys, quantized):
    data = call_json(capsys, "inspect", quantized / "model.safetensors")
    names = {entry["name"] for entry in data["entries"]}
    assert "model.layers.0.mlp.up_proj" in names
    (quantized.parent / "alone").mkdir()
    lonely = quantized.parent / "alone" / "x.safetensors"
    lonely.write_bytes((quantized / "model.safetensors").read_bytes())
    entries = call_json(capsys, "inspect", lonely)["entries"]
    assert "model.layers.0.mlp.up_proj.codes" in {entry["name"] for entry in entries}


def test_doctor(capsys):
    data = call_json(capsys, "doctor")
    assert data["bitfold"]["version"] == bitfold.__version__
    assert _C.cpu_features()[data["cpu"]["isa"]]
    assert data["libraries"]["torch"] == torch.__version__
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert torch.__version__ in out


def test_help_and_version(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for command in ("quantize", "eval", "generate", "inspect", "doctor"):
        assert command in out
    assert call(capsys, "--version")[1].split() == ["bitfold", bitfold.__version__]


def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "bitfold", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "bitfold")


BLOCKED = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from bitfold.cli import main
main()
"""


@pytest.mark.parametrize(
    ("blocked", "arguments", "extra"),
    [
        ("typer", ["doctor"], "bitfold[cli]"),
        ("rich", ["doctor"], "bitfold[cli]"),
        ("transformers", ["quantize", ".", "out"], "bitfold[hf]"),
    ],
)
def test_missing_extras_are_one_sentence(blocked, arguments, extra, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, blocked, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert extra in done.stderr


def test_bugs_keep_their_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr("bitfold.cli.doctor.diagnose", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["doctor"])


def test_interrupt(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitfold.cli.doctor.diagnose", interrupted)
    code, out, err = call(capsys, "doctor")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_closed_pipe_is_no_error():
    script = f"{sys.executable} -m bitfold inspect --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert "Traceback" not in done.stderr
