"""The kernel for more than 32 rows of x on GPUs with wgmma (csrc/cuda/linear_wgmma.hpp).

Beyond what test_linear.py asks of every device: every code in every place, exact sums, the same bits whatever the
schedule, blocks of one and two quarters of 64 rows, k cut over blocks of threads, and little shared memory. More
than 128 rows need a W of so many rows that the plan takes this kernel (test_cuda_plan.py).
"""

from __future__ import annotations

import bitfold
import devices
import numpy as np
import oracle
import oracle_floats
import oracle_gguf
import pytest
import torch
import wgmma_rounding
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
from test_gguf_blocks import tame_blocks

pytestmark = pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator")


@pytest.fixture(params=GPUS)
def gpu(request):
    with devices.use(request.param, request.node.nodeid):
        yield request.param


@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_every_weight_is_where_its_column_is(gpu, format, rng):
    """x of ones and zeros picks columns of W: what is rounded once is rounded as y is."""
    if format in PLANES and wgmma_rounding.roundings(format) == 1 and format.startswith("int"):
        return assert_columns_in_place(rng, format, 70)
    assert_weights_rounded(*make(rng, format, 70, whole(format, 320)))


@pytest.mark.parametrize(
    "format",
    [
        *(f"int{bits}-g{group}-asym" for bits in (8, 4, 2) for group in (32, 64)),
        *("int3-g64", "nf4-b32", "nf4-b64", "nf4-b32-dq", "nf4-b64-dq", "fp4-b64"),
    ],
)
def test_scales_of_128_columns_lie_together(gpu, format, rng):
    """One load brings them, and one their zero points; of the last 256 columns there are 128."""
    assert_weights_rounded(*make(rng, format, 70, 640))


def assert_weights_rounded(
    qtensor: bitfold.QTensor, w: np.ndarray, dtype: torch.dtype = torch.float16
) -> None:
    """Each weight, times one, as near as the kernel promises, and rounded to the type of y."""
    w = w.astype(np.float64)
    k = w.shape[1]
    allowed = wgmma_rounding.errors(qtensor, w).T
    unit, smallest = {torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 2.0**-134)}[dtype]
    for first in range(0, k, 128):
        y = bitfold.linear(torch.eye(k, dtype=dtype)[first : first + 128], qtensor).double().numpy()
        exact, near = w.T[first : first + 128], allowed[first : first + 128]
        assert (np.abs(y - exact) <= near + unit * (np.abs(exact) + near) + smallest).all()


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
    """One multiprocessor takes blocks of many rows: of one and two quarters, and what is left of the last."""
    n, k = 1200, 256
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((260, k))).to(torch.bfloat16)
    with devices.use("emulated"):
        devices.emulated().configure(multiprocessors=1, order="priority")
        together = bitfold.linear(x, qtensor)
        assert_near(together, x, w)
        for m in (40, 100, 129, 192, 200, 257):
            assert_same(bitfold.linear(x[:m], qtensor), together[:m])


@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_at_most_64_rows_of_x(gpu, format, rng):
    """Blocks of 256 rows of W: where waves of smaller ones take longer, as with one multiprocessor."""
    m, n, k = 40, 300 if gpu == "emulated" else 17000, whole(format, 544)
    if gpu == "emulated":
        devices.emulated().configure(multiprocessors=1, order="priority")
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.float16)
    assert_near(bitfold.linear(x, qtensor), x, w)


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
    """As if a block had 132 KB: the fewest stages that there may be."""
    n, k, m = 140, whole(format, 768), 120
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.float16)
    with devices.use("emulated"):
        devices.emulated().configure(shared_bytes=132 * 1024, order="priority", multiprocessors=1)
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


@pytest.mark.parametrize(
    "format",
    [
        "int4-g64-sbf16",
        "int4-g32-asym-sbf16",
        "int8-g32-sfp32",
        "int3-g64-sfp32",
        "int2-g64-sbf16",
        "nf4-b32",
        "fp4-b64",
        "fp8-e4m3-g64",
        "fp8-e5m2-g32",
    ],
)
def test_groups_of_a_row_far_apart(gpu, format, rng):
    """Scales from 2^-20 to 2^20 beside one another, rising, falling and in any order, and some of zero."""
    n, k = 140, 768
    planes = random_planes(rng, format, n, k)
    rows, groups = planes["scales"].shape
    powers = rng.uniform(-20, 20, (rows, groups))
    powers[:40].sort(axis=1)
    powers[40:80] = np.sort(powers[40:80], axis=1)[:, ::-1]
    powers[80:90] = -20
    powers[80:90, -1] = 20
    scales = np.exp2(powers) * rng.choice([-1, 0, 1, 1, 1], (rows, groups))
    if format.startswith("fp8"):
        planes["codes"] = rng.integers(0, 0x7C, (n, k)).astype(np.uint8) & (
            0x77 if "e4m3" in format else 0xFF
        )
    planes["scales"] = oracle_floats.to_dtype(scales.astype(np.float32), oracle.parse(format).scale)
    qtensor, w = to_qtensor(planes, format, n, k), oracle.decode(planes, format, n, k)
    assert_weights_rounded(qtensor, w, torch.bfloat16)
    x = torch.from_numpy(rng.standard_normal((40, k))).to(torch.bfloat16)
    assert_sums_rounded(qtensor, w, x)


