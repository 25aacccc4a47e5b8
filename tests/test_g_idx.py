"""Matrices whose groups aren't neighbouring columns: g_idx, as GPTQ's act-order leaves it."""

from __future__ import annotations

import io

import bitfold
import numpy as np
import pytest
import torch
from bitfold import grids
from bitfold.checkpoint import load, save
from bitfold.qtensor import column_order
from bitfold.shards import CheckpointError
from cases import refusal
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

FORMATS = (
    "int8-g32",
    "int4-g32",
    "int4-g32-asym",
    "int3-g32",
    "int2-g32-asym",
    "nf4-b64",
    "nf4-b64-dq",
    "fp4-b64",
)


def some_g_idx(rng: np.random.Generator, k: int, group: int) -> torch.Tensor:
    """A random assignment of k columns to groups, each but the last with `group` of them."""
    return torch.from_numpy(rng.permutation(np.arange(k) // group).astype(np.int32))


def two_of_one_meaning(format: str, n: int, k: int, rng: np.random.Generator):
    """A matrix with g_idx, its columns as its planes have them as a matrix without, and their order."""
    plain = bitfold.encode(torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)), format)
    g_idx = some_g_idx(rng, k, bitfold.formats.parse(format).group)
    order = np.argsort(g_idx.numpy(), kind="stable")
    return bitfold.QTensor(plain.format, plain.shape, plain.planes, g_idx=g_idx), plain, order


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_every_column_finds_its_place(format, data):
    n, k = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 200))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    moved, plain, order = two_of_one_meaning(format, n, k, rng)
    expected = np.empty((n, k), np.float32)
    expected[:, order] = plain.decode().numpy()
    assert np.array_equal(moved.decode().numpy(), expected)
    ids = torch.from_numpy(rng.integers(0, n, 5))
    assert np.array_equal(bitfold.embedding(ids, moved).numpy(), expected[ids])
    x = torch.from_numpy(rng.standard_normal((data.draw(st.integers(0, 11)), k)).astype(np.float32))
    assert torch.equal(bitfold.linear(x, moved), bitfold.linear(x[:, order.copy()], plain))


@pytest.mark.parametrize("format", FORMATS)
def test_pack_is_the_inverse_of_unpack(format, rng):
    moved, plain, order = two_of_one_meaning(format, 5, 150, rng)
    logical = moved.unpack()
    assert torch.equal(logical.codes[:, order.copy()], plain.unpack().codes)
    assert logical.g_idx is moved.g_idx
    again = bitfold.pack(format=format, **logical._asdict())
    assert again.g_idx is moved.g_idx
    assert all(torch.equal(a, b) for a, b in zip(again.planes.values(), moved.planes.values(), strict=True))


def test_scales_zeros_and_positions_are_those_of_the_columns(rng):
    moved, plain, order = two_of_one_meaning("int4-g32-asym", 4, 100, rng)
    for found, expected in (
        (grids.scales(moved), grids.scales(plain)),
        (grids.zeros(moved), grids.zeros(plain)),
    ):
        assert torch.equal(found[:, order.copy()], expected)
    weight = torch.from_numpy(rng.standard_normal((4, 100)).astype(np.float32))
    found = grids.positions(weight, moved)
    assert torch.equal(found[:, order.copy()], grids.positions(weight[:, order.copy()], plain))


def test_columns_in_order_change_nothing(rng):
    plain = bitfold.encode(torch.from_numpy(rng.standard_normal((3, 100)).astype(np.float32)), "int4-g32")
    same = bitfold.QTensor(
        plain.format, plain.shape, plain.planes, g_idx=torch.arange(100, dtype=torch.int32) // 32
    )
    assert torch.equal(same.decode(), plain.decode())
    assert torch.equal(column_order(same.g_idx), torch.arange(100))
    assert same.nbytes == plain.nbytes + 400
    assert "with g_idx" in repr(same)


