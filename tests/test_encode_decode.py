"""Encode, decode, pack and unpack against the oracle: every bit of every plane, for every format of the table."""

from __future__ import annotations

import re
from itertools import product

import bitfold
import numpy as np
import oracle
import oracle_encode
import oracle_floats
import pytest
import torch
from cases import (
    DTYPES,
    assert_planes,
    assert_same_bits,
    bits,
    every_format,
    oracle_planes,
    random_planes,
    refusal,
    some_formats,
    tensor_of,
    to_qtensor,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st

SHAPES = [(0, 0), (0, 5), (3, 0), (1, 1), (1, 7), (2, 8), (3, 31), (2, 33), (5, 64), (3, 130), (2, 257)]
NESTED_SHAPES = [*SHAPES, (1, 256 * 32), (7, 257 * 8), (4, 9000)]


def encode_both(w: torch.Tensor, format: str, what: str, **options) -> bitfold.QTensor:
    """bitfold's planes, asserted equal to the oracle's."""
    encoded = bitfold.encode(w, format, **options)
    as_numpy = w.double().numpy() if w.dtype == torch.float64 else w.float().numpy()
    assert_planes(encoded, oracle_encode.encode(as_numpy, format, **options), what)
    return encoded


def decoded_bits(planes: dict, format: str, n: int, k: int, dtype: str, layout: str = "rows") -> np.ndarray:
    decoded = oracle.decode(planes, format, n, k, layout)
    converted = oracle_floats.to_dtype(decoded, dtype)
    return converted.view(np.uint64) if dtype == "fp64" else converted


def refused(*args, says: str = "", **options) -> str:
    """What encode's error says."""
    return refusal(lambda: bitfold.encode(*args, **options), says)


# ---- every format ----


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", every_format())
def test_encode_and_decode(format, rng):
    for n, k in NESTED_SHAPES if format.endswith("dq") else SHAPES:
        w = torch.from_numpy(weights(rng, n, k))
        encoded = encode_both(w, format, f"{format} {n}x{k}")
        planes = oracle_planes(encoded)
        for name, dtype in DTYPES.items():
            decoded = encoded.decode(dtype)
            assert decoded.dtype == dtype
            assert decoded.is_contiguous()
            assert_same_bits(decoded, decoded_bits(planes, format, n, k, name), f"{format} {n}x{k} to {name}")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("format", every_format())
def test_decode_of_any_codes(format, rng):
    """Codes that encode never writes too: NaN minifloats, the lowest integer, fp4's second zero. The last two shapes
    are more than a GPU's block of threads decodes, as one long row and row by row."""
    for n, k in [(1, 1), (3, 33), (2, 257), (5, 300), (2, 4352), (3, 4160)]:
        planes = random_planes(rng, format, n, k)
        qtensor = to_qtensor(planes, format, n, k)
        for name, dtype in DTYPES.items():
            wanted = decoded_bits(planes, format, n, k, name)
            assert_same_bits(qtensor.decode(dtype), wanted, f"{format} {n}x{k} to {name}")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", every_format())
def test_pack_and_unpack_are_inverse(format, rng):
    fmt = oracle.parse(format)
    for n, k in SHAPES:
        planes = random_planes(rng, format, n, k)
        qtensor = to_qtensor(planes, format, n, k)
        logical, expected = qtensor.unpack(), oracle.unpack(planes, format, n, k)
        what = f"{format} {n}x{k}"
        assert_same_bits(logical.codes, expected.codes, f"{what} codes")
        assert (logical.zeros is None) == (expected.zeros is None)
        if expected.zeros is not None:
            assert_same_bits(logical.zeros, expected.zeros, f"{what} zeros")
        for name in ("scales", "nested_scales", "nested_offset"):
            assert (getattr(logical, name) is None) == (name not in planes)
            if name in planes:
                assert_same_bits(getattr(logical, name), planes[name], f"{what} {name}")
        packed = bitfold.pack(**logical._asdict(), format=format)
        assert packed.format == fmt.canonical
        assert packed.shape == (n, k)
        assert_planes(packed, planes, f"{what} packed again")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", [f for f in every_format() if oracle.parse(f).kind == "codebook"])
def test_flat_layout(format, rng):
    """One row of n * k columns: groups straddle rows."""
    for n, k in [(1, 1), (3, 7), (5, 35), (2, 257), (0, 3), (3, 0), (7, 129), (3, 4160)]:
        planes = oracle_encode.encode(weights(rng, 1, n * k), format)
        qtensor = to_qtensor(planes, format, n, k, "flat")
        for name, dtype in DTYPES.items():
            wanted = decoded_bits(planes, format, n, k, name, "flat")
            assert_same_bits(qtensor.decode(dtype), wanted, f"{format} {n}x{k} flat to {name}")
        logical = qtensor.unpack()
        expected = oracle.unpack(planes, format, n, k, "flat")
        assert_same_bits(logical.codes, expected.codes.reshape(n, k), f"{format} {n}x{k} flat codes")
        packed = bitfold.pack(**logical._asdict(), format=format, layout="flat")
        assert packed.layout == "flat"
        assert packed.shape == (n, k)
        assert_planes(packed, planes, f"{format} {n}x{k} flat packed again")


# ---- inputs ----


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", some_formats())
def test_input_dtypes(format, rng):
    for name, dtype in DTYPES.items():
        w = torch.from_numpy(weights(rng, 4, 67).astype(np.float64)).to(dtype)
        encode_both(w, format, f"{format} from {name}")


@pytest.mark.usefixtures("device")
def test_float64_input_is_rounded_to_binary32_first():
    """1 + 2^-11 + 2^-40 rounds up to fp16 at once, but to even through binary32."""
    w = torch.tensor([[1 + 2**-11 + 2**-40, 1 + 3 * 2**-11 - 2**-40]], dtype=torch.float64)
    assert bits(bitfold.encode(w, "fp16").planes["codes"]).tolist() == [[0x3C00, 0x3C02]]
    encode_both(w, "fp16", "double rounding")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("format", some_formats())
def test_strided_inputs(format, rng):
    base = torch.from_numpy(weights(rng, 80, 84))
    views = {
        "transposed": base.t(),
        "every other column": base[:, ::2],
        "every other row": base[1::2],
        "window": base[3:20, 5:72],
        "transposed window": base[5:72, 3:20].t(),
        "one row for all": base[:1, :67].expand(5, 67),
        "one column for all": base[:9, :1].expand(9, 70),
        "transposed half": base.half().t(),
        "double window": base.double()[3:20, 5:72],
    }
    for name, view in views.items():
        encoded = encode_both(view, format, f"{format} {name}")
        for plane, again in zip(
            encoded.planes.values(), bitfold.encode(view.contiguous(), format).planes.values(), strict=True
        ):
            assert torch.equal(plane.view(torch.uint8), again.view(torch.uint8))


def test_encode_does_not_touch_its_input(rng):
    w = torch.from_numpy(weights(rng, 5, 70))
    before = w.clone()
    for format in some_formats():
        bitfold.encode(w, format)
        assert torch.equal(bits_of(w), bits_of(before))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", [f for f in every_format() if f.endswith("dq")])
def test_given_nested_offset(format, rng):
    w = torch.from_numpy(weights(rng, 9, 640))
    for offset in (0.0, 0.75, -3.5, 1e-3):
        encoded = encode_both(w, format, f"{format} offset {offset}", nested_offset=float(np.float32(offset)))
        assert encoded.planes["nested_offset"].tolist() == [float(np.float32(offset))]


def test_nested_offset_only_where_scales_nest():
    refused(torch.ones(1, 64), "nf4-b64", nested_offset=1.0, says="nested_offset")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@given(data=st.data())
def test_any_weights(data):
    """Any shape, format and magnitude: the oracle's planes, or an error where it has one."""
    format = data.draw(st.sampled_from(every_format()))
    n, k = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 150))
    seed = data.draw(st.integers(0, 2**32 - 1))
    decades = data.draw(st.sampled_from([0, 1, 4, 12, 40]))
    centre = data.draw(st.sampled_from([0, 0, 0, -6, 4, 20, -40]))
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        w = rng.standard_normal((n, k)) * 10.0 ** (centre + rng.uniform(-decades / 2, decades / 2, (n, k)))
        w = np.clip(w, -3e38, 3e38).astype(np.float32)
    tensor = torch.from_numpy(w)
    try:
        expected = oracle_encode.encode(w, format)
    except oracle_encode.OracleError as error:
        check_message(refused(tensor, format), error, format)
        return
    assert_planes(bitfold.encode(tensor, format), expected, format)


