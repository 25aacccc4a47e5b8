"""Weights as the owners' libraries stored them (tests/data/foreign, made by tests/interop/make/single_weights.py),
without the libraries: their values, an independent decoder's and ours, and the bytes that we would write.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bitfold
import numpy as np
import oracle_foreign as oracle
import pytest
import torch
from bitfold.foreign.bitsandbytes import FourBitScheme
from bitfold.foreign.owners import OWNERS
from safetensors import safe_open

DATA = Path(__file__).parent / "data" / "foreign"
FILES = sorted(path.stem for path in DATA.glob("*.safetensors"))
MODULE = "model.layers.0.self_attn.k_proj"


def read(name: str):
    """The scheme of a file's configuration, its tensors, and what the library decoded."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        section = json.loads(file.metadata()["quantization_config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    decoded = tensors.pop("decoded")
    owner = OWNERS[section["quant_method"]]
    assert owner.modules(f"{MODULE}.{part}" for part in tensors) == {
        MODULE: tuple(part for part in owner.parts if part in tensors)
    }
    scheme = owner.read_config(section, DATA).scheme(MODULE)
    assert scheme is not None
    return section, scheme, tensors, decoded


def test_there_are_files_of_every_owner():
    assert {name.partition("-")[0] for name in FILES} == {
        "autoawq",
        "bitsandbytes",
        "compressed",
        "gptqmodel",
    }


@pytest.mark.parametrize("name", FILES)
def test_values_are_the_librarys(name):
    """To the bit, but for int8 of bitsandbytes, which rounds q * SCB and then times 1 / 127."""
    _, scheme, tensors, decoded = read(name)
    ours = scheme.unpack(tensors).decode()
    if name == "bitsandbytes-int8":
        assert torch.allclose(ours, decoded.float(), rtol=3e-7, atol=0)
    else:
        assert torch.equal(ours.to(decoded.dtype), decoded)


@pytest.mark.parametrize("name", FILES)
def test_values_are_those_of_the_page(name):
    """The decoder that is written from docs/foreign.md."""
    section, scheme, tensors, _ = read(name)
    ours = scheme.unpack(tensors).decode().numpy()
    found = {
        key: (value.float() if value.is_floating_point() else value).numpy() for key, value in tensors.items()
    }
    if name.startswith("gptqmodel"):
        version = 2 if section["checkpoint_format"] == "gptq_v2" else 1
        wanted, codes, zeros = oracle.gptq(found, section["bits"], 32, version)
        assert (zeros == 0).any()
        assert (zeros == (1 << section["bits"]) - 1).any()
        assert np.array_equal(codes, scheme.unpack(tensors).unpack().codes.numpy())
    elif name.startswith("autoawq"):
        wanted, _, _ = oracle.awq(found, 32)
    elif "fp8" in name:
        wanted = found["weight"].astype(np.float64) * found["weight_scale"]
    elif name.startswith("compressed"):
        weights = section["config_groups"]["group_0"]["weights"]
        group = weights["group_size"] or -1
        wanted = oracle.compressed(found, weights["num_bits"], group, weights["symmetric"])
    elif "int8" in name:
        wanted = found["weight"] * (found["SCB"] / np.float32(127))[:, None].astype(np.float64)
    else:
        wanted = oracle.four_bits(found, name.split("-")[1])
    assert np.array_equal(wanted.astype(np.float32), ours)


@pytest.mark.parametrize("name", FILES)
def test_we_write_their_bytes(name):
    """Every tensor of theirs, bit for bit."""
    _, scheme, tensors, _ = read(name)
    if isinstance(scheme, FourBitScheme):  # the dtype that is written beside a weight is the model's
        scheme = replace(scheme, dtype=torch.float16)
    written = scheme.pack(scheme.unpack(tensors))
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].dtype == tensor.dtype, key
        assert written[key].shape == tensor.shape, key
        assert torch.equal(
            written[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), key


def test_versions_of_gptq_are_the_same_weights():
    """What the two versions differ in is how zero points are stored."""
    for bits in (2, 3, 4, 8):
        one, two = (bitfold_weight(f"gptqmodel-{bits}-v{version}") for version in (1, 2))
        assert torch.equal(one.decode(), two.decode())


def bitfold_weight(name: str) -> bitfold.QTensor:
    _, scheme, tensors, _ = read(name)
    return scheme.unpack(tensors)
