"""compressed-tensors: checkpoints of llm-compressor on bitfold's kernels, and bitfold's on theirs, with the
same logits.
"""

from __future__ import annotations

import bitfold
import pytest

pytest.importorskip(
    "compressed_tensors", reason="compressed-tensors is not installed: pip install bitfold[interop]"
)

import torch
from bitfold.check.examine import examine
from bitfold.nn import QuantLinear
from owners import TEXT, assert_close, base, by_transformers, converted, logits, script  # noqa: F401

# Schemes whose activations are floats.
THEIRS = [
    "ct-pack-4-g128-sym",
    "ct-pack-8-channel-sym",
    "ct-pack-2-g32-sym",
    "ct-pack-4-g128-sym-gptq-static",
]
ROUNDED = [
    "ct-float-8-channel",
    "ct-float-8-tensor",
    "ct-float-8-block",
    "ct-float-8-tensor-static",
]
ASYMMETRIC = ["ct-pack-4-g32-asym", "ct-pack-4-g128-asym-gptq", "ct-pack-3-g32-asym"]
OURS = [  # "fp8-w8a8" rounds its inputs: see assert_same_layers
    "int4-g128",
    "int4-g32",
    "int8-channel",
    "int8-g32",
    "int2-g32",
    "fp8-channel",
    "fp8-block",
]


@pytest.mark.parametrize("recipe", OURS)
def test_they_load_ours(recipe, base, tmp_path):  # noqa: F811
    path = converted(base, tmp_path / "m", recipe, "compressed-tensors")
    assert_close(logits(by_transformers(path)), logits(bitfold.load(path, dtype=torch.float32)))


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_theirs(name, base, tmp_path):  # noqa: F811
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: pip install llmcompressor")
    script("llmcompressor_models").main(str(base), str(tmp_path), str(TEXT), name)
    assert_close(
        logits(bitfold.load(tmp_path / name, dtype=torch.float32)), logits(by_transformers(tmp_path / name))
    )
    assert examine(tmp_path / name).sound


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_we_load_their_asymmetric_ones(name, base, tmp_path):  # noqa: F811
    """transformers 5.24 can't load what llm-compressor 0.14 wrote (the shape of the packed zero points), so
    logits are compared with those of the weights that compressed-tensors itself decompresses.
    """
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: pip install llmcompressor")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    script("llmcompressor_models").main(str(base), str(tmp_path), str(TEXT), name)
    path = tmp_path / name
    section = AutoConfig.from_pretrained(path).quantization_config
    config = QuantizationConfig.model_validate(section)
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config.format)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stored = load_file(path / "model.safetensors")
    packed = {name.rpartition(".")[0] for name in stored if name.endswith(".weight_packed")}
    kept = {key: value for key, value in stored.items() if key.rpartition(".")[0] not in packed}
    assert not model.load_state_dict(
        kept, strict=False
    ).unexpected_keys  # embedding and norms, as they were saved
    for module in packed:
        parts = {
            key.removeprefix(f"{module}."): value
            for key, value in stored.items()
            if key.startswith(f"{module}.")
        }
        parts["weight_scale"] = parts["weight_scale"].float()  # or products are rounded to bf16
        model.get_submodule(module).weight.data = compressor.decompress(parts, scheme)["weight"].float()
    assert_close(logits(bitfold.load(path, dtype=torch.float32)), logits(model))
    assert examine(path).sound


def assert_same_layers(path) -> None:
    """Each layer of both, given the same input: a sum that is a little different may round the next layer's input to
    another number, so that logits tell less. Of three dimensions, for their library gives each number of a matrix a
    scale of its own.
    """
    ours, theirs = bitfold.load(path, dtype=torch.float32).eval(), by_transformers(path)
    logits(theirs)  # decompresses
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert str(layer.activations) in ("fp8", "fp8-static")
        x = torch.randn(1, 5, layer.in_features) * torch.arange(1, 6)[:, None]
        with torch.inference_mode():
            y, expected = layer(x), theirs.get_submodule(name)(x)
        assert (y - expected).norm() < 1e-6 * expected.norm(), name


@pytest.mark.parametrize("name", ROUNDED)
def test_layers_round_as_theirs_do(name, base, tmp_path):  # noqa: F811
    pytest.importorskip("llmcompressor", reason="llm-compressor is not installed: pip install llmcompressor")
    script("llmcompressor_models").main(str(base), str(tmp_path), str(TEXT), name)
    assert_same_layers(tmp_path / name)
    assert examine(tmp_path / name).sound


def test_their_layers_round_as_ours_do(base, tmp_path):  # noqa: F811
    assert_same_layers(converted(base, tmp_path / "m", "fp8-w8a8", "compressed-tensors"))