# ---- ties, zeros, extremes ----


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("family", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize("exponent", [-130, -20, 0, 20, 110])
def test_integer_ties_go_to_even(family, exponent):
    """Scale 2^exponent exactly; every half-way point of the grid."""
    largest = 2 ** (oracle.parse(family).bits - 1) - 1
    steps = np.arange(-2 * largest, 2 * largest + 1) / 2
    w = torch.from_numpy(np.ldexp(steps, exponent).astype(np.float32))[None]
    encoded = encode_both(w, f"{family}-tensor-sfp32", "ties")
    codes = encoded.unpack().codes.numpy().astype(int)[0] - (largest + 1)
    assert codes.tolist() == [int(np.rint(step)) for step in steps]  # numpy's rint: half to even
    shifted = torch.cat([w - w.min(), torch.zeros(1, 1)], dim=1)
    if exponent > -125:
        encode_both(shifted, f"{family}-tensor-asym-sfp32", "asymmetric")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize(
    ("family", "small"), [("fp8-e4m3", oracle_floats.E4M3), ("fp8-e5m2", oracle_floats.E5M2)]
)
def test_minifloat_ties_go_to_even(family, small):
    values = small.magnitudes[: small.overflow]
    middles = (values[:-1] + values[1:]) / 2
    w = np.concatenate([values, -values, middles, -middles, [-0.0]]).astype(np.float32)
    encoded = encode_both(torch.from_numpy(w)[None], f"{family}-channel-sfp32", "ties")
    assert encoded.planes["scales"].item() == 1.0
    codes = bits(encoded.planes["codes"])[0]
    count = len(values)
    assert codes[:count].tolist() == list(range(count))
    assert (codes[2 * count : 2 * count + len(middles)] % 2 == 0).all()
    assert codes[-1] == 0x80


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("family", ["nf4", "fp4"])
def test_codebook_midpoints_take_the_lower_entry(family):
    table = np.sort(oracle.parse(family).grid.table)
    middles = (table[:-1] + table[1:]) * np.float32(0.5)
    near = [np.nextafter(middles, np.float32(s)) for s in (-2, 2)]
    w = np.concatenate([[1.0], middles, *near]).astype(np.float32)
    decoded = encode_both(torch.from_numpy(w)[None], f"{family}-b64", "midpoints").decode().numpy()[0]
    assert decoded[1 : 1 + len(middles)].tolist() == table[:-1].tolist()


@pytest.mark.usefixtures("device")
@pytest.mark.isa
def test_fp4_zeros():
    """As bitsandbytes on a CPU: what rounds to zero from above is code 8, zero and what comes from below code 0."""
    w = torch.tensor([[1.0, 0.0, -0.0, 0.002, -0.002, 1e-30, -1e-30, -1.0]])
    encoded = encode_both(w, "fp4-b32", "zeros")
    assert encoded.unpack().codes.tolist() == [[3, 0, 0, 8, 0, 8, 0, 11]]
    assert encoded.decode()[0, 1:7].tolist() == [0.0] * 6


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", every_format())
def test_all_zero_groups_decode_to_exact_zeros(format):
    w = torch.zeros(4, 150)
    w[1] = -0.0
    w[2, 100] = 1.0
    decoded = encode_both(w, format, "zeros").decode()
    if "dq" in format:  # the scale of such a block is not 0 any more, its codes are those of 0
        assert not decoded[[0, 1, 3]].any()
        return
    assert not decoded[w == 0].any()
    assert torch.isfinite(decoded).all()


WIDE = [f for f in every_format() if f.endswith("-sfp32") or f in ("nf4-b64", "fp4-b32")]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", WIDE)
@pytest.mark.parametrize("magnitude", [1e30, 1e-30, 3e37, 2e-36])
def test_extremes_with_fp32_scales(format, magnitude, rng):
    w = torch.from_numpy((rng.uniform(-1, 1, (3, 70)) * magnitude).astype(np.float32))
    decoded = encode_both(w, format, f"{magnitude}").decode().double()
    bound = {"integer": 1.01 / 2, "minifloat": 0.13, "codebook": 0.4}[oracle.parse(format).kind]
    if (
        oracle.parse(format).kind == "integer"
    ):  # half a step of the widest group, and clipping of half a step at zero's end
        steps = oracle.parse(format).grid.largest(format.find("asym") > 0)
        bound = (2 if "asym" in format else 1) * 1.02 / steps
    assert ((decoded - w.double()).abs() <= bound * magnitude).all()


@pytest.mark.usefixtures("device")
@pytest.mark.isa
def test_denormal_weights_survive_with_fp32_scales():
    """Weights of 2^-149 * (0 ... 127): the scale is the smallest denormal, each is a whole number of it."""
    tiny = 2.0**-149
    w = torch.arange(-127, 128, dtype=torch.float64).mul(tiny).float()[None]
    encoded = encode_both(w, "int8-tensor-sfp32", "denormals")
    assert encoded.planes["scales"].item() == tiny
    assert torch.equal(encoded.decode(), w)
    w = torch.linspace(-1, 1, 64).mul(1e-40)[None]
    for format in ("int8-g64-sfp32", "int4-g64-sfp32"):
        decoded = encode_both(w, format, "denormals").decode()
        step = 1e-40 / oracle.parse(format).grid.largest(False)
        assert (decoded.double() - w.double()).abs().max() <= 0.51 * step + 2**-149


# ---- errors: one sentence, naming the place ----


def check_message(message: str, error: oracle_encode.OracleError, format: str) -> None:
    numbers = [int(number) for number in re.findall(r"(?<![\w.+-])\d+(?![\w.])", message)]
    fmt = oracle.parse(format)
    assert "\n" not in message
    if isinstance(error, oracle_encode.NotFinite | oracle_encode.CastOverflow):
        assert f"weight[{error.row}, {error.column}]" in message
    if isinstance(error, oracle_encode.CastOverflow):
        assert error.count in numbers, message
        assert "clamp" in message
    if isinstance(error, oracle_encode.ScaleOverflow | oracle_encode.ScaleUnderflow):
        if fmt.rows > 1:
            assert f"weight[{error.row}, {error.group * fmt.group}]" in message
        elif fmt.group != oracle.TENSOR:
            assert re.search(rf"row {error.row}\b", message), message
        if fmt.group > 0 and fmt.rows == 1:
            assert error.group in numbers or error.group * fmt.group in numbers, message
        assert ("too large" if isinstance(error, oracle_encode.ScaleOverflow) else "too small") in message
        if fmt.scale in ("fp16", "bf16"):
            suggestion = re.search(r"use '(.+)'", message).group(1)
            assert suggestion in every_format()
            assert oracle.parse(suggestion).scale != fmt.scale


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@pytest.mark.parametrize("format", some_formats())
def test_not_finite(format):
    for (row, column), dtype in product([(0, 0), (2, 37), (4, 69), (3, 1)], DTYPES.values()):
        for bad in (float("nan"), float("inf"), -float("inf")):
            w = torch.ones(5, 70, dtype=dtype)
            w[row, column] = bad
            w[4, 69] = bad
            check_message(refused(w, format), oracle_encode.NotFinite(row, column), format)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", some_formats())
def test_float64_beyond_binary32(format):
    w = torch.ones(3, 40, dtype=torch.float64)
    w[1, 33] = -1e39
    check_message(refused(w, format), oracle_encode.NotFinite(1, 33), format)


def with_scale(format: str, scale: str) -> str:
    return oracle.parse(f"{re.sub('-(dq|s(fp16|bf16|fp32))$', '', format)}-s{scale}").canonical


def encodes(w: torch.Tensor, format: str) -> bool:
    try:
        oracle_encode.encode(w.numpy(), format)
    except oracle_encode.OracleError:
        return False
    return True


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("format", every_format())
def test_scale_faults(format):
    """Weights that no scale dtype but a wide one can serve, in one group of the last row."""
    fmt = oracle.parse(format)
    if fmt.kind == "cast":
        return
    found = set()
    for magnitude in (3e38, 1e10, 1e-4, 1e-7, 2e-9, 1e-20, 1e-39, 2.9e-43, 1.5e-45):
        w = torch.zeros(4, 150)
        w[3, 140] = magnitude
        w[3, 141] = -magnitude
        try:
            expected = oracle_encode.encode(w.numpy(), format)
        except oracle_encode.OracleError as error:
            found.add(type(error))
            message = refused(w, format)
            check_message(message, error, format)
            suggestion = re.search(r"use '(.+)'", message)
            if suggestion and magnitude > 1e-30 and encodes(w, with_scale(format, "fp32")):
                assert encodes(w, suggestion.group(1)), f"{message}: that fails too"
        else:
            assert_planes(bitfold.encode(w, format), expected, f"{format} {magnitude}")
    if fmt.scale == "fp16":
        assert found == {oracle_encode.ScaleOverflow, oracle_encode.ScaleUnderflow}
    elif fmt.kind != "codebook" and fmt.family != "int2":
        assert oracle_encode.ScaleUnderflow in found


def test_the_first_fault_is_named_whatever_the_threads(threads):
    w = torch.ones(600, 256)
    for row in (123, 124, 300, 599):
        w[row, 64:128] = 1e9
    for count in (1, 2, 4):
        threads(count)
        for format in ("int4-g64", "fp16"):
            refused(w, format, says=r"row 123\b|weight\[123, 64\]")
        refused(w, "fp8-b4x64-sfp16", says=r"starts at weight\[120, 64\]")


def test_the_suggested_scale_dtype_works():
    for format, value in [
        ("int4-g32", 1e9),
        ("int4-g32", 1e-9),
        ("nf4-b64-sfp16", 1e7),
        ("fp8-e4m3-tensor-sfp16", 1e-8),
    ]:
        w = torch.full((2, 64), value)
        message = refused(w, format)
        bitfold.encode(w, re.search(r"use '(.+)'", message).group(1))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("format", "largest"), [("fp16", 65504.0), ("bf16", oracle_floats.BF16.largest)])
