"""What GGUF's blocks are used for: products, embeddings and gradients against float64 of the decoded weights, for every
block type of the table.
"""

from __future__ import annotations

import bitfold
import devices
import numpy as np
import oracle_gguf
import pytest
import torch
from bitfold.formats import parse
from cases import DTYPES, assert_same_bits, block_formats
from test_gguf_blocks import decoded_bits, every_block, of_blocks, some_weights, tame_blocks
from test_linear import ROWS_AT_ONCE, assert_close, draw, exact, multiplied, to_bf16

BATCHES = (0, 1, 2, 3, 7, 8, 9, 16, 33)
# Of the emulator, which is slow: the ends of its kernels' batches.
EMULATED = (0, 1, 3, 8, 9, 33)


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear(format, dtype, rng):
    for n, count in [(1, 1), (5, 3), (33, 2), (130, 1)]:
        blocks = tame_blocks(rng, format, n, count)
        qtensor, w = of_blocks(blocks, format), oracle_gguf.decode(blocks, format).astype(np.float64)
        for m in BATCHES if devices.plan_device() == "cpu" else EMULATED:
            x = draw(rng, m, w.shape[1], dtype=dtype)
            bias = draw(rng, n, dtype=dtype) if m % 2 else None
            y = bitfold.linear(x, qtensor, bias)
            assert_close(y, x, multiplied(w, format, x), bias, f"{format} m={m} n={n} k={w.shape[1]}")


@pytest.mark.usefixtures("device")
@every_block
def test_linear_of_strides_and_empty_sizes(format, rng):
    values = parse(format).group
    blocks = tame_blocks(rng, format, 9, 2)
    qtensor, w = of_blocks(blocks, format), oracle_gguf.decode(blocks, format).astype(np.float64)
    k = 2 * values
    base = draw(rng, 2, 6, 2 * k, dtype=torch.float32)
    for x in (base[..., :k], base[..., ::2], base[0, 0, :k], draw(rng, k, 12, dtype=torch.float32).t()):
        y = bitfold.linear(x, qtensor)
        assert_close(y, x, w, None, format)
        assert torch.equal(y, bitfold.linear(x.contiguous(), qtensor))
    for n, k in [(0, values), (5, 0)]:
        empty = bitfold.encode(torch.zeros(n, k), format)
        for m in (0, 1, 9):
            assert torch.equal(bitfold.linear(torch.ones(m, k), empty), torch.zeros(m, n))


@every_block
def test_linear_same_bits_for_any_threads(format, rng, threads):
    qtensor = of_blocks(tame_blocks(rng, format, 203, 3), format)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for m in (1, 3, 9, 67):
            x = draw(rng, m, qtensor.shape[1], dtype=dtype)
            outputs = []
            for count in (1, 2, 4, 1):
                threads(count)
                outputs.append(bitfold.linear(x, qtensor))
            assert all(torch.equal(outputs[0], other) for other in outputs[1:]), f"{format} m={m} {dtype}"


