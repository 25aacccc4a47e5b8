"""GGUF's blocks: encode and decode against llama.cpp's golden bytes and the oracle, bit for bit, for every block type
of the table.
"""

from __future__ import annotations

import bitfold
import numpy as np
import oracle_floats
import oracle_gguf
import oracle_gguf_encode
import pytest
import torch
from bitfold.formats import parse
from cases import DTYPES, assert_same_bits, bits, block_formats, refusal
from golden import golden
from hypothesis import given
from hypothesis import strategies as st

every_block = pytest.mark.parametrize("format", block_formats())


# ---- ways between bitfold and the oracle ----


def encode_both(
    x: torch.Tensor | np.ndarray, format: str, what: str, importance: np.ndarray | None = None
) -> bitfold.QTensor:
    """bitfold's blocks, asserted equal to the oracle's; infinite scales are stored."""
    x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    given = None if importance is None else torch.from_numpy(importance)
    encoded = bitfold.encode(x, format, importance=given, clamp=True)
    assert list(encoded.planes) == ["blocks"]
    expected = oracle_gguf_encode.encode(x.to(torch.float32).numpy(), format, importance)
    assert_same_bits(encoded.planes["blocks"], expected, what)
    return encoded


def of_blocks(blocks: np.ndarray, format: str) -> bitfold.QTensor:
    layout = oracle_gguf.LAYOUTS[format]
    n, k = len(blocks), blocks.shape[1] // layout.bytes * layout.values
    return bitfold.QTensor(format, (n, k), {"blocks": torch.from_numpy(np.array(blocks))})


