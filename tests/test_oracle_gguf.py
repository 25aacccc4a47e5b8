"""The oracle of GGUF's blocks against what it did not make: llama.cpp's golden blocks and the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import oracle_gguf as oracle
import pytest
from golden import golden
from oracle_gguf_encode import encode

every_type = pytest.mark.parametrize("name", oracle.LAYOUTS)


def same_floats(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where bits are equal, or both are NaN."""
    return (got.view(np.uint32) == wanted.view(np.uint32)) | (np.isnan(got) & np.isnan(wanted))


@every_type
def test_encodes_the_golden_blocks(name):
    data = golden(name)
    assert (encode(data.x, name) == data.bytes).all()
    assert (encode(data.x, name, data.importance) == data.bytes_imatrix).all()


@every_type
def test_decodes_the_golden_blocks(name):
    data = golden(name)
    assert same_floats(oracle.decode(data.bytes, name), data.dequant).all()


@every_type
def test_parts_are_packed_as_they_were(name, rng):
    layout = oracle.LAYOUTS[name]
    blocks = rng.integers(0, 256, (300, layout.bytes)).astype(np.uint8)
    assert (layout.pack(layout.unpack(blocks)) == blocks).all()


@every_type
def test_any_bytes_mean_what_the_gguf_package_says(name, rng):
    blocks = rng.integers(0, 256, (300, oracle.LAYOUTS[name].bytes)).astype(np.uint8)
    kind = gguf.GGMLQuantizationType[name.upper()]
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(blocks, kind)
    assert same_floats(oracle.decode(blocks, name), theirs).all()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_the_gguf_package_encodes_alike(name, rng):
    """It has no others, and none with importance. In blocks of nothing but zeros these lose their signs there."""
    x = (rng.standard_normal((60, 320)) * 10.0 ** rng.uniform(-3, 3, (60, 1))).astype(np.float32)
    x[::7] = rng.integers(-8, 9, (9, 320))
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name.upper()])
    assert (encode(x, name) == theirs).all()
