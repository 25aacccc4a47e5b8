"""The kernel for more than 32 rows of x on GPUs with wgmma (csrc/cuda/linear_wgmma.hpp).

Beyond what test_linear.py asks of every device: every code in every place, exact sums, the same bits whatever the
schedule, blocks of one to four quarters of 64 rows, k cut over blocks of threads, and little shared memory. More
than 128 rows need a W of so many rows that the plan takes this kernel (test_cuda_plan.py).
"""

from __future__ import annotations

import bitfold
import devices
import numpy as np
import pytest
import torch
from cases import DTYPES, random_planes, to_qtensor
from test_cuda_tile import (
    BLOCKS,
    GPUS,
    PLANES,
    assert_bf16_beyond_the_range_of_fp16,
    assert_columns_in_place,
    assert_near,
    assert_same,
    assert_same_on_every_schedule,
    assert_whole_sums_exact,
    make,
    whole,
)

pytestmark = pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator")


@pytest.fixture(params=GPUS)
def gpu(request):
    with devices.use(request.param, request.node.nodeid):
        yield request.param


@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_every_weight_is_where_its_column_is(gpu, format, rng):
    assert_columns_in_place(rng, format, 70)


@pytest.mark.parametrize("format", [format for format in PLANES if format.startswith("int")])
def test_sums_of_small_whole_numbers_are_exact(gpu, format, rng):
    half, bf16 = torch.float16, torch.bfloat16
    assert_whole_sums_exact(rng, format, 800, ((33, bf16), (64, half), (65, half), (200, bf16)))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_accuracy(gpu, format, dtype, rng):
    """Ragged rows, columns and tokens, k that ends within a chunk or in one short of the pipeline."""
    for m, n, k in (
        (33, 1, 33),
        (64, 130, 288),
        (65, 128, 1056),
        (128, 40, 96),
        (137, 500, 288),
        (200, 800, 128),
    ):
        qtensor, w = make(rng, format, n, whole(format, k))
        x = torch.from_numpy(rng.standard_normal((m, w.shape[1]))).to(DTYPES[dtype])
        bias = torch.from_numpy(rng.standard_normal(n)).to(DTYPES[dtype]) if m % 2 else None
        assert_near(bitfold.linear(x, qtensor, bias), x, w, bias)


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's multiprocessors can't be chosen")
@pytest.mark.parametrize("format", ["int4-g128", "int4-g32-asym", "q5_k"])
def test_blocks_of_every_size(format, rng):
    """One multiprocessor takes blocks as large as there are: of one to four quarters, and what is left of the last."""
    n, k = 1200, 256
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((260, k))).to(torch.bfloat16)
    with devices.use("emulated"):
        devices.emulated().configure(multiprocessors=1, order="priority")
        together = bitfold.linear(x, qtensor)
        assert_near(together, x, w)
        for m in (40, 100, 129, 192, 200, 257):
            assert_same(bitfold.linear(x[:m], qtensor), together[:m])


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's schedule can't be chosen")
@pytest.mark.parametrize("m", [40, 100])
@pytest.mark.parametrize(
    "format", ["int4-g128-asym", "nf4-b64-dq", "int8-g32", "q2_k", "q4_k", "q6_k", "mxfp4"]
)
def test_bits_depend_on_no_schedule(format, m, rng):
    assert_same_on_every_schedule(rng, format, m)


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's shared memory can't be chosen")
@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_less_shared_memory(format, rng):
    """As if a block had 99 KB: fewer stages, and fewer tokens where they don't fit."""
    n, k, m = 140, whole(format, 768), 120
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.float16)
    with devices.use("emulated"):
        devices.emulated().configure(shared_bytes=99 * 1024, order="priority", multiprocessors=1)
        assert_near(bitfold.linear(x, qtensor), x, w)


@pytest.mark.parametrize("format", ["int4-g64", "q4_k", "q5_1", "mxfp4"])
def test_bf16_beyond_the_range_of_fp16(gpu, format, rng):
    assert_bf16_beyond_the_range_of_fp16(rng, format, 70)


@pytest.mark.parametrize("format", ["int4-g128", "nf4-b64", "int8-channel-sfp32"])
def test_huge_and_tiny_scales(gpu, format, rng):
    """Scales at the ends of fp16 (of fp32), beside one another: nothing overflows or vanishes before the result."""
    n, k, m = 40, 256, 35
    ends = [2.0**15, 6e-8] if "sfp32" not in format else [1e30, 1e-30]
    qtensor, w = make(rng, format, n, k, scales=np.array(ends))
    x = torch.from_numpy(rng.standard_normal((m, k)) * 2.0**-4).to(torch.bfloat16)
    y = bitfold.linear(x, qtensor)
    exact = x.double().numpy() @ w.astype(np.float64).T
    size = np.sqrt((x.double().numpy() ** 2) @ (w.astype(np.float64) ** 2).T)
    assert (np.abs(y.double().numpy() - exact) <= 2.0**-7 * np.maximum(size, np.abs(exact))).all()


@pytest.mark.parametrize("format", ["int4-g64", "int3-g64", "q6_k", "mxfp4"])
def test_views_of_x(gpu, format, rng):
    """x transposed, stepped over and from an odd place has the bits of a contiguous one."""
    n, m, k = 19, 41, 256
    qtensor, _ = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.float16)
    expected = bitfold.linear(x, qtensor)
    shifted = torch.zeros(m * k + 1, dtype=x.dtype)[1:].view(m, k).copy_(x)
    stepped = torch.zeros(2 * m, 3 * k, dtype=x.dtype)[::2, ::3].copy_(x)
    for view in (x.t().contiguous().t(), shifted, stepped):
        assert_same(bitfold.linear(view, qtensor), expected)


@pytest.mark.parametrize("format", ["fp8-e4m3-channel", "fp8-e5m2-channel"])
def test_what_is_no_number_stays_in_its_row(gpu, format, rng):
    """The last row but one ends in a NaN, which lies where the copies of the row before it end."""
    n, k = 20, 40
    planes = random_planes(rng, format, n, k)
    codes = rng.integers(0, 0x78, (n, k)).astype(np.uint8)
    codes[5, 0], codes[9, k - 1] = 0x7F, 0xFF
    qtensor = to_qtensor(planes | {"codes": codes}, format, n, k)
    y = bitfold.linear(torch.ones(34, k, dtype=torch.bfloat16), qtensor)
    assert torch.equal(torch.isnan(y).any(0).nonzero().flatten(), torch.tensor([5, 9]))
