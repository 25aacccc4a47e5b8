"""The same numbers in another format, and weights that go from one library's tensors to another's and back."""

from __future__ import annotations

import bitfold
import numpy as np
import oracle_gguf
import pytest
import torch
from bitfold.foreign.awq import AwqScheme
from bitfold.foreign.compressed_tensors import CompressedScheme
from bitfold.foreign.gptq import GptqScheme
from bitfold.foreign.regrid import nearest_integers, regrid
from bitfold.foreign.scheme import Unfit
from bitfold.formats import FORMATS, parse
from hypothesis import given
from hypothesis import strategies as st
from test_foreign import matrix, same


def tensors_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert other[name].dtype == tensor.dtype, name
        assert torch.equal(other[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), (
            name
        )


@given(
    seed=st.integers(0, 1 << 30),
    n=st.integers(1, 4),
    groups=st.integers(1, 4),
    group=st.sampled_from([-1, 16, 32, 64]),
    asym=st.booleans(),
)
def test_a_to_b_to_a(seed, n, groups, group, asym):
    """4 bits, all pairs of GPTQ 1 and 2, AWQ and compressed-tensors: the bytes of A again, and the same values in B."""
    n, k = 8 * n, 16 * groups if group == -1 else group * groups
    qtensor = matrix(seed, n, k, 4, group, asym, torch.float16, False)
    schemes = [
        GptqScheme(4, group, not asym, 1),
        GptqScheme(4, group, not asym, 2),
        AwqScheme(group, asym),
        CompressedScheme("pack-quantized", "int", 4, group, not asym),
        CompressedScheme("int-quantized", "int", 4, group, not asym),
    ]
    for one in schemes:
        first = one.pack(qtensor)
        for other in schemes:
            second = other.pack(one.unpack(first))
            assert torch.equal(other.decode(second), qtensor.decode())
            tensors_equal(one.pack(other.unpack(second)), first)


@given(
    seed=st.integers(0, 1 << 30),
    bits=st.sampled_from([2, 3, 8]),
    group=st.sampled_from([-1, 32, 64]),
    asym=st.booleans(),
    shuffled=st.booleans(),
)
def test_other_widths_and_orders(seed, bits, group, asym, shuffled):
    """GPTQ 1 -> GPTQ 2 -> compressed-tensors (which has no order of columns to write) -> GPTQ 1."""
    shuffled &= group > 0
    qtensor = matrix(seed, 32, 128, bits, group, asym, torch.float16, shuffled)
    one, two = (GptqScheme(bits, group, not asym, version) for version in (1, 2))
    first = one.pack(qtensor)
    second = two.pack(one.unpack(first))
    tensors_equal(one.pack(two.unpack(second)), first)
    if qtensor.g_idx is None:
        three = CompressedScheme("pack-quantized", "int", bits, group, not asym)
        tensors_equal(one.pack(three.unpack(three.pack(two.unpack(second)))), first)
    else:
        with pytest.raises(Unfit, match="g_idx"):
            CompressedScheme("pack-quantized", "int", bits, group, not asym).pack(qtensor)


@given(
    seed=st.integers(0, 1 << 30),
    source=st.sampled_from([(4, 64), (4, -1), (4, 0), (4, 32), (3, 32), (2, 96), (8, 64)]),
    group=st.sampled_from([16, 32]),
    scale=st.sampled_from([torch.float16, torch.bfloat16]),
    asym=st.booleans(),
    shuffled=st.booleans(),
)
def test_more_bits_smaller_groups_wider_scales(seed, source, group, scale, asym, shuffled):
    """The values stay, to the bit; the way back needs no rounding either where the groups were not cut."""
    bits, wide = source
    shuffled &= wide == group
    qtensor = matrix(seed, 8, 192, bits, wide, asym, scale, shuffled)
    zeros = "-asym" if asym else ""
    for target in (f"int{bits}-g{group}{zeros}-sfp32", f"int8-g{group}{zeros}-sfp32"):
        moved = regrid(qtensor, target)
        assert moved.format == parse(target).canonical
        assert torch.equal(moved.decode(), qtensor.decode())
    back = regrid(
        regrid(qtensor, f"int{bits}-g{group}{zeros}-sfp32"), f"int{bits}-g{group}{zeros}-{_short(scale)}"
    )
    if wide == group:
        same(qtensor, back)


def _short(dtype: torch.dtype) -> str:
    return {torch.float16: "sfp16", torch.bfloat16: "sbf16"}[dtype]


@given(
    seed=st.integers(0, 1 << 30),
    source=st.sampled_from(["int4-g32", "int8-g64", "int3-g96-asym", "int4-g32-asym"]),
)
def test_blocks_have_the_same_numbers(seed, source):
    """Against the decoder of GGUF's blocks; codes with zero points meet 0 in the middle of more bits."""
    format = parse(source)
    qtensor = matrix(seed, 4, 192, format.bits, format.group, format.asymmetric, torch.float16, False)
    block = "q8_0" if format.bits == 8 or source == "int4-g32-asym" else "q4_0"
    blocks = regrid(qtensor, block)
    assert blocks.format == block
    wanted = qtensor.decode(torch.float64).numpy()
    assert np.array_equal(oracle_gguf.decode(blocks.planes["blocks"].numpy(), block), wanted)
    back = regrid(blocks, "int8-g32" if block == "q8_0" else "int4-g32")
    assert np.array_equal(back.decode(torch.float64).numpy(), wanted)
    if source == "int4-g32":
        same(qtensor, back)


@given(seed=st.integers(0, 1 << 30))
def test_minima_that_are_multiples_of_scales(seed):
    """q4_1 has minima where integers have zero points: the same where -zero * scale is a number of fp16."""
    qtensor = matrix(seed, 4, 64, 4, 32, True, torch.float16, False)
    codes, scales, zeros, *_ = qtensor.unpack()
    short = (scales.view(torch.int16) & -64).view(torch.float16)  # 5 bits, so that 4 more fit
    sound = bitfold.pack(codes, short, zeros, format=qtensor.format)
    blocks = regrid(sound, "q4_1")
    wanted = sound.decode(torch.float64).numpy()
    assert np.array_equal(oracle_gguf.decode(blocks.planes["blocks"].numpy(), "q4_1"), wanted)
    same(sound, regrid(blocks, sound.format))


def test_minima_that_are_none():
    scales = torch.full((1, 1), 1 + 2.0**-10, dtype=torch.float16)
    zeros = torch.full((1, 1), 13, dtype=torch.uint8)
    qtensor = bitfold.pack(torch.zeros(1, 32, dtype=torch.uint8), scales, zeros, format="int4-g32-asym")
    with pytest.raises(Unfit, match=r"minima, -zero \* scale, are numbers of float16"):
        regrid(qtensor, "q4_1")
    rounded = regrid(qtensor, "q4_1", rounding=True).decode()
    assert 0 < (rounded - qtensor.decode()).abs().max() < 13 * 2**-11
    with pytest.raises(Unfit, match="no whole multiples"):
        regrid(
            bitfold.encode(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), "q4_1"),
            "int4-g32-asym",
        )


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("int4-g32", "int4-g64", "one scale for weights that have several"),
        ("int4-channel", "int4-tensor", "one scale for weights that have several"),
        ("int8-g32", "int4-g32", "code - zero goes beyond"),
        ("int8-g32-asym", "int4-g32-asym", "don't fit 4"),
        ("int4-g32-asym", "int4-g32", "code - zero goes beyond"),
        ("int4-g32-sfp32", "int4-g32", "not all of its scales are numbers of float16"),
        ("nf4-b64", "int4-g64", "another grid"),
        ("nf4-b64-dq", "nf4-b64", "another grid"),
        ("fp8-e4m3-channel", "int8-channel", "another grid"),
        ("q4_k", "int4-g32-asym", "another grid"),
        ("bf16", "int8-channel", "another grid"),
    ],
)
def test_what_does_not_hold_the_values(source, target, reason):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    with pytest.raises(Unfit, match=reason):
        regrid(bitfold.encode(weight, source), target)


def test_scales_beyond_a_dtype_are_an_error_even_when_rounded():
    qtensor = bitfold.encode(torch.full((1, 32), 1e6), "int4-g32-sfp32")
    with pytest.raises(Unfit, match=r"go up to 1\.4.*e\+05, beyond float16"):
        regrid(qtensor, "int4-g32", rounding=True)


@pytest.mark.parametrize("family", FORMATS)
def test_every_format_has_integers_that_are_near(family):
    near = nearest_integers(FORMATS[family])
    assert near.grid == "integer"
    assert near.bits >= FORMATS[family].bits or FORMATS[family].grid == "cast"
