"""Format strings and sizes: what parses, to what, what each error says, and how many bytes a matrix takes."""

from __future__ import annotations

import re

import bitfold
import gguf
import oracle
import pytest
import torch
from bitfold import _C
from bitfold.formats import parse, plane_shapes, stored_bytes
from cases import PLANES, block_formats, every_format, plane_families, refusal

SPELLINGS = {
    "fp16": "fp16",
    "bf16": "bf16",
    "fp8": "fp8-e4m3-channel",
    "fp8-g32": "fp8-e4m3-g32",
    "fp8-tensor-sfp16": "fp8-e4m3-tensor-sfp16",
    "fp8-e4m3": "fp8-e4m3-channel",
    "fp8-e5m2": "fp8-e5m2-channel",
    "fp8-b128x128": "fp8-e4m3-b128x128",
    "fp8-e5m2-sfp16-b2x16": "fp8-e5m2-b2x16-sfp16",
    "fp8-e5m2-g16-sbf16": "fp8-e5m2-g16-sbf16",
    "int8": "int8-channel",
    "int8-asym": "int8-channel-asym",
    "int8-sfp16": "int8-channel",
    "int8-tensor": "int8-tensor",
    "int4": "int4-g128",
    "int4-asym": "int4-g128-asym",
    "int4-g16": "int4-g16",
    "int4-g17-asym-sbf16": "int4-g17-asym-sbf16",
    "int4-g128-sfp16": "int4-g128",
    "int4-sfp32-asym-g32": "int4-g32-asym-sfp32",
    "int4-g1000000": "int4-g1000000",
    "int3": "int3-g64",
    "int3-channel": "int3-channel",
    "int2": "int2-g64",
    "int2-tensor-asym-sfp32": "int2-tensor-asym-sfp32",
    "nf4": "nf4-b64",
    "nf4-dq": "nf4-b64-dq",
    "nf4-b4096": "nf4-b4096",
    "nf4-b33-sfp16": "nf4-b33-sfp16",
    "nf4-b64-sfp32": "nf4-b64",
    "fp4": "fp4-b64",
    "fp4-b32-dq": "fp4-b32-dq",
    "fp4-dq-b32": "fp4-b32-dq",
}

