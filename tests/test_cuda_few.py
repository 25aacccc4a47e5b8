"""The kernel for 9 to 32 rows of x on GPUs with wgmma (csrc/cuda/linear_few.hpp).

Beyond what test_linear.py asks of every device: every code in every place, exact sums, the same bits whatever the
schedule, k cut over blocks of threads, rows that begin at odd places, and less shared memory.
"""

from __future__ import annotations

import re

import bitfold
import devices
import numpy as np
import pytest
import torch
from cases import DTYPES
from test_cuda_tile import (
    BLOCKS,
    GPUS,
    PLANES,
    assert_bf16_beyond_the_range_of_fp16,
    assert_columns_in_place,
    assert_near,
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


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_every_weight_is_where_its_column_is(gpu, format, rows, rng):
    assert_columns_in_place(rng, format, 21, rows=rows)


@pytest.mark.parametrize("format", [format for format in PLANES if format.startswith("int")])
def test_sums_of_small_whole_numbers_are_exact(gpu, format, rng):
    half, bf16 = torch.float16, torch.bfloat16
    assert_whole_sums_exact(rng, format, 300, ((9, half), (17, bf16), (32, half)))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_accuracy(gpu, format, dtype, rng):
    """Ragged rows, columns and tokens, k that ends within a stage or in one short of the pipeline."""
    for m, n, k in (
        (9, 1, 33),
        (16, 130, 288),
        (17, 256, 1056),
        (32, 40, 96),
        (24, 257, 544),
        (10, 300, 2048),
    ):
        qtensor, w = make(rng, format, n, whole(format, k))
        x = torch.from_numpy(rng.standard_normal((m, w.shape[1]))).to(DTYPES[dtype])
        bias = torch.from_numpy(rng.standard_normal(n)).to(DTYPES[dtype]) if m % 2 else None
        assert_near(bitfold.linear(x, qtensor, bias), x, w, bias)


@pytest.mark.parametrize(
    "format",
    [
        *("int4-g32-sbf16", "int4-g32-asym", "int4-g32-sfp32", "int4-g64-sbf16", "int4-g64-asym-sbf16"),
        *("int4-g64-asym-sfp32", "int4-g128-sbf16", "int4-g128-asym-sbf16", "int4-g128-asym-sfp32"),
        *("int8-g64-asym", "int8-channel-asym-sbf16", "int8-g32-sfp32"),
        *("int3-g64-sbf16", "int3-g128-asym", "int2-g64-asym-sbf16", "int2-g64-asym-sfp32"),
        *("nf4-b32-dq", "nf4-b64-sbf16", "nf4-b128-dq", "nf4-b128-sfp16"),
        *("fp8-e4m3-g64-sfp16", "fp8-e4m3-b512x128", "fp8-e5m2-b256x64"),
    ],
)
def test_scales_however_they_are_stored(gpu, format, rng):
    """Every loop of the kernel: groups of 32, 64 and more columns, in every dtype, with zero points and without,
    nested, of many rows; where those of 128 columns lie together, and where they don't."""
    group = 1 if "channel" in format else int(re.search(r"[gbx](\d+)(-|$)", format)[1])
    for m, n, k in ((16, 600, 768), (27, 300, 768 - max(group, 32))):
        qtensor, w = make(rng, format, n, k)
        x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.float16)
        assert_near(bitfold.linear(x, qtensor), x, w)


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's schedule can't be chosen")
@pytest.mark.parametrize("m", [12, 30])
@pytest.mark.parametrize(
    "format", ["int4-g128-asym", "nf4-b64-dq", "int8-g32", "q2_k", "q4_k", "q6_k", "mxfp4"]
)
def test_bits_depend_on_no_schedule(format, m, rng):
    assert_same_on_every_schedule(rng, format, m)


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's shared memory can't be chosen")
@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_two_stages(format, rng):
    """As if a block had 192 KB: few stages for all formats, which are filled and emptied again and again."""
    n, k, m = 140, whole(format, 1536), 20
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.float16)
    with devices.use("emulated"):
        devices.emulated().configure(shared_bytes=192 * 1024, order="priority", multiprocessors=1)
        assert_near(bitfold.linear(x, qtensor), x, w)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "format", ["int8-channel", "int4-g128-asym", "int4-g32", "int3-g64-asym", "int2-g64"]
)
def test_an_infinity_stays_what_it_is(gpu, format, dtype, rng):
    n, k = 40, whole(format, 512)
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((12, k))).to(DTYPES[dtype])
    x[5, 77] = -torch.inf
    x[9, 300] = torch.nan
    y = bitfold.linear(x, qtensor)
    none = torch.from_numpy(w[:, 77] == 0)
    assert torch.isnan(y[9]).all()
    assert torch.isnan(y[5, none]).all()
    sign = torch.from_numpy(np.sign(w[:, 77]))[~none]
    assert torch.equal(y[5, ~none].double(), -torch.inf * sign)
    others = [row for row in range(12) if row not in (5, 9)]
    assert_near(y[others], x[others], w)


@pytest.mark.parametrize("format", ["int4-g64", "q4_k", "q5_1", "mxfp4"])
def test_bf16_beyond_the_range_of_fp16(gpu, format, rng):
    assert_bf16_beyond_the_range_of_fp16(rng, format, 32)
