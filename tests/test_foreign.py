"""Weights of other libraries' checkpoints: from their tensors to ours and back, against an independent decoder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import bitfold
import numpy as np
import oracle_foreign as oracle
import pytest
import torch
from bitfold.activations import Activations
from bitfold.foreign import compressed_tensors, finegrained
from bitfold.foreign.awq import AwqScheme
from bitfold.foreign.bitsandbytes import EightBitScheme, FourBitScheme, nested_map, quant_map
from bitfold.foreign.compressed_tensors import CompressedScheme
from bitfold.foreign.finegrained import BlockScheme
from bitfold.foreign.gptq import GptqScheme
from bitfold.foreign.scheme import Unfit, integer
from bitfold.formats import ceil_div
from bitfold.shards import CheckpointError
from cases import refusal as refused
from hypothesis import given
from hypothesis import strategies as st

SCALES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
PER = {2: 16, 3: 32, 4: 8, 8: 4}  # numbers that fill whole words


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in tensors.items()
    }


def matrix(
    seed: int, n: int, k: int, bits: int, group: int, asym: bool, scale: torch.dtype, shuffled: bool
) -> bitfold.QTensor:
    """Any codes, any scales; of the zero points some are 0 and some the largest."""
    rng = np.random.default_rng(seed)
    groups = ceil_div(k, group) if group > 0 else 1
    rows = 1 if group == 0 else n
    codes = torch.from_numpy(rng.integers(0, 1 << bits, (n, k), dtype=np.uint8))
    scales = torch.from_numpy(rng.uniform(1e-3, 2, (rows, groups)).astype(np.float32)).to(scale)
    zeros = rng.integers(0, 1 << bits, (rows, groups), dtype=np.uint8)
    zeros[rng.random(zeros.shape) < 0.3] = 0
    zeros[rng.random(zeros.shape) < 0.3] = (1 << bits) - 1
    g_idx = torch.from_numpy(rng.permutation(k).astype(np.int32) // group) if shuffled else None
    return bitfold.pack(
        codes,
        scales,
        torch.from_numpy(zeros) if asym else None,
        format=integer(bits, group, asym, scale),
        g_idx=g_idx,
    )


def same(one: bitfold.QTensor, other: bitfold.QTensor) -> None:
    """Bit for bit."""
    assert (other.format, other.shape, other.layout) == (one.format, one.shape, one.layout)
    for name, plane in one.planes.items():
        assert other.planes[name].dtype == plane.dtype, name
        assert torch.equal(
            other.planes[name].reshape(-1).view(torch.uint8), plane.reshape(-1).view(torch.uint8)
        )
    assert (one.g_idx is None) == (other.g_idx is None)
    assert one.g_idx is None or torch.equal(one.g_idx, other.g_idx)


def there_and_back(scheme, qtensor: bitfold.QTensor) -> dict[str, np.ndarray]:
    """The tensors of a weight, which are those announced, and which give it back."""
    tensors = scheme.pack(qtensor)
    entry = scheme.entry(tensors)
    assert (entry.format, entry.shape, entry.layout) == (qtensor.format, qtensor.shape, qtensor.layout)
    assert entry.g_idx == (qtensor.g_idx is not None)
    specs = scheme.specs(entry, lambda name: qtensor.planes[name])
    assert {name: (spec.dtype, spec.shape) for name, spec in specs.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    same(qtensor, scheme.unpack(tensors))
    assert torch.equal(scheme.decode(tensors), qtensor.decode())
    return arrays(tensors)


@given(
    seed=st.integers(0, 1 << 30),
    bits=st.sampled_from([2, 3, 4, 8]),
    words=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    group=st.sampled_from([-1, 16, 32, 48]),
    asym=st.booleans(),
    version=st.sampled_from([1, 2]),
    shuffled=st.booleans(),
    scale=SCALES,
)
def test_gptq(seed, bits, words, group, asym, version, shuffled, scale):
    """Every width, both versions, zero points 0 and 2^b - 1, groups that follow an order of columns, a short last
    group.
    """
    n, k = (count * PER[bits] for count in words)
    shuffled &= group > 0 and k > group
    qtensor = matrix(seed, n, k, bits, group, asym, scale, shuffled)
    if shuffled and torch.equal(qtensor.g_idx, torch.arange(k, dtype=torch.int32) // group):
        return
    tensors = there_and_back(GptqScheme(bits, group, not asym, version), qtensor)
    weights, codes, zeros = oracle.gptq(tensors, bits, group, version)
    unpacked = qtensor.unpack()
    assert np.array_equal(codes, unpacked.codes.numpy())
    wanted = unpacked.zeros.t().numpy() if asym else np.full(zeros.shape, 1 << bits - 1)
    assert np.array_equal(zeros, wanted)
    assert np.array_equal(weights.astype(np.float32), qtensor.decode().numpy())


def test_gptq_1_borrows_across_numbers():
    """A zero point of 0 is stored as -1 in its word: all of its neighbours above lose 1 more."""
    qtensor = matrix(0, 8, 16, 4, 16, True, torch.float16, False)
    zeros = torch.tensor([[0], [3], [0], [0], [15], [1], [8], [0]], dtype=torch.uint8)
    qtensor = bitfold.pack(*qtensor.unpack()[:2], zeros, format=qtensor.format)
    word = GptqScheme(4, 16, False, 1).pack(qtensor)["qzeros"]
    assert word.item() % oracle.WORD == (0x081F0030 - 0x11111111) % oracle.WORD
    two = GptqScheme(4, 16, False, 2).pack(qtensor)["qzeros"]
    assert two.item() == 0x081F0030
    symmetric = matrix(0, 8, 16, 4, 16, False, torch.float16, False)
    assert GptqScheme(4, 16, True, 1).pack(symmetric)["qzeros"].item() == 0x77777777
    assert GptqScheme(4, 16, True, 2).pack(symmetric)["qzeros"].item() % oracle.WORD == 0x88888888


@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 4),
    groups=st.integers(1, 4),
    group=st.sampled_from([-1, 16, 32, 40]),
    asym=st.booleans(),
    scale=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_awq(seed, n, groups, group, asym, scale):
    n, k = 8 * n, 16 * groups if group == -1 else group * groups
    qtensor = matrix(seed, n, k, 4, group, asym, scale, False)
    tensors = there_and_back(AwqScheme(group, asym), qtensor)
    weights, codes, zeros = oracle.awq(tensors, group)
    unpacked = qtensor.unpack()
    assert np.array_equal(codes, unpacked.codes.numpy())
    assert np.array_equal(zeros, unpacked.zeros.t().numpy() if asym else np.full(zeros.shape, 8))
    assert np.array_equal(weights.astype(np.float32), qtensor.decode().numpy())


def test_awq_interleaves_the_columns_of_a_word():
    """The word that was seen in a file of AutoAWQ's."""
    codes = torch.tensor([8, 5, 7, 4, 4, 3, 14, 2], dtype=torch.uint8)[:, None].repeat(1, 16)
    qtensor = bitfold.pack(codes, torch.ones(8, 1, dtype=torch.float16), format="int4-g16")
    assert (AwqScheme(16, False).pack(qtensor)["qweight"] == 0x2345E478).all()


