"""linear_fp8 and round_fp8: the bits of rounding, the product against float64, what torch sees of both."""

from __future__ import annotations

import bitfold
import devices
import numpy as np
import oracle_fp8
import pytest
import torch
from cases import DTYPES, assert_same_bits, refusal, some_formats
from test_linear import TOLERANCE, draw, exact, make, multiplied
from test_ops import FLOATS, OPCHECKS, dynamo, graphs, quantized  # noqa: F401  (a fixture)

BATCHES = (0, 1, 2, 3, 7, 8, 9, 33)
SCALES = (None, 0.01)  # dynamic, and one that saturates
FEW = [
    "fp8-e4m3-channel",
    "fp8-e4m3-tensor",
    "fp8-e4m3-b128x128",
    "fp8-e5m2-g32",
    "int4-g32-asym",
    "nf4-b32-dq",
    "bf16",
]


def scale_tensor(scale: float | None) -> torch.Tensor | None:
    return None if scale is None else torch.tensor(scale)


def run(x, qtensor, bias=None, scale=None):
    planes = list(qtensor.planes.values())
    return devices.ops().linear_fp8(x, planes, qtensor.format, *qtensor.shape, bias, scale_tensor(scale))


def hard_rows(rng: np.random.Generator, k: int) -> torch.Tensor:
    """Rows of ordinary numbers, of very different sizes, of ties, zeros, subnormals, NaN and infinities."""
    x = torch.from_numpy(rng.standard_normal((12, k))).float()
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0.0
    x[3, ::2] = -0.0
    x[4] = torch.from_numpy(np.exp(rng.uniform(-14, 6, k))).float()
    x[5] = torch.arange(k) % 113 / 16  # ties where the scale is a power of 2
    x[5, 0] = 448 / 16
    x[6] *= 1e-41
    x[7] = 1e-45
    x[8, k // 2] = float("nan")
    x[9, 0] = float("inf")
    x[10, -1] = -float("inf")
    x[11, 0], x[11, -1] = float("inf"), float("nan")
    return x


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rounding_is_the_oracles(dtype, scale, rng):
    for k in (1, 2, 15, 16, 33, 257, 2100):
        x = hard_rows(rng, k).to(dtype)
        codes, scales = devices.ops().round_fp8(x, scale_tensor(scale))
        expected, expected_scales = oracle_fp8.round_rows(exact(x), scale)
        assert_same_bits(scales, expected_scales.view(np.uint32), f"scales, k={k}")
        assert_same_bits(codes, expected, f"codes, k={k}")


@pytest.mark.usefixtures("device")
def test_rounding_takes_any_strides_and_dimensions(rng):
    x = draw(rng, 6, 4, 40, dtype=torch.bfloat16)
    for view in (x, x[::2, 1:], x.transpose(0, 1), x[0], x[0, 0], x[:, :, ::3], x[:0], x[..., :0]):
        codes, scales = devices.ops().round_fp8(view)
        dense, dense_scales = devices.ops().round_fp8(view.contiguous())
        assert codes.shape == view.shape
        assert scales.shape == view.shape[:-1]
        assert torch.equal(codes, dense)
        assert torch.equal(scales, dense_scales)


def test_rounding_is_that_of_a_weight(rng):
    """Rows of x become what rows of a weight become in fp8-e4m3-channel."""
    x = draw(rng, 7, 300, dtype=torch.float32)
    codes, scales = torch.ops.bitfold.round_fp8(x)
    planes = bitfold.encode(x, "fp8-e4m3-channel").planes
    assert torch.equal(codes, planes["codes"])
    assert torch.equal(scales[:, None], planes["scales"])


# ---- the product ----


def assert_close(y, x, w, bias, scale, what):
    rounded = oracle_fp8.rounded(exact(x), scale)
    expected = oracle_fp8.linear(exact(x), w, exact(bias), scale)
    assert (y.dtype, tuple(y.shape), y.is_contiguous()) == (x.dtype, expected.shape, True), what
    size = max(np.linalg.norm(expected), np.linalg.norm(np.sqrt(rounded**2 @ (w**2).T)))
    error = np.linalg.norm(exact(y) - expected)
    assert error <= TOLERANCE[x.dtype] * size, f"{what}: relative error {error / size:.3g}"


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", some_formats())
def test_accuracy(format, dtype, rng):
    for n, k in [(33, 257), (1, 1), (130, 96)]:
        qtensor, w = make(rng, format, n, k)
        for m in BATCHES:
            for scale in SCALES:
                x = draw(rng, m, k, dtype=dtype)
                bias = draw(rng, n, dtype=dtype) if m % 2 else None
                what = f"{format} m={m} n={n} k={k} x_scale={scale}"
                decoded = multiplied(w, format, x)
                assert_close(run(x, qtensor, bias, scale), x, decoded, bias, scale, what)


def test_batches_are_cut_where_it_does_not_show(rng):
    """More rows than are rounded at a time."""
    qtensor, w = make(rng, "fp8-e4m3-b128x128", 150, 200)
    x = draw(rng, 1100, 200, dtype=torch.float32)
    y = run(x, qtensor)
    assert_close(y, x, w, None, None, "1100 rows")
    assert torch.equal(y[512:1024], run(x[512:1024], qtensor))


def test_zeros_and_empty_sizes():
    for n, k in [(0, 0), (0, 40), (5, 0), (5, 40)]:
        for format in FEW:
            qtensor = bitfold.encode(torch.ones(n, k), format)
            for m in (0, 1, 9):
                bias = torch.arange(n).float()
                assert torch.equal(run(torch.zeros(m, k), qtensor, bias), bias.expand(m, n))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_and_infinities_stay_in_their_row(dtype, rng):
    qtensor, _w = make(rng, "fp8-e4m3-channel", 40, 64)
    for m in (4, 12):
        x = draw(rng, m, 64, dtype=dtype)
        clean = run(x, qtensor)
        x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
        y = run(x, qtensor)
        assert y[1:4].isnan().all()
        assert torch.equal(y[4:], clean[4:])
        assert torch.equal(y[0], clean[0])
        y = run(x, qtensor, scale=0.01)  # what is beyond the largest number saturates, infinities too
        assert y[1].isnan().all()
        assert y[2:].isfinite().all()
        x[2, 5], x[3, 7] = 1e4, -1e4
        assert torch.equal(y[2:], run(x, qtensor, scale=0.01)[2:])


def test_rows_do_not_depend_on_each_other(rng):
    qtensor, _ = make(rng, "fp8-e4m3-b128x128", 150, 200)
    x = draw(rng, 8, 200, dtype=torch.bfloat16)
    together = run(x, qtensor)
    for j in range(8):
        assert torch.equal(together[j], run(x[j], qtensor))


def test_the_same_bits_for_any_threads(threads, rng):
    for format in FEW:
        qtensor, _ = make(rng, format, 200, 330)
        for m in (1, 8, 70):
            x = draw(rng, m, 330, dtype=torch.bfloat16)
            found = []
            for count in (1, 2, 3):
                threads(count)
                found.append(run(x, qtensor))
            assert all(torch.equal(found[0], other) for other in found)


def test_strides_do_not_change_the_bits(rng):
    qtensor, _ = make(rng, "fp8-e4m3-channel", 40, 64)
    x = draw(rng, 6, 5, 128, dtype=torch.float32)
    for view in (x[..., ::2], x[..., :64].transpose(0, 1), x[0, 0, :64], x[:0, :, :64]):
        assert torch.equal(run(view, qtensor), run(view.contiguous(), qtensor))


def test_saturating_is_what_a_small_scale_does(rng):
    qtensor, _ = make(rng, "fp8-e4m3-channel", 16, 64)
    x = torch.full((1, 64), 7.0)
    assert torch.equal(run(x, qtensor, scale=0.01), run(torch.full((1, 64), 4.48), qtensor, scale=0.01))


# ---- what torch sees ----


@pytest.mark.parametrize("format", FEW)
def test_opcheck(format, rng):
    qtensor = quantized(rng, format)
    planes, (n, k) = list(qtensor.planes.values()), qtensor.shape
    ops = torch.ops.bitfold

    def check(op, *args):
        torch.library.opcheck(op, args, test_utils=OPCHECKS)

    for dtype in FLOATS:
        x = torch.randn(3, k, dtype=dtype, requires_grad=True)
        bias = torch.randn(n, dtype=dtype, requires_grad=True)
        check(ops.linear_fp8.default, x, planes, qtensor.format, n, k, bias)
        check(ops.linear_fp8.default, x, planes, qtensor.format, n, k, None, torch.tensor(0.1))
        check(ops.round_fp8.default, x.detach())
        check(ops.round_fp8.default, x.detach(), torch.tensor([0.1]))
    check(ops.linear_fp8.default, torch.randn(k), planes, qtensor.format, n, k)
    check(ops.linear_fp8.default, torch.randn(2, 4, k).transpose(0, 1), planes, qtensor.format, n, k)


def test_compiles_once(rng, dynamo):  # noqa: F811
    qtensor, _ = make(rng, "fp8-e4m3-b128x128", 24, 72)
    planes, bias = list(qtensor.planes.values()), torch.randn(24)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x):
        y = torch.ops.bitfold.linear_fp8(x * 2, planes, qtensor.format, 24, 72, bias)
        return torch.relu(y) + 1

    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (11, 2, 3, 8, 9, 33):
            x = torch.randn(m, 72)
            assert torch.equal(compiled(x), torch.relu(run(x * 2, qtensor, bias)) + 1)
    assert graphs(dynamo) == 1