# text -> what the one sentence must contain
ERRORS = {
    "": ["int4", "nf4"],
    "int5": ["int4"],
    "in4": ["int4"],
    "nf5": ["nf4"],
    "INT4": ["int4"],
    "int4 ": ["int4"],
    "int4g128": ["int4"],
    "q4_k_m": ["q4_k", "Families"],
    "fp8-e4m4": ["e4m4"],
    "int4-": ["int4"],
    "int4--asym": ["int4"],
    "int4-128": ["128", "g<"],
    "int4-g": ["g<"],
    "int4-g0": ["g0", "16"],
    "int4-g15": ["g15", "16"],
    "int4-g-16": ["g<"],
    "int4-g16.0": ["g16.0"],
    "int4-g+16": ["g+16"],
    "int4-g99999999999999999999": ["16"],
    "int4-b64": ["b64", "g<"],
    "int4-dq": ["dq"],
    "int4-g32-g64": ["twice"],
    "int4-g32-channel": ["twice"],
    "int4-asym-asym": ["twice"],
    "int4-sfp16-sfp16": ["twice"],
    "int4-sfp8": ["sfp8", "sfp16"],
    "int4-g128-sym": ["sym", "asym"],
    "nf4-b31": ["b31", "32", "4096"],
    "nf4-b4097": ["b4097", "32", "4096"],
    "nf4-g64": ["g64", "b<"],
    "nf4-asym": ["asym"],
    "nf4-channel": ["channel", "b<"],
    "nf4-tensor": ["tensor", "b<"],
    "nf4-dq-dq": ["twice"],
    "nf4-dq-sfp16": ["twice"],
    "fp8-asym": ["asym"],
    "fp8-e5m2-dq": ["dq"],
    "fp8-g8": ["g8", "16"],
    "fp8-b128": ["b128", "b<rows>x<columns>"],
    "fp8-b128x": ["b128x", "16"],
    "fp8-b128x8": ["b128x8", "16"],
    "fp8-bx128": ["bx128", "power of 2"],
    "fp8-b1x128": ["b1x128", "power of 2"],
    "fp8-b96x128": ["b96x128", "power of 2"],
    "fp8-b-2x128": ["b<rows>x<columns>"],
    "fp8-b4194304x128": ["b4194304x128", "power of 2"],
    "fp8-b128x128x2": ["b128x128x2", "16"],
    "fp8-g32-b128x128": ["twice"],
    "int4-b128x128": ["b128x128", "g<"],
    "nf4-b64x64": ["b64x64", "32"],
    "fp16-g64": ["g64"],
    "fp16-asym": ["asym"],
    "fp16-tensor": ["tensor"],
    "bf16-sfp32": ["sfp32"],
    "bf16-dq": ["dq"],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_spelling(text):
    assert parse(text).canonical == SPELLINGS[text]
    assert parse(SPELLINGS[text]).canonical == SPELLINGS[text]


@pytest.mark.parametrize("text", ERRORS)
def test_error(text):
    message = refusal(lambda: parse(text), re.escape(f"'{text}'"))
    for needle in ERRORS[text]:
        assert needle in message.replace(f"'{text}'", "", 1), message


def test_every_op_refuses_an_unknown_format():
    weight = torch.zeros(2, 2)
    for call in (lambda: bitfold.encode(weight, "int5"), lambda: bitfold.pack(weight.byte(), format="int5")):
        refusal(call, "did you mean 'int")


@pytest.mark.parametrize("text", every_format())
def test_fields(text):
    ours, spec = parse(text), oracle.parse(text)
    assert ours.canonical == spec.canonical == text
    assert (ours.family, ours.grid, ours.bits) == (spec.family, spec.kind, spec.bits)
    assert (ours.group, ours.asymmetric, ours.scale) == (spec.group, spec.asymmetric, spec.scale)
    assert ours.group_rows == spec.rows


def test_formats_are_the_defaults_of_the_table():
    assert list(bitfold.FORMATS) == [row["family"] for row in _C.families()]
    assert list(oracle.FAMILIES) == [row["family"] for row in plane_families()]
    for family, format in bitfold.FORMATS.items():
        assert parse(family) == format
        assert format.canonical == (family if family in block_formats() else oracle.parse(family).canonical)


def test_blocks():
    """Columns and bytes of a block are those that the gguf package knows."""
    assert block_formats()
    for family in block_formats():
        values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[family.upper()]]
        format = parse(family)
        assert (format.grid, format.group, format.scale) == ("block", values, "none")
        assert plane_shapes(family, 3, 2 * values) == {"blocks": (3, 2 * nbytes)}
        assert stored_bytes(family, 3, 2 * values) == 6 * nbytes
        refusal(lambda format=format, k=values + 1: format.check_columns(k), f"multiple of {values}")
        refusal(lambda family=family: parse(f"{family}-g32"), "takes no parameters")


@pytest.mark.parametrize("text", every_format())
def test_sizes(text):
    for n, k in [(0, 0), (0, 5), (5, 0), (1, 1), (1, 7), (3, 16), (2, 17), (4, 33), (3, 127), (5, 257)]:
        for layout in ("rows", "flat"):
            expected = oracle.plane_shapes(text, n, k, layout)
            assert plane_shapes(text, n, k, layout) == {name: shape for name, (_, shape) in expected.items()}
            dtypes = [PLANES[dtype] for dtype, _ in expected.values()]
            assert [law.dtype for law in parse(text).planes] == dtypes
        assert stored_bytes(text, n, k) == oracle.stored_bytes(text, n, k)


def test_bits_per_weight_of_the_defaults():
    """The figures that people quote, for a 4096 x 4096 matrix."""
    quoted = {"int4": 4.125, "int4-asym": 4.15625, "int3": 3.25, "int2": 2.25, "nf4": 4.5, "nf4-dq": 4.127}
    for text, expected in quoted.items():
        assert 8 * stored_bytes(text, 4096, 4096) / 4096**2 == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("text", every_format())
def test_qtensor_sizes(text, rng):
    for n, k in [(3, 35), (2, 0)]:
        qtensor = bitfold.encode(torch.from_numpy(rng.standard_normal((n, k)).astype("float32")), text)
        expected = oracle.plane_shapes(text, n, k)
        assert {name: tuple(plane.shape) for name, plane in qtensor.planes.items()} == {
            name: shape for name, (_, shape) in expected.items()
        }
        assert qtensor.nbytes == oracle.stored_bytes(text, n, k)
        assert qtensor.shape == (n, k)
        assert qtensor.format == text