@given(
    seed=st.integers(0, 1 << 30),
    bits=st.sampled_from([2, 3, 4, 8]),
    n=st.integers(1, 20),
    k=st.integers(1, 70),
    group=st.sampled_from([-1, 0, 16, 32]),
    asym=st.booleans(),
    packed=st.booleans(),
    shuffled=st.booleans(),
    scale=SCALES,
)
def test_compressed_tensors_of_integers(seed, bits, n, k, group, asym, packed, shuffled, scale):
    """Any sizes: words may end early along the columns, and zero points along the rows."""
    shuffled &= packed and group > 0 and k > group
    qtensor = matrix(seed, n, k, bits, group, asym, scale, shuffled)
    if shuffled and torch.equal(qtensor.g_idx, torch.arange(k, dtype=torch.int32) // group):
        return
    storage = "pack-quantized" if packed else "int-quantized"
    tensors = there_and_back(CompressedScheme(storage, "int", bits, group, not asym, shuffled), qtensor)
    weights = oracle.compressed(tensors, bits, group, not asym)
    assert np.array_equal(weights.astype(np.float32), qtensor.decode().numpy())


def test_compressed_tensors_of_two_versions():
    """Zero points of packed weights as int8, one by one, are those that are packed along the rows."""
    qtensor = matrix(3, 20, 64, 4, 32, True, torch.bfloat16, False)
    scheme = CompressedScheme("pack-quantized", "int", 4, 32, False)
    tensors = scheme.pack(qtensor)
    zeros = qtensor.unpack().zeros.to(torch.int16) - 8
    same(qtensor, scheme.unpack({**tensors, "weight_zero_point": zeros.to(torch.int8)}))


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 70),
    group=st.sampled_from(["channel", "tensor", "g16", "b4x32"]),
    scale=SCALES,
)
def test_compressed_tensors_of_floats(n, k, group, scale):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 100 + k))
    spelled = {torch.float16: "sfp16", torch.bfloat16: "sbf16", torch.float32: "sfp32"}[scale]
    qtensor = bitfold.encode(weight, f"fp8-e4m3-{group}-{spelled}")
    size, rows = {"channel": (-1, 1), "tensor": (0, 1), "g16": (16, 1), "b4x32": (32, 4)}[group]
    scheme = CompressedScheme("float-quantized", "float", 8, size, rows=rows)
    there_and_back(scheme, qtensor)
    tensors = scheme.pack(qtensor)
    scales = tensors["weight_scale"].double().reshape(-1, ceil_div(k, size) if size > 0 else 1)
    scales = scales.repeat_interleave(size, 1)[:, :k] if size > 0 else scales
    scales = scales.repeat_interleave(rows, 0)[:n]
    wanted = tensors["weight"].to(torch.float64) * scales
    assert torch.equal(wanted.float(), qtensor.decode())


