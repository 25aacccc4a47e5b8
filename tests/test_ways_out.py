"""Every preset, and every way that a quantized model may go from there: each has what its layers multiply with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import bitfold
import pytest
import tiny
import torch
from bitfold.check.examine import examine
from bitfold.convert import convert_checkpoint
from bitfold.nn import KEPT_PARTS, QuantLinear, QuantModule
from bitfold.recipes import RECIPES, Recipe, Rule
from tiny import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM

IDS = torch.randint(2, tiny.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
FED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # by norms
LOUD, FACTOR = 5, 64.0  # a hidden channel, and how much larger norms make it


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model with a tied head and an outlier feature, which weights behind the norms make good."""
    path = tiny.write_llama(tmp_path_factory.mktemp("source") / "model", torch.bfloat16, tied=True)

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[LOUD] *= FACTOR
            elif name.endswith(
                ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
            ):
                tensor[:, LOUD] /= FACTOR

    tiny.rewrite(path, plant)
    return path


def tied_too(recipe: Recipe) -> Recipe:
    """With the weight that the embedding and the head share quantized as well."""
    shared = Rule("*.embed_tokens", "int8-g32"), Rule("lm_head", "int8-g32")
    return dataclasses.replace(recipe, rules=(*shared, *recipe.rules))


@pytest.fixture(params=RECIPES)
def checkpoint(request, source, text, tmp_path) -> Path:
    recipe, target = RECIPES[request.param], tmp_path / "q"
    if any(rule.calibrates or rule.activations.gains for rule in recipe.rules):
        bitfold.quantize_calibrated(source, target, recipe, text, samples=4, sequence_length=32)
    else:
        bitfold.quantize_checkpoint(source, target, tied_too(recipe))
    return target


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.decode() for name, module in model.named_modules() if isinstance(module, QuantModule)
    }


def kept_of(model: torch.nn.Module) -> dict[str, tuple]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {
        name: (str(layer.activations), *(getattr(layer, part) is not None for part in KEPT_PARTS))
        for name, layer in layers.items()
    }


def test_ways_out(checkpoint, tmp_path):
    report = examine(checkpoint)
    assert report.sound, [str(problem) for problem in report.problems]
    model = load(checkpoint)
    wanted, weights, kept = logits(model), weights_of(model), kept_of(model)
    assert torch.equal(logits(bitfold.load(checkpoint, dtype=torch.float32)), wanted)

    bitfold.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "pretrained")
    for path in (tmp_path / "saved", tmp_path / "pretrained"):
        assert examine(path).sound
        again = load(path)
        assert torch.equal(logits(again), wanted)
        assert kept_of(again) == kept

    decoded = load(checkpoint).dequantize()
    for name, weight in weights.items():
        assert torch.equal(decoded.get_submodule(name).weight, weight), name
    decoded.save_pretrained(tmp_path / "decoded")
    assert torch.equal(logits(load(tmp_path / "decoded")), logits(decoded))

    done = convert_checkpoint(checkpoint, tmp_path / "converted", decode=torch.float32)
    assert done.exact
    assert torch.equal(logits(load(tmp_path / "converted")), logits(decoded))


def test_adapters_on_every_preset(checkpoint, tmp_path):
    """Ones that add nothing: what is merged has the same weights, and what is rounded again keeps what it had."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    weights, kept = weights_of(load(checkpoint)), kept_of(load(checkpoint))
    adapted = peft.get_peft_model(load(checkpoint), bitfold.peft.prepare(config))
    plain = bitfold.peft.merge(adapted, torch.float32)
    for name, weight in weights.items():
        assert torch.equal(plain.get_submodule(name).weight, weight), name
    adapted = peft.get_peft_model(load(checkpoint), bitfold.peft.prepare(config))
    merged = bitfold.peft.merge(adapted, quiet=True)
    assert kept_of(merged) == kept
    merged.save_pretrained(tmp_path / "merged")
    assert examine(tmp_path / "merged").sound
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def test_the_model_has_what_it_is_for(source, text, tmp_path):
    """Copies of outlier columns, without which some of the tests above would test nothing."""
    bitfold.quantize_calibrated(source, tmp_path / "q", "llm-int8", text, samples=4, sequence_length=32)
    copies = [kept for kept in kept_of(load(tmp_path / "q")).values() if kept[0] == "llm-int8-exact"]
    assert len(copies) >= 10