@pytest.mark.parametrize("format", FEW)
@pytest.mark.parametrize("shape", [(72,), (3, 72), (2, 3, 72), (2, 0, 72)])
def test_gradients_are_those_of_the_product_without_rounding(format, shape, rng):
    qtensor, w = make(rng, format, 24, 72)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)
    plain_x, plain_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    grad = torch.randn(*shape[:-1], 24, dtype=torch.float64)
    run(x, qtensor, bias).backward(grad)
    (plain_x @ torch.from_numpy(w).t() + plain_bias).backward(grad)
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.grad, plain_bias.grad, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(lambda bias: run(x.detach(), qtensor, bias), (bias,))


def test_only_what_needs_a_gradient_gets_one(rng):
    qtensor, _ = make(rng, "fp8-e4m3-channel", 24, 72)
    x, bias = torch.randn(3, 72), torch.randn(24, requires_grad=True)
    run(x, qtensor, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 3.0))
    x.requires_grad_()
    run(x, qtensor).sum().backward()
    assert x.grad.shape == x.shape
    codes, _ = torch.ops.bitfold.round_fp8(x)
    assert not codes.requires_grad
    _, scales = torch.ops.bitfold.round_fp8(x)
    if scales.requires_grad:
        with pytest.raises(RuntimeError, match="not differentiable"):
            scales.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_is_that_of_linear(dtype, rng):
    qtensor, _ = make(rng, "fp8-e4m3-channel", 24, 72)
    x, bias = torch.randn(3, 72, dtype=dtype), torch.randn(24, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x, qtensor, bias, 0.02)
        assert y.dtype == torch.nn.functional.linear(x, torch.randn(24, 72, dtype=dtype), bias).dtype
    low = x if dtype == torch.float64 else x.bfloat16()
    assert torch.equal(y, run(low, qtensor, bias.to(low.dtype), 0.02))


