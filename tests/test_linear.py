"""linear and its gradient against float64 of the decoded weights: accuracy, determinism, layouts, regimes."""

from __future__ import annotations

import os
import subprocess
import sys

import bitfold
import devices
import numpy as np
import oracle
import oracle_encode
import oracle_floats
import pytest
import torch
from cases import DTYPES, random_planes, refusal, some_formats, to_qtensor, weights

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float64: 1e-12}
BATCHES = (0, 1, 2, 3, 7, 8, 9, 16, 33, 130)
# (n, k) -> batches: every batch once, every ragged edge in every regime
SHAPES = {
    (33, 257): BATCHES,
    (1, 1): (1, 9),
    (5, 7): (2, 33),
    (17, 33): (8, 9),
    (3, 130): (1, 16),
    (130, 96): (3, 130),
}
ROWS_AT_ONCE = 8  # the fused regime's largest batch (docs/architecture.md)


def fused(format: str) -> bool:
    """Whether small batches run fused: groups start at word boundaries (docs/architecture.md)."""
    group = oracle.parse(format).group
    return group <= 0 or group % (32 if format.startswith("fp8") else 16) == 0


def make(rng: np.random.Generator, format: str, n: int, k: int, layout: str = "rows"):
    """A QTensor and its float64 weights from the oracle."""
    if layout == "flat":
        planes = oracle_encode.encode(weights(rng, 1, n * k), format)
    else:
        planes = oracle_encode.encode(weights(rng, n, k), format)
    return to_qtensor(planes, format, n, k, layout), oracle.decode(planes, format, n, k, layout).astype(
        np.float64
    )