@pytest.mark.parametrize("m", [40, 100])
@pytest.mark.parametrize(
    "format", ["int4-g128", "int4-g128-asym", "int4-g32-asym", "int3-g64-asym", "int8-g64-asym", "nf4-b64"]
)
def test_a_large_chunk_among_small_ones(gpu, format, m, rng):
    """The power of two that the second chunk of all rows makes smaller stays so in the chunks behind it, whose scales
    would fit the first one's."""
    n, k = 300, 256 * 7
    if gpu == "emulated":
        devices.emulated().configure(multiprocessors=1)  # k is not cut
    planes = random_planes(rng, format, n, k)
    _, groups = planes["scales"].shape
    scales = np.exp2(rng.uniform(-9, -8, (n, groups)))
    scales.reshape(n, 7, -1)[:, 1] *= 2.0**13
    planes["scales"] = oracle_floats.to_dtype(scales.astype(np.float32), oracle.parse(format).scale)
    qtensor, w = to_qtensor(planes, format, n, k), oracle.decode(planes, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.bfloat16)
    assert_sums_rounded(qtensor, w, x)


@pytest.mark.parametrize("format", BLOCKS)
def test_blocks_of_a_row_far_apart(gpu, format, rng):
    """The same of blocks, whose numbers of 16 bits go from 2^-20 to 2^9."""
    layout = oracle_gguf.LAYOUTS[format]
    n, count = 140, 768 // layout.values
    blocks = tame_blocks(rng, format, n, count).reshape(n, count, layout.bytes)
    powers = rng.uniform(-20, 9, (n, count))
    powers[:40].sort(axis=1)
    powers[40:80] = np.sort(powers[40:80], axis=1)[:, ::-1]
    for at in layout.halves:
        half = (np.exp2(powers) * rng.choice([-1, 0, 1, 1, 1], (n, count))).astype(np.float16)
        blocks[:, :, at : at + 2] = half.view(np.uint8).reshape(n, count, 2)
    if not layout.halves:
        blocks[:, :, 0] = 127 + powers.astype(int)
    blocks = blocks.reshape(n, -1)
    w = oracle_gguf.decode(blocks, format)
    qtensor = bitfold.QTensor(format, w.shape, {"blocks": torch.from_numpy(blocks)})
    assert_weights_rounded(qtensor, w, torch.bfloat16)
    x = torch.from_numpy(rng.standard_normal((40, w.shape[1]))).to(torch.bfloat16)
    assert_sums_rounded(qtensor, w, x)


def assert_sums_rounded(qtensor: bitfold.QTensor, w: np.ndarray, x: torch.Tensor) -> None:
    """Sums of rounded weights, which are as near as all of them together; of fp32, 2^-20 of what is summed."""
    w, x = w.astype(np.float64), x.double()
    y = bitfold.linear(x.to(torch.bfloat16), qtensor).double().numpy()
    exact, size = x.numpy() @ w.T, np.abs(x.numpy())
    near = size @ (wgmma_rounding.errors(qtensor, w) + 2.0**-20 * np.abs(w)).T
    assert (np.abs(y - exact) <= near + 2.0**-8 * (np.abs(exact) + near) + 2.0**-134).all()


@pytest.mark.parametrize(
    "format", ["int4-g64-sfp32", "int8-g32-asym-sbf16", "nf4-b64", "q4_0", "q8_0", "q4_k", "q6_k"]
)
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_scales_that_are_no_numbers(gpu, format, number, rng):
    """Infinities and NaNs among scales: sums of their rows are no numbers, and others what they were."""
    n, k, wrong = 130, 1024, [3, 70, 129]
    qtensor, w = make(rng, format, n, k)
    planes = {name: plane.clone() for name, plane in qtensor.planes.items()}
    if format in BLOCKS:
        layout = oracle_gguf.LAYOUTS[format]
        blocks = planes["blocks"].numpy().reshape(n, -1, layout.bytes)
        half = np.array([number], np.float16).view(np.uint8)
        for row, block in zip(wrong, (0, 1, k // layout.values - 1), strict=True):
            blocks[row, block, layout.halves[0] : layout.halves[0] + 2] = half
    else:
        for row, group in zip(wrong, (0, 5, planes["scales"].shape[1] - 1), strict=True):
            planes["scales"][row, group] = number
    x = torch.from_numpy(rng.standard_normal((40, k))).to(torch.bfloat16)
    y = bitfold.linear(x, bitfold.QTensor(format, (n, k), planes))
    assert not y[:, wrong].isfinite().any()
    others = np.delete(np.arange(n), wrong)
    assert_same(y[:, others], bitfold.linear(x, qtensor)[:, others])
    assert_near(y[:, others], x, w[others])


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
