"""torch's view of the ops: schemas, fake kernels, compile, gradients, autocast, and the errors of the border."""

from __future__ import annotations

import bitfold
import pytest
import torch
import torch._dynamo
from cases import DTYPES, refusal, some_formats, weights

ops = torch.ops.bitfold
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def quantized(rng, format: str = "int4-g16", n: int = 6, k: int = 40) -> bitfold.QTensor:
    return bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)


def arguments(qtensor: bitfold.QTensor) -> tuple:
    return list(qtensor.planes.values()), qtensor.format, *qtensor.shape


# ---- opcheck ----


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4-g16-asym", "int3-tensor", "nf4-b32", "nf4-b32-dq"])
def test_opcheck(format, rng):
    """Every op, on a format of every set of planes; linear on every dtype."""
    qtensor = quantized(rng, format)
    planes, text, n, k = arguments(qtensor)
    weight = torch.from_numpy(weights(rng, n, k))
    logical = qtensor.unpack()
    nested = [] if logical.nested_scales is None else [logical.nested_scales, logical.nested_offset]
    offset = torch.tensor([0.5]) if nested else None

    def check(op, *args, **options):
        torch.library.opcheck(op, args, options, test_utils=OPCHECKS)

    check(ops.encode.default, weight, text)
    check(ops.encode.default, weight.half().t().contiguous().t(), text, offset, text == "bf16")
    check(ops.pack.default, logical.codes, logical.scales, logical.zeros, text, nested)
    for layout in ("rows", "flat") if qtensor.format.startswith("nf4") else ("rows",):
        if layout == "flat":
            planes = list(bitfold.encode(weight.reshape(1, n * k), text).planes.values())
        check(ops.unpack.default, planes, text, n, k, layout)
        check(ops.decode.default, planes, text, n, k, torch.bfloat16, layout)
        ids = torch.tensor([[1, 0], [5, 5]])
        check(ops.embedding.default, ids, planes, text, n, k, torch.float32, layout)
        grad = torch.randn(3, n, requires_grad=True)
        check(ops.linear_grad_x.default, grad, planes, text, n, k, layout)
        for dtype in FLOATS if layout == "rows" else (torch.float32,):
            x = torch.randn(3, k, dtype=dtype, requires_grad=True)
            bias = torch.randn(n, dtype=dtype, requires_grad=True)
            check(ops.linear.default, x, planes, text, n, k, bias, layout)
    check(ops.linear.default, torch.randn(2, 4, k).transpose(0, 1), planes, text, n, k, None, layout)
    check(ops.linear.default, torch.randn(k), planes, text, n, k, None, layout)


@pytest.mark.parametrize("format", some_formats())
def test_fake_kernels_have_the_real_shapes(format, rng):
    """Shapes, dtypes and strides of every op under FakeTensorMode, for sizes that divide nothing."""
    from torch._subclasses import FakeTensorMode

    for n, k in [(0, 0), (1, 1), (5, 33), (3, 130), (0, 3), (3, 0)]:
        qtensor = quantized(rng, format, n, k)
        planes, text, _, _ = arguments(qtensor)
        logical = qtensor.unpack()
        nested = [] if logical.nested_scales is None else [logical.nested_scales, logical.nested_offset]
        calls = {
            "encode": (ops.encode, torch.zeros(n, k), text),
            "decode": (ops.decode, planes, text, n, k, torch.bfloat16),
            "pack": (ops.pack, logical.codes, logical.scales, logical.zeros, text, nested),
            "unpack": (ops.unpack, planes, text, n, k),
            "linear": (ops.linear, torch.zeros(2, 3, k, dtype=torch.float16), planes, text, n, k),
            "linear_grad_x": (ops.linear_grad_x, torch.zeros(2, 3, n), planes, text, n, k),
            "embedding": (
                ops.embedding,
                torch.zeros(2, 0, dtype=torch.int64),
                planes,
                text,
                n,
                k,
                torch.float64,
            ),
        }
        for name, (op, *args) in calls.items():
            with FakeTensorMode() as mode:
                fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
                fake = op(*fake_args)
            real = op(*args)
            for ours, theirs in zip(
                *(out if isinstance(out, list) else [out] for out in (fake, real)), strict=True
            ):
                assert ours.shape == theirs.shape, f"{name} {format} {n}x{k}"
                assert ours.dtype == theirs.dtype, f"{name} {format} {n}x{k}"
                assert ours.stride() == theirs.stride(), f"{name} {format} {n}x{k}"


