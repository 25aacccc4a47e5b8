"""The kernel for 9 to 128 rows of x (csrc/cuda/linear_tile.cu); GPUs with wgmma have others for them
(test_cuda_few.py, test_cuda_wgmma.py), so the emulator is one without.

Beyond what test_linear.py asks of every device: every code in every place, exact sums, the same bits whatever the
schedule, k cut over blocks of threads, and GPUs with less shared memory.
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
from cases import DTYPES, block_formats, random_planes, to_qtensor
from test_gguf_blocks import tame_blocks

GPUS = [name for name in devices.NAMES if name != "cpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator")

PLANES = [
    "int8-channel",
    "int8-g32-asym",
    "int4-g128",
    "int4-g32-asym",
    "int4-channel-asym-sbf16",
    "int4-tensor-sfp32",
    "int3-g64-asym",
    "int2-g64",
    "int2-g128-asym",
    "nf4-b64-dq",
    "nf4-b32",
    "fp4-b64",
    "fp8-e4m3-channel",
    "fp8-e4m3-b32x128",
    "fp8-e5m2-b4x64-sbf16",
    "fp8-e5m2-g96",
]
BLOCKS = block_formats()
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


WITHOUT_WGMMA = {"capability": 80}


@pytest.fixture(params=GPUS)
def gpu(request):
    with devices.use(request.param, request.node.nodeid):
        if request.param == "emulated":
            devices.emulated().configure(**devices.schedule(request.node.nodeid), **WITHOUT_WGMMA)
        yield request.param


def has_wgmma(gpu: str) -> bool:
    """Whether more than 32 rows are another kernel's, whose weights are rounded (test_cuda_wgmma.py)."""
    return gpu == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def make(rng: np.random.Generator, format: str, n: int, k: int, scales: np.ndarray | None = None):
    """A QTensor with every code, and the oracle's weights in binary32; scales: to be drawn from these."""
    if format in BLOCKS:
        blocks = tame_blocks(rng, format, n, k // oracle_gguf.LAYOUTS[format].values)
        return bitfold.QTensor(format, (n, k), {"blocks": torch.from_numpy(blocks)}), oracle_gguf.decode(
            blocks, format
        )
    planes = random_planes(rng, format, n, k)
    if format.startswith("fp8"):  # of a size that sums of fp16 can have
        planes["codes"] &= 0xBF
    if scales is not None:
        drawn = rng.choice(scales, planes["scales"].shape).astype(np.float32)
        planes["scales"] = oracle_floats.to_dtype(drawn, oracle.parse(format).scale)
    return to_qtensor(planes, format, n, k), oracle.decode(planes, format, n, k)


def whole(format: str, k: int) -> int:
    """The columns nearest below k that the format can have."""
    values = oracle_gguf.LAYOUTS[format].values if format in BLOCKS else 1
    return max(k // values, 1) * values


def rounded(exact: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(exact.astype(np.float32)).to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_near(y: torch.Tensor, x: torch.Tensor, w: np.ndarray, bias: torch.Tensor | None = None) -> None:
    """Norm of the error against the norm of the result; of its expected size where cancellation left less."""
    exact = oracle.linear(x.double().numpy(), w, None if bias is None else bias.double().numpy())
    expected = np.sqrt(oracle.linear(x.double().numpy() ** 2, w.astype(np.float64) ** 2))
    error = np.linalg.norm(y.double().numpy() - exact)
    assert error <= TOLERANCE[y.dtype] * max(np.linalg.norm(exact), np.linalg.norm(expected))


def assert_columns_in_place(rng: np.random.Generator, format: str, n: int, rows: int = 128) -> None:
    """x of ones and zeros picks columns of W: exact but for rounding (twice where a type has minima, or a table)."""
    k = whole(format, 320)
    qtensor, w = make(rng, format, n, k)
    for first in range(0, k, rows):
        x = torch.eye(k, dtype=torch.float16)[first : first + rows]
        expected = rounded(w.T[first : first + rows], torch.float16)
        y = bitfold.linear(x, qtensor)
        if format in BLOCKS or format.startswith(("nf4", "fp4")):
            torch.testing.assert_close(y, expected, rtol=2.0**-10, atol=2.0**-20)
        else:
            assert_same(y, expected)


def assert_whole_sums_exact(rng: np.random.Generator, format: str, n: int, batches: tuple) -> None:
    """Sums of small whole numbers, for batches of (rows of x, its dtype)."""
    k = 416
    qtensor, w = make(rng, format, n, k, scales=np.array([0.125, 0.25, 0.5, 1.0, -1.0]))
    for m, dtype in batches:
        x = torch.from_numpy(rng.integers(-3, 4, (m, k))).to(dtype)
        bias = torch.from_numpy(rng.integers(-9, 10, n)).to(dtype)
        exact = x.double().numpy() @ w.astype(np.float64).T + bias.double().numpy()
        assert_same(bitfold.linear(x, qtensor, bias), rounded(exact, dtype))


def assert_same_on_every_schedule(rng: np.random.Generator, format: str, m: int, **gpu: int) -> None:
    """Blocks, warps and lanes in any order, copies late or early; k over several blocks on many multiprocessors."""
    n, k = 140, 1024
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.bfloat16)
    with devices.use("emulated"):
        for multiprocessors in (1, 132):
            results = []
            for schedule in schedules():
                devices.emulated().configure(multiprocessors=multiprocessors, **schedule, **gpu)
                results.append(bitfold.linear(x, qtensor))
            assert_near(results[0], x, w)
            for result in results[1:]:
                assert_same(result, results[0])


def assert_bf16_beyond_the_range_of_fp16(rng: np.random.Generator, format: str, m: int) -> None:
    """Each row has a power of two of its own; an infinity, a NaN and zeros stay what they are, and in their rows."""
    n, k = 24, 256
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.bfloat16)
    sizes = torch.tensor([1e30, 1e-30, 1.0, 3e-38, 1e34, 1e-20, 1e10, 2.0, 0.0])
    x[:9] = (x[:9].float() * sizes[:, None]).to(torch.bfloat16)
    x[9, 100], x[m - 2, 200] = float("inf"), float("nan")
    y = bitfold.linear(x, qtensor)
    exact = x[:9].double().numpy() @ w.astype(np.float64).T
    error = np.linalg.norm(y[:9].double().numpy() - exact, axis=1)
    assert (error <= 4e-3 * np.linalg.norm(exact, axis=1) + 2.0**-134 * np.sqrt(n)).all()
    assert not torch.isfinite(y[9]).any()
    assert torch.isnan(y[m - 2]).all()
    for there in (slice(10, m - 2), slice(m - 1, m)):
        assert_near(y[there], x[there], w)


@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_every_weight_is_where_its_column_is(gpu, format, rng):
    assert_columns_in_place(rng, format, 21, rows=32 if has_wgmma(gpu) else 128)


@pytest.mark.parametrize("format", [format for format in PLANES if format.startswith("int")])
def test_sums_of_small_whole_numbers_are_exact(gpu, format, rng):
    half, bf16 = torch.float16, torch.bfloat16
    assert_whole_sums_exact(rng, format, 150, ((9, half), (17, bf16), (33, half), (80, bf16)))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("format", [*PLANES, *BLOCKS])
def test_accuracy(gpu, format, dtype, rng):
    """Ragged rows, columns and tokens, k that ends within a chunk or in one short of the pipeline."""
    shapes = [(16, 1, 33), (9, 130, 288), (31, 128, 1056), (64, 40, 96), (72, 33, 544), (128, 129, 256)]
    shapes += [(1, 35, 800), (8, 128, 512)] if format in BLOCKS else []
    for m, n, k in shapes:
        qtensor, w = make(rng, format, n, whole(format, k))
        x = torch.from_numpy(rng.standard_normal((m, w.shape[1]))).to(DTYPES[dtype])
        bias = torch.from_numpy(rng.standard_normal(n)).to(DTYPES[dtype]) if m % 2 else None
        assert_near(bitfold.linear(x, qtensor, bias), x, w, bias)


def schedules():
    orders = ("sequential", "priority", "priority", "priority")
    deliveries = ("late", "early", "late", "random")
    for seed, (order, delivery, poison) in enumerate(
        zip(orders, deliveries, (0xFF, 0x00, 0x55, 0x7F), strict=True)
    ):
        yield {"seed": seed, "order": order, "delivery": delivery, "poison": poison}


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's schedule can't be chosen")
@pytest.mark.parametrize("m", [9, 80])
@pytest.mark.parametrize(
    "format", ["int4-g128-asym", "nf4-b64-dq", "int8-g32", "q2_k", "q4_k", "q6_k", "mxfp4"]
)
def test_bits_depend_on_no_schedule(format, m, rng):
    assert_same_on_every_schedule(rng, format, m, **WITHOUT_WGMMA)


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU's shared memory can't be chosen")
@pytest.mark.parametrize("m", [16, 32, 64, 128])
@pytest.mark.parametrize("format", ["int4-g128", "nf4-b64", "q4_k", "q6_k", "q8_0"])
def test_less_shared_memory(format, m, rng):
    """GPUs with 99 KB for a block: fewer tokens for each, and so more blocks for the same rows."""
    n, k = 140, 768
    qtensor, w = make(rng, format, n, k)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(torch.float16)
    with devices.use("emulated"):
        devices.emulated().configure(shared_bytes=99 * 1024, order="priority", **WITHOUT_WGMMA)
        assert_near(bitfold.linear(x, qtensor), x, w)


@pytest.mark.parametrize("format", BLOCKS)
def test_few_rows_have_the_same_bits_in_any_batch(gpu, format, rng):
    k = whole(format, 768)
    qtensor, _ = make(rng, format, 35, k)
    x = torch.from_numpy(rng.standard_normal((8, k)) * np.exp(rng.uniform(-9, 9, (8, 1)))).to(torch.bfloat16)
    together = bitfold.linear(x, qtensor)
    for m in (1, 3, 7):
        assert_same(bitfold.linear(x[m:], qtensor), together[m:])


@pytest.mark.parametrize("format", ["int4-g64", "q4_k", "q5_1", "mxfp4"])
def test_bf16_beyond_the_range_of_fp16(gpu, format, rng):
    assert_bf16_beyond_the_range_of_fp16(rng, format, 16)


@pytest.mark.parametrize("m", [12, 40])
@pytest.mark.parametrize("first", [0, 1], ids=["aligned", "not aligned"])
def test_the_largest_number_is_found_wherever_it_lies(gpu, m, first, rng):
    """It would overflow if the row's others chose the power of two."""
    n, k = 24, 6112
    qtensor, w = make(rng, "int4-g32", n, k)
    x = torch.from_numpy(rng.standard_normal((m, k + 1))).to(torch.bfloat16)[:, first : first + k]
    places = [0, 1, 7, 8, 2046, 2049, 4095, k // 2, k - 9, k - 2, k - 1]
    for row, place in enumerate(places):
        x[row, place] = 1e9 if row % 3 else -1e9
    y = bitfold.linear(x, qtensor)
    for row in range(m):
        assert_near(y[row : row + 1], x[row : row + 1], w)


@pytest.mark.parametrize("format", ["int4-g64", "int3-g64", "q6_k", "mxfp4"])
def test_views_of_x(gpu, format, rng):
    """x transposed, stepped over and from an odd place has the bits of a contiguous one."""
    n, m, k = 19, 11, 256
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
    y = bitfold.linear(torch.ones(10, k, dtype=torch.bfloat16), qtensor)
    assert torch.equal(torch.isnan(y).any(0).nonzero().flatten(), torch.tensor([5, 9]))