@pytest.mark.usefixtures("device")
@every_block
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_linear_of_long_sums(format, dtype, rng):
    blocks = tame_blocks(rng, format, 9, 14336 // parse(format).group)
    qtensor, w = of_blocks(blocks, format), oracle_gguf.decode(blocks, format).astype(np.float64)
    for m in (1, 9):
        x = draw(rng, m, 14336, dtype=dtype)
        assert_close(bitfold.linear(x, qtensor), x, multiplied(w, format, x), None, f"{format} m={m}")


def test_the_plan_names_the_regime():
    for format in block_formats():
        for m, regime in [
            (1, "fused"),
            (ROWS_AT_ONCE, "fused"),
            (ROWS_AT_ONCE + 1, "tiled"),
            (1000, "tiled"),
        ]:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                assert bitfold.plan_linear(format, m, 64, 256, dtype).regime == regime, format
            assert bitfold.plan_linear(format, m, 64, 256, torch.float64).regime == "floor"


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_fused_rows_do_not_depend_on_each_other(format, rng):
    qtensor = of_blocks(tame_blocks(rng, format, 37, 3), format)
    for dtype in DTYPES.values():
        x = draw(rng, ROWS_AT_ONCE, qtensor.shape[1], dtype=dtype)
        alone = torch.cat([bitfold.linear(row[None], qtensor) for row in x])
        for m in (2, 3, 5, 8):
            assert torch.equal(bitfold.linear(x[-m:], qtensor), alone[-m:]), f"{format} {dtype} m={m}"


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_what_is_not_finite_stays_where_it_is(format, rng):
    """A bad activation spoils the outputs of its row alone, a bad scale those of its column alone."""
    layout = oracle_gguf.LAYOUTS[format]
    blocks = tame_blocks(rng, format, 20, 3)
    qtensor = of_blocks(blocks, format)
    spoilt = blocks.copy()
    for at in layout.halves:
        spoilt[7, layout.bytes + at : layout.bytes + at + 2] = 0x7C, 0x7E  # a NaN
    for dtype in DTYPES.values():
        for m in (1, 3, 20):
            x = draw(rng, m, qtensor.shape[1], dtype=dtype)
            bad = x.clone()
            bad[0, layout.values] = float("nan")
            finite = torch.isfinite(bitfold.linear(bad, qtensor)).all(dim=1)
            assert finite.tolist() == [False] + [True] * (m - 1), f"{format} {dtype} m={m}"
            if layout.halves:
                y = bitfold.linear(x, of_blocks(spoilt, format))
                assert torch.isfinite(y).all(dim=0).tolist() == [row != 7 for row in range(20)]


@pytest.mark.usefixtures("device")
@every_block
def test_neighbours_are_not_read_as_weights(format, rng):
    """A plane inside a larger buffer of NaN scales gives what a plane of its own gives; the same for x."""
    blocks = tame_blocks(rng, format, 3, 2)
    buffer = torch.full((blocks.size + 256,), 0x7E, dtype=torch.uint8)
    inside = buffer[128 : 128 + blocks.size].view(blocks.shape)
    inside.copy_(torch.from_numpy(blocks))
    alone, within = (
        of_blocks(blocks, format),
        bitfold.QTensor(format, (3, 2 * parse(format).group), {"blocks": inside}),
    )
    for m in (1, 8, 9):
        x = draw(rng, m, alone.shape[1], dtype=torch.float32)
        wide = torch.full((m * x.shape[1] + 64,), float("nan"))
        view = wide[32 : 32 + x.numel()].view(x.shape)
        view.copy_(x)
        assert torch.equal(bitfold.linear(view, within), bitfold.linear(x, alone)), f"{format} m={m}"
    assert torch.equal(within.decode(), alone.decode())


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_embedding(format, rng):
    blocks = tame_blocks(rng, format, 11, 3)
    qtensor = of_blocks(blocks, format)
    ids = torch.tensor([[0, 10, 3], [3, 7, 7]])
    for name, dtype in DTYPES.items():
        rows = bitfold.embedding(ids, qtensor, dtype)
        expected = decoded_bits(blocks, format, name)[ids.numpy()]
        assert_same_bits(rows, expected, f"{format} {name}")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient(format, dtype, rng):
    for n, count in [(1, 1), (17, 2), (130, 1)]:
        blocks = tame_blocks(rng, format, n, count)
        qtensor, w = of_blocks(blocks, format), oracle_gguf.decode(blocks, format).astype(np.float64)
        x = draw(rng, 9, w.shape[1], dtype=dtype).requires_grad_()
        grad = draw(rng, 9, n, dtype=dtype)
        bitfold.linear(x, qtensor).backward(grad)
        rounds = devices.plan_device() == "cuda" and dtype == torch.bfloat16  # decoded for torch's product
        assert_close(x.grad, grad, (to_bf16(w) if rounds else w).T, None, f"{format} n={n}")


@every_block
def test_module_and_bytes_of_the_plane(format, rng):
    """A layer and its weight: as many bytes as the table says, and what encode gave comes out of the layer."""
    layout = oracle_gguf.LAYOUTS[format]
    w = torch.from_numpy(some_weights(rng, 7, 2 * layout.values))
    layer = bitfold.QuantLinear(bitfold.encode(w, format))
    assert layer.qtensor.planes["blocks"].shape == (7, 2 * layout.bytes)
    assert layer.qtensor.nbytes == 7 * 2 * layout.bytes
    x = draw(rng, 3, w.shape[1], dtype=torch.float32)
    assert_close(layer(x), x, exact(layer.qtensor.decode()), None, format)
