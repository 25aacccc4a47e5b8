"""bitsandbytes' own quantizers (its CPU wheel) beside ours: codes, absmax and nested absmax, bit for bit."""

from __future__ import annotations

import bitfold
import pytest
import torch
from bitfold.activations import llm_int8
from bitfold.foreign.bitsandbytes import EightBitScheme

bnb = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: pip install bitfold[interop]"
)
functional = pytest.importorskip("bitsandbytes.functional")

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FAMILIES = ("nf4", "fp4")


def weights(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * 100003 + k)
    w = torch.randn(n, k, generator=generator) * torch.rand(n, 1, generator=generator).exp()
    w[n // 2] *= 1e-3
    w[0, : k // 2] = 0
    return w.to(dtype)


def theirs(w: torch.Tensor, family: str, block: int, nested: bool):
    return functional.quantize_4bit(w, blocksize=block, quant_type=family, compress_statistics=nested)


def as_planes(codes: torch.Tensor, state, rows: int) -> dict[str, torch.Tensor]:
    """Our planes from their tensors: the same bytes in other shapes."""
    planes = {"codes": codes.reshape(rows, -1), "scales": state.absmax.reshape(rows, -1)}
    if state.nested:
        planes["nested_scales"] = state.state2.absmax
        planes["nested_offset"] = state.offset.reshape(1)
    return planes


def same_bits(ours: torch.Tensor, other: torch.Tensor) -> bool:
    return ours.dtype == other.dtype and torch.equal(
        ours.view(torch.uint8), other.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_absmax(family, block):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, k in [(1, block), (3, 2 * block), (7, 3 * block), (32, 4096)]:
            w = weights(n, k, dtype)
            codes, state = theirs(w, family, block, nested=False)
            ours = bitfold.encode(w, f"{family}-b{block}")
            assert same_bits(ours.planes["codes"], codes.reshape(n, -1)), f"{n}x{k} {dtype}: codes"
            assert same_bits(ours.planes["scales"], state.absmax.reshape(n, -1)), f"{n}x{k} {dtype}: absmax"


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nested_absmax_with_their_offset(family, block):
    """Sizes with one block, with a short last group of 256, and with many thousand blocks."""
    for n, k in [(1, block), (5, 3 * block), (257, block), (1000, 8 * block if block < 512 else block)]:
        w = weights(n, k)
        codes, state = theirs(w, family, block, nested=True)
        ours = bitfold.encode(w, f"{family}-b{block}-dq", nested_offset=state.offset)
        for name, plane in as_planes(codes, state, n).items():
            assert same_bits(ours.planes[name], plane), f"{n}x{k}: {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_our_offset_is_the_mean_that_theirs_is(family):
    w = weights(64, 1024)
    _, state = theirs(w, family, 64, nested=True)
    ours = bitfold.encode(w, f"{family}-b64-dq").planes["nested_offset"]
    assert ours.item() == pytest.approx(state.offset.item(), rel=1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_decode_their_tensors(family, nested):
    for block in (32, 64, 256, 2048):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = weights(6, 2 * block, dtype)
            codes, state = theirs(w, family, block, nested)
            format = f"{family}-b{block}" + ("-dq" if nested else "")
            ours = bitfold.QTensor(format, tuple(w.shape), as_planes(codes, state, 6))
            decoded = functional.dequantize_4bit(codes, state)
            assert decoded.dtype == dtype
            assert torch.equal(ours.decode(dtype), decoded), f"block {block} {dtype}"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_decode_ours(family, nested):
    for n, k in [(6, 128), (33, 1024)]:
        ours = bitfold.encode(weights(n, k), f"{family}-b64" + ("-dq" if nested else ""))
        state = theirs(weights(n, k), family, 64, nested)[1]
        state.absmax = ours.planes["scales"].reshape(-1)
        if nested:
            state.state2.absmax = ours.planes["nested_scales"]
            state.offset = ours.planes["nested_offset"][0]
        decoded = functional.dequantize_4bit(ours.planes["codes"].reshape(-1, 1), state)
        assert torch.equal(decoded, ours.decode())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_straddling_blocks_through_layout_flat(family, nested):
    """k is no multiple of the block: their blocks run over the ends of rows.

    What the codes mean is worked out here: on CPUs with AVX-512, dequantize_4bit of bitsandbytes 0.50.2 takes
    other blocks' scales where k is 96 and the block 64 (75% relative error to the weights that it encoded).
    """
    for n, k, block in [(3, 40, 32), (5, 100, 64), (64, 96, 64), (7, 96, 4096), (130, 100, 32)]:
        w = weights(n, k)
        codes, state = theirs(w, family, block, nested)
        format = f"{family}-b{block}" + ("-dq" if nested else "")
        ours = bitfold.QTensor(format, (n, k), as_planes(codes, state, 1), layout="flat")
        absmax = state.absmax
        if nested:
            absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
        nibbles = torch.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], 1).reshape(-1)[: n * k].long()
        table = functional.get_4bit_type(family, device="cpu")
        decoded = (table[nibbles] * absmax.reshape(-1)[torch.arange(n * k) // block]).reshape(n, k)
        assert torch.equal(ours.decode(), decoded), f"{n}x{k} block {block}"
        assert (decoded - w).norm() < 0.2 * w.norm()
        unpacked = bitfold.pack(**ours.unpack()._asdict(), format=format, layout="flat")
        for name, plane in ours.planes.items():
            assert same_bits(unpacked.planes[name], plane)
        for m in (1, 20):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            expected = x.double() @ decoded.double().T
            y = bitfold.linear(x, ours).double()
            assert (y - expected).norm() <= 5e-6 * expected.norm()
    assert bitfold.plan_linear(format, 1, n, k, layout="flat").regime == "floor"


def test_odd_number_of_straddling_weights():
    """n * k is odd: the last byte holds one code."""
    w = weights(3, 35)
    codes, state = theirs(w, "nf4", 32, nested=False)
    ours = bitfold.QTensor("nf4-b32", (3, 35), as_planes(codes, state, 1), layout="flat")
    flat = functional.dequantize_4bit(codes, theirs(w.reshape(1, -1), "nf4", 32, nested=False)[1])
    assert torch.equal(ours.decode().reshape(-1), flat.reshape(-1)[: 3 * 35])


def test_tables():
    for family in FAMILIES:
        codes = torch.arange(16, dtype=torch.uint8)[None]
        ours = bitfold.pack(codes, torch.ones(1, 1), format=f"{family}-b32").decode()[0]
        assert same_bits(ours, functional.get_4bit_type(family, device="cpu"))
    nested = torch.arange(256, dtype=torch.uint8)[None]
    ours = bitfold.pack(
        torch.full((1, 256 * 32), 15, dtype=torch.uint8),
        nested,
        format="nf4-b32-dq",
        nested_scales=torch.ones(1),
        nested_offset=torch.zeros(1),
    )
    assert torch.equal(ours.decode()[0, ::32], functional.create_dynamic_map())


# ---- LLM.int8() ----


def outliers(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs with values of 30 to 80 in some columns, in some rows of them; all others are below 6."""
    generator = torch.Generator().manual_seed(m * 1009 + k)
    x = torch.randn(m, k, generator=generator).clamp(-5, 5)
    for column in (1, k // 3, k - 2):
        loud = x[:: column % 3 + 1, column]
        loud.copy_(loud.sign() * (30 + 50 * torch.rand(loud.shape, generator=generator)))
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 6.0, 20.0])
def test_outputs_are_those_of_their_int8_layer(threshold, dtype):
    """Linear8bitLt itself, with outliers: what differs is their rounding to 16 bits between the two products, of their
    weights to fp16 in the columns with outliers, and of x to fp16 (bf16 has numbers that aren't fp16's). Their step of
    a row counts what lies below the threshold in columns that another row makes outliers: here that is small."""
    for m, n, k in [(1, 48, 64), (5, 64, 256), (33, 96, 320)]:
        w = weights(n, k, torch.float16)
        layer = bnb.nn.Linear8bitLt(k, n, bias=True, has_fp16_weights=False, threshold=threshold)
        layer.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
        layer.bias.data = torch.linspace(-1, 1, n).to(dtype)
        layer = layer.to("cpu").eval()  # in training it multiplies floats
        x = outliers(m, k, dtype)
        with torch.no_grad():
            theirs = layer(x)
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        codes = layer.state.CB if layer.state.CB is not None else layer.weight.data
        qtensor = EightBitScheme().unpack({"weight": codes, "SCB": scales.float()})
        ours = bitfold.QuantLinear(qtensor, layer.bias.data, llm_int8(threshold))(x)
        assert ours.dtype == theirs.dtype == dtype
        largest = theirs.float().abs().max()
        steps = 2.0 ** (-10 if dtype == torch.float16 else -7)
        assert (ours.float() - theirs.float()).abs().max() <= 2 * steps * largest, (m, n, k)
        plain = x.float() @ qtensor.decode().T + layer.bias.data.float()
        if threshold == 6.0:
            # The outliers are what makes the difference to plain int8.
            rounded = bitfold.QuantLinear(qtensor, layer.bias.data, "int8")(x)
            assert (ours.float() - plain).norm() < 0.5 * (rounded.float() - plain).norm()
