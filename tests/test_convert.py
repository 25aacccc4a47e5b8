"""`bitfold convert`: GGUF files and directories of safetensors, back and forth, with the status of every tensor."""

from __future__ import annotations

import json

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

import bitfold  # noqa: E402
import gguf_models  # noqa: E402
import tiny  # noqa: E402
from bitfold.convert import convert_checkpoint  # noqa: E402
from bitfold.gguf import export, reader  # noqa: E402
from bitfold.shards import CheckpointError  # noqa: E402
from command import call, call_json  # noqa: E402
from tiny import one_thread  # noqa: E402, F401

SIZES = {"hidden_size": 256, "intermediate_size": 512}
IDS = torch.randint(0, gguf_models.ROWS, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def values(file) -> dict[str, torch.Tensor]:
    """All tensors of a GGUF file, by the gguf package alone: bytes or numbers."""
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}


def packed_file(path, kind: str, format: str):
    """A GGUF file of a random model whose matrices have a block format."""
    directory = gguf_models.write_directory(path / f"{kind}-source", kind, **SIZES)
    return gguf_models.write_file(export.read_directory(directory), path / f"{kind}.gguf", format)


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "gemma2", "mixtral", "qwen3_moe", "phi3-long"])
def test_there_and_back_is_the_same(kind, tmp_path):
    """GGUF -> checkpoint -> GGUF: every tensor has the same bytes, all metadata is there, and both load alike."""
    format = "q4_k" if kind not in ("phi3-long", "qwen3_moe") else "q8_0"
    sizes = {} if kind == "phi3-long" else SIZES
    source = gguf_models.write_directory(tmp_path / "source", kind, **sizes)
    first = gguf_models.write_file(
        export.read_directory(source), tmp_path / "first.gguf", format, stacks=True
    )
    there = convert_checkpoint(first, tmp_path / "checkpoint")
    back = convert_checkpoint(tmp_path / "checkpoint", tmp_path / "back.gguf")
    assert there.exact
    assert back.exact
    assert (there.before, there.after, back.before, back.after) == ("gguf", "bitfold", "bitfold", "gguf")
    one, two = values(first), values(tmp_path / "back.gguf")
    assert one.keys() == two.keys()
    for name, wanted in one.items():
        assert torch.equal(two[name], wanted), name
    metadata = [reader.read_gguf(file).metadata for file in (first, tmp_path / "back.gguf")]
    assert metadata[1].keys() == metadata[0].keys()
    changed = {key for key, value in metadata[0].items() if metadata[1][key] != value}
    assert changed <= {"general.file_type", "general.name"}
    assert torch.equal(logits(bitfold.load(tmp_path / "checkpoint")), logits(bitfold.load(first)))


def test_an_unquantized_directory_keeps_its_values(tmp_path):
    """bfloat16 -> BF16 -> bfloat16, and the tensors are those of the first directory."""
    source = gguf_models.write_directory(tmp_path / "source", "llama-biased", torch.bfloat16)
    assert convert_checkpoint(source, tmp_path / "model.gguf").exact
    back = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert back.exact
    assert back.after == "transformers"
    one, two = tiny.tensors_of(source), tiny.tensors_of(tmp_path / "back")
    assert one.keys() == two.keys()
    assert all(torch.equal(two[name].bfloat16(), wanted) for name, wanted in one.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2_moe"])
def test_decoded_weights_are_those_of_the_blocks(kind, tmp_path):
    """--decode float32 makes a directory that transformers alone computes the same with."""
    file = packed_file(tmp_path, kind, "q8_0")
    result = convert_checkpoint(file, tmp_path / "decoded", decode=torch.float32)
    assert result.exact
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded").eval()
    wanted = logits(bitfold.load(file))
    assert (logits(plain) - wanted).abs().max() < 2e-5 * wanted.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "decoded")
    original = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{kind}-source")
    assert [tokenizer(text)["input_ids"] for text in gguf_models.TRICKY] == [
        original(text)["input_ids"] for text in gguf_models.TRICKY
    ]


def test_stacks_of_experts_are_decoded(tmp_path):
    source = gguf_models.write_directory(tmp_path / "source", "mixtral", **SIZES)
    model = export.read_directory(source)
    file = gguf_models.write_file(model, tmp_path / "packed.gguf", "q4_k", stacks=True)
    plain = gguf_models.write_file(model, tmp_path / "plain.gguf", "q4_k", stacks=True, decode=True)
    assert convert_checkpoint(file, tmp_path / "decoded", decode=torch.float32).exact
    decoded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded").eval()
    assert torch.equal(logits(decoded), logits(bitfold.load(plain)))


