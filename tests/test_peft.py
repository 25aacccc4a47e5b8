"""PEFT on quantized layers: the same as PEFT on the decoded weights, the same files, merging, and what is refused."""

from __future__ import annotations

from pathlib import Path

import bitfold
import pytest
import torch
from bitfold import versions
from bitfold.shards import CheckpointError
from tiny import one_thread, tensors_of, write_llama  # noqa: F401
from torch import nn
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft", reason="peft is not installed")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

IDS = torch.arange(24).reshape(2, 12)
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("source") / "model", torch.float32)


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("nf4") / "model"
    bitfold.quantize_checkpoint(source, target, "nf4-dq")
    return target


def load_base(path: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def config_of(**options) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"], **options}
    )


def adapted(base: nn.Module, seed: int = 1, **options) -> PeftModel:
    """With adapters of random numbers, as if they had been trained."""
    model = get_peft_model(base, bitfold.peft.prepare(config_of(**options)))
    shake(model, seed)
    return model


def shake(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- training and files ----


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_peft_on_the_decoded_weights(checkpoint, tmp_path, kind):
    """Outputs, gradients, a step of an optimizer and the files, beside PEFT alone on the dequantized model."""
    ours = adapted(load_base(checkpoint), **KINDS[kind])
    ours.save_pretrained(tmp_path / "adapter")
    plain = load_base(checkpoint).dequantize()
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
    assert set(trainable(ours)) == set(trainable(theirs))
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    for name, parameter in trainable(ours).items():
        expected = trainable(theirs)[name].grad
        assert expected.norm() > 0
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name
    fresh = get_peft_model(load_base(checkpoint).dequantize(), config_of(**KINDS[kind]))
    fresh.save_pretrained(tmp_path / "fresh")

    def shapes(folder):
        tensors = {}
        for file in (tmp_path / folder).glob("*.safetensors"):
            tensors = {name: tuple(tensor.shape) for name, tensor in tensors_of(file.parent).items()}
        return tensors

    assert shapes("adapter") == shapes("fresh")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_load_again_and_on_the_16_bit_base(source, checkpoint, tmp_path, kind):
    model = adapted(load_base(checkpoint), **KINDS[kind]).eval()
    model.save_pretrained(tmp_path)
    again = bitfold.peft.load(load_base(checkpoint), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert not trainable(again)
    assert trainable(bitfold.peft.load(load_base(checkpoint), tmp_path, is_trainable=True))
    other = PeftModel.from_pretrained(load_base(source), tmp_path)  # without bitfold's layers
    assert not any(isinstance(module, bitfold.QuantLinear) for module in other.modules())
    weights = other.state_dict()
    for name, tensor in again.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, weights[name])


def test_all_linear_is_all_but_the_head(checkpoint):
    base = load_base(checkpoint)
    config = bitfold.peft.prepare(config_of(target_modules="all-linear"), base)
    model = get_peft_model(base, config)
    adapters = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapters) == 14
    assert not any("lm_head" in name for name in adapters)


def test_adapters_have_no_dtype_of_a_plane(source):
    for recipe in ("int4-g32", "fp8"):
        base = AutoModelForCausalLM.from_pretrained(source, quantization_config=bitfold.Config(recipe))
        model = get_peft_model(base, bitfold.peft.prepare(config_of()), autocast_adapter_dtype=False)
        assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


