"""The kernel for at most 8 rows of x (csrc/cuda/linear_rows.cu), beyond what test_linear.py asks of every device: every
code in every place, exact sums, the same bits whatever the schedule, the batch and the GPU, and the cuts of long rows.
"""

from __future__ import annotations

import itertools

import bitfold
import devices
import numpy as np
import oracle
import oracle_floats
import pytest
import torch
from cases import DTYPES, block_formats, random_planes, to_qtensor, weights
from test_cuda_tile import make as make_any
from test_cuda_tile import whole

GPUS = [name for name in devices.NAMES if name != "cpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator")

# (format, k): each width of pieces, each way to store scales, zero points, and what goes through masks.
CASES = [
    ("int8-channel", 192),
    ("int8-channel-asym", 384),
    ("int8-g64-asym", 128),
    ("int8-g32-asym-sbf16", 96),
    ("int8-g17-asym", 83),
    ("int4-g128", 256),
    ("int4-g128-asym", 384),
    ("int4-g128-asym", 768),
    ("int4-channel-asym-sbf16", 192),
    ("int4-g64-asym", 128),
    ("int4-g32-asym", 96),
    ("int4-tensor-asym-sfp32", 64),
    ("int4-g33-asym", 83),
    ("int3-g64", 128),
    ("int3-g64-asym", 192),
    ("int3-g64-asym-sfp32", 64),
    ("int3-g20-asym", 83),
    ("int2-g128-asym", 256),
    ("int2-g64-asym", 192),
    ("int2-g16-asym", 77),
    ("nf4-b128", 256),
    ("nf4-b64-dq", 192),
    ("nf4-b64", 64),
    ("nf4-b64", 512),
    ("fp4-b64-dq", 768),
    ("nf4-b32-sfp16", 96),
    ("nf4-b33-dq", 83),
    ("fp4-b64", 128),
    ("fp4-b256-dq", 256),
    ("fp8-e4m3-channel", 128),
    ("fp8-e4m3-b8x128", 256),
    ("fp8-e4m3-b2x64-sfp16", 128),
    ("fp8-e4m3-g32-sfp16", 96),
    ("fp8-e4m3-g17", 50),
    ("fp8-e5m2-channel", 256),
    ("fp8-e5m2-g64", 128),
    ("fp8-e5m2-tensor", 35),
]
INTEGERS = [case for case in CASES if case[0].startswith("int")]


@pytest.fixture(params=GPUS)
def gpu(request):
    with devices.use(request.param, request.node.nodeid):
        yield request.param


def make(rng: np.random.Generator, format: str, n: int, k: int, scales: np.ndarray | None = None):
    """A QTensor of random finite numbers, and the oracle's weights in binary32; scales: to be drawn from these."""
    planes = random_planes(rng, format, n, k)
    if format.startswith("fp8"):
        codes = planes["codes"]
        planes["codes"] = np.where(codes & 0x7F >= 0x7C, codes & 0xFB, codes)
    if scales is not None:
        drawn = rng.choice(scales, planes["scales"].shape).astype(np.float32)
        planes["scales"] = oracle_floats.to_dtype(drawn, oracle.parse(format).scale)
    return to_qtensor(planes, format, n, k), oracle.decode(planes, format, n, k)


def rounded(exact: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(exact.astype(np.float32)).to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("format", "k"), CASES)
def test_every_weight_is_where_its_column_is(gpu, format, k, dtype, rng):
    """x of one 1 picks a column of W. The table of nf4 and fp4 is rounded to fp16, everything else is exact."""
    n = 21
    qtensor, w = make(rng, format, n, k)
    for first in range(0, k, 8):
        x = torch.eye(k, dtype=DTYPES[dtype])[first : first + 8]
        y = bitfold.linear(x, qtensor)
        expected = rounded(w.T[first : first + 8], DTYPES[dtype])
        if format.startswith(("nf4", "fp4")):
            # Half a unit in the last place for the table and for y.
            rtol = 2.0**-11 + torch.finfo(DTYPES[dtype]).eps
            torch.testing.assert_close(y, expected, rtol=rtol, atol=2.0**-24)
        else:
            assert_same(y, expected)


@pytest.mark.parametrize(("format", "k"), INTEGERS)
def test_sums_of_small_whole_numbers_are_exact(gpu, format, k, rng):
    n = 40
    qtensor, w = make(rng, format, n, k, scales=np.array([0.125, 0.25, 0.5, 1.0, -1.0]))
    for m, dtype in itertools.product(range(1, 9), (torch.float16, torch.bfloat16)):
        x = torch.from_numpy(rng.integers(-3, 4, (m, k))).to(dtype)
        bias = torch.from_numpy(rng.integers(-9, 10, n)).to(dtype)
        exact = x.double().numpy() @ w.astype(np.float64).T + bias.double().numpy()
        assert_same(bitfold.linear(x, qtensor, bias), rounded(exact, dtype))