def draw(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def exact(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.double().numpy()


def assert_close(
    y: torch.Tensor, x: torch.Tensor, w: np.ndarray, bias: torch.Tensor | None, what: str
) -> None:
    """Norm of the error against the norm of the result; of its expected size where cancellation left less."""
    expected = oracle.linear(exact(x), w, exact(bias))
    assert y.dtype == x.dtype, what
    assert tuple(y.shape) == expected.shape, what
    assert y.is_contiguous(), what
    size = max(np.linalg.norm(expected), np.linalg.norm(np.sqrt(oracle.linear(exact(x) ** 2, w**2))))
    error = np.linalg.norm(exact(y) - expected)
    assert error <= TOLERANCE[x.dtype] * size, f"{what}: relative error {error / size:.3g}"


def multiplied(w: np.ndarray, format: str, x: torch.Tensor) -> np.ndarray:
    """The decoded weights as the plan says that they are multiplied: exact, or rounded to bf16."""
    plan = bitfold.plan_linear(format, x[..., 0].numel(), *w.shape, x.dtype, devices.plan_device())
    return to_bf16(w) if plan.operands == "bfloat16" else w


def to_bf16(w: np.ndarray) -> np.ndarray:
    return oracle_floats.from_dtype(oracle_floats.to_dtype(w, "bf16"), "bf16").astype(np.float64)


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", some_formats())
def test_accuracy(format, dtype, rng):
    for (n, k), batches in SHAPES.items():
        qtensor, w = make(rng, format, n, k)
        for m in batches:
            x = draw(rng, m, k, dtype=dtype)
            bias = draw(rng, n, dtype=dtype) if m % 2 else None
            assert_close(
                bitfold.linear(x, qtensor, bias),
                x,
                multiplied(w, format, x),
                bias,
                f"{format} m={m} n={n} k={k}",
            )


@pytest.mark.isa
@pytest.mark.parametrize("group", ["channel", "g32", "g96", "g544", "g768"])
@pytest.mark.parametrize("family", ["fp8-e4m3", "fp8-e5m2"])
def test_pieces_of_groups_and_ends_of_rows(family, group, rng):
    """Groups that are half a chunk of lanes, more than a piece, or no even part of one; rows that end anywhere in
    them. A row of x has its bits in any batch that is multiplied in registers, and tiles of few rows those of many."""
    for n, k in ((5, 31), (37, 65), (9, 544), (6, 800), (3, 2081)):
        qtensor, w = make(rng, f"{family}-{group}", n, k)
        x = draw(rng, 21, k, dtype=torch.float32)
        for m in (1, 2, 3, 5, 8, 9, 10, 11, 13, 16, 21):
            y = bitfold.linear(x[:m], qtensor)
            assert_close(y, x[:m], w, None, f"{family}-{group} m={m} n={n} k={k}")
            wanted = bitfold.linear(x[:1] if m <= 8 else x, qtensor)
            shared = min(m, len(wanted))
            assert torch.equal(y[:shared], wanted[:shared]), (m, n, k)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_accuracy_of_long_sums(dtype, rng):
    for format in ("int4-g128", "nf4-b64", "fp16"):
        qtensor, w = make(rng, format, 9, 4099)
        for m in (1, 9):
            x = draw(rng, m, 4099, dtype=dtype)
            assert_close(bitfold.linear(x, qtensor), x, multiplied(w, format, x), None, f"{format} m={m}")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", some_formats())
def test_empty_sizes(format):
    for n, k in [(0, 0), (0, 40), (5, 0)]:
        qtensor = bitfold.encode(torch.zeros(n, k), format)
        for m in (0, 1, 9):
            for dtype in DTYPES.values():
                bias = torch.arange(n).to(dtype)
                assert torch.equal(
                    bitfold.linear(torch.ones(m, k, dtype=dtype), qtensor), torch.zeros(m, n).to(dtype)
                )
                y = bitfold.linear(torch.ones(m, k, dtype=dtype), qtensor, bias)
                assert torch.equal(y, bias.expand(m, n))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", some_formats())
def test_strides_and_leading_dimensions(format, dtype, rng):
    n, k = 9, 70
    qtensor, w = make(rng, format, n, k)
    bias = draw(rng, n, dtype=dtype)
    base = draw(rng, 2, 6, 2 * k, dtype=dtype)
    views = {
        "3-d": base[..., :k],
        "every other column": base[..., ::2],
        "transposed": draw(rng, k, 12, dtype=dtype).t(),
        "transposed 3-d": draw(rng, k, 3, 4, dtype=dtype).permute(1, 2, 0),
        "leading dimensions swapped": base[..., :k].transpose(0, 1),
        "one row for all": base[:1, :1, :k].expand(2, 3, k),
        "one number for all": base[:1, :1, :1].expand(1, 5, k),
        "vector": base[0, 0, :k],
        "strided vector": base[0, 0, ::2],
        "4-d": draw(rng, 2, 1, 3, k, dtype=dtype),
        "4-d with a zero": draw(rng, 2, 0, 3, k, dtype=dtype),
        "offset": base[1:, 3:, 5 : 5 + k],
    }
    for name, x in views.items():
        assert_close(bitfold.linear(x, qtensor, bias), x, multiplied(w, format, x), bias, f"{format} {name}")
        same = bitfold.linear(x.contiguous(), qtensor, bias)
        assert torch.equal(bitfold.linear(x, qtensor, bias), same), (
            f"{format} {name}: strides changed the bits"
        )


@pytest.mark.parametrize("format", some_formats())
def test_same_bits_for_any_threads_and_every_run(format, rng, threads):
    qtensor, _ = make(rng, format, 203, 321)
    for dtype, batches in {torch.float32: (1, 8, 67), torch.bfloat16: (3, 9), torch.float64: (2,)}.items():
        bias = draw(rng, 203, dtype=dtype)
        for m in batches:
            x = draw(rng, m, 321, dtype=dtype)
            outputs = []
            for count in (1, 2, 4, 1):
                threads(count)
                outputs.append(bitfold.linear(x, qtensor, bias))
            assert all(torch.equal(outputs[0], other) for other in outputs[1:]), f"{format} m={m} {dtype}"


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("format", [f for f in some_formats() if fused(f)])
def test_fused_rows_do_not_depend_on_each_other(format, rng):
    n, k = 37, 164
    qtensor, _ = make(rng, format, n, k)
    for name, dtype in DTYPES.items():
        x = draw(rng, ROWS_AT_ONCE, k, dtype=dtype)
        alone = torch.cat([bitfold.linear(row[None], qtensor) for row in x])
        for m in (2, 3, 5, 8) if name == "fp32" else (5, 8):
            together = bitfold.linear(x[-m:], qtensor)
            assert torch.equal(together, alone[-m:]), f"{format} {name} m={m}"


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", [f for f in some_formats() if oracle.parse(f).kind == "codebook"])
def test_flat_layout(format, rng):
    for n, k in [(1, 1), (5, 35), (33, 57), (3, 0), (0, 3)]:
        qtensor, w = make(rng, format, n, k, "flat")
        for dtype in DTYPES.values():
            bias = draw(rng, n, dtype=dtype)
            for m in (0, 1, 5, 17):
                x = draw(rng, m, k, dtype=dtype)
                assert_close(bitfold.linear(x, qtensor, bias), x, w, bias, f"{format} flat m={m} n={n} k={k}")


def test_the_plan_names_the_regime():
    for format in some_formats():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for m in (1, 2, ROWS_AT_ONCE):
                expected = "fused" if fused(format) else "tiled"
                assert bitfold.plan_linear(format, m, 64, 256, dtype).regime == expected, format
            for m in (ROWS_AT_ONCE + 1, 64, 1000):
                plan = bitfold.plan_linear(format, m, 64, 256, dtype)
                rounds = dtype == torch.bfloat16 and bitfold._C.isa() == "avx512_bf16"
                assert plan.regime == "tiled", format
                assert plan.operands == ("bfloat16" if rounds else "float32"), format
        for m in (1, 9):
            assert bitfold.plan_linear(format, m, 64, 256, torch.float64).regime == "floor"
    assert bitfold.plan_linear("nf4", 1, 3, 57, layout="flat").regime == "floor"
    assert bitfold.plan_linear("nf4", 9, 3, 57, layout="flat").regime == "floor"
    plan = bitfold.plan_linear("int4", 1, 64, 256)
    assert plan == bitfold.plan_linear("int4-g128", 1, 64, 256)
    assert plan.isa == bitfold._C.isa()
    refusal(lambda: bitfold.plan_linear("int4", 1, 64, 256, device="meta"), "device")
    refusal(lambda: bitfold.plan_linear("int4", 1, 64, 256, torch.int32), "dtype|int32")
    refusal(lambda: bitfold.plan_linear("int4", 1, 64, 256, layout="columns"), "layout", "rows", "flat")
    refusal(lambda: bitfold.plan_linear("int5", 1, 64, 256), "int4")
    refusal(lambda: bitfold.plan_linear("int4", -1, 64, 256), "m")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("format", some_formats())
def test_any_codes(format, rng):
    """Codes that encode never writes. Minifloats' NaN and infinities are left out: they have no norm."""
    if oracle.parse(format).kind in ("cast", "minifloat"):
        return
    for n, k in [(5, 33), (40, 257)]:
        planes = random_planes(rng, format, n, k)
        w = oracle.decode(planes, format, n, k).astype(np.float64)
        qtensor = to_qtensor(planes, format, n, k)
        for m in (1, 8, 9, 20):
            x = draw(rng, m, k, dtype=torch.float32)
            assert_close(
                bitfold.linear(x, qtensor), x, multiplied(w, format, x), None, f"{format} m={m} n={n} k={k}"
            )


@pytest.mark.usefixtures("device")
def test_nan_and_infinity_stay_in_their_row(rng):
    """A bad activation spoils the outputs of its row alone, in every regime."""
    for format in some_formats():
        qtensor, _ = make(rng, format, 20, 70)
        for dtype in DTYPES.values():
            for m in (3, 20):
                x = draw(rng, m, 70, dtype=dtype)
                x[1, 69] = float("nan")
                y = bitfold.linear(x, qtensor)
                finite = torch.isfinite(y).all(dim=1)
                assert not torch.isfinite(y[1]).any(), format
                assert finite[[i for i in range(m) if i != 1]].all(), format


@pytest.mark.usefixtures("device")
def test_padding_bits_and_neighbours_are_not_read_as_weights(rng):
    """Planes inside larger buffers full of NaN and ones give what planes of their own give."""
    for format in some_formats():
        qtensor, _ = make(rng, format, 3, 71)
        planes = {}
        for name, plane in qtensor.planes.items():
            fill = 255 if plane.dtype == torch.uint8 else float("nan")
            buffer = torch.full((plane.numel() + 128,), fill, dtype=plane.dtype)
            planes[name] = buffer[64 : 64 + plane.numel()].view(plane.shape)
            planes[name].copy_(plane)
        inside = bitfold.QTensor(format, (3, 71), planes)
        for m in (1, 9):
            x = draw(rng, m, 71, dtype=torch.float32)
            assert torch.equal(bitfold.linear(x, inside), bitfold.linear(x, qtensor)), format
        assert torch.equal(inside.decode(), qtensor.decode())


# ---- gradient with respect to x ----


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", some_formats())
def test_grad_x_accuracy(format, dtype, rng):
    for n, k in [(1, 1), (17, 33), (3, 130), (130, 96), (0, 5), (5, 0)]:
        qtensor, w = make(rng, format, n, k)
        for m in (0, 1, 9) if n < 20 else (2, 33):
            grad = draw(rng, m, n, dtype=dtype)
            dx = devices.ops().linear_grad_x(grad, list(qtensor.planes.values()), qtensor.format, n, k)
            # A GPU's gradients of more than 8 rows of bf16 are torch's product with a weight of bf16 (docs/cuda.md).
            rounds = devices.plan_device() == "cuda" and m > ROWS_AT_ONCE and dtype == torch.bfloat16
            assert_close(dx, grad, (to_bf16(w) if rounds else w).T, None, f"{format} m={m} n={n} k={k}")


@pytest.mark.parametrize("format", ["nf4-b32-dq", "fp4-b64"])
def test_grad_x_of_strided_and_flat(format, rng, threads):
    qtensor, w = make(rng, format, 9, 35, "flat")
    planes = list(qtensor.planes.values())
    for grad in (draw(rng, 9, 20, dtype=torch.float32).t(), torch.ones(1, 1).expand(4, 9)):
        dx = torch.ops.bitfold.linear_grad_x(grad, planes, format, 9, 35, "flat")
        assert_close(dx, grad, w.T, None, format)
    qtensor, w = make(rng, format, 90, 135)
    grad = draw(rng, 2, 3, 90, dtype=torch.bfloat16)
    outputs = []
    for count in (1, 2, 4):
        threads(count)
        outputs.append(torch.ops.bitfold.linear_grad_x(grad, list(qtensor.planes.values()), format, 90, 135))
        assert torch.equal(outputs[0], outputs[-1])
    assert_close(outputs[0], grad, w.T, None, format)


# ---- memory ----

PEAK = """
import sys
import torch
import os
import subprocess
import sys

import bitfold


def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


n = k = 4096
planes = [torch.zeros(law.shape(n, k), dtype=law.dtype) for law in bitfold.formats.parse(sys.argv[1]).planes]
dtype, layout = getattr(torch, sys.argv[2]), sys.argv[3]
if layout == "flat":
    planes = [plane.reshape(1, -1) if plane.dim() == 2 else plane for plane in planes]
small = bitfold.encode(torch.ones(64, 256), sys.argv[1])
for m in (1, 9):
    bitfold.linear(torch.ones(m, 256, dtype=dtype), small)
    x = torch.ones(m, k, dtype=dtype)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    torch.ops.bitfold.linear(x, planes, sys.argv[1], n, k, None, layout)
    print(peak() - before)
"""


BIG = [
    ("int4-g128", "float32", "rows"),
    ("nf4-b64-dq", "float16", "rows"),
    ("int3-g16-asym", "float64", "rows"),
    ("nf4-b64", "bfloat16", "flat"),
    ("q4_k", "float32", "rows"),
    ("q8_0", "bfloat16", "rows"),
]


@pytest.mark.parametrize(("format", "dtype", "layout"), BIG)
def test_no_decoded_copy_of_the_matrix(format, dtype, layout):
    """The peak of resident memory grows by far less than the smallest decoded copy (32 MiB in 16 bits)."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory can't be reset here")
    command = [sys.executable, "-c", PEAK, format, dtype, layout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown = [int(line) for line in done.stdout.split()]
    assert len(grown) == 2
    assert max(grown) < 8 * 2**20, f"{[size >> 20 for size in grown]} MiB"


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("format", ["fp8-e4m3", "fp8-e5m2"])
def test_a_nan_code_reaches_its_output_alone(format, rng):
    """NaN is 0x7f and 0xff in e4m3 (OCP FP8, table 1), above 0x7c in e5m2; encoding makes none."""
    for code in (0x7F, 0xFF):
        qtensor, _ = make(rng, format, 9, 321)
        qtensor.planes["codes"][4, 320] = code
        for m in (1, 3, 8, 9):
            y = bitfold.linear(torch.zeros(m, 321), qtensor)
            assert y[:, 4].isnan().all()
            assert y.isnan().sum() == m