def test_gradients(rng):
    moved, _, _ = two_of_one_meaning("int4-g32", 6, 70, rng)
    x = torch.from_numpy(rng.standard_normal((3, 70))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bitfold.linear(x, moved), x)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_module(rng):
    moved, _, _ = two_of_one_meaning("int4-g32", 6, 70, rng)
    layer = bitfold.QuantLinear(moved, torch.zeros(6))
    x = torch.from_numpy(rng.standard_normal((3, 70)).astype(np.float32))
    expected = bitfold.linear(x, moved)
    assert torch.equal(layer(x), expected)  # not prepared: the order is worked out
    layer.prepare()
    assert torch.equal(layer(x), expected)
    assert layer.qtensor.g_idx is layer.g_idx
    assert not layer.g_idx.requires_grad
    assert layer.bfloat16().g_idx.dtype == torch.int32
    assert "g_idx" in layer.state_dict()
    layer.float().prepare()
    other = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other["g_idx"] = other["g_idx"].flip(0).contiguous()
    layer.load_state_dict(other)  # the order of before is no longer that of g_idx
    flipped = bitfold.QTensor(moved.format, moved.shape, moved.planes, g_idx=other["g_idx"])
    assert torch.equal(layer(x), bitfold.linear(x, flipped))
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_checkpoint(tmp_path, rng):
    moved, _, _ = two_of_one_meaning("int4-g32-asym", 6, 70, rng)
    save(Model(bitfold.QuantLinear(moved)), tmp_path / "a")
    loaded = load(tmp_path / "a", model=Model(nn.Linear(70, 6, bias=False)))
    assert torch.equal(loaded.layer.qtensor.decode(), moved.decode())
    assert torch.equal(loaded.layer.g_idx, moved.g_idx)
    x = torch.from_numpy(rng.standard_normal((3, 70)).astype(np.float32))
    assert torch.equal(loaded(x), bitfold.linear(x, moved))
    half = load(tmp_path / "a", model=Model(nn.Linear(70, 6, bias=False)), dtype=torch.bfloat16)
    assert torch.equal(half.layer.g_idx, moved.g_idx)


def test_a_damaged_checkpoint_is_refused(tmp_path, rng):
    moved, _, _ = two_of_one_meaning("int4-g32", 6, 70, rng)
    layer = bitfold.QuantLinear(moved)
    layer.g_idx.data.fill_(1)
    save(Model(layer), tmp_path / "a")
    with pytest.raises(CheckpointError, match="'layer': g_idx has 1 groups, 1 to 1, of 70 to 70 columns"):
        load(tmp_path / "a", model=Model(nn.Linear(70, 6, bias=False)))


def test_pickle_and_trees(rng):
    moved, _, _ = two_of_one_meaning("int4-g32", 6, 70, rng)
    file = io.BytesIO()
    torch.save(moved, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).decode(), moved.decode())
    same = torch.utils._pytree.tree_map(torch.clone, moved)
    assert same.g_idx is not moved.g_idx
    assert torch.equal(same.decode(), moved.decode())
    assert torch.equal(moved.to("cpu").g_idx, moved.g_idx)


def test_bad_input(rng):
    plain = bitfold.encode(torch.from_numpy(rng.standard_normal((3, 100)).astype(np.float32)), "int4-g32")
    good = torch.arange(100, dtype=torch.int32) // 32
    channel = bitfold.encode(torch.ones(3, 100), "int8-channel")
    blocks = bitfold.encode(torch.ones(3, 256), "q4_k")
    for qtensor, g_idx, words in (
        (
            plain,
            good.long(),
            "g_idx is a torch.int64 of shape [100]; it must be a torch.int32 of shape [100]",
        ),
        (plain, good[:-1], "g_idx is a torch.int32 of shape [99]; it must be a torch.int32 of shape [100]"),
        (plain, good.clamp(max=2), "g_idx has 3 groups, 0 to 2, of 32 to 36 columns"),
        (plain, good - 1, "g_idx has 4 groups, -1 to 2"),
        (plain, good.to("meta"), "g_idx is on meta; it must be on cpu as the planes are"),
        (channel, good, "g_idx is given, but int8-channel has no groups of columns"),
        (blocks, good, "g_idx is given, but q4_k has blocks"),
    ):
        assert words in refusal(
            lambda q=qtensor, g=g_idx: bitfold.QTensor(q.format, q.shape, q.planes, g_idx=g)
        )
    moved = bitfold.QTensor(plain.format, plain.shape, plain.planes, g_idx=good)
    assert "its last dimension must be 100" in refusal(lambda: bitfold.linear(torch.ones(2, 99), moved))
    assert "qtensor has g_idx" in refusal(lambda: bitfold.QuantEmbedding(moved))
