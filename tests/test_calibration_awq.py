"""AWQ within the loop over the blocks: what is folded changes nothing, what comes out is nearer to the model."""

from __future__ import annotations

import json
from pathlib import Path

import bitfold
import calibrated
import pytest
import tiny
import tiny_architectures
import torch
from bitfold import hf, quantize_calibrated
from bitfold.calibration import data, scaling
from bitfold.calibration import run as runs
from bitfold.evaluate import compare_all, cut, kl_gap
from bitfold.quantizers.awq import AwqOptions
from bitfold.recipes import Recipe, Rule
from calibrated import OPTIONS, contents, prepared
from tiny import one_thread  # noqa: F401

DEMO = Path(__file__).parents[1] / "examples" / "demo"
IDS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "kept"), tiny_architectures.KEPT)
def test_a_scaled_block_computes_what_it_did(name, kept, tmp_path):
    """Of a bfloat16 checkpoint, as it will be stored: with norms, biases and kept layers in bfloat16."""
    tiny_architectures.model(name, torch.bfloat16).save_pretrained(tmp_path)
    keep = (Rule(kept, "keep"),) if kept else ()
    recipe = Recipe("awq", "", (*keep, Rule("*", "int3-g16", "awq", AwqOptions(then="gptq"))))
    run, layers, changed = prepared(tmp_path, recipe, IDS, scaling.prepare)
    assert set(run.notes) == set(layers)
    assert max(note.alpha for note in run.notes.values()) > 0
    assert len(changed) > len(layers) / 2


@pytest.mark.parametrize("name", [*tiny_architectures.MODELS])
def test_every_architecture_loads_and_is_nearer_than_plain_rounding(name, tmp_path, monkeypatch):
    tiny_architectures.model(name, torch.bfloat16).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    ids = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(runs.data, "read", lambda *args, **kwargs: data.Calibration(ids, "ids", 0))
    summary = quantize_calibrated(tmp_path / "m", tmp_path / "awq", "awq-int3-g16", "ids")
    assert {module.calibration.method for module in summary.modules} == {"awq"}
    errors = [(m.calibration.output_error, m.calibration.rounding_error) for m in summary.modules]
    assert sum(error for error, _ in errors) < sum(error for _, error in errors)
    bitfold.quantize_checkpoint(tmp_path / "m", tmp_path / "rtn", "int3-g16")
    base = hf.load_causal_lm(tmp_path / "m").float()
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        awq, rtn = (
            tiny_architectures.relative_difference(
                bitfold.load(tmp_path / n).float()(input_ids=ids).logits, expected
            )
            for n in ("awq", "rtn")
        )
    assert awq < rtn


@torch.no_grad()
def test_the_errors_of_the_report_are_those_of_the_layers(tmp_path, text):
    """Of a layer of the first block, by hooks in the model and from what is written."""
    source = calibrated.write_model(tmp_path / "m")
    quantize_calibrated(source, tmp_path / "q", "awq-int3-g32", text, **OPTIONS)
    report = json.loads((tmp_path / "q" / "bitfold_report.json").read_text())
    base = hf.load_causal_lm(source, dtype=torch.float32)
    made = bitfold.load(tmp_path / "q", dtype=torch.float32)
    calibration = data.read(text, tiny.tokenizer(), **OPTIONS, seed=0)
    name = "model.layers.0.mlp.gate_proj"
    xs = []
    handle = base.get_submodule(name).register_forward_pre_hook(lambda _, args: xs.append(args[0]))
    with torch.no_grad():
        base(input_ids=calibration.ids)
    handle.remove()
    x = xs[0].reshape(-1, 64)
    norms = [m.get_submodule("model.layers.0.post_attention_layernorm").weight for m in (base, made)]
    weight = base.get_submodule(name).weight
    columns = made.get_submodule(name).qtensor.decode() * (norms[1] / norms[0])
    plain = bitfold.encode(weight, "int3-g32").decode()
    found = next(module["calibration"] for module in report["modules"] if module["name"] == name)
    for key, changed in (("output_error", columns), ("rounding_error", plain)):
        error = (x @ (changed - weight).T).norm() / (x @ weight.T).norm()
        assert found[key] == pytest.approx(float(error), rel=1e-3), key


@pytest.mark.parametrize("then", ["round", "gptq"])
def test_threads_and_a_stop_change_no_byte(then, source, text, tmp_path, threads):
    recipe = Recipe("awq", "", (Rule("*", "int3-g32", "awq", AwqOptions(then=then)),))
    threads(1)
    quantize_calibrated(source, tmp_path / "one", recipe, text, **OPTIONS)
    threads(3)

    def stop(what: str, done: int, total: int) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_calibrated(source, tmp_path / "two", recipe, text, **OPTIONS, progress=stop)
    quantize_calibrated(source, tmp_path / "two", recipe, text, **OPTIONS)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_model_is_refused_by_name(tmp_path, text):
    from transformers import StableLmConfig, StableLmForCausalLM

    config = StableLmConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    StableLmForCausalLM(config).save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(
        ValueError, match="the model is a 'stablelm', and which layers feed which is known only of"
    ):
        quantize_calibrated(tmp_path / "m", tmp_path / "q", "awq-int4-g32", text, **OPTIONS)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("formats", [("int4-g128", "int4-g64"), ("int3-g128", "int3-g64")], ids=str)
def test_on_the_demo_model_the_divergence_is_smaller_than_that_of_rounding(formats, tmp_path):
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "first.txt").write_text(text[:60_000])
    models = {}
    for format in formats:
        quantize_calibrated(
            DEMO / "model",
            tmp_path / f"awq-{format}",
            f"awq-{format}",
            tmp_path / "first.txt",
            samples=16,
            sequence_length=256,
        )
        bitfold.quantize_checkpoint(DEMO / "model", tmp_path / format, format)
        for name in (f"awq-{format}", format):
            models[name] = bitfold.load(tmp_path / name, dtype=torch.float32)
    windows = cut(text[100_000:], hf.load_tokenizer(DEMO / "model"), context=512, max_tokens=6132)
    measured = compare_all(hf.load_causal_lm(DEMO / "model", dtype=torch.float32), models, windows)
    for format in formats:
        gap = kl_gap(measured[f"awq-{format}"], measured[format])
        assert gap.value > 3 * gap.error > 0, (format, gap)