def test_cast_overflow(format, largest):
    w = torch.zeros(3, 20)
    w[1, 4], w[1, 5] = largest, -largest
    encode_both(w, format, "largest")
    bad = torch.finfo(torch.float32).max
    w[1, 7], w[2, 0], w[2, 19] = bad, -bad, bad
    check_message(refused(w, format), oracle_encode.CastOverflow(3, 1, 7), format)
    clamped = encode_both(w, format, "clamp", clamp=True).decode()
    assert clamped[1, 7].item() == clamped[2, 19].item() == largest
    assert clamped[2, 0].item() == -largest
    assert torch.isfinite(clamped).all()


@pytest.mark.usefixtures("device")
def test_cast_overflow_starts_half_a_step_beyond_the_largest():
    for format, edge in [("fp16", 65520.0), ("bf16", (oracle_floats.BF16.largest + 2.0**128) / 2)]:
        inside = torch.tensor([[np.nextafter(np.float32(edge), np.float32(0))]])
        assert (
            encode_both(inside, format, "inside").decode().item() == oracle.parse(format).grid.small.largest
        )
        beyond = torch.tensor([[edge]], dtype=torch.float32)
        refused(beyond, format, says="clamp")


@pytest.mark.usefixtures("device")
def test_clamp_does_not_hide_nan_or_infinity():
    for bad in (float("nan"), float("inf")):
        w = torch.tensor([[1.0, bad]])
        refused(w, "fp16", clamp=True, says=r"weight\[0, 1\]")


