"""The floor on GPUs (csrc/cuda/linear_floor.cu): y = x W^T + b and dx = dy W for every format, layout, dtype and stride
against float64, and the same bits whatever the schedule and the batch.
"""

from __future__ import annotations

from itertools import product

import bitfold
import devices
import pytest
import torch
from cases import DTYPES, block_formats, random_planes, some_formats, to_qtensor, weights

GPUS = [name for name in devices.NAMES if name != "cpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator")

LIMITS = {"fp64": 1e-14, "fp32": 5e-6, "fp16": 1e-3, "bf16": 4e-3}  # docs/architecture.md


@pytest.fixture(params=GPUS)
def gpu(request):
    with devices.use(request.param, request.node.nodeid):
        yield request.param


def make(rng, format: str, n: int, k: int, layout: str = "rows") -> tuple[bitfold.QTensor, torch.Tensor]:
    """A matrix and its decoded weights in float64."""
    if layout == "flat":
        q = to_qtensor(random_planes(rng, format, n, k, layout), format, n, k, layout)
    else:
        q = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
    return q, q.decode(torch.float64)


def strided(rng, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.from_numpy(rng.standard_normal((rows, columns))).to(dtype)
    return x if rng.integers(2) else x.T.contiguous().T


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("format", [*some_formats(), *block_formats()])
def test_products(format, dtype, gpu, rng):
    k = 256 if format in block_formats() else 83
    q, w = make(rng, format, 19, k)
    for m in (1, 9):
        x, bias = strided(rng, m, k, DTYPES[dtype]), strided(rng, 1, 19, DTYPES[dtype])[0]
        y = bitfold.linear(x, q, bias)
        assert y.dtype == DTYPES[dtype]
        assert distance(y, x.double() @ w.T + bias.double()) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["nf4-b64-dq", "fp4-b33"])
def test_products_with_blocks_that_straddle_rows(format, dtype, gpu, rng):
    q, w = make(rng, format, 7, 35, "flat")
    x, bias = strided(rng, 10, 35, DTYPES[dtype]), strided(rng, 1, 7, DTYPES[dtype])[0]
    assert distance(bitfold.linear(x, q, bias), x.double() @ w.T + bias.double()) < LIMITS[dtype]


@pytest.mark.parametrize("format", [*some_formats(), *block_formats()])
def test_gradients(format, gpu, rng):
    k = 512 if format in block_formats() else 300
    q, w = make(rng, format, 35, k)
    for (dtype, limit), m in product(LIMITS.items(), (6, 9)):  # nine rows of 16 bits are torch's to multiply
        dy = strided(rng, m, 35, DTYPES[dtype])
        dx = devices.ops().linear_grad_x(dy, list(q.planes.values()), format, 35, k, "rows")
        assert dx.dtype == DTYPES[dtype]
        assert distance(dx, dy.double() @ w) < limit


def test_bits_depend_on_neither_schedule_nor_batch(gpu, rng):
    if gpu != "emulated":
        pytest.skip("a GPU has no schedule to choose")
    q, _ = make(rng, "q4_k", 11, 768)
    x, dy = strided(rng, 13, 768, torch.float32), strided(rng, 13, 11, torch.float32)
    found = []
    for seed in range(4):
        devices.emulated().configure(**devices.schedule(str(seed)))
        dx = devices.ops().linear_grad_x(dy, list(q.planes.values()), "q4_k", 11, 768, "rows")
        found.append((bitfold.linear(x, q), dx))
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dx, found[0][1])
    for j in range(13):
        assert torch.equal(bitfold.linear(x[j : j + 1], q), found[0][0][j : j + 1])
