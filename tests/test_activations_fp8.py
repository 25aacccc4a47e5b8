"""Layers and models whose inputs are 8-bit floats: what a QuantLinear computes, keeps, saves and refuses."""

from __future__ import annotations

import copy
import json
import pickle

import bitfold
import mixtures
import numpy as np
import oracle_fp8
import pytest
import tiny
import torch
from bitfold.activations import KINDS, read
from bitfold.nn import QuantLinear, set_activations
from bitfold.recipes import Recipe, Rule
from cases import refusal
from test_linear_fp8 import FEW
from tiny import one_thread  # noqa: F401

IDS = torch.arange(40).remainder(tiny.VOCAB)[None]
SCALE = torch.tensor(0.03)


def layer(format: str, activations: str, rng: np.random.Generator, n: int = 24, k: int = 72) -> QuantLinear:
    qtensor = bitfold.encode(torch.from_numpy(rng.standard_normal((n, k))).float(), format)
    scale = SCALE.clone() if read(activations).is_static else None
    bias = torch.from_numpy(rng.standard_normal(n)).float()
    return QuantLinear(qtensor, bias, activations, x_scale=scale).eval()


@pytest.mark.parametrize("activations", ["fp8", "fp8-static"])
@pytest.mark.parametrize("format", FEW)
def test_a_layer_rounds_its_input(format, activations, rng):
    module = layer(format, activations, rng)
    x = torch.from_numpy(rng.standard_normal((2, 3, 72))).float()
    scale = float(SCALE) if activations == "fp8-static" else None
    rows, decoded = x.reshape(-1, 72).numpy(), module.qtensor.decode().numpy()
    expected = oracle_fp8.linear(rows, decoded, module.bias.detach().numpy(), scale)
    y = module(x).detach()
    assert y.shape == (2, 3, 24)
    assert np.linalg.norm(y.reshape(-1, 24).double().numpy() - expected) < 5e-6 * np.linalg.norm(expected)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
    assert f"activations={activations}" in str(module)


def test_activations_may_be_set_at_any_time(rng):
    module = layer("fp8-e4m3-channel", "float", rng)
    x = torch.from_numpy(rng.standard_normal((3, 72))).float()
    plain = module(x)
    module.activations = "fp8"
    assert not torch.equal(module(x), plain)
    refusal(lambda: setattr(module, "activations", "fp8-static"), "fp8-static", "x_scale")
    assert str(module.activations) == "fp8"
    module.activations = "float"
    assert torch.equal(module(x), plain)


def test_a_static_scale_keeps_its_dtype(rng):
    module = layer("fp8-e4m3-tensor", "fp8-static", rng)
    for moved in (copy.deepcopy(module).half(), copy.deepcopy(module).to(torch.bfloat16)):
        assert moved.x_scale.dtype == torch.float32
        assert torch.equal(moved.x_scale, SCALE)
        assert not moved.x_scale.requires_grad
    state = module.state_dict()
    assert set(state) == {"codes", "scales", "bias", "x_scale"}
    empty = QuantLinear.empty("fp8-e4m3-tensor", 24, 72, bias=True, activations="fp8-static")
    empty.load_state_dict(state)
    x = torch.from_numpy(rng.standard_normal((3, 72))).float()
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize("activations", ["fp8", "fp8-static"])
def test_gradients_go_straight_through(activations, rng):
    module = layer("fp8-e4m3-b128x128", activations, rng)
    x = torch.from_numpy(rng.standard_normal((3, 72))).float().requires_grad_()
    module(x).sum().backward()
    expected = module.qtensor.decode().sum(0).expand(3, 72)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activations", ["fp8", "fp8-static"])
def test_a_layer_compiles_whole(activations, rng):
    module = layer("fp8-e4m3-channel", activations, rng)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (5, 1, 9):
        x = torch.from_numpy(rng.standard_normal((m, 72))).float()
        assert torch.equal(compiled(x), module(x))


def test_what_is_refused(rng):
    refusal(lambda: layer("q8_0", "fp8", rng, k=64), "fp8", "q8_0", "fp8-e4m3-channel")
    refusal(lambda: Rule("*", "q4_k", activations="fp8"), "fp8", "q4_k")
    refusal(lambda: Rule("*", None, activations="fp8"), "fp8", "keeps")
    refusal(lambda: read("fp8-dynamic"), "fp8-dynamic", "fp8-static")
    flat = bitfold.QTensor(
        "nf4-b64", (3, 35), bitfold.encode(torch.ones(1, 105), "nf4-b64").planes, layout="flat"
    )
    refusal(lambda: QuantLinear(flat, activations="fp8"), "fp8", "across its rows")
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        qtensor = bitfold.encode(torch.ones(2, 16), "fp8")
        refusal(
            lambda q=qtensor, b=bad: QuantLinear(q, activations="fp8-static", x_scale=torch.tensor(b)),
            "x_scale",
            "above 0",
        )
    assert KINDS["fp8-static"].largest == 448


# ---- models ----


@pytest.mark.parametrize("recipe", ["fp8-w8a8", "fp8-block"])
def test_a_model_comes_back_as_it_was(recipe, tmp_path):
    model = tiny.llama(torch.bfloat16)
    bitfold.quantize(model, recipe, quiet=True)
    kinds = {str(m.activations) for m in model.modules() if isinstance(m, QuantLinear)}
    assert kinds == {"fp8" if recipe == "fp8-w8a8" else "float"}
    bitfold.save(model, tmp_path / "q", recipe=recipe)
    loaded = bitfold.load(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    again = bitfold.load(tmp_path / "q", activations="float" if recipe == "fp8-w8a8" else "fp8")
    with torch.no_grad():
        assert not torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_static_model_comes_back_as_it_was(tmp_path):
    model = tiny.llama(torch.bfloat16)
    bitfold.quantize(model, "fp8-e4m3-tensor", quiet=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            static = QuantLinear(module.qtensor, module.bias, "fp8-static", x_scale=SCALE.clone())
            model.set_submodule(name, static)
    bitfold.save(model, tmp_path / "q")
    section = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert "fp8-static" in json.dumps(section)
    loaded = bitfold.load(tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_experts_round_their_inputs():
    model = mixtures.model("mixtral")
    bitfold.quantize(model, Recipe("r", "", (Rule("*", "fp8-e4m3-channel", activations="fp8"),)), quiet=True)
    stack = model.model.layers[0].mlp.experts.down_proj
    x = torch.randn(5, stack.shape[2])
    assert torch.equal(stack(x, 1), QuantLinear(stack.matrix(1), activations="fp8")(x))
    rounded = model(IDS).logits
    set_activations(model, "float")
    assert torch.equal(stack(x, 1), QuantLinear(stack.matrix(1))(x))
    assert not torch.equal(model(IDS).logits, rounded)