def test_errors_are_measured(tmp_path):
    """F32 -> F16: the errors told are those that numbers of the two files show."""
    source = gguf_models.write_directory(tmp_path / "source", "qwen2")
    result = convert_checkpoint(source, tmp_path / "model.gguf", dtype=torch.float16)
    assert not result.exact
    state, found = tiny.tensors_of(source), values(tmp_path / "model.gguf")
    status = next(status for status in result.tensors if status.name == "blk.1.ffn_up.weight")
    wanted = state["model.layers.1.mlp.up_proj.weight"].double()
    error = found[status.name].double() - wanted
    assert (status.before, status.after) == ("F32", "F16")
    assert status.largest == error.abs().max().item() > 0
    assert status.relative == pytest.approx((error.norm() / wanted.norm()).item(), rel=1e-6)
    assert all(status.exact for status in result.tensors if status.name.endswith("norm.weight"))


def test_the_shift_of_norms_is_measured(tmp_path):
    """Gemma's norms get a 1 in float32, which rounds; nothing else changes."""
    source = gguf_models.write_directory(tmp_path / "source", "gemma2")
    result = convert_checkpoint(source, tmp_path / "model.gguf")
    for status in result.tensors:
        norm = status.name.endswith("_norm.weight")
        assert (0 < status.largest < 2**-23) if norm else status.exact, status


def test_the_command_tells_and_stores(tmp_path, capsys):
    source = gguf_models.write_directory(tmp_path / "source", "mistral", sliding_window=16)
    code, out, err = call(capsys, "convert", source, tmp_path / "model.gguf")
    assert code == 0, err
    assert "all exact" in out
    assert "its layers look back 16 tokens" in " ".join(out.split())
    stored = json.loads((tmp_path / "model.gguf.json").read_text())
    assert stored["exact"]
    assert len(stored["tensors"]) == 21
    told = call_json(capsys, "convert", tmp_path / "model.gguf", tmp_path / "back", "--decode", "float16")
    assert told == json.loads((tmp_path / "back" / "bitfold_conversion.json").read_text())
    assert (told["from"], told["to"], told["exact"]) == ("gguf", "transformers", False)


def test_running_a_file_by_the_commands(tmp_path, capsys):
    """generate and eval take a GGUF file where they take a directory."""
    source = gguf_models.write_directory(tmp_path / "source", "llama", eos_token_id=None)
    convert_checkpoint(source, tmp_path / "model.gguf")
    made = [
        call_json(capsys, "generate", model, "--prompt", "The quick", "--max-new-tokens", 5)["text"]
        for model in (source, tmp_path / "model.gguf")
    ]
    assert made[0] == made[1]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(gguf_models.CORPUS))
    result = call_json(
        capsys, "eval", tmp_path / "model.gguf", "--base", source, "--text", text, "--context", 32
    )
    assert result["mean_kl"]["value"] == 0
    assert result["top1"]["value"] == 1


# ---- what can't be ----


def fails(capsys, *arguments: object) -> str:
    code, _, err = call(capsys, *arguments)
    assert code == 2, err
    assert err.count("\n") == 1, err
    return err


def test_what_cannot_be_converted_is_one_sentence(tmp_path, capsys):
    source = gguf_models.write_directory(tmp_path / "source", "qwen2")
    file = gguf_models.write_file(export.read_directory(source), tmp_path / "model.gguf")
    new = tmp_path / "new"
    assert "does not exist" in fails(capsys, "convert", tmp_path / "nothing", new)
    assert "use bitfold quantize" in fails(capsys, "convert", file, tmp_path / "other.gguf")
    assert "use bitfold quantize" in fails(capsys, "convert", source, new)
    assert "--decode is 'int8'" in fails(capsys, "convert", file, new, "--decode", "int8")
    assert "takes dtype" in fails(capsys, "convert", source, tmp_path / "a.gguf", "--decode", "float16")
    assert "unquantized directory" in fails(capsys, "convert", file, new, "--dtype", "float16")
    assert "exists already" in fails(capsys, "convert", source, file)
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    assert "is no GGUF file" in fails(capsys, "convert", text, new)
    bitfold.quantize_checkpoint(source, tmp_path / "nf4", "nf4-b64")
    assert "nf4-b64 is of another grid than iq4_nl; --allow-lossy" in fails(
        capsys, "convert", tmp_path / "nf4", tmp_path / "b.gguf"
    )
    assert not new.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "nf4", "source", "text.gguf"]


def test_values_beyond_float16_are_refused(tmp_path, capsys):
    source = gguf_models.write_directory(tmp_path / "source", "qwen2", torch.bfloat16)
    tiny.rewrite(source, lambda tensors: tensors["model.embed_tokens.weight"].__setitem__((3, 5), 1e6))
    message = fails(capsys, "convert", source, tmp_path / "a.gguf", "--dtype", "float16")
    assert "'token_embd.weight' has values beyond float16's 65504" in message
    convert_checkpoint(source, tmp_path / "model.gguf")
    message = fails(capsys, "convert", tmp_path / "model.gguf", tmp_path / "new", "--decode", "float16")
    assert "model.embed_tokens.weight has values beyond float16's 65504" in message
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "a.gguf").exists()


def test_nothing_is_replaced_unasked(tmp_path):
    source = gguf_models.write_directory(tmp_path / "source", "qwen2")
    file = tmp_path / "model.gguf"
    convert_checkpoint(source, file)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_checkpoint(source, file)
    assert convert_checkpoint(source, file, force=True).exact