def schedules():
    for seed, (order, delivery, poison) in enumerate(
        [
            ("sequential", "late", 0xFF),
            ("sequential", "early", 0x00),
            ("priority", "late", 0x55),
            ("priority", "early", 0xFF),
            ("priority", "random", 0x00),
            ("priority", "random", 0x7F),
        ]
    ):
        for multiprocessors in (1, 3, 132):
            yield {
                "seed": seed,
                "order": order,
                "delivery": delivery,
                "poison": poison,
                "multiprocessors": multiprocessors,
            }


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's schedule can't be chosen")
@pytest.mark.parametrize(
    ("format", "k"),
    [
        ("int4-g128", 2304),
        ("int3-g64-asym", 1216),
        ("nf4-b64", 2304),
        ("nf4-b64-dq", 1088),
        *((format, 2304) for format in block_formats() if format.endswith("_k")),
        ("int8-g17", 83),
    ],
)
def test_bits_depend_on_no_schedule_and_no_gpu(format, k, rng):
    """Blocks, warps and lanes in any order, copies that come late, more or fewer multiprocessors."""
    n, m = 70, 5
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.bfloat16)
    with devices.use("emulated"):
        results = []
        for schedule in schedules():
            devices.emulated().configure(**schedule)
            results.append(bitfold.linear(x, qtensor))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("format", "k"), [("int4-g64-asym", 1600), ("fp4-b64", 704), ("int2-g33", 99)])
def test_a_row_has_the_same_bits_in_any_batch(gpu, format, k, dtype, rng):
    qtensor, _ = make(rng, format, 35, k)
    x = torch.from_numpy(rng.standard_normal((8, k)) * np.exp(rng.uniform(-9, 9, (8, 1)))).to(DTYPES[dtype])
    together = bitfold.linear(x, qtensor)
    for m in range(1, 8):
        assert_same(bitfold.linear(x[m:], qtensor), together[m:])


@pytest.mark.parametrize("format", ["int4-g128", "nf4-b64", "q4_k", "int8-channel"])
def test_whole_tiles_and_slices_of_them_have_the_same_bits(gpu, format, rng):
    """Of a long row all of x fits into shared memory, and of eight it doesn't."""
    n, k = 40, 256 * 53
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
    x = torch.from_numpy(rng.standard_normal((8, k))).to(torch.float16)
    together = bitfold.linear(x, qtensor)
    for m in (1, 2):
        assert_same(bitfold.linear(x[:m], qtensor), together[:m])


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("format", ["int4-g128-asym", "nf4-b64", "int8-channel", "int4-g48"])
def test_rows_longer_than_shared_memory(gpu, format, m, rng):
    """x of 8 tokens doesn't fit: k is cut into slices, and the tiles of a block wait for them in rounds."""
    n, k = 16 * 21, 128 * 110
    if gpu == "emulated":
        devices.emulated().configure(multiprocessors=2, order="priority", poison=0x55)
    qtensor, w = make(rng, format, n, k)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
        exact = x.double().numpy() @ w.astype(np.float64).T
        y = bitfold.linear(x, qtensor).double().numpy()
        tolerance = 1e-3 if dtype == torch.float16 else 4e-3
        assert np.linalg.norm(y - exact) <= tolerance * np.linalg.norm(exact)


def test_bf16_beyond_the_range_of_fp16(gpu, rng):
    """Each row has a power of two of its own; an infinity, a NaN and zeros stay what they are."""
    n, k = 24, 256
    qtensor, w = make(rng, "int4-g64", n, k)
    x = torch.from_numpy(rng.standard_normal((8, k))).to(torch.bfloat16)
    sizes = torch.tensor([1e30, 1e-30, 1.0, 3e-38, 1e-41, 0.0])
    x[:6] = (x[:6].float() * sizes[:, None]).to(torch.bfloat16)
    x[6, 100], x[7, 200] = float("inf"), float("nan")
    y = bitfold.linear(x, qtensor)
    exact = x[:6].double().numpy() @ w.astype(np.float64).T
    error = np.linalg.norm(y[:6].double().numpy() - exact, axis=1)
    # y of the fifth row is subnormal in bf16: half a unit of 2^-133 for each element.
    assert (error <= 4e-3 * np.linalg.norm(exact, axis=1) + 2.0**-134 * np.sqrt(n)).all()
    infinite = torch.from_numpy(w[:, 100] != 0)
    assert torch.isinf(y[6, infinite]).all()
    assert torch.isnan(y[7]).all()


