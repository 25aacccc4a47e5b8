"""python single_weights.py OWNER OUT: one weight of 32 x 64 in each of an owner's ways, as its library stores it.

Run where the library is installed. Each file of tests/data/foreign that this makes has the tensors of the weight, as
they are in a checkpoint, and `decoded`, the values that the library itself makes of them; its metadata are the
library's version and the configuration. tests/test_foreign_files.py reads them without the libraries.

Rows 0 to 3 of the weight are positive and row 8 is negative, so that there are zero points at both ends of the codes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCAB = 64
MODULE = "model.layers.0.self_attn.k_proj"  # 32 x 64
SHARED = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": VOCAB}

Case = tuple[str, dict[str, Any], dict[str, torch.Tensor], torch.Tensor]
"""Name, quantization_config, tensors by their names within the module, values."""


def base(folder: Path, dtype: torch.dtype) -> Path:
    """The model whose weight it is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=1, **SHARED
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:4] = module.weight[:4].abs() + 0.01
                module.weight[8] = -module.weight[8].abs() - 0.01
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w1").save_pretrained(folder)
    return folder


def stored(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The quantization_config of a directory, and the tensors of the module."""
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    with safe_open(path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{MODULE}.")]  # noqa: SIM118
        return section, {name.removeprefix(f"{MODULE}."): file.get_tensor(name) for name in names}


# ---- the owners ----


def bitsandbytes(folder: Path) -> Iterator[Case]:
    from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True}
    cases = {
        "nf4": {**four, "bnb_4bit_quant_type": "nf4"},
        "nf4-nested": {**four, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "fp4": {**four, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
    }
    source = base(folder / "base", torch.float16)
    for name, settings in cases.items():
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=BitsAndBytesConfig(**settings)
        )
        model.save_pretrained(folder / name)
        section, tensors = stored(folder / name)
        if name == "int8":
            values = int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
        else:
            parts = {key: value for key, value in tensors.items() if key != "weight"}
            state = QuantState.from_dict(parts, device="cpu")
            values = dequantize_4bit(tensors["weight"], state)
        yield f"bitsandbytes-{name}", section, tensors, values


def compressed_tensors(folder: Path) -> Iterator[Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    group = {"type": "int", "strategy": "group", "group_size": 32}
    cases = {
        "w4-g32": {"num_bits": 4, "symmetric": True, **group},
        "w4-g32-asym": {"num_bits": 4, "symmetric": False, **group},
        "w3-g32-asym": {"num_bits": 3, "symmetric": False, **group},
        "w8-channel": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "fp8-channel": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    }
    source = base(folder / "base", torch.bfloat16)
    for name, weights in cases.items():
        model = AutoModelForCausalLM.from_pretrained(source)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        oneshot(
            model=model,
            recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        )
        model.save_pretrained(folder / name, save_compressed=True)
        section, tensors = stored(folder / name)
        compressor = BaseCompressor.load_from_registry(section["format"])
        found = compressor.decompress(dict(tensors), scheme)
        yield f"compressed-tensors-{name}", section, tensors, found["weight"]


def gptqmodel(folder: Path) -> Iterator[Case]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores its own default is one too few
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    rows = [" ".join(f"w{(i * 7 + j * j) % VOCAB}" for j in range(48)) for i in range(32)]
    for bits in (2, 3, 4, 8):
        for version in (1, 2):
            name = f"{bits}-v{version}"
            config = QuantizeConfig(
                bits=bits,
                group_size=32,
                sym=False,
                desc_act=bits == 4,
                format="gptq" if version == 1 else "gptq_v2",
            )
            model = GPTQModel.load(str(base(folder / "base", torch.float16)), config)
            model.quantize(rows, batch_size=4)
            model.save(str(folder / name))
            section, tensors = stored(folder / name)
            section.pop("meta")
            loaded = GPTQModel.load(
                str(folder / name), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
            )
            module = loaded.model.get_submodule(MODULE)
            values = module.dequantize_weight().t().contiguous()
            yield f"gptqmodel-{name}", section, tensors, values


def autoawq(folder: Path) -> Iterator[Case]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(32, 2, generator=generator).half() * 0.05 + 0.01
    zeros = torch.randint(0, 16, (32, 2), generator=generator)
    zeros[:4], zeros[8] = 0, 15
    codes = torch.randint(0, 16, (32, 2, 32), generator=generator)
    linear = torch.nn.Linear(64, 32, bias=False, dtype=torch.float16)
    linear.weight.data = ((codes - zeros[..., None]) * scales[..., None]).reshape(32, 64)
    module = WQLinear_GEMM.from_linear(
        linear, 4, 32, False, scales.t().contiguous(), zeros.t().half().contiguous()
    )
    tensors = dict(module.state_dict())
    values = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 32)
    section = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    yield "autoawq-4", section, tensors, values.t().contiguous()


OWNERS = {
    "bitsandbytes": (bitsandbytes, "bitsandbytes"),
    "compressed-tensors": (compressed_tensors, "compressed-tensors"),
    "gptqmodel": (gptqmodel, "gptqmodel"),
    "autoawq": (autoawq, "autoawq"),
}


def main(owner: str, out: str) -> None:
    cases, package = OWNERS[owner]
    with tempfile.TemporaryDirectory() as folder:
        for name, section, tensors, values in cases(Path(folder)):
            metadata = {
                "library": f"{package} {importlib.metadata.version(package)}",
                "quantization_config": json.dumps(section),
            }
            parts = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(
                {**parts, "decoded": values.detach().contiguous()},
                Path(out) / f"{name}.safetensors",
                metadata,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