FLOATS8 = {"num_bits": 8, "type": "float", "symmetric": True}
BY_TOKEN = {**FLOATS8, "strategy": "token", "dynamic": True}
STATIC = {**FLOATS8, "strategy": "tensor", "dynamic": False}


def floats_config(inputs: object, weights: dict | None = None) -> dict:
    weights = weights or {**FLOATS8, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"format": "float-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (None, "float"),
        (BY_TOKEN, "fp8"),
        (STATIC, "fp8-static"),
        ({**BY_TOKEN, "strategy": "group", "group_size": 128}, "float"),  # DeepSeek's: a scale for 128 inputs
        ({**BY_TOKEN, "type": "int"}, "float"),
        ({**BY_TOKEN, "num_bits": 4}, "float"),
        ({**STATIC, "strategy": "token"}, "float"),
        ({**BY_TOKEN, "symmetric": False}, "float"),
    ],
)
def test_activations_of_compressed_tensors(inputs, expected):
    config = compressed_tensors.read_config(floats_config(inputs), Path("config.json"))
    scheme = config.scheme("any")
    assert str(scheme.activations) == expected
    assert bool(scheme.left_out) == (expected == "float" and inputs is not None)
    again = compressed_tensors.read_config(config.to_json(), Path("config.json")).scheme("any")
    assert again == replace(scheme, left_out="")  # what is written asks for nothing that isn't done


def test_what_is_left_out_is_told_in_the_configurations_words():
    def left_out(inputs, outputs=None):
        section = floats_config(inputs)
        section["config_groups"]["group_0"]["output_activations"] = outputs
        return compressed_tensors.read_config(section, Path("config.json")).scheme("any").left_out

    groups = {**BY_TOKEN, "strategy": "group", "group_size": 128}
    words = 'type "float", num_bits 8, symmetric true, strategy '
    assert left_out(groups) == f'rounds their inputs ({words}"group", group_size 128, dynamic true)'
    assert left_out(BY_TOKEN, STATIC) == f'rounds their outputs ({words}"tensor", dynamic false)'
    both = left_out(groups, STATIC)
    assert both.startswith("rounds their inputs (")
    assert " and rounds their outputs (" in both


def test_blocks_of_compressed_tensors():
    def read(**more):
        weights = {**FLOATS8, "strategy": "block", **more}
        return compressed_tensors.read_config(floats_config(BY_TOKEN, weights), Path("config.json"))

    config = read(block_structure=[128, 64])
    assert (config.scheme("any").rows, config.scheme("any").group) == (128, 64)
    written = config.to_json()["config_groups"]["group_0"]["weights"]
    assert (written["strategy"], written["block_structure"]) == ("block", [128, 64])
    for bad in (
        [128],
        [100, 128],
        [128, 8],
        [1, 128],
        [128, 128, 128],
        ["128", 128],
        [True, 128],
        [128.0, 128],
    ):
        refused(lambda b=bad: read(block_structure=b), "block_structure", "power of 2", error=CheckpointError)
    refused(lambda: read(), "block_structure", error=CheckpointError)