def decoded_bits(blocks: np.ndarray, format: str, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        converted = oracle_floats.to_dtype(oracle_gguf.decode(blocks, format), dtype)
    return converted.view(np.uint64) if dtype == "fp64" else converted


def overflows(blocks: np.ndarray, format: str) -> np.ndarray:
    """Rows with a scale or minimum that is no finite number."""
    layout = oracle_gguf.LAYOUTS[format]
    cube = blocks.reshape(len(blocks), -1, layout.bytes)
    if not layout.halves:
        return (cube[:, :, 0] == 255).any(axis=1)
    return np.stack([cube[:, :, at + 1] & 0x7C == 0x7C for at in layout.halves]).any(axis=(0, 2))


def below_mxfp4(x: np.ndarray) -> np.ndarray:
    """Rows with a block whose largest number is too small for an exponent of MXFP4, and not 0."""
    largest = np.abs(x).reshape(len(x), -1, 32).max(axis=2)
    return ((largest > 0) & (largest < 2.0**-125)).any(axis=1)


def tame_blocks(rng: np.random.Generator, format: str, n: int, count: int) -> np.ndarray:
    """n rows of `count` blocks of any codes and any integers, with scales of ordinary size and either sign."""
    layout = oracle_gguf.LAYOUTS[format]
    cube = rng.integers(0, 256, (n, count, layout.bytes)).astype(np.uint8)
    if not layout.halves:
        cube[:, :, 0] = rng.integers(120, 131, (n, count))
    for at in layout.halves:
        half = (rng.standard_normal((n, count)) * 0.05).astype(np.float16)
        cube[:, :, at : at + 2] = half.view(np.uint8).reshape(n, count, 2)
    return cube.reshape(n, -1)


def shapes(format: str) -> list[tuple[int, int]]:
    """No rows, no columns, one block, rows and blocks in numbers that no count of lanes divides."""
    values = parse(format).group
    counts = [(0, 1), (3, 0), (1, 1), (2, 1), (5, 3), (17, 2), (33, 1), (1, 9), (3, 17)]
    return [(n, count * values) for n, count in counts]


def some_weights(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Rows of different size, some of it in outliers, some zeros of either sign; a row of zeros."""
    w = rng.standard_normal((n, k)) * np.exp(rng.uniform(-2, 2, (n, 1))) + rng.uniform(-0.2, 0.2, (n, 1))
    w[rng.random((n, k)) < 0.01] *= 10
    w[rng.random((n, k)) < 0.05] = 0.0
    w[rng.random((n, k)) < 0.02] = -0.0
    if n > 2:
        w[n // 2] = 0.0
    return w.astype(np.float32)


def some_importance(rng: np.random.Generator, k: int) -> np.ndarray:
    """As importance is: of very different size, none where an input never fires."""
    q = rng.chisquare(1, k) * np.exp(rng.uniform(-3, 3, k))
    q[rng.random(k) < 0.1] = 0
    q[:1] = 1
    return q.astype(np.float32)


# ---- golden vectors ----


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
def test_golden_bytes(format, weighed):
    data = golden(format)
    wanted = data.bytes_imatrix if weighed else data.bytes
    importance = torch.from_numpy(data.importance) if weighed else None
    x = torch.from_numpy(data.x)
    stored = bitfold.encode(x, format, importance=importance, clamp=True)
    assert_same_bits(stored.planes["blocks"], wanted, format)
    beyond = overflows(wanted, format) | (below_mxfp4(data.x) if format == "mxfp4" else False)
    sound = bitfold.encode(x[~beyond], format, importance=importance)
    assert_same_bits(sound.planes["blocks"], wanted[~beyond], format)
    for row in np.flatnonzero(beyond):
        refusal(lambda row=row: bitfold.encode(x[row : row + 1], format, importance=importance), "row 0")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_golden_decoding(format):
    data = golden(format)
    qtensor = of_blocks(data.bytes, format)
    assert_same_bits(qtensor.decode(), data.dequant.view(np.uint32), format)


# ---- every type: shapes, inputs ----


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_encode_and_decode(format, rng):
    for n, k in shapes(format):
        for importance in (None, some_importance(rng, k)) if k else (None,):
            encoded = encode_both(some_weights(rng, n, k), format, f"{format} {n}x{k}", importance)
            assert encoded.shape == (n, k)
            blocks = encoded.planes["blocks"].numpy()
            for name, dtype in DTYPES.items():
                decoded = encoded.decode(dtype)
                assert decoded.dtype == dtype
                assert decoded.is_contiguous()
                assert_same_bits(decoded, decoded_bits(blocks, format, name), f"{format} {n}x{k} to {name}")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_decode_of_any_bytes(format, rng):
    """What encode never writes too: infinite and sub-normal scales, every integer."""
    layout = oracle_gguf.LAYOUTS[format]
    for n, count in [(1, 1), (3, 5), (40, 11)]:
        blocks = rng.integers(0, 256, (n, count * layout.bytes)).astype(np.uint8)
        for name, dtype in DTYPES.items():
            decoded = of_blocks(blocks, format).decode(dtype)
            assert_same_bits(decoded, decoded_bits(blocks, format, name), f"{format} to {name}")


@pytest.mark.usefixtures("device")
@every_block
@pytest.mark.parametrize("name", DTYPES)
def test_input_dtypes(format, name, rng):
    k = 3 * parse(format).group
    w = torch.from_numpy(some_weights(rng, 19, k).astype(np.float64)).to(DTYPES[name])
    for importance in (None, some_importance(rng, k)):
        encode_both(w, format, f"{format} from {name}", importance)


@pytest.mark.usefixtures("device")
@every_block
def test_strided_inputs(format, rng):
    values = parse(format).group
    n, k = 9, 2 * values
    base = torch.from_numpy(some_weights(rng, 2 * n, 2 * k))
    views = {
        "every other": base[::2, ::2],
        "transposed": torch.from_numpy(some_weights(rng, k, n)).t(),
        "offset": base[3:, values : values + k],
        "one row for all": base[:1, :k].expand(n, k),
        "one number for all": base[:1, :1].expand(n, k),
    }
    wide = torch.from_numpy(np.repeat(some_importance(rng, k), 2))
    for name, view in views.items():
        encode_both(view, format, f"{format} {name}")
        strided = bitfold.encode(view, format, importance=wide[::2])
        dense = bitfold.encode(view.contiguous(), format, importance=wide[::2].contiguous())
        assert torch.equal(strided.planes["blocks"], dense.planes["blocks"])
        encode_both(view, format, f"{format} {name}", wide[::2].contiguous().numpy())


def test_encode_does_not_touch_its_inputs(rng):
    for format in block_formats():
        k = 2 * parse(format).group
        w, q = torch.from_numpy(some_weights(rng, 5, k)), torch.from_numpy(some_importance(rng, k))
        before = w.clone(), q.clone()
        bitfold.encode(w, format, importance=q)
        assert torch.equal(w.view(torch.int32), before[0].view(torch.int32))
        assert torch.equal(q, before[1])


@every_block
def test_same_bytes_for_any_threads(format, rng, threads):
    k = 2 * parse(format).group
    w, q = torch.from_numpy(some_weights(rng, 203, k)), torch.from_numpy(some_importance(rng, k))
    for importance in (None, q):
        outputs = []
        for count in (1, 2, 4, 1):
            threads(count)
            outputs.append(bitfold.encode(w, format, importance=importance).planes["blocks"])
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.usefixtures("device")
@every_block
def test_a_row_does_not_depend_on_the_others(format, rng):
    """Rows share lanes and nothing else: each alone has the bytes that it has among others."""
    k = 3 * parse(format).group
    w, q = torch.from_numpy(some_weights(rng, 37, k)), torch.from_numpy(some_importance(rng, k))
    for importance in (None, q):
        together = bitfold.encode(w, format, importance=importance).planes["blocks"]
        for row in (0, 1, 15, 16, 18, 36):
            alone = bitfold.encode(w[row : row + 1], format, importance=importance).planes["blocks"]
            assert torch.equal(alone[0], together[row])


# ---- extremes ----


def extremes(rng: np.random.Generator, k: int) -> dict[str, np.ndarray]:
    """Rows [n, k] that searches stumble over, by name. Some overflow a float16 scale."""
    normal = rng.standard_normal((3, k))
    sparse, outlier = normal.copy(), normal * 1e-6
    sparse[rng.random((3, k)) < 0.9] = -0.0
    outlier[:, ::97] = 100
    half_zero = normal.copy()
    half_zero[:, : k // 2] = 0
    found = {
        "zeros": np.zeros((2, k)),
        "negative zeros": np.full((2, k), -0.0),
        "constant": np.repeat([[0.3], [-0.3], [1e-20], [-5e4]], k, axis=1),
        "two values": np.where(normal < 0, 0.3, -0.7),
        "alternating": np.tile([0.5, -0.5], k // 2)[None],
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "far from zero": normal * 0.01 + np.array([[1], [-1], [30]]),
        "integers": rng.integers(-8, 9, (3, k)),
        "halves": rng.integers(-16, 17, (3, k)) / 2,
        "powers of two": np.ldexp(np.sign(normal), rng.integers(-20, 20, (3, k))),
        "just below powers of two": np.nextafter(
            np.ldexp(np.sign(normal), rng.integers(-126, 120, (3, k))).astype(np.float32), np.float32(0)
        ),
        "on the grid of bf16": (normal.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
        "ties on the grid of bf16": np.round(normal * 16) / 16,
        "sparse": sparse,
        "an outlier": outlier,
        "half zero": half_zero,
        "heavy tails": rng.standard_cauchy((6, k)) ** 3,
        "around the threshold": normal * 1e-15,
        "all sizes": normal * 10.0 ** rng.uniform(-42, 36, (3, k)),
        "groups of all sizes": normal * 10.0 ** np.repeat(rng.uniform(-20, 20, (3, k // 16)), 16, axis=1),
    }
    for exponent in (-45, -44, -42, -40, -39, -38, -37, -36, -30, -20, -14, 4, 7, 20, 36, 38):
        found[f"1e{exponent}"] = np.clip(normal * 10.0**exponent, -3.4e38, 3.4e38)
    return {name: rows.astype(np.float32) for name, rows in found.items()}


def importances(rng: np.random.Generator, k: int) -> dict[str, np.ndarray]:
    single, sparse = np.zeros(k), rng.chisquare(1, k)
    single[k // 3] = 1
    sparse[rng.random(k) < 0.95] = 0
    sparse[0] = 1
    block_of_zeros = rng.chisquare(1, k)
    block_of_zeros[:256] = 0
    found = {
        "ones": np.ones(k),
        "a single one": single,
        "sparse": sparse,
        "a block of zeros": block_of_zeros,
        "tiny": rng.chisquare(1, k) * 1e-42 + 1e-44,
        "huge": np.minimum(rng.chisquare(1, k) * 1e37, 3e38),
        "of all sizes": 10.0 ** rng.uniform(-44, 38, k),
    }
    return {name: q.astype(np.float32) for name, q in found.items()}


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_extremes(format, rng):
    for name, x in extremes(rng, 512).items():
        encode_both(x, format, f"{format} {name}")


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_extremes_with_importance(format, rng):
    for weighing, q in importances(rng, 512).items():
        for name, x in extremes(rng, 512).items():
            encode_both(x, format, f"{format} {name}, importance {weighing}", q)


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@given(data=st.data())
def test_any_weights(data):
    """Any type, shape, input dtype, importance and magnitude, rows of different kinds side by side."""
    format = data.draw(st.sampled_from(block_formats()))
    n, count = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 5))
    dtype = DTYPES[data.draw(st.sampled_from(["fp32", "fp32", "bf16", "fp16", "fp64"]))]
    weighing = data.draw(st.sampled_from([None, None, "ones", "sparse", "of all sizes", "tiny"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    k = count * parse(format).group
    kinds = list(extremes(rng, k).values())
    rows = [kind[rng.integers(len(kind))] for kind in (kinds[i] for i in rng.integers(0, len(kinds), n))]
    w = torch.from_numpy(np.array(rows, np.float32).reshape(n, k))
    w = w * float(data.draw(st.sampled_from([1.0, 1.0, 0.37, 1e-3])))
    largest = min(3e38, torch.finfo(dtype).max)
    w = w.clamp(-largest, largest).to(dtype)
    importance = None if weighing is None else importances(rng, k)[weighing]
    encode_both(w, format, f"{format} {n}x{k} {dtype} importance {weighing}", importance)


@pytest.mark.usefixtures("device")
@pytest.mark.isa
def test_wrapped_integers_spill_over_their_neighbours(rng):
    """q4_k with importance on few columns finds negative scales; in 6 bits they wrap, and spill."""
    spilt = 0
    for _ in range(60):
        x = (rng.standard_cauchy((24, 256)) ** 3).astype(np.float32)
        q = np.zeros(256, np.float32)
        q[rng.integers(0, 256, 4)] = 1
        encoded = encode_both(x, "q4_k", "spilt", q).planes["blocks"].numpy()
        spilt += int((encoded[:, 4:12] >> 6 == 3).any(axis=1).sum())
    assert spilt, "no row was such a case"


@every_block
def test_importance_matters_where_there_is_a_search(format, rng):
    k = 4 * parse(format).group
    w, q = torch.from_numpy(some_weights(rng, 9, k)), torch.from_numpy(some_importance(rng, k))
    plain, weighed = (bitfold.encode(w, format, importance=i).planes["blocks"] for i in (None, q))
    assert torch.equal(plain, weighed) == (format in ("q8_0", "mxfp4"))


# ---- errors: one sentence ----


@pytest.mark.usefixtures("device")
@every_block
def test_columns_must_be_whole_blocks(format):
    values = parse(format).group
    for k in (1, values - 1, values + 1, values + values // 2):
        message = refusal(lambda k=k: bitfold.encode(torch.ones(2, k), format), rf"\b{k}\b", rf"\b{values}\b")
        assert format in message
    with pytest.raises(ValueError, match=str(values)):
        bitfold.QTensor(format, (1, values + 1), {"blocks": torch.zeros(1, 1, dtype=torch.uint8)})


@pytest.mark.usefixtures("device")
@every_block
def test_not_finite(format):
    values = parse(format).group
    for bad in (float("nan"), float("inf"), -float("inf")):
        for dtype in DTYPES.values():
            w = torch.ones(40, 2 * values, dtype=dtype)
            w[20, values + 3] = bad
            w[39, 0] = bad
            for clamp in (False, True):
                refusal(
                    lambda w=w, clamp=clamp: bitfold.encode(w, format, clamp=clamp), rf"20, {values + 3}\b"
                )


@pytest.mark.usefixtures("device")
@pytest.mark.isa
@every_block
def test_a_scale_beyond_float16_is_an_error_unless_clamped(format, rng, threads):
    """The first such block is named, whatever the threads; with clamp the bytes are llama.cpp's."""
    values = parse(format).group
    w = some_weights(rng, 300, 3 * values)
    for row in (123, 124, 299):
        # Beyond what any scale holds; for mxfp4 below it, where the exponent wraps to what means no number.
        w[row, values : 2 * values] = 1.5e-38 if format == "mxfp4" else 1e10
        w[row, values + 1] *= -1
    blocks = encode_both(w, format, format).planes["blocks"].numpy()
    assert np.flatnonzero(overflows(blocks, format)).tolist() == [123, 124, 299]
    for count in (1, 2, 4):
        threads(count)
        message = refusal(lambda: bitfold.encode(torch.from_numpy(w), format), r"row 123\b", r"block 1\b")
        assert format in message


@pytest.mark.isa
@every_block
def test_no_size_of_weights_is_lost_in_silence(format, rng):
    """Weights of any size are kept or refused. Searches end in finite scales that mean nothing from 3e14 on."""
    values = parse(format).group
    kinds = {
        "constant": np.ones(values),
        "alternating": np.tile([1.0, -1.0], values // 2),
        "one": np.eye(1, values, 5)[0],
        "normal": rng.standard_normal(values),
    }
    outcomes = set()
    for name, kind in kinds.items():
        for exponent in np.arange(-2, 38, 0.5):
            x = torch.from_numpy((kind * 10.0**exponent).astype(np.float32))[None]
            for importance in (
                None,
                torch.ones(values),
                torch.from_numpy(some_importance(rng, values) + 0.1),
            ):
                try:
                    decoded = bitfold.encode(x, format, importance=importance).decode()
                except ValueError as error:
                    assert f"needs a scale that {format} can't hold" in str(error)  # noqa: PT017
                    outcomes.add("refused")
                else:
                    error = (decoded.double() - x.double()).norm() / x.double().norm()
                    assert error < 0.5, f"{name} 1e{exponent}"
                    outcomes.add("kept")
    assert outcomes == ({"kept"} if format == "mxfp4" else {"kept", "refused"})


@pytest.mark.isa
def test_weights_below_the_exponents_of_mxfp4_are_refused_unless_clamped():
    """The exponent wraps; with clamp the bytes are llama.cpp's, whose codes are zeros. Other types mean zeros."""
    for size, exponent in ((2.0**-149, 232), (2.0**-133, 248), (2.0**-127, 254), (2.0**-126, 255)):
        x = torch.zeros(2, 96)
        x[1, 40] = -size
        message = refusal(lambda x=x: bitfold.encode(x, "mxfp4"), r"block 1 of row 1\b", f"{size:.3g}")
        assert "can't hold" in message
        blocks = encode_both(x, "mxfp4", f"{size}").planes["blocks"]
        assert blocks.view(2, 3, 17)[1, 1].tolist() == [exponent] + 16 * [0]
    x[1, 40] = 2.0**-125
    assert torch.equal(bitfold.encode(x, "mxfp4").decode(), x)
    for format in block_formats():
        if format != "mxfp4":
            assert not bitfold.encode(torch.full((1, 256), 1e-40), format).decode().any()


@pytest.mark.usefixtures("device")
@every_block
def test_bad_importance(format):
    values = parse(format).group
    w = torch.ones(2, 2 * values)
    k = 2 * values
    good = torch.ones(k)
    bad = {
        "too short": good[:-1],
        "too long": torch.ones(k + 1),
        "a matrix": torch.ones(1, k),
        "a number": torch.tensor(1.0),
        "float64": good.double(),
        "integers": good.int(),
        "half": good.half(),
        "all zero": torch.zeros(k),
        "negative zero": torch.full((k,), -0.0),
    }
    for value in (-1.0, -1e-40, float("nan"), float("inf"), -float("inf")):
        bad[f"{value}"] = good.clone().index_fill_(0, torch.tensor(7), value)
    for name, importance in bad.items():
        message = refusal(lambda i=importance: bitfold.encode(w, format, importance=i), "importance")
        if name in ("-1.0", "nan", "inf", "-inf"):
            assert "[7]" in message, message
    bitfold.encode(w, format, importance=good)


def test_other_formats_take_no_importance():
    for format in ("int4", "nf4", "fp16"):
        refusal(
            lambda format=format: bitfold.encode(torch.ones(2, 64), format, importance=torch.ones(64)),
            "importance",
        )


def test_blocks_have_no_planes_to_unpack():
    for format in block_formats():
        k = parse(format).group
        qtensor = bitfold.encode(torch.ones(1, k), format)
        refusal(qtensor.unpack, format)
        refusal(lambda format=format, k=k: bitfold.pack(torch.zeros(1, k).byte(), format=format), format)
        assert bits(qtensor.planes["blocks"]).dtype == np.uint8