# ---- compile ----
#
# A graph's first sizes differ from each other: dynamo takes sizes that are equal there for the same symbol.


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def graphs(counters) -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "format", ["int4-g32", "int3-g16-asym", "nf4-b32-dq", "fp8", "bf16", "int8-tensor-asym"]
)
def test_compiled_linear_compiles_once(format, rng, dynamo):
    qtensor = quantized(rng, format, 24, 72)
    bias = torch.randn(24)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x, bias):
        return torch.relu(bitfold.linear(x * 2, qtensor, bias)) + 1

    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (11, 2, 3, 7, 8, 9, 33, 130):
            x = torch.randn(m, 72)
            assert torch.equal(run(x, bias), torch.relu(bitfold.linear(x * 2, qtensor, bias)) + 1)
    assert graphs(dynamo) == 1


def test_compiled_ops_do_not_specialise_on_the_matrix(rng, dynamo):
    """Matrices of other sizes run through the same graph: the size laws are arithmetic on symbols."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x, weight, ids, n, k):
        planes = ops.encode(weight, "int4-g32-asym")
        y = ops.linear(x, planes, "int4-g32-asym", n, k)
        logical = ops.unpack(planes, "int4-g32-asym", n, k)
        again = ops.pack(logical[0], logical[1], logical[2], "int4-g32-asym", [])
        rows = ops.embedding(ids, again, "int4-g32-asym", n, k, torch.float32)
        return y, ops.decode(again, "int4-g32-asym", n, k, torch.float32), rows

    with torch._dynamo.config.patch(error_on_recompile=True):
        for m, n, k in [(11, 24, 72), (5, 31, 100), (9, 40, 257), (33, 7, 200)]:
            weight = torch.from_numpy(weights(rng, n, k))
            x, ids = torch.randn(m, k), torch.randint(0, n, (m, 2))
            qtensor = bitfold.encode(weight, "int4-g32-asym")
            y, decoded, rows = run(x, weight, ids, n, k)
            assert torch.equal(y, bitfold.linear(x, qtensor))
            assert torch.equal(decoded, qtensor.decode())
            assert torch.equal(rows, bitfold.embedding(ids, qtensor))
    assert graphs(dynamo) == 1


def test_compiled_embedding_and_decode_compile_once(rng, dynamo):
    qtensor = quantized(rng, "nf4-b32", 24, 72)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(ids):
        return bitfold.embedding(ids, qtensor, torch.bfloat16) * 2 + qtensor.decode(torch.bfloat16)[0]

    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, columns in [(5, 7), (4, 5), (7, 2), (3, 3)]:
            ids = torch.randint(0, 24, (rows, columns))
            expected = bitfold.embedding(ids, qtensor, torch.bfloat16) * 2 + qtensor.decode(torch.bfloat16)[0]
            assert torch.equal(run(ids), expected)
    assert graphs(dynamo) == 1


def test_compiled_training_step(rng, dynamo):
    """Forward and backward in one graph each, gradients equal to eager's."""
    qtensor = quantized(rng, "int4-g32", 24, 72)

    def loss(x, bias):
        return bitfold.linear(x, qtensor, bias).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (11, 5, 3):
        grads = []
        for function in (loss, compiled):
            x = torch.linspace(-1, 1, m * 72).reshape(m, 72).requires_grad_()
            bias = torch.ones(24, requires_grad=True)
            function(x, bias).backward()
            grads.append((x.grad, bias.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-6)
    assert graphs(dynamo) == 1


def test_inductor(rng, dynamo):
    qtensor = quantized(rng, "int4-g32", 24, 72)

    @torch.compile(fullgraph=True, dynamic=True)
    def run(x):
        return torch.nn.functional.silu(bitfold.linear(x + 1, qtensor)) * 3

    for m in (11, 3):
        x = torch.randn(m, 72)
        assert torch.allclose(
            run(x), torch.nn.functional.silu(bitfold.linear(x + 1, qtensor)) * 3, rtol=1e-5, atol=1e-5
        )
    assert graphs(dynamo) == 1


def test_export_keeps_the_format_readable(rng):
    qtensor = quantized(rng, "int4-g32", 24, 72)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = torch.nn.Parameter(qtensor.planes["codes"], requires_grad=False)
            self.scales = torch.nn.Parameter(qtensor.planes["scales"], requires_grad=False)

        def forward(self, x):
            return ops.linear(x, [self.codes, self.scales], "int4-g32", 24, 72)

    x = torch.randn(3, 72)
    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
    assert "int4-g32" in program.graph_module.code
    wide = torch.randn(11, 72)
    assert torch.equal(program.module()(wide), bitfold.linear(wide, qtensor))


# ---- gradients ----


@pytest.mark.parametrize("format", some_formats())
def test_gradcheck(format, rng):
    qtensor = quantized(rng, format, 5, 35)
    x = torch.randn(3, 35, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, bias: bitfold.linear(x, qtensor, bias), (x, bias), fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        lambda x, bias: bitfold.linear(x, qtensor, bias), (x, bias), fast_mode=True
    )


@pytest.mark.parametrize("shape", [(35,), (1, 35), (2, 3, 35), (2, 0, 35), (0, 35)])
def test_gradients_for_any_leading_dimensions(shape, rng):
    qtensor = quantized(rng, "int4-g16-asym", 5, 35)
    w = qtensor.decode(torch.float64)
    x, bias = torch.randn(shape, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    grads = []
    for run in (lambda x, b: bitfold.linear(x, qtensor, b), lambda x, b: torch.nn.functional.linear(x, w, b)):
        leaf, offset = x.clone().requires_grad_(), bias.clone().requires_grad_()
        run(leaf, offset).square().sum().backward()
        grads.append((leaf.grad, offset.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_in_low_precision_keep_their_dtype(rng):
    qtensor = quantized(rng, "nf4-b32", 5, 35)
    for dtype in FLOATS:
        x = torch.randn(4, 35, dtype=dtype, requires_grad=True)
        bias = torch.randn(5, dtype=dtype, requires_grad=True)
        y = bitfold.linear(x, qtensor, bias)
        assert y.requires_grad
        y.sum().backward()
        assert x.grad.dtype == bias.grad.dtype == dtype
    assert not bitfold.linear(torch.randn(4, 35), qtensor).requires_grad


def test_only_bias_or_only_x_needs_a_gradient(rng):
    qtensor = quantized(rng, "int8", 5, 35)
    x, bias = torch.randn(4, 35, requires_grad=True), torch.randn(5)
    bitfold.linear(x, qtensor, bias).sum().backward()
    assert torch.allclose(x.grad, qtensor.decode().sum(0).expand(4, 35), rtol=1e-5, atol=1e-5)
    x, bias = torch.randn(4, 35), torch.randn(5, requires_grad=True)
    bitfold.linear(x, qtensor, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((5,), 4.0))


def test_other_ops_do_not_pretend_to_have_gradients(rng):
    """encode takes trainable weights and gives constants."""
    encoded = bitfold.encode(torch.randn(3, 40, requires_grad=True), "int8")
    assert not any(plane.requires_grad for plane in encoded.planes.values())
    assert not encoded.decode().requires_grad


# ---- autocast ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_autocast_is_that_of_linear(dtype, low, with_bias, rng):
    qtensor = quantized(rng, "int4-g16", 5, 35)
    x, weight = torch.randn(4, 35).to(dtype), qtensor.decode(dtype)
    bias = torch.randn(5).to(dtype) if with_bias else None
    with torch.autocast("cpu", dtype=low):
        theirs = torch.nn.functional.linear(x, weight, bias)
        ours = bitfold.linear(x, qtensor, bias)
    assert ours.dtype == theirs.dtype
    cast = torch.float64 if dtype == torch.float64 else low
    assert torch.equal(ours, bitfold.linear(x.to(cast), qtensor, None if bias is None else bias.to(cast)))
    with torch.autocast("cpu", enabled=False):
        assert bitfold.linear(x, qtensor, bias).dtype == dtype


def test_autocast_mixes_dtypes_as_linear_does(rng):
    """A float32 bias beside a bfloat16 x is an error outside of autocast, and cast inside."""
    qtensor = quantized(rng, "int4-g16", 5, 35)
    x, bias = torch.randn(4, 35, dtype=torch.bfloat16), torch.randn(5)
    refusal(lambda: bitfold.linear(x, qtensor, bias), "bias")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bitfold.linear(x, qtensor, bias).dtype == torch.bfloat16


def test_autocast_leaves_planes_alone(rng):
    """fp32 scales stay fp32: autocast must not round them to bfloat16."""
    qtensor = quantized(rng, "nf4-b32", 5, 35)
    x = torch.randn(4, 35)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bitfold.linear(x, qtensor)
        decoded = qtensor.decode()
    assert torch.equal(y, bitfold.linear(x.bfloat16(), qtensor))
    assert decoded.dtype == torch.float32


def test_autocast_backward(rng):
    qtensor = quantized(rng, "int4-g16", 5, 35)
    x = torch.randn(4, 35, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bitfold.linear(x, qtensor, bias)
    y.float().sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    assert torch.allclose(x.grad, qtensor.decode().sum(0).expand(4, 35), rtol=2e-2, atol=2e-2)


# ---- the border: one clean sentence that names the argument ----


def bad_planes(planes: list[torch.Tensor]) -> dict[str, tuple[list[torch.Tensor], str]]:
    """What is wrong -> (planes, a word of the sentence)."""
    codes, scales, zeros = planes
    return {
        "none": ([], "planes"),
        "too few": (planes[:2], "planes"),
        "too many": ([*planes, scales], "planes"),
        "codes of another dtype": ([codes.int(), scales, zeros], "codes"),
        "codes of signed bytes": ([codes.view(torch.int8), scales, zeros], "codes"),
        "scales of another dtype": ([codes, scales.float(), zeros], "scales"),
        "zeros of another dtype": ([codes, scales, zeros.half()], "zeros"),
        "codes too short": ([codes[:, :-1].contiguous(), scales, zeros], "codes"),
        "codes with a row less": ([codes[:-1], scales, zeros], "codes"),
        "codes flattened": ([codes.reshape(-1), scales, zeros], "codes"),
        "scales transposed": ([codes, scales.t().contiguous(), zeros], "scales"),
        "scales of three dimensions": ([codes, scales[None], zeros], "scales"),
        "zeros too long": ([codes, scales, torch.cat([zeros, zeros], 1)], "zeros"),
        "codes not contiguous": ([codes.t().contiguous().t(), scales, zeros], "codes"),
        "scales not contiguous": (
            [codes, torch.cat([scales, scales], 1)[:, : scales.shape[1]], zeros],
            "scales",
        ),
        "planes swapped": ([scales, codes, zeros], "codes"),
        "scales on meta": ([codes, scales.to("meta"), zeros], "scales|device|meta"),
        "all on meta": ([plane.to("meta") for plane in planes], "codes|device|meta"),
    }


WRONG_PLANES = [
    "none", "too few", "too many", "codes of another dtype", "codes of signed bytes", "scales of another dtype",
    "zeros of another dtype", "codes too short", "codes with a row less", "codes flattened", "scales transposed",
    "scales of three dimensions", "zeros too long", "codes not contiguous", "scales not contiguous", "planes swapped",
    "scales on meta", "all on meta",
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG_PLANES)
def test_bad_planes(case, rng):
    text, n, k = "int4-g16-asym", 6, 40
    planes, word = bad_planes(list(quantized(rng, text, n, k).planes.values()))[case]
    calls = {
        "linear": lambda: ops.linear(torch.randn(2, k), planes, text, n, k),
        "linear_grad_x": lambda: ops.linear_grad_x(torch.randn(2, n), planes, text, n, k),
        "embedding": lambda: ops.embedding(torch.tensor([0]), planes, text, n, k, torch.float32),
        "decode": lambda: ops.decode(planes, text, n, k, torch.float32),
        "unpack": lambda: ops.unpack(planes, text, n, k),
    }
    for name, call in calls.items():
        if name in ("decode", "unpack") and case in ("none", "all on meta"):
            continue  # torch finds no kernel without a tensor; tensors all on meta ask for shapes alone
        error = (ValueError, RuntimeError) if "meta" in case else ValueError
        try:
            refusal(call, word, error=error)
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from failure


def test_bad_arguments_of_linear(rng):
    qtensor = quantized(rng, "int4-g16", 6, 40)
    planes, text, n, k = arguments(qtensor)
    x = torch.randn(2, k)

    def linear(x=x, planes=planes, text=text, n=n, k=k, bias=None, layout="rows"):
        return ops.linear(x, planes, text, n, k, bias, layout)

    linear()
    refusal(lambda: linear(x=torch.randn(2, k + 1)), "x", "41", "40")
    refusal(lambda: linear(x=torch.randn(())), "x")
    refusal(lambda: linear(x=torch.ones(2, k, dtype=torch.int64)), "x")
    refusal(lambda: linear(x=torch.ones(2, k, dtype=torch.complex64)), "x")
    refusal(lambda: linear(x=torch.ones(2, k).to(torch.float8_e4m3fn)), "x")
    refusal(lambda: linear(bias=torch.randn(n + 1)), "bias", "7", "6")
    refusal(lambda: linear(bias=torch.randn(n, 1)), "bias")
    refusal(lambda: linear(bias=torch.randn(n).double()), "bias")
    refusal(
        lambda: linear(bias=torch.randn(n, device="meta")),
        "bias|device|meta",
        error=(ValueError, RuntimeError),
    )
    refusal(lambda: linear(text="int4-g32"), "scales")
    refusal(lambda: linear(text="int5"), "int4")
    refusal(lambda: linear(n=-1), "n")
    refusal(lambda: linear(k=-1), r"\bk\b|x")
    refusal(lambda: linear(n=7), "codes|scales")
    refusal(lambda: linear(n=2**62), "codes|n")
    refusal(lambda: linear(layout="columns"), "layout", "rows", "flat")
    refusal(lambda: linear(layout="flat"), "layout", "nf4")


def test_clamp_is_for_casts():
    refusal(lambda: ops.encode(torch.ones(2, 64), "int4", None, True), "clamp", "int4-g128")


def test_bad_arguments_of_other_ops(rng):
    qtensor = quantized(rng, "int4-g16", 6, 40)
    planes, text, n, k = arguments(qtensor)
    refusal(lambda: ops.linear_grad_x(torch.randn(2, k), planes, text, n, k), "grad", "40", "6")
    refusal(lambda: ops.linear_grad_x(torch.ones(2, n, dtype=torch.int32), planes, text, n, k), "grad")
    refusal(lambda: ops.decode(planes, text, n, k, torch.int8), "dtype")
    refusal(lambda: ops.decode(planes, text, n, -1, torch.float32), r"\bk\b")
    refusal(lambda: ops.decode(planes, text, n, k, torch.float32, "columns"), "layout")
    refusal(lambda: ops.encode(torch.ones(2, 2, dtype=torch.complex64), text), "weight")
    refusal(lambda: ops.encode(torch.ones(3), text), "weight")
    refusal(lambda: ops.encode(torch.ones(2, 64), "nf4-b32-dq", torch.ones(2)), "nested_offset")
    refusal(lambda: ops.encode(torch.ones(2, 64), "nf4-b32-dq", torch.ones(1).double()), "nested_offset")
    refusal(
        lambda: ops.encode(torch.ones(2, 64), "nf4-b32-dq", torch.tensor([float("nan")])), "nested_offset"
    )


def test_buffers_that_no_memory_has_room_for():
    """A copy of x as doubles would be of 2 PiB, more than there are addresses."""
    k = 1 << 24
    weight = bitfold.encode(torch.zeros(1, k), "int4-g128")
    x = torch.zeros(1, k, dtype=torch.float64).expand(k, k)
    with pytest.raises(MemoryError, match="no memory for what the op keeps"):
        ops.linear(x, list(weight.planes.values()), "int4-g128", 1, k)


def test_qtensor_checks_its_planes(rng):
    qtensor = quantized(rng, "int4-g16-asym", 6, 40)
    for case in WRONG_PLANES:
        planes, word = bad_planes(list(qtensor.planes.values()))[case]
        if len(planes) != 3 or "contiguous" in case or case == "all on meta":
            continue
        named = dict(zip(qtensor.planes, planes, strict=True))
        refusal(lambda named=named: bitfold.QTensor("int4-g16-asym", (6, 40), named), word)
    for planes in ({}, {"codes": qtensor.planes["codes"]}, {**qtensor.planes, "more": torch.ones(1)}):
        refusal(
            lambda planes=planes: bitfold.QTensor("int4-g16-asym", (6, 40), planes), "plane|scales|more|codes"
        )


def test_ops_do_not_write_to_their_inputs(rng):
    for format in some_formats():
        qtensor = quantized(rng, format)
        before = {name: plane.clone() for name, plane in qtensor.planes.items()}
        for dtype in DTYPES.values():
            x = torch.randn(9, 40, dtype=dtype)
            kept = x.clone()
            bitfold.linear(x, qtensor)
            bitfold.linear(x[:1], qtensor)
            qtensor.decode(dtype)
            assert torch.equal(x, kept)
        qtensor.unpack()
        for name, plane in qtensor.planes.items():
            assert torch.equal(plane.view(torch.uint8), before[name].view(torch.uint8)), f"{format} {name}"