def test_bad_arguments(rng):
    qtensor, _ = make(rng, "fp8-e4m3-channel", 24, 72)
    planes, x = list(qtensor.planes.values()), torch.randn(3, 72)
    op, rounding = torch.ops.bitfold.linear_fp8, torch.ops.bitfold.round_fp8
    args = (planes, qtensor.format, 24, 72)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        refusal(lambda v=value: op(x, *args, None, torch.tensor(v)), "x_scale", "above 0", error=Exception)
        refusal(lambda v=value: rounding(x, torch.tensor(v)), "x_scale", "above 0", error=Exception)
    refusal(lambda: op(x, *args, None, torch.ones(2)), "x_scale", r"\[2\]", "one float32")
    refusal(lambda: op(x, *args, None, torch.ones((), dtype=torch.float16)), "x_scale", "float16")
    refusal(lambda: op(x[:, 1:], *args), "x has shape", "k = 72")
    refusal(lambda: op(x.int(), *args), "x is int32")
    refusal(lambda: op(x, *args, torch.ones(24).half()), "bias is float16", "float32")
    refusal(lambda: op(x, *args, torch.ones(23)), "bias has shape", "24")
    refusal(lambda: op(x, planes[:1], *args[1:]), "planes has 1")
    refusal(lambda: op(x, [], *args[1:]), "planes is empty")
    refusal(lambda: rounding(torch.tensor(1.0)), "no dimensions")
    blocks = list(bitfold.encode(torch.ones(2, 256), "q4_k").planes.values())
    refusal(lambda: op(torch.ones(1, 256), blocks, "q4_k", 2, 256), "q4_k", "with planes")


