"""The kernels for GPUs of x rounded to 8 bits, row by row: the bits of the CPU, whose oracle test_rows_int8.py has,
whatever the shape, the stride and the outliers."""

from __future__ import annotations

import bitfold
import devices
import pytest
import torch
from cases import refusal
from torch import Tensor

GPUS = [name for name in devices.NAMES if name != "cpu"]
pytestmark = pytest.mark.skipif(not GPUS, reason="BITFOLD_TEST_DEVICES names no GPU and no emulator")

FORMATS = ("int8-channel", "int8-channel-asym-sbf16", "int8-tensor", "int8-tensor-asym-sfp32")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=GPUS)
def gpu(request):
    """The ops on a GPU, or on the emulator in a schedule of the test's own."""
    with devices.use(request.param, request.node.nodeid):
        yield devices.ops()


def weight(n: int, k: int, format: str) -> list[Tensor]:
    rng = torch.Generator().manual_seed(n * 1000 + k)
    return list(bitfold.encode(torch.randn(n, k, generator=rng), format).planes.values())


def activations(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Numbers that are below 6, but for some columns, and some numbers of their own."""
    rng = torch.Generator().manual_seed(m * 1000 + k)
    x = torch.randn(m, k, generator=rng).clamp(-4, 4)
    x[:, torch.rand(k, generator=rng) < 0.05] *= 12
    x[torch.rand(m, k, generator=rng) < 0.3 / max(m, 1)] *= 12
    return x.to(dtype)


def copied(n: int, k: int) -> tuple[Tensor, Tensor]:
    columns = torch.arange(0, k, 3, dtype=torch.int32)
    return columns, torch.randn(n, len(columns), generator=torch.Generator().manual_seed(k)).bfloat16()


def assert_same(gpu, x: Tensor, planes: list[Tensor], format: str, n: int, *more) -> Tensor:
    arguments = (x, planes, format, n, x.shape[-1], *more)
    y, expected = gpu.linear_int8(*arguments), torch.ops.bitfold.linear_int8(*arguments)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    return y


WAYS = {
    "plain": lambda n, k: (0.0, False),
    "found": lambda n, k: (6.0, False),
    "by row": lambda n, k: (6.0, True),
    "static": lambda n, k: (0.0, False, torch.tensor([0.05])),
    "copied": lambda n, k: (0.0, False, None, *copied(n, k)),
    "found and copied": lambda n, k: (6.0, False, None, *copied(n, k)),
    "by row and copied": lambda n, k: (6.0, True, None, *copied(n, k)),
    "static and copied": lambda n, k: (0.0, False, torch.tensor([0.05]), *copied(n, k)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", FORMATS)
def test_bits(format, way, gpu):
    """One row and many, of few columns and many, whole pieces and none."""
    shapes = [
        (1, 7, 1),
        (2, 33, 67),
        (8, 40, 192),
        (5, 70, 1040),
        (9, 65, 64),
        (33, 20, 336),
        (12, 5, 35),
        (40, 130, 80),
    ]
    for i, (m, n, k) in enumerate(shapes):
        dtype = DTYPES[i % 3]
        bias = torch.linspace(-1, 1, n).to(dtype) if i % 2 else None
        assert_same(gpu, activations(m, k, dtype), weight(n, k, format), format, n, bias, *WAYS[way](n, k))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("way", ["plain", "found", "found and copied"])
def test_columns_cut_over_blocks(way, capability):
    """The last of several blocks adds the sums of all: the CPU's bits whatever it is, and whatever lay in memory."""
    m, n, k = 40, 70, 2064
    planes, x = weight(n, k, "int8-channel-asym-sbf16"), activations(m, k, torch.bfloat16)
    emulator = devices.emulated()
    with devices.use("emulated"):
        for multiprocessors in (1, 2, 132):  # 2, 4 and 5 blocks for a tile; of 11 rows 1, 2 and 5
            for seed, (order, delivery) in enumerate(
                (("sequential", "late"), ("priority", "early"), ("priority", "random"))
            ):
                emulator.configure(
                    multiprocessors=multiprocessors,
                    seed=seed,
                    order=order,
                    delivery=delivery,
                    poison=0xFF,
                    capability=capability,
                )
                for rows in (m, 11):
                    assert_same(
                        torch.ops.bitfold_emulated,
                        x[:rows],
                        planes,
                        "int8-channel-asym-sbf16",
                        n,
                        None,
                        *WAYS[way](n, k),
                    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("way", ["found", "by row and copied"])
def test_more_tokens_than_are_multiplied_at_a_time(way, capability):
    """Four waves of blocks of 128 tokens, or of 256, and the others, few and many."""
    n, k = 20, 80
    planes = weight(n, k, "int8-channel-asym")
    with devices.use("emulated"):
        devices.emulated().configure(multiprocessors=1, order="priority", capability=capability)
        for m, dtype in ((1024, torch.bfloat16), (1030, torch.float32), (1100, torch.float16)):
            x = activations(m, k, dtype)
            bias = torch.linspace(-1, 1, n).to(dtype)
            assert_same(torch.ops.bitfold_emulated, x, planes, "int8-channel-asym", n, bias, *WAYS[way](n, k))


@pytest.mark.slow
def test_more_tokens_than_a_grid_has_blocks_for(gpu):
    """By the kernel for few rows, which has any number of them where columns are no whole pieces."""
    m, k = 65535 * 8 + 1, 4
    assert_same(gpu, torch.randn(m, k), weight(1, k, "int8-channel"), "int8-channel", 1)


@pytest.mark.parametrize("way", ["plain", "found", "by row and copied"])
def test_a_row_that_is_no_number_stays_alone(way, gpu):
    for m, dtype in ((3, torch.bfloat16), (20, torch.bfloat16), (5, torch.float16)):
        n, k = 9, 80
        planes, x = weight(n, k, "int8-channel"), activations(m, k, dtype)
        for bad in (float("nan"), float("inf"), -float("inf")):
            x[m // 2, 17] = bad
            y = assert_same(gpu, x, planes, "int8-channel", n, None, *WAYS[way](n, k))
            assert y.isnan().any(dim=1).tolist() == [j == m // 2 for j in range(m)]


@pytest.mark.parametrize("kilobytes", [99, 145, 163])
def test_little_shared_memory(kilobytes):
    """Fewer warps, and fewer outliers of a tile at hand, or none."""
    m, n, k = 3, 75, 1040
    planes, x = weight(n, k, "int8-channel-asym"), activations(m, k, torch.bfloat16)
    with devices.use("emulated"):
        devices.emulated().configure(shared_bytes=kilobytes * 1024, order="priority", multiprocessors=1)
        for way in ("plain", "found and copied"):
            assert_same(torch.ops.bitfold_emulated, x, planes, "int8-channel-asym", n, None, *WAYS[way](n, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_no_outlier(dtype, gpu):
    """Beside what is one in the same column, and alone there, in a row that is no number anyway."""
    n, k = 9, 96
    planes = weight(n, k, "int8-channel")
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        x = torch.randn(6, k, generator=torch.Generator().manual_seed(k)).clamp(-4, 4)
        x[1, 4:12] = bad
        x[2, 5], x[3, 6], x[0, 7], x[5, 8] = 6.0, -50.0, 5.9, -6.0
        for way in ("found", "by row", "found and copied"):
            y = assert_same(gpu, x.to(dtype), planes, "int8-channel", n, None, *WAYS[way](n, k))
            assert y.isnan().any(dim=1).tolist() == [j == 1 for j in range(6)]


def test_outliers_so_large_that_products_are_no_numbers(gpu):
    """Sums of them are infinite in the definition's order, or nothing, where one rounding would leave a number."""
    for m in (3, 12, 40):
        n, k = 20, 80
        x = activations(m, k, torch.bfloat16)
        x[: m // 2, 3], x[: m // 2, 50] = 2.0**125, -(2.0**125)
        planes = weight(n, k, "int8-channel")
        planes[0][: n // 2, 3] = planes[0][: n // 2, 50] = 200
        y = assert_same(gpu, x, planes, "int8-channel", n, None, *WAYS["found"](n, k))
        assert not y[: m // 2, : n // 2].isfinite().any()
        assert y[m // 2 :].isfinite().all()


def test_rows_of_nothing(gpu):
    """Zeros, and numbers so small that their step would be none."""
    for m in (4, 12):
        x = torch.zeros(m, 96)
        x[1] = torch.linspace(-1, 1, 96) * 2.0**-101
        x[2, 5] = 2.0**-100
        for way in ("plain", "found", "static"):
            assert_same(
                gpu,
                x,
                weight(7, 96, "int8-channel-asym"),
                "int8-channel-asym",
                7,
                None,
                *WAYS[way](7, 96),
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_at_every_place(dtype, gpu):
    """Of four columns that a thread looks at, and of the words that say which are outliers; with and without a copy."""
    n, k = 7, 192
    planes = weight(n, k, "int8-channel-asym")
    for columns in ([0], [1], [2], [3], [4, 6], [29, 31], [32, 35, 190], [0, 1, 2, 3, 188, 189, 190, 191]):
        x = torch.randn(3, k, generator=torch.Generator().manual_seed(columns[0])).clamp(-4, 4)
        x[1, columns] = torch.linspace(-60, -50, len(columns))  # of one row alone
        list_ = torch.tensor(columns, dtype=torch.int32)
        copy = torch.linspace(-1, 1, n * len(columns)).view(n, -1).half()
        for way in (
            (6.0, False),
            (6.0, True),
            (0.0, False, None, list_, copy),
            (6.0, True, None, list_, copy),
        ):
            assert_same(gpu, x.to(dtype), planes, "int8-channel-asym", n, None, *way)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_beyond_a_fixed_step(dtype, gpu):
    """They are as large as a code can be, of their sign; and a step so small that all are."""
    n, k = 6, 96
    planes = weight(n, k, "int8-channel-asym")
    x = torch.linspace(-2, 2, 3 * k).view(3, k)
    x[1, 7], x[1, 8], x[2, 0] = 300.0, -300.0, 1.5
    for step in (1.0, 0.01, 1.5 / 127, 2.0**-60):
        for copies in ((), copied(n, k)):
            more = (0.0, False, torch.tensor([step]), *copies)
            assert_same(gpu, x.to(dtype), planes, "int8-channel-asym", n, None, *more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_of_a_row(dtype, gpu):
    """Its code is 127, whatever 127 over it rounds to, in a row of its own numbers and of their negatives."""
    n, k = 5, 64
    planes = weight(n, k, "int8-channel-asym")
    x = torch.linspace(1, 2, 40 * k).view(40, k)
    x[20:] *= -1
    assert_same(gpu, x.to(dtype), planes, "int8-channel-asym", n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_y(dtype, gpu):
    """Rows of W that are whole fours, and are not, with blocks that have some of theirs; tokens too."""
    m, k = 70, 64
    x = activations(m, k, dtype)
    for n in (4, 128, 132, 252, 255, 130):
        planes = weight(n, k, "int8-channel-asym")
        for bias in (None, torch.linspace(-1, 1, n).to(dtype)):
            for way in ("found", "static and copied"):
                y = assert_same(gpu, x, planes, "int8-channel-asym", n, bias, *WAYS[way](n, k))
                assert y.isfinite().all()


def test_strides_and_leading_dimensions(gpu):
    n, k = 10, 48
    planes, base = weight(n, k, "int8-channel"), activations(12, 2 * k, torch.float16)
    for x in (
        base[:, :k],
        base[:, ::2],
        base[:3, 1 : k + 1],
        base.view(2, 6, 2 * k)[..., k:],
        base[0, :k],
        base.t()[:k].t(),
    ):
        assert_same(gpu, x, planes, "int8-channel", n, None, 6.0)
    assert_same(gpu, base[:1, :k].expand(11, k), planes, "int8-channel", n, None, 6.0)


def test_empty_sizes(gpu):
    for m, n, k in [(0, 5, 64), (3, 0, 64), (3, 5, 0), (11, 5, 0), (0, 0, 0)]:
        for threshold in (0.0, 6.0):
            bias = torch.ones(n)
            assert_same(
                gpu, torch.ones(m, k), weight(n, k, "int8-channel"), "int8-channel", n, bias, threshold
            )


def test_more_columns_than_32_bits_add_up(gpu):
    """Sums of 65536 columns become fp32 one after the other."""
    k = 2 * 65536 + 80
    for m in (2, 9):
        assert_same(
            gpu,
            activations(m, k, torch.bfloat16),
            weight(3, k, "int8-tensor-asym"),
            "int8-tensor-asym",
            3,
        )


def test_what_is_refused(gpu):
    planes = weight(4, 32, "int8-channel")
    message = refusal(
        lambda: gpu.linear_int8(torch.ones(1, 32).double(), planes, "int8-channel", 4, 32), "float64"
    )
    assert "on a GPU" in message


@pytest.mark.skipif("emulated" not in GPUS, reason="a GPU that has trapped runs nothing more")
@pytest.mark.parametrize("wrong", [[3, 2], [32], [-1], [5, 5]])
def test_lists_of_columns_that_are_none_are_trapped(wrong):
    planes = weight(4, 32, "int8-channel")
    columns = torch.tensor(wrong, dtype=torch.int32)
    arguments = (
        planes,
        "int8-channel",
        4,
        32,
        None,
        0.0,
        False,
        None,
        columns,
        torch.ones(4, len(wrong)).half(),
    )
    with devices.use("emulated", str(wrong)), pytest.raises(RuntimeError):
        devices.ops().linear_int8(torch.ones(1, 32), *arguments)