def test_bad_weights():
    for weight in (torch.ones(3), torch.ones(2, 2, 2), torch.ones(()), torch.ones(2, 2, dtype=torch.int32)):
        refused(weight, "int8", says="weight")


@pytest.mark.isa
@pytest.mark.parametrize("format", ["int4-g128", "int3-g64", "nf4", "fp8", "bf16", "fp16", "q4_k", "q8_0"])
def test_large_outputs(format, rng):
    """4 MiB and more go past the caches, or to new pages: the bits of a few rows at a time, wherever rows begin."""
    for k in (1024, 1280) if format.startswith("q") else (1024, 1035):
        n = (4 << 20) // (2 * k) + 3
        qtensor = bitfold.encode(torch.from_numpy(weights(rng, n, k)), format)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ids = torch.arange(n).split(100)
            rows = bits(torch.cat([bitfold.embedding(part, qtensor, dtype) for part in ids]))
            for _ in range(3):  # in memory that is new, and in memory that isn't
                assert np.array_equal(bits(qtensor.decode(dtype)), rows), f"{format} {dtype} k={k}"


@pytest.mark.usefixtures("device")
def test_pack_checks_its_arguments():
    codes = torch.zeros(2, 20, dtype=torch.uint8)
    scales, zeros = torch.ones(2, 2, dtype=torch.float16), torch.zeros(2, 2, dtype=torch.uint8)
    good = {"codes": codes, "scales": scales, "zeros": zeros, "format": "int4-g16-asym"}
    bitfold.pack(**good)
    bad = {
        "codes": [codes.int(), codes[0], torch.full_like(codes, 16)],
        "scales": [None, scales.float(), scales[:1], scales[:, :1], scales[0]],
        "zeros": [None, zeros.int(), zeros[:1], torch.full_like(zeros, 16)],
    }
    for name, values in bad.items():
        for value in values:
            refusal(
                lambda name=name, value=value: bitfold.pack(**{**good, name: value}), name.removesuffix("s")
            )
    nested = {"nested_scales": torch.ones(1), "nested_offset": torch.ones(1)}
    refusal(lambda: bitfold.pack(codes, scales, zeros, format="int4-g16"), "zero")
    refusal(lambda: bitfold.pack(codes, scales.byte(), format="nf4-b32-dq"), "nested")
    refusal(lambda: bitfold.pack(codes, scales, format="int4-g16", **nested), "nested")