# ---- a GPU: the kernel that rounds, and torch's product ----


@pytest.mark.parametrize("name", [name for name in devices.NAMES if name != "cpu"])
@pytest.mark.parametrize("format", ["fp8-e4m3-channel", "fp8-e4m3-tensor"])
def test_the_product_on_a_gpu(name, format, rng):
    with devices.use(name, f"{name} {format}"):
        qtensor, w = make(rng, format, 48, 64)
        for shape in [(64,), (1, 64), (5, 64), (2, 3, 64), (0, 64)]:
            for scale in SCALES:
                x = draw(rng, *shape, dtype=torch.bfloat16)
                bias = draw(rng, 48, dtype=torch.bfloat16)
                y = run(x, qtensor, bias, scale)
                assert y.shape == (*shape[:-1], 48)
                rows = x.reshape(-1, 64)
                assert_close(y.reshape(-1, 48), rows, w, bias, scale, f"{format} {shape}")


@pytest.mark.skipif("emulated" not in devices.NAMES, reason="BITFOLD_TEST_DEVICES names no emulator")
@pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")
def test_a_failure_of_torchs_product_is_told_in_its_words(rng):
    """Which torch gives away from 2.13 on."""

    def broken(*args, **kwargs):
        raise RuntimeError("this product is broken")

    with devices.use("emulated", "broken"), torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_mm", broken, "CPU")
        qtensor, _ = make(rng, "fp8-e4m3-channel", 48, 64)
        with pytest.raises(RuntimeError, match=r"^torch's aten::_scaled_mm failed") as found:
            run(torch.ones(2, 64, dtype=torch.bfloat16), qtensor)
    told = torch.__version__ >= torch.torch_version.TorchVersion("2.13")
    assert ("this product is broken" in str(found.value)) == told


@pytest.mark.parametrize("name", [name for name in devices.NAMES if name != "cpu"])
def test_a_gpu_refuses_what_torch_has_no_product_for(name, rng):
    with devices.use(name, name):
        x = torch.ones(2, 64, dtype=torch.bfloat16)
        for format in (
            "fp8-e4m3-b128x128",
            "fp8-e4m3-g32",
            "fp8-e5m2-channel",
            "fp8-e4m3-channel-sfp16",
            "int8",
        ):
            qtensor, _ = make(rng, format, 48, 64)
            refusal(lambda q=qtensor: run(x, q), f"format is '{qtensor.format}'", "fp8-e4m3-channel")
        qtensor, _ = make(rng, "fp8-e4m3-channel", 48, 64)
        refusal(lambda: run(x.float(), qtensor), "x is float32", "bfloat16")
        qtensor, _ = make(rng, "fp8-e4m3-channel", 40, 64)
        refusal(lambda: run(x, qtensor), "40 x 64", "multiples of 16")