@pytest.mark.parametrize("format", ["fp8-e4m3-channel", "fp8-e4m3-g17", "fp8-e5m2-channel", "fp8-e5m2-g17"])
def test_what_is_no_number_stays_in_its_row(gpu, format, rng):
    n, k = 32, 128
    for code in (0x7F, 0xFF, 0x7C, 0xFC):
        codes = rng.integers(0, 0x78, (n, k)).astype(np.uint8)
        codes[5, k - 1] = code
        planes = random_planes(rng, format, n, k) | {"codes": codes}
        planes["scales"] = oracle_floats.to_dtype(np.ones(planes["scales"].shape, np.float32), "fp32")
        w = oracle.decode(planes, format, n, k)
        y = bitfold.linear(torch.ones(2, k, dtype=torch.bfloat16), to_qtensor(planes, format, n, k))
        finite = np.isfinite(w).all(axis=1)
        assert torch.isfinite(y[:, torch.from_numpy(finite)]).all()
        expected = w[5].astype(np.float64).sum()
        assert np.array_equal(np.isnan(y[:, 5].float().numpy()), [np.isnan(expected)] * 2)
        assert np.array_equal(np.isinf(y[:, 5].float().numpy()), [np.isinf(expected)] * 2)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(("format", "k"), [("int4-g64", 192), ("nf4-b64", 128), ("int3-g17-asym", 51)])
def test_views(gpu, format, k, dtype, rng):
    """x transposed, stepped over and from an odd place has the bits of a contiguous one."""
    n, m = 19, 3
    qtensor, _ = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(DTYPES[dtype])
    expected = bitfold.linear(x, qtensor)
    shifted = torch.zeros(m * k + 1, dtype=x.dtype)[1:].view(m, k).copy_(x)
    stepped = torch.zeros(2 * m, 3 * k, dtype=x.dtype)[::2, ::3].copy_(x)
    for view in (x.t().contiguous().t(), shifted, stepped):
        assert_same(bitfold.linear(view, qtensor), expected)


@pytest.mark.parametrize("format", block_formats())
def test_every_weight_of_a_block_is_where_its_column_is(gpu, format, rng):
    """Of blocks of any bytes, rows of which begin anywhere in 16 bytes; minima, and what stands for them, are a sum in
    fp32."""
    n, k = 21, whole(format, 832)
    qtensor, w = make_any(rng, format, n, k)
    # What is subtracted is hardly more than the row's largest weight, and rounded in fp32.
    largest = np.abs(w).max(axis=1).astype(np.float64)
    for first in range(0, k, 8):
        y = bitfold.linear(torch.eye(k, dtype=torch.float16)[first : first + 8], qtensor).double().numpy()
        exact = w.T[first : first + 8].astype(np.float64)
        assert (np.abs(y - exact) <= 2.0**-11 * np.abs(exact) + 2.0**-20 * largest + 2.0**-25).all()


@pytest.mark.parametrize("format", block_formats())
def test_blocks(gpu, format, rng):
    """Chunks in turns, rows that end within one, tiles of less than 16 rows; and the same bits in any batch."""
    columns = bitfold.formats.parse(format).group
    for n, k, dtype in (
        (37, 4608 + columns, torch.float16),
        (16, columns, torch.bfloat16),
        (5, 2048, torch.bfloat16),
    ):
        qtensor = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
        w = qtensor.decode(torch.float64).numpy()
        x = torch.from_numpy(rng.standard_normal((8, k))).to(dtype)
        x[4:] = x[4:].abs()  # sums of x are large then, and what is subtracted too
        y = bitfold.linear(x, qtensor)
        exact = x.double().numpy() @ w.T
        tolerance = 1e-3 if dtype == torch.float16 else 4e-3
        for rows in (slice(4), slice(4, 8)):
            error = np.linalg.norm(y[rows].double().numpy() - exact[rows])
            assert error <= tolerance * np.linalg.norm(exact[rows])
        for m in (1, 2, 7):
            assert_same(bitfold.linear(x[:m], qtensor), y[:m])


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's shared memory can't be chosen")
@pytest.mark.parametrize("kilobytes", [163, 99])
@pytest.mark.parametrize(
    "format",
    [
        "int4-g128",
        "int4-g32-asym",
        "int4-g16",
        "nf4-b64",
        "int8-channel",
        "q8_0",
        "q5_0",
        "q5_1",
        "q4_k",
        "q6_k",
    ],
)
def test_less_shared_memory(format, kilobytes, rng):
    """As GPUs before Hopper have: shorter slices of x, narrower pieces where a format has them, or the tile kernel."""
    n, k = 40, 2048
    qtensor = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
    x = torch.from_numpy(rng.standard_normal((8, k))).to(torch.float16)
    exact = x.double().numpy() @ qtensor.decode(torch.float64).numpy().T
    with devices.use("emulated"):
        devices.emulated().configure(shared_bytes=kilobytes * 1024, capability=80)
        y = bitfold.linear(x, qtensor)
    assert np.linalg.norm(y.double().numpy() - exact) <= 1e-3 * np.linalg.norm(exact)
