"""Training with rounded weights: the forward pass, gradients, and what it becomes, bit for bit."""

from __future__ import annotations

import copy
import math
import runpy
from pathlib import Path

import bitfold
import numpy as np
import pytest
import torch
from bitfold import qat
from tiny import llama, one_thread, write_llama  # noqa: F401
from torch import nn
from transformers import AutoModelForCausalLM

DEMO = Path(__file__).parents[1] / "examples" / "demo" / "model"  # its tokenizer is one that GGUF knows
EXAMPLE = Path(__file__).parents[1] / "examples" / "qat.py"
IDS = torch.arange(24).reshape(2, 12)
FORMATS = (
    "int8", "int8-g32-asym", "int4-channel", "int4-g32", "int4-g32-asym", "int3-g64", "int3-g32-asym", "int2-g64",
    "int2-g32-asym", "int4-tensor", "nf4", "nf4-dq", "fp4", "fp8", "fp8-e5m2-g32", "q4_0", "q8_0", "q4_1",
    "iq4_nl", "mxfp4",
)  # fmt: skip
LAYER = "model.layers.0.mlp.up_proj"


def train(model: nn.Module, steps: int = 3, rate: float = 1e-3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def captured(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that each layer that rounds multiplies with in one forward pass."""
    found = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (qat.FakeQuantLinear, qat.FakeQuantEmbedding)):
            original = module.rounded

            def rounded(original=original, name=name):
                found[name] = original()
                return found[name]

            module.rounded = rounded
            handles.append(module)
    model(IDS)
    for module in handles:
        del module.rounded
    return found


@pytest.mark.parametrize("format", FORMATS)
def test_conversion_gives_what_the_forward_pass_used(format):
    """After some steps of training, in float32; the packed layers decode to the very numbers."""
    model = qat.prepare(llama(), format)
    names = {name for name, module in model.named_modules() if isinstance(module, qat.FakeQuantLinear)}
    assert len(names) == 14
    before = model.get_submodule(LAYER).weight.detach().clone()
    train(model)
    assert not torch.equal(before, model.get_submodule(LAYER).weight)
    used, logits = captured(model), model(IDS).logits
    qat.convert(model)
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer) is bitfold.QuantLinear
        assert torch.equal(layer.qtensor.decode(), used[name])
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "format", ["int8", "int4-channel", "int4-g32", "int3-g64", "int2-g64", "int4-tensor"]
)
def test_learned_steps_too(format):
    model = qat.prepare(llama(), format, learned_steps=True)
    layer = model.get_submodule(LAYER)
    before = layer.steps.detach().clone()
    train(model)
    assert not torch.equal(before, layer.steps)
    used = captured(model)
    qat.convert(model)
    for name, weight in used.items():
        assert torch.equal(model.get_submodule(name).qtensor.decode(), weight)


@pytest.mark.parametrize("format", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_blocks_of_256_columns(format):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 24), nn.Linear(24, 1))
    x = torch.randn(16, 512)
    net[0] = qat.FakeQuantLinear("0", net[0], format)
    before = net[0].weight.detach().clone()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(2):
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    used = net[0].rounded().detach()
    assert not torch.equal(before, net[0].weight)
    assert torch.equal(qat.convert(net)[0].qtensor.decode(), used)


def test_all_of_it_in_bfloat16():
    """A model in bf16, and one in float32 under autocast, as Trainer's bf16=True has it."""
    model = qat.prepare(llama(torch.bfloat16), "int4-g32")
    train(model)
    used = captured(model)
    qat.convert(model)
    for name, weight in used.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(model.get_submodule(name).qtensor.decode(torch.bfloat16), weight)
    model = qat.prepare(llama(), "int4-g32")
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_submodule(LAYER).weight.grad.dtype == torch.float32
    used = captured(model)
    qat.convert(model)
    assert all(
        torch.equal(model.get_submodule(name).qtensor.decode(), weight) for name, weight in used.items()
    )


@pytest.mark.parametrize(
    ("recipe", "given", "wanted"),
    [
        ("int8", None, "float"),
        ("w8a8", None, "int8"),
        ("llm-int8", None, "llm-int8"),
        ("llm-int8-t1-rows", None, "llm-int8-t1-rows"),
        ("fp8-w8a8", None, "fp8"),
        ("w8a8", "float", "float"),
        ("int8", "llm-int8-t2", "llm-int8-t2"),
        ("q4_0", "int8", "int8"),
        ("nf4", "fp8", "fp8"),
        ("int4-g32", "int8", "float"),  # no layer multiplies so: for training alone
    ],
)
def test_inputs_are_rounded_as_the_packed_layers_do(recipe, given, wanted, tmp_path):
    """What a recipe does with inputs is trained with, and stays with the layers."""
    model = qat.prepare(llama(), recipe, activations=given)
    assert str(model.get_submodule(LAYER).activations) == (given or wanted)
    before = model(IDS).logits
    qat.convert(model)
    assert str(model.get_submodule(LAYER).activations) == wanted
    relative = ((model(IDS).logits - before).norm() / before.norm()).item()
    assert (relative < 1e-5) == (given is None or given == wanted)
    bitfold.save(model, tmp_path / "q")
    assert str(bitfold.load(tmp_path / "q").get_submodule(LAYER).activations) == wanted


@pytest.mark.parametrize("activations", ["int8", "fp8", "llm-int8"])
def test_inputs_that_are_no_numbers(activations):
    """A row with one gives NaN, as in packed layers, and no other row does; a row of zeros is one."""
    layer = qat.FakeQuantLinear("layer", nn.Linear(64, 32), "int8-channel", activations=activations)
    x = torch.randn(4, 64)
    x[1, 3], x[1, 4], x[2] = float("nan"), float("inf"), 0
    y = layer(x)
    torch.testing.assert_close(y[3], layer(x[3:])[0])
    packed = qat.convert(nn.Sequential(layer))[0]
    assert torch.equal(y.isnan(), packed(x).isnan())
    assert y.isnan().all(1).tolist() == [False, True, False, False]
    torch.testing.assert_close(y[2], packed.bias)


def test_the_gradient_passes_as_if_nothing_had_been_rounded():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    for activations in ("float", "int8", "fp8"):
        layer = qat.FakeQuantLinear("layer", copy.deepcopy(linear), "int4-g32", activations=activations)
        x = torch.randn(5, 64, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        grad = 2 * y.detach()
        weight = bitfold.encode(linear.weight, "int4-g32").decode()
        rounded = {
            "float": lambda x: x,
            "int8": lambda x: (127 * x / x.abs().amax(1, True)).round() * x.abs().amax(1, True) / 127,
            "fp8": lambda x: (
                (448 * x / x.abs().amax(1, True)).to(torch.float8_e4m3fn).float()
                * x.abs().amax(1, True)
                / 448
            ),
        }[activations](x.detach())
        torch.testing.assert_close(y, rounded @ weight.T + linear.bias)
        torch.testing.assert_close(layer.weight.grad, grad.T @ rounded)
        torch.testing.assert_close(x.grad, grad @ weight)
        torch.testing.assert_close(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("format", ["int4-g32", "int3-channel", "int2-tensor"])
def test_gradients_of_learned_steps(format):
    """Against equation 3 of the paper (Esser et al. 2020), in numpy, a weight at a time."""
    from bitfold.formats import parse
    from bitfold.qat.fake import round_learned

    torch.manual_seed(1)
    parsed = parse(format)
    n, k = 6, 80
    weight = torch.randn(n, k, requires_grad=True)
    group = {"int4-g32": 32, "int3-channel": k, "int2-tensor": k}[format]
    shape = (1 if format == "int2-tensor" else n, math.ceil(k / group))
    steps = (0.1 + torch.rand(shape)).to(torch.float16).float().requires_grad_()
    out = round_learned(weight, steps, parsed)
    weights = torch.randn(n, k)
    (out * weights).sum().backward()
    low, high = -(2 ** (parsed.bits - 1)), 2 ** (parsed.bits - 1) - 1
    grad_weight, grad_steps, count = np.zeros((n, k)), np.zeros(shape), np.zeros(shape)
    for i in range(n):
        for j in range(k):
            place = (0 if shape[0] == 1 else i, j // group)
            step = float(steps[place])
            v = np.float32(weight[i, j].item()) / np.float32(step)
            level = min(max(np.rint(v), low), high)
            assert out[i, j].item() == pytest.approx(level * step, rel=1e-6)
            inside = low <= v <= high
            grad_weight[i, j] = weights[i, j].item() if inside else 0
            grad_steps[place] += weights[i, j].item() * ((np.rint(v) - v) if inside else level)
            count[place] += 1
    grad_steps /= np.sqrt((n * k / steps.numel()) * max(1, high))
    np.testing.assert_allclose(weight.grad.numpy(), grad_weight, rtol=1e-6)
    np.testing.assert_allclose(steps.grad.numpy(), grad_steps, rtol=1e-3, atol=1e-5)


def test_it_starts_as_plain_rounding_and_recovers():
    """A teacher and its copy in 3 bits: distance falls far below that of plain rounding."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    x = (
        torch.randn(512, 6) @ torch.randn(6, 32) / 2.5
    )  # correlated, so that one weight can make up for another
    want = teacher(x).detach()

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(teacher)

        def forward(self, x):
            return self.net(x)

    plain = Student()
    bitfold.quantize(plain, "int3-g32", quiet=True)
    lost = (plain(x) - want).square().mean().item()
    student = qat.prepare(Student(), "int3-g32")
    assert (student(x) - want).square().mean().item() == pytest.approx(lost, rel=1e-4)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 300)
    for _ in range(300):
        (student(x) - want).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert (qat.convert(student)(x) - want).square().mean().item() < 0.5 * lost


def test_parameters_keep_their_names_and_ties(tmp_path):
    model = llama(tied=True)
    names = dict(model.named_parameters())
    recipe = tmp_path / "all.toml"
    recipe.write_text(
        '[[rules]]\nmatch = "model.embed_tokens"\nformat = "int8"\n[[rules]]\nmatch = "lm_head"\nformat = "int8"\n'
        '[[rules]]\nformat = "int4-g32"\n'
    )
    qat.prepare(model, recipe)
    after = dict(model.named_parameters())
    assert set(after) == set(names)
    assert all(after[name] is parameter for name, parameter in names.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    train(model)
    logits = model(IDS).logits
    qat.convert(model)
    assert model.lm_head.codes is model.model.embed_tokens.codes
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-3, atol=1e-4)


def test_a_trained_model_saves_and_loads(tmp_path):
    model = qat.prepare(llama(), "int3-g64", learned_steps=True)
    train(model)
    qat.convert(model)
    bitfold.save(model, tmp_path / "model")
    assert torch.equal(bitfold.load(tmp_path / "model")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("format", "name", "to"), [("int4-g32", "gptq", "gptq"), ("q4_0", "model.gguf", None)]
)
def test_exports_without_drift(tmp_path, format, name, to):
    """What was trained for a layout goes into it value by value."""
    if to is None:
        pytest.importorskip("gguf", reason="gguf is not installed")
        source = DEMO
    else:
        source = write_llama(tmp_path / "source", torch.float32)
    model = qat.prepare(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), format)
    train(model, 2)
    used = captured(model)
    qat.convert(model)
    bitfold.save(model, tmp_path / "model", tokenizer_from=source)
    conversion = bitfold.convert_checkpoint(tmp_path / "model", tmp_path / name, to=to)
    assert conversion.exact
    again = bitfold.load(tmp_path / name)
    for layer, weight in used.items():
        assert torch.equal(again.get_submodule(layer).qtensor.decode(), weight), layer


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="examples/ is not beside the tests")
def test_the_example_in_small(tmp_path, capsys):
    """A few steps already bring back some of what 2 bits lose."""
    example = runpy.run_path(str(EXAMPLE))
    options = example["parse"](
        ["--recipe", "int2-g64", "--steps", "12", "--batch", "4", "--context", "64", "--tokens", "1022",
         "--rows", "200", "--learning-rate", "5e-4", "--keep", str(tmp_path)]
    )  # fmt: skip
    results = example["run"](options)
    example["show"](results)
    assert results[0].recovered > 0.2
    assert "recovered" in capsys.readouterr().out
    assert type(bitfold.load(tmp_path / "int2-g64").model.layers[0].mlp.up_proj) is bitfold.QuantLinear


# ---- what is refused ----


def test_bad_input():
    with pytest.raises(ValueError, match="none of the 14 weights to quantize trains"):
        qat.prepare(llama().requires_grad_(False), "int4")
    with pytest.raises(ValueError, match="activations is 'int4'; it must be one of float, int8, int8-static"):
        qat.prepare(llama(), "int4", activations="int4")
    with pytest.raises(
        ValueError, match="activations is 'int8-static', which take something from calibration"
    ):
        qat.prepare(llama(), "int8", activations="int8-static")
    with pytest.raises(
        ValueError, match=r"learned_steps is True, but the format is nf4-b64; it must be of symmetric"
    ):
        qat.prepare(llama(), "nf4", learned_steps=True)
    with pytest.raises(ValueError, match="needs a text to calibrate on"):
        qat.prepare(llama(), "gptq-int4-g128")
    with pytest.raises(
        ValueError, match=r"no layers that round their weights: bitfold.qat.prepare makes them"
    ):
        qat.convert(llama())
    model = qat.prepare(llama(), "int4")
    with torch.no_grad():
        model.get_submodule(LAYER).weight[3, 5] = float("nan")
    for use in (lambda: model(IDS), lambda: qat.convert(model)):
        with pytest.raises(ValueError, match=rf"{LAYER}.weight: weight\[3, 5\] is NaN"):
            use()