# ---- merging ----


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_the_quantized_base(checkpoint, tmp_path, kind, capsys):
    """Each weight is rounded once more, of PEFT's own float32 merge; unmerging gives the old bits."""
    adapted(load_base(checkpoint), **KINDS[kind]).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load_base(checkpoint).dequantize(), tmp_path).merge_and_unload()
    model = bitfold.peft.load(load_base(checkpoint), tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="rounded again"):
        model.merge_adapter()
    assert not torch.equal(
        model.get_submodule(f"base_model.model.{LAYER}").base_layer.codes,
        before[f"base_model.model.{LAYER}.base_layer.codes"],
    )
    with model.disable_adapter():
        base_logits = model(IDS).logits
    assert torch.equal(base_logits, load_base(checkpoint)(IDS).logits)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    merged = bitfold.peft.merge(model)
    assert type(merged.get_submodule(LAYER)) is bitfold.QuantLinear
    weight = plain.get_submodule(LAYER).weight.detach()
    planes = bitfold.encode(weight, "nf4-b64-dq").planes
    assert all(
        torch.equal(merged.get_submodule(LAYER).qtensor.planes[name], plane) for name, plane in planes.items()
    )
    decoded = merged.get_submodule(LAYER).qtensor.decode()
    error = ((decoded - weight).norm() / weight.norm()).item()
    assert merged.merge_summary.errors[LAYER] == pytest.approx(error, rel=1e-4)
    assert len(merged.merge_summary.errors) == 6
    assert "merged adapters into 6 quantized weights and rounded them again" in capsys.readouterr().out
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_base(tmp_path / "merged")(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("recipe", ["w8a8-static", "fp8-w8a8-static", "llm-int8-t0.5"])
def test_what_layers_keep_for_their_inputs_stays(source, tmp_path, recipe):
    """Steps as they were; copies of columns as these columns are in PEFT's own merge."""
    text = tmp_path / "text.txt"
    text.write_text("some words of a text to calibrate on " * 30)
    bitfold.quantize_calibrated(source, tmp_path / "q", recipe, text, samples=2, sequence_length=32)
    adapted(load_base(tmp_path / "q")).save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(load_base(tmp_path / "q").dequantize(), tmp_path / "adapter")
    plain = plain.merge_and_unload()
    model = bitfold.peft.load(load_base(tmp_path / "q"), tmp_path / "adapter")
    before = model.get_submodule(f"base_model.model.{LAYER}").base_layer
    merged = bitfold.peft.merge(model, quiet=True)
    after = merged.get_submodule(LAYER)
    assert after.activations == before.activations
    if recipe.startswith("llm"):
        assert str(after.activations) == "llm-int8-t0.5-exact"
        assert torch.equal(after.outlier_columns, before.outlier_columns)
        columns = plain.get_submodule(LAYER).weight[:, after.outlier_columns.long()].detach()
        torch.testing.assert_close(after.outlier_weight.float(), columns, rtol=2**-8, atol=1e-6)
        assert not torch.equal(after.outlier_weight, before.outlier_weight)
    else:
        assert torch.equal(after.x_scale, before.x_scale)
    planes = bitfold.encode(plain.get_submodule(LAYER).weight.detach(), after.format).planes
    assert all(torch.equal(after.qtensor.planes[name], plane) for name, plane in planes.items())
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(load_base(tmp_path / "merged")(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_into_16_bits(checkpoint, tmp_path, kind):
    adapted(load_base(checkpoint), **KINDS[kind]).save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load_base(checkpoint).dequantize(), tmp_path).merge_and_unload()
    for dtype in (torch.bfloat16, torch.float32):
        merged = bitfold.peft.merge(bitfold.peft.load(load_base(checkpoint), tmp_path), dtype)
        assert not any(isinstance(module, bitfold.QuantLinear) for module in merged.modules())
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
        for name, parameter in merged.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name).to(dtype)), name
        merged.save_pretrained(tmp_path / str(dtype))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype))
        assert type(again.get_submodule(LAYER)) is nn.Linear
        assert torch.equal(again(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_merge_as_in_peft(checkpoint, tmp_path, kind):
    for place, seed in (("one", 1), ("two", 2)):
        adapted(load_base(checkpoint), seed, **KINDS[kind]).save_pretrained(tmp_path / place)
    ours = bitfold.peft.load(load_base(checkpoint), tmp_path / "one", adapter_name="one")
    theirs = PeftModel.from_pretrained(
        load_base(checkpoint).dequantize(), tmp_path / "one", adapter_name="one"
    )
    ours.load_adapter(
        tmp_path / "two",
        "two",
        peft_config=bitfold.peft.prepare(LoraConfig.from_pretrained(tmp_path / "two")),
    )
    theirs.load_adapter(tmp_path / "two", "two")
    for model in (ours, theirs):
        model.base_model.set_adapter(["one", "two"])
    merged, plain = bitfold.peft.merge(ours, torch.float32), theirs.merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(LAYER).weight, plain.get_submodule(LAYER).weight)


def test_biases_take_in_their_part(source, tmp_path):
    """lora_bias: B has a bias of its own, which goes into the layer's."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 32)

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(3)
    net = Net()
    bitfold.quantize(net, "int8", quiet=True)
    model = get_peft_model(
        net, bitfold.peft.prepare(LoraConfig(r=4, target_modules=["layer"], lora_bias=True))
    )
    shake(model, 1)
    x = torch.randn(5, 64)
    want = model(x)
    torch.testing.assert_close(bitfold.peft.merge(model, torch.float32)(x), want, rtol=1e-4, atol=1e-5)


def test_columns_in_another_order_keep_it(tmp_path):
    """A weight with g_idx, merged: the groups stay those of the columns."""
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    g_idx = torch.randperm(64).div(32, rounding_mode="floor").to(torch.int32)
    order = torch.argsort(g_idx, stable=True)
    planes = bitfold.encode(weight[:, order], "int8-g32").planes
    before = bitfold.QTensor("int8-g32", (16, 64), planes, "rows", g_idx)
    from bitfold.quantize import requantize

    changed = weight + 0.1 * torch.randn(16, 64)
    after = requantize(changed, before)
    assert torch.equal(after.g_idx, g_idx)
    assert (after.decode() - changed).abs().max() < 0.02


# ---- what is refused ----


def test_a_merged_weight_beyond_fp16(checkpoint):
    model = adapted(load_base(checkpoint))
    with torch.no_grad():
        model.get_submodule(f"base_model.model.{LAYER}").lora_B["default"].weight[3] = 1e6
    with pytest.raises(ValueError, match=rf"^{LAYER}.weight: element \[3, \d+\] is beyond torch.float16"):
        bitfold.peft.merge(model, torch.float16)


def test_an_adapter_with_nan_is_named(checkpoint):
    for dtype in (None, torch.bfloat16):
        model = adapted(load_base(checkpoint))
        with torch.no_grad():
            model.get_submodule(f"base_model.model.{LAYER}").lora_A["default"].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=rf"{LAYER}: NaNs detected"):
            bitfold.peft.merge(model, dtype)


@pytest.mark.parametrize(
    "initial", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "orthogonal", "lora_ga"]
)
def test_initialisations_that_look_at_the_weight(checkpoint, initial):
    options = {"init_lora_weights": initial}
    if initial == "loftq":
        options["loftq_config"] = {"loftq_bits": 4}
    if initial == "lora_ga":
        options["lora_ga_config"] = peft.LoraGAConfig()
    with pytest.raises(
        ValueError, match=rf"init_lora_weights is '{initial}'.* must be True, False or 'gaussian'"
    ):
        adapted(load_base(checkpoint), **options)


def test_gaussian_and_no_initialisation(checkpoint):
    for initial in ("gaussian", False):
        model = get_peft_model(
            load_base(checkpoint), bitfold.peft.prepare(config_of(init_lora_weights=initial))
        )
        assert torch.isfinite(model(IDS).logits).all()


def test_adapters_for_another_model(checkpoint, tmp_path):
    other = write_llama(tmp_path / "wide", torch.float32, hidden=96)
    get_peft_model(load_base(other), config_of()).save_pretrained(tmp_path / "shapes")
    with pytest.raises(
        CheckpointError, match=r"adapter for another model: '.*weight' is \[96, 4\], but the layer is 64 x"
    ):
        bitfold.peft.load(load_base(checkpoint), tmp_path / "shapes")
    other = write_llama(tmp_path / "deep", torch.float32, layers=3)
    get_peft_model(load_base(other), config_of()).save_pretrained(tmp_path / "names")
    with pytest.raises(CheckpointError, match=r"it has 3 tensors? .*'model.layers.2.*which this one lacks"):
        bitfold.peft.load(load_base(checkpoint), tmp_path / "names")


def test_what_prepare_refuses(checkpoint):
    with pytest.raises(ValueError, match="config is a IA3Config; it must be a LoraConfig"):
        bitfold.peft.prepare(peft.IA3Config())
    with pytest.raises(ValueError, match=r"give the model too, prepare\(config, model\)"):
        bitfold.peft.prepare(config_of(target_modules="all-linear"))
    with pytest.raises(ValueError, match="fan_in_fan_out is True"):
        bitfold.peft.prepare(config_of(fan_in_fan_out=True))
    with pytest.raises(
        ValueError, match=r"modules_to_save is .*, and model.layers.0.mlp.up_proj is quantized"
    ):
        bitfold.peft.prepare(config_of(modules_to_save=["lm_head", "up_proj"]), load_base(checkpoint))
    bitfold.peft.prepare(config_of(modules_to_save=["lm_head", "proj"]), load_base(checkpoint))
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(load_base(checkpoint), config_of())  # without prepare, PEFT's own words
    with pytest.raises(ValueError, match="on a quantized base it must be LoRA"):
        adapted(load_base(checkpoint), alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    for quantizes in (bitfold.quantize, bitfold.qat.prepare):
        plain = load_base(checkpoint).dequantize()
        with pytest.raises(
            ValueError, match="is inside of PEFT's LoraModel; it must be quantized before it has"
        ):
            quantizes(get_peft_model(plain, LoraConfig(target_modules=["q_proj"])), "int4-g32")
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM; it must be a PeftModel"):
        bitfold.peft.merge(load_base(checkpoint))


def test_scales_that_were_cast_are_named(source):
    """peft.prepare_model_for_kbit_training casts whatever has 16 bits, fp16 scales too."""
    base = AutoModelForCausalLM.from_pretrained(source, quantization_config=bitfold.Config("int4-g32"))
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    with pytest.raises(ValueError, match=r"scales.*float32.*float16"):
        base(IDS)


def test_another_version_of_peft_is_named():
    for version in ("0.18.1", "1.0.0"):
        with pytest.raises(versions.MissingExtraError, match=rf"bitfold.peft needs peft .* not {version}"):
            versions.PEFT.check("bitfold.peft", version)
    for version in versions.PEFT.tested:
        versions.PEFT.check("bitfold.peft", version)
