"""embedding: rows of the matrix, decoded."""

from __future__ import annotations

import bitfold
import oracle
import oracle_encode
import oracle_floats
import pytest
import torch
from cases import (
    DTYPES,
    assert_same_bits,
    block_formats,
    oracle_planes,
    refusal,
    some_formats,
    to_qtensor,
    weights,
)


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("format", some_formats())
def test_rows_are_decoded_rows(format, rng):
    n, k = 11, 67
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
    ids = {
        "one": torch.tensor(3),
        "none": torch.empty(0, dtype=torch.int64),
        "vector": torch.tensor([0, 10, 3, 3, 7]),
        "matrix": torch.arange(10).reshape(2, 5),
        "with a zero": torch.empty(2, 0, 4, dtype=torch.int64),
        "int32": torch.tensor([[9, 1], [0, 10]], dtype=torch.int32),
        "transposed": torch.arange(10).reshape(2, 5).t(),
        "strided": torch.arange(11)[::3],
        "expanded": torch.tensor([[4]]).expand(3, 2),
    }
    for name, dtype in DTYPES.items():
        decoded = qtensor.decode(dtype)
        wanted = oracle_floats.to_dtype(oracle.decode(oracle_planes(qtensor), format, n, k), name)
        for what, index in ids.items():
            rows = bitfold.embedding(index, qtensor, dtype)
            assert rows.dtype == dtype
            assert tuple(rows.shape) == (*index.shape, k)
            expected = wanted[index.long().numpy()]
            expected = expected.view("u8") if name == "fp64" else expected
            assert_same_bits(rows, expected.reshape(rows.shape), f"{format} {what} {name}")
            assert torch.equal(rows, decoded[index.long()])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", [*some_formats(), *block_formats()])
def test_many_rows(format, rng):
    """More than a GPU's block of threads decodes, each row of it in whole bytes."""
    n, k = 7, 768
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
    ids = torch.from_numpy(rng.integers(0, n, 25))
    for dtype in DTYPES.values():
        assert torch.equal(bitfold.embedding(ids, qtensor, dtype), qtensor.decode(dtype)[ids])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("k", [35, 1032])
def test_flat_layout(k, rng):
    for format in ("nf4-b32", "fp4-b64-dq"):
        planes = oracle_encode.encode(weights(rng, 1, 9 * k), format)
        qtensor = to_qtensor(planes, format, 9, k, "flat")
        ids = torch.tensor([8, 0, 5, 5, 1, 2, 7, 6, 4, 3])
        assert torch.equal(bitfold.embedding(ids, qtensor), qtensor.decode()[ids])


def test_same_bits_for_any_threads(rng, threads):
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, 50, 130)), "int4-g32")
    ids = torch.from_numpy(rng.integers(0, 50, (40, 30)))
    for count in (1, 2, 4):
        threads(count)
        assert torch.equal(bitfold.embedding(ids, qtensor), qtensor.decode()[ids])


@pytest.mark.parametrize("format", ["fp16", "int8-channel", "int4-g16-asym", "nf4-b32-dq"])
def test_ids_out_of_range(format):
    qtensor = bitfold.encode(torch.ones(5, 40), format)
    for bad in (-1, 5, 2**31, 2**62, -(2**63)):
        for ids in (torch.tensor([0, 1, bad]), torch.tensor([[bad]])):
            message = refusal(lambda ids=ids: bitfold.embedding(ids, qtensor), error=(ValueError, IndexError))
            assert str(bad) in message
            assert "5" in message


def test_an_empty_table_has_no_rows():
    qtensor = bitfold.encode(torch.ones(0, 40), "int8")
    assert bitfold.embedding(torch.empty(3, 0, dtype=torch.int64), qtensor).shape == (3, 0, 40)
    refusal(lambda: bitfold.embedding(torch.tensor([0]), qtensor), error=(ValueError, IndexError))


@pytest.mark.usefixtures("device")
def test_bad_ids():
    qtensor = bitfold.encode(torch.ones(5, 40), "int8")
    for ids in (torch.tensor([0.0]), torch.tensor([True]), torch.tensor([0], dtype=torch.uint8)):
        refusal(lambda ids=ids: bitfold.embedding(ids, qtensor), "ids")
    refusal(lambda: bitfold.embedding(torch.tensor([0]), qtensor, torch.int32), "dtype")


def test_more_memory_than_there_can_be():
    """2^49 bytes, which no address space has. torch says why from 2.13 on."""
    ids, qtensor = torch.zeros(2**24, dtype=torch.int64), bitfold.encode(torch.ones(2, 2**22), "int4")
    asked = r"no memory of the CPU for a float64 tensor of shape \[16777216, 4194304\]"
    reason = (
        r".*can't allocate memory" if torch.__version__ >= torch.torch_version.TorchVersion("2.13") else ""
    )
    with pytest.raises(RuntimeError, match=asked + reason) as found:
        bitfold.embedding(ids, qtensor, torch.float64)
    assert "API call failed" not in str(found.value)
    assert torch.equal(bitfold.embedding(ids[:1], qtensor), qtensor.decode()[:1])