@pytest.mark.usefixtures("device")
def test_pack_takes_strided_codes(rng):
    base = torch.from_numpy(rng.integers(0, 8, (40, 60)).astype(np.uint8))
    scales = torch.ones(1, 1, dtype=torch.float16)
    for view in (base.t(), base[:, ::3], base[::2, 1:]):
        packed = bitfold.pack(view, scales, format="int3-tensor")
        assert torch.equal(packed.unpack().codes, view)
        assert torch.equal(
            packed.planes["codes"],
            bitfold.pack(view.contiguous(), scales, format="int3-tensor").planes["codes"],
        )


def test_oracle_small_floats_are_torchs():
    """The oracle's enumerated floats against torch's conversions, over all codes and many numbers."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(50000) * 10.0 ** rng.uniform(-12, 6, 50000)).astype(np.float32)
    for small, dtype in [(oracle_floats.FP16, torch.float16), (oracle_floats.BF16, torch.bfloat16)]:
        every = np.arange(65536).astype(np.uint16)
        name = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
        ours = torch.from_numpy(small.value(every))
        assert torch.equal(torch.nan_to_num(ours), torch.nan_to_num(tensor_of(every, name).float()))
        assert_same_bits(torch.from_numpy(x).to(dtype), small.code(x), name)
    for small, dtype in [(oracle_floats.E4M3, torch.float8_e4m3fn), (oracle_floats.E5M2, torch.float8_e5m2)]:
        inside = x[np.abs(x) <= small.largest]
        theirs = torch.from_numpy(inside).to(dtype).view(torch.uint8)
        assert_same_bits(theirs, small.code(inside, saturate=True), small.name)