def test_static_scales_of_compressed_tensors():
    qtensor = bitfold.encode(torch.randn(3, 20), "fp8-e4m3-tensor")
    scheme = CompressedScheme("float-quantized", "float", 8, 0, activations=Activations("fp8-static"))
    stored = scheme.pack(qtensor) | scheme.pack_kept({"x_scale": torch.tensor(0.25)})
    assert stored["input_scale"].tolist() == [0.25]
    assert set(scheme.specs(scheme.entry(stored))) == set(stored)
    assert str(scheme.entry(stored).activations) == "fp8-static"
    for dtype in (torch.float32, torch.bfloat16):
        kept = scheme.kept({**stored, "input_scale": stored["input_scale"].to(dtype)})["x_scale"]
        assert (kept.dtype, kept.shape, kept.item()) == (torch.float32, (), 0.25)
    refused(lambda: scheme.entry(scheme.pack(qtensor)), "lacks input_scale")
    for bad in (torch.tensor([0.0]), torch.tensor([float("nan")]), torch.ones(2), torch.ones(1).double()):
        refused(lambda b=bad: scheme.kept({**stored, "input_scale": b}), "input_scale", "above 0")


@given(n=st.integers(1, 300), k=st.integers(1, 300))
def test_fine_grained_floats(n, k):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k))
    qtensor = bitfold.encode(weight, "fp8-e4m3-b128x128")
    there_and_back(BlockScheme(), qtensor)
    tensors = BlockScheme().pack(qtensor)
    scales = tensors["weight_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    assert torch.equal((tensors["weight"].double() * scales).float(), qtensor.decode())


def test_the_configuration_of_fine_grained_floats():
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    kept = {**section, "modules_to_not_convert": ["lm_head", "mlp.gate"]}
    config = finegrained.read_config(kept, Path("config.json"))
    assert config.scheme("model.layers.0.mlp.up_proj") == BlockScheme(128, 128)
    assert config.scheme("lm_head") is config.scheme("model.layers.0.mlp.gate") is None
    assert config.scheme("model.layers.0.mlp.gate_proj") is not None
    assert finegrained.read_config(config.to_json(), Path("config.json")) == config
    assert (
        BlockScheme(128, 64).left_out
        == "rounds their inputs to 8-bit floats with a scale for each 64 of a row"
    )
    static = finegrained.read_config({**section, "activation_scheme": "static"}, Path("config.json"))
    assert static.default == BlockScheme(128, 128, static=True)
    assert static.default.left_out.endswith("one scale from calibration")
    refused(
        lambda: finegrained.read_config({**section, "activation_scheme": "token"}, Path("config.json")),
        "activation_scheme",
        error=CheckpointError,
    )
    for bad in (None, [128], [96, 128], [128, 8], ["128", 128], [True, 128]):
        refused(
            lambda b=bad: finegrained.read_config({**section, "weight_block_size": b}, Path("config.json")),
            "weight_block_size",
            error=CheckpointError,
        )
    refused(
        lambda: finegrained.read_config({**section, "fmt": "e5m2"}, Path("config.json")),
        "fmt",
        error=CheckpointError,
    )
    tensors = BlockScheme().pack(bitfold.encode(torch.ones(130, 20), "fp8-e4m3-b128x128"))
    refused(lambda: BlockScheme().entry({"weight": tensors["weight"]}), "weight_scale_inv")
    wrong = {**tensors, "weight_scale_inv": torch.ones(1, 1)}
    refused(lambda: BlockScheme().entry(wrong), "weight_scale_inv", r"\[2, 1\]")


@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(["nf4", "fp4"]),
    n=st.integers(1, 40),
    k=st.sampled_from([1, 7, 32, 50, 64, 128]),
    block=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
)
def test_four_bits_of_bitsandbytes(seed, kind, n, k, block, nested):
    """Blocks that fill rows and blocks that run on into the next, an odd number of weights, a short last block."""
    rng = np.random.default_rng(seed)
    blocks = ceil_div(n * k, block)
    packed = rng.integers(0, 256, (ceil_div(n * k, 2), 1), dtype=np.uint8)
    if n * k % 2:
        packed[-1] &= 0xF0
    state = {"quant_type": kind, "blocksize": block, "dtype": "float16", "shape": [n, k]}
    tensors = {"weight": torch.from_numpy(packed), "weight.quant_map": quant_map(kind)}
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors["weight.absmax"] = torch.from_numpy(rng.integers(0, 256, blocks, dtype=np.uint8))
        tensors["weight.nested_absmax"] = torch.from_numpy(
            rng.random(ceil_div(blocks, 256), dtype=np.float32)
        )
        tensors["weight.nested_quant_map"] = nested_map()
    else:
        tensors["weight.absmax"] = torch.from_numpy(rng.random(blocks, dtype=np.float32))
    text = f"weight.quant_state.bitsandbytes__{kind}"
    tensors[text] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    scheme = FourBitScheme(kind, torch.float16)
    qtensor = scheme.unpack(tensors)
    assert qtensor.layout == ("rows" if k % block == 0 else "flat")
    assert np.array_equal(qtensor.decode().numpy(), oracle.four_bits(arrays(tensors), kind))
    again = scheme.pack(qtensor)
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert all(
        torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in tensors
    )
    there_and_back(scheme, qtensor)


def test_eight_bits_of_bitsandbytes_come_back():
    """SCB / 127 is rounded, and times 127 is SCB again but for the highest hundred and twenty-seventh of a binade."""
    generator = torch.Generator().manual_seed(5)
    scb = torch.rand(4096, generator=generator) * 0.98 + 1
    tensors = {
        "weight": torch.randint(-127, 128, (4096, 16), generator=generator, dtype=torch.int8),
        "SCB": torch.ldexp(scb, torch.randint(-8, 8, (4096,), generator=generator)),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    scheme = EightBitScheme()
    qtensor = scheme.unpack(tensors)
    assert qtensor.format == "int8-channel-sfp32"
    wanted = tensors["weight"].double() * tensors["SCB"].double()[:, None] / 127
    assert torch.allclose(qtensor.decode(torch.float64), wanted, rtol=1.3e-7, atol=0)
    assert torch.allclose(scheme.decode(tensors), wanted, rtol=1e-15, atol=0)
    again = scheme.pack(qtensor)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


# ---- what doesn't fit, and what is no weight ----


def refusal(error: type[Exception], function, *arguments) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    return str(caught.value)


def test_what_a_format_has_no_place_for():
    shuffled = matrix(1, 8, 64, 4, 16, True, torch.float16, True)
    assert "act-order" in refusal(Unfit, AwqScheme(16).pack, shuffled)
    assert "no g_idx since" in refusal(
        Unfit, CompressedScheme("pack-quantized", "int", 4, 16, False).pack, shuffled
    )
    asym = matrix(1, 8, 64, 4, 16, True, torch.float16, False)
    assert "zero points" in refusal(Unfit, GptqScheme(4, 16, True).pack, asym)
    assert "zero points" in refusal(Unfit, AwqScheme(16, False).pack, asym)
    assert "group size 32" in refusal(Unfit, GptqScheme(4, 32, False).pack, asym)
    assert "packs 8" in refusal(
        Unfit, GptqScheme(4, 16, False).pack, matrix(1, 12, 64, 4, 16, True, torch.float16, False)
    )
    floats = bitfold.encode(torch.randn(8, 64), "nf4-b64")
    assert "grid" in refusal(Unfit, GptqScheme().pack, floats)
    assert "run on" in refusal(Unfit, FourBitScheme().pack, bitfold.encode(torch.randn(8, 100), "nf4-b64"))
    assert "int8-channel-sfp32" in refusal(Unfit, EightBitScheme().pack, asym)


def test_tensors_that_are_no_weight():
    scheme = GptqScheme(4, 16, False)
    sound = scheme.pack(matrix(2, 16, 64, 4, 16, True, torch.float16, False))
    broken = {
        "lacks qzeros": {name: tensor for name, tensor in sound.items() if name != "qzeros"},
        "has perm too": {**sound, "perm": sound["g_idx"]},
        "scales is torch.float16 [3, 16]": {**sound, "scales": sound["scales"][:3]},
        "qzeros is torch.int64": {**sound, "qzeros": sound["qzeros"].long()},
        "qweight is torch.int16": {**sound, "qweight": sound["qweight"].short()},
        "whole words": {**sound, "qweight": sound["qweight"][:, :13]},
        "g_idx has 4 groups, 0 to 3": {**sound, "g_idx": (torch.arange(64) % 5 % 4).int()},
    }
    for said, tensors in broken.items():
        assert said in refusal(ValueError, scheme.unpack, tensors)
    symmetric = replace(scheme, symmetric=True)
    assert "version 1" in refusal(ValueError, symmetric.unpack, sound)
