"""docs/formats.md once more, slowly, in numpy: what the tests compare bitfold with.

Nothing here imports bitfold. Every table is typed from the specification, every float type smaller than
binary32 is the list of all its values, and every step of an encoder is one numpy operation on float32. Planes
are dicts of numpy arrays of *bits*: float16 and bfloat16 as uint16, float32 as uint32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

F32 = np.float32
TENSOR, CHANNEL = 0, -1
NESTED_GROUP = 256
NESTED_SUM = 1024


# ---- small floats, by enumeration ----


class SmallFloat:
    """A float type of at most 16 bits: the list of its values, and nearest-even rounding onto that list."""

    def __init__(self, name: str, exponent_bits: int, mantissa_bits: int, infinities: bool = True):
        self.name = name
        self.bits = 1 + exponent_bits + mantissa_bits
        codes = np.arange(2 ** (self.bits - 1))
        exponent, mantissa = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
        unit = np.ldexp(1.0, np.maximum(exponent, 1) - (2 ** (exponent_bits - 1) - 1) - mantissa_bits)
        magnitudes = np.where(exponent == 0, mantissa, mantissa + 2**mantissa_bits) * unit
        # The first code that is not finite keeps its formula's value here: it is what overflow is measured against.
        self.overflow = int(codes[exponent == exponent.max()][0]) if infinities else int(codes[-1])
        self.magnitudes = magnitudes[: self.overflow + 1]
        self.largest = float(magnitudes[self.overflow - 1])
        values = np.where(codes < self.overflow, magnitudes, np.nan)
        if infinities:
            values[self.overflow] = np.inf
        self.values = np.concatenate([values, -values])  # code -> value

    def code(self, x: np.ndarray, saturate: bool = False) -> np.ndarray:
        """Nearest code, ties to the even one; what is beyond the largest value gets the overflow code, or saturates."""
        x = np.asarray(x, np.float64)
        middles = (self.magnitudes[:-1] + self.magnitudes[1:]) / 2
        index = np.searchsorted(middles, np.abs(x), side="left")
        tie = (index < len(middles)) & (np.abs(x) == middles[np.minimum(index, len(middles) - 1)])
        index = index + (tie & (index % 2 == 1))
        index = np.minimum(index, self.overflow - 1) if saturate else np.minimum(index, self.overflow)
        return (index + np.signbit(x) * 2 ** (self.bits - 1)).astype(
            np.uint16 if self.bits == 16 else np.uint8
        )

    def value(self, code: np.ndarray) -> np.ndarray:
        return self.values[np.asarray(code, np.int64)].astype(F32)  # exact: all are binary32 numbers

    def beyond(self, x: np.ndarray) -> np.ndarray:
        return (self.code(x) & (2 ** (self.bits - 1) - 1)) >= self.overflow


FP16 = SmallFloat("fp16", 5, 10)
BF16 = SmallFloat("bf16", 8, 7)
E4M3 = SmallFloat("fp8-e4m3", 4, 3, infinities=False)
E5M2 = SmallFloat("fp8-e5m2", 5, 2)
PLANE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "nested": "uint8"}


def to_dtype(x: np.ndarray, name: str) -> np.ndarray:
    """Bits of binary32 numbers rounded to fp16, bf16 or fp32 (fp64: the float64 itself)."""
    x = np.asarray(x, F32)
    if name in ("fp16", "bf16"):
        small = FP16 if name == "fp16" else BF16
        bits = small.code(x)
        return np.where(np.isnan(x), np.uint16(0x7FFF), bits)
    return x.view(np.uint32) if name == "fp32" else x.astype(np.float64)


def from_dtype(bits: np.ndarray, name: str) -> np.ndarray:
    """Binary32 numbers of the bits of fp16, bf16 or fp32 numbers."""
    return bits.view(F32) if name == "fp32" else (FP16 if name == "fp16" else BF16).value(bits)


# ---- codebooks ----

NF4_TEXT = """
-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022833334
-0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1"""
NF4 = np.array([float(value) for value in NF4_TEXT.split()], F32)
FP4_HALF = np.array([0, 0.005208333333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25], F32)
FP4 = np.concatenate([FP4_HALF, [F32(0)], -FP4_HALF[1:]])


def dynamic_map() -> np.ndarray:
    """The 256 values of the nested scales' 8-bit codes, ascending (float32)."""
    tenth, one = F32(0.1), F32(1)
    values = [F32(0), one]
    for e in range(7):
        parts = 2**e
        step = (one - tenth) / F32(parts)
        # float64 holds the product and the sum exactly, so each edge is rounded once.
        low = [F32(np.float64(tenth) + np.float64(step) * i) for i in range((parts + 1) // 2)]
        high = [F32(1.0 - np.float64(step) * (parts - i)) for i in range((parts + 1) // 2, parts + 1)]
        edges = np.array(low + high, F32)
        centres = (edges[:-1] + edges[1:]) / F32(2) * F32(10.0 ** (e - 6))
        values += [*centres, *-centres]
    return np.sort(np.array(values, F32))


DYNAMIC_MAP = dynamic_map()


def nearest_entry(t: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Index of the entry of an ascending table nearest to t; an exact midpoint takes the lower entry."""
    middles = (table[:-1] + table[1:]) * F32(0.5)
    return (t[..., None] > middles).sum(axis=-1)


# ---- errors ----


class OracleError(Exception):
    pass


@dataclass
class NotFinite(OracleError):
    row: int
    column: int


@dataclass
class CastOverflow(OracleError):
    count: int
    row: int
    column: int


@dataclass
class ScaleOverflow(OracleError):
    row: int
    group: int


@dataclass
class ScaleUnderflow(OracleError):
    row: int
    group: int


# ---- grids: what a code means, and which code a weight gets ----
#
# w is [rows, groups, columns of a group] in float32, short groups padded with zeros. `spread` gives the number a
# that the scale is made of, s = a / `largest`; `step` is the q of the scale-range rule; `codes` takes the stored
# scale in float32, never 0: all-zero groups get `zero`.


class Integer:
    high_first = False

    def __init__(self, bits: int):
        self.bits, self.middle = bits, 2 ** (bits - 1)

    def largest(self, asymmetric):
        return 2**self.bits - 1 if asymmetric else self.middle - 1

    def step(self):
        return self.middle - 1

    def spread(self, w, asymmetric):
        if not asymmetric:
            return np.abs(w).max(axis=-1, initial=0)
        with np.errstate(over="ignore"):
            return w.max(axis=-1, initial=0) - w.min(axis=-1, initial=0)

    def zeros(self, w, s):
        return np.clip(np.rint(-w.min(axis=-1, initial=0) / s), 0, 2**self.bits - 1).astype(np.uint8)

    def codes(self, w, s, zeros):
        q = np.rint(w / s[..., None])
        if zeros is not None:
            return np.clip(q + zeros[..., None].astype(F32), 0, 2**self.bits - 1).astype(np.uint8)
        return (np.clip(q, -self.middle, self.middle - 1) + self.middle).astype(np.uint8)

    def zero(self, asymmetric):
        return 0 if asymmetric else self.middle

    def value(self, codes, zeros):
        z = self.middle if zeros is None else zeros.astype(np.int64)
        return (codes.astype(np.int64) - z).astype(F32)


class Minifloat:
    bits = 8
    high_first = False

    def __init__(self, small: SmallFloat):
        self.small = small

    def largest(self, asymmetric):
        return self.small.largest

    def step(self):
        return 8

    def spread(self, w, asymmetric):
        return np.abs(w).max(axis=-1, initial=0)

    def codes(self, w, s, zeros):
        return self.small.code(w / s[..., None], saturate=True)

    def zero(self, asymmetric):
        return 0

    def value(self, codes, zeros):
        return self.small.value(codes)


class Codebook:
    bits = 4
    high_first = True

    def __init__(self, table: np.ndarray):
        self.table = table
        self.order = np.argsort(table, kind="stable")  # fp4's two zeros: code 0, then code 8

    def largest(self, asymmetric):
        return 1

    def step(self):
        return 8

    def spread(self, w, asymmetric):
        return np.abs(w).max(axis=-1, initial=0)

    def codes(self, w, s, zeros):
        r = F32(1) / np.maximum(s, F32(1e-38))
        t = np.clip(w * r[..., None], F32(-1), F32(1))
        return self.order[nearest_entry(t, self.table[self.order])].astype(np.uint8)

    def zero(self, asymmetric):
        return int(np.flatnonzero(self.table == 0)[0])

    def value(self, codes, zeros):
        return self.table[codes]


class Cast:
    high_first = False
    bits = 16

    def __init__(self, small: SmallFloat):
        self.small = small

    def encode(self, w, clamp):
        beyond = self.small.beyond(w)
        if beyond.any() and not clamp:
            row, column = np.argwhere(beyond)[0]
            raise CastOverflow(int(beyond.sum()), int(row), int(column))
        return self.small.code(w, saturate=True)


# ---- the table of families, and the format string ----


@dataclass(frozen=True)
class Family:
    grid: object
    kind: str
    letter: str = ""
    smallest: int = 0
    biggest: int = 0
    default: str = ""
    scale: str = "none"
    asymmetric: bool = False
    nested: bool = False
    tall: bool = False  # a scale may be for some columns of several rows


def _groups(grid, kind, default, scale="fp16", **more):
    return Family(grid, kind, "g", 16, 2**40, default, scale, **more)


FAMILIES = {
    "fp16": Family(Cast(FP16), "cast"),
    "bf16": Family(Cast(BF16), "cast"),
    "fp8-e4m3": _groups(Minifloat(E4M3), "minifloat", "channel", "fp32", tall=True),
    "fp8-e5m2": _groups(Minifloat(E5M2), "minifloat", "channel", "fp32", tall=True),
    "int8": _groups(Integer(8), "integer", "channel", asymmetric=True),
    "int4": _groups(Integer(4), "integer", "g128", asymmetric=True),
    "int3": _groups(Integer(3), "integer", "g64", asymmetric=True),
    "int2": _groups(Integer(2), "integer", "g64", asymmetric=True),
    "nf4": Family(Codebook(NF4), "codebook", "b", 32, 4096, "b64", "fp32", nested=True),
    "fp4": Family(Codebook(FP4), "codebook", "b", 32, 4096, "b64", "fp32", nested=True),
}


@dataclass(frozen=True)
class Format:
    canonical: str
    family: str
    grid: object = field(repr=False)
    kind: str
    group: int  # TENSOR, CHANNEL or columns
    asymmetric: bool
    scale: str  # none, fp16, bf16, fp32, nested
    rows: int = 1  # that share a scale; TENSOR: all do

    @property
    def bits(self) -> int:
        return self.grid.bits


def parse(text: str) -> Format:
    """A valid format string (spelled in the order of the grammar); KeyError or ValueError otherwise."""
    text = re.sub(r"^fp8(?!-e)", "fp8-e4m3", text)
    name = next(f for f in sorted(FAMILIES, key=len, reverse=True) if text == f or text.startswith(f + "-"))
    family = FAMILIES[name]
    pattern = r"(?:-(tensor|channel|[gb]\d+|b\d+x\d+))?(-asym)?(?:-s(fp16|bf16|fp32))?(-dq)?"
    match = re.fullmatch(pattern, text[len(name) :])
    if not match:
        raise ValueError(text)
    granularity, asym, scale, dq = match.groups()
    if family.kind == "cast":
        if any(match.groups()):
            raise ValueError(text)
        return Format(name, name, family.grid, "cast", TENSOR, False, "none")
    granularity = granularity or family.default
    rows = 1
    if granularity in ("tensor", "channel"):
        group = TENSOR if granularity == "tensor" else CHANNEL
    elif "x" in granularity:
        rows, group = map(int, granularity[1:].split("x"))
        if not family.tall or rows not in [2**i for i in range(1, 21)]:
            raise ValueError(text)
    else:
        group = int(granularity[1:])
    named = group <= 0
    if (named and family.letter == "b") or (not named and rows == 1 and granularity[0] != family.letter):
        raise ValueError(text)
    if not named and not family.smallest <= group <= family.biggest:
        raise ValueError(text)
    if (asym and not family.asymmetric) or (dq and not family.nested) or (dq and scale):
        raise ValueError(text)
    scale = "nested" if dq else scale or family.scale
    canonical = f"{name}-{granularity}{asym or ''}"
    if dq:
        canonical += "-dq"
    elif scale != family.scale:
        canonical += f"-s{scale}"
    return Format(canonical, name, family.grid, family.kind, group, bool(asym), scale, rows)


# ---- sizes ----


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def groups_in_row(fmt: Format, k: int) -> int:
    return ceil_div(k, fmt.group) if fmt.group > 0 else 1


def plane_shapes(text: str, n: int, k: int, layout: str = "rows") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Plane name -> (dtype, shape), in the order of the specification's table."""
    fmt = parse(text)
    if layout == "flat":
        n, k = 1, n * k
    if fmt.kind == "cast":
        return {"codes": (PLANE_DTYPES[fmt.family], (n, k))}
    rows, groups = 1 if fmt.group == TENSOR else ceil_div(n, fmt.rows), groups_in_row(fmt, k)
    planes = {
        "codes": ("uint8", (n, ceil_div(k * fmt.bits, 8))),
        "scales": (PLANE_DTYPES[fmt.scale], (rows, groups)),
    }
    if fmt.asymmetric:
        planes["zeros"] = ("uint8", (rows, ceil_div(groups * fmt.bits, 8)))
    if fmt.scale == "nested":
        planes["nested_scales"] = ("float32", (ceil_div(n * groups, NESTED_GROUP),))
        planes["nested_offset"] = ("float32", (1,))
    return planes


def stored_bytes(text: str, n: int, k: int) -> int:
    size = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
    return sum(size[dtype] * int(np.prod(shape)) for dtype, shape in plane_shapes(text, n, k).values())


# ---- bit streams ----


def pack_bits(codes: np.ndarray, bits: int, high_first: bool = False) -> np.ndarray:
    """[rows, count] codes -> [rows, ceil(count * bits / 8)] bytes; every row starts at a byte."""
    rows, count = codes.shape
    if high_first:
        even = np.zeros((rows, ceil_div(count, 2)), np.uint8)
        odd = even.copy()
        even[:, :] = codes[:, 0::2]
        odd[:, : count // 2] = codes[:, 1::2]
        return even * 16 + odd
    stream = (codes[:, :, None].astype(np.int64) >> np.arange(bits)) & 1
    size = ceil_div(count * bits, 8)
    padded = np.zeros((rows, size * 8), np.int64)
    padded[:, : count * bits] = stream.reshape(rows, count * bits)
    return (padded.reshape(rows, size, 8) << np.arange(8)).sum(axis=2).astype(np.uint8)


def unpack_bits(data: np.ndarray, count: int, bits: int, high_first: bool = False) -> np.ndarray:
    """The inverse of pack_bits."""
    rows, size = data.shape
    if high_first:
        both = np.stack([data >> 4, data & 15], axis=2).reshape(rows, size * 2)
        return both[:, :count].astype(np.uint8)
    stream = ((data[:, :, None].astype(np.int64) >> np.arange(8)) & 1).reshape(rows, size * 8)[
        :, : count * bits
    ]
    return (stream.reshape(rows, count, bits) << np.arange(bits)).sum(axis=2).astype(np.uint8)


# ---- encode ----


def split(w: np.ndarray, group: int, together: int = 1) -> np.ndarray:
    """[n, k] -> [rows, groups, columns of a group], the last group padded with zeros; with rows that share their
    scales [ceil(n / together), groups, together * columns], the last rows padded too."""
    n, k = w.shape
    if together > 1:
        bands, count = ceil_div(n, together), ceil_div(k, group)
        padded = np.zeros((bands * together, count * group), w.dtype)
        padded[:n, :k] = w
        tiles = padded.reshape(bands, together, count, group).transpose(0, 2, 1, 3)
        return tiles.reshape(bands, count, together * group)
    if group == TENSOR:
        return w.reshape(1, 1, n * k)
    if group == CHANNEL:
        return w.reshape(n, 1, k)
    count = ceil_div(k, group)
    padded = np.zeros((n, count * group), w.dtype)
    padded[:, :k] = w
    return padded.reshape(n, count, group)


def join(groups: np.ndarray, n: int, k: int, group: int, together: int = 1) -> np.ndarray:
    """The inverse of split."""
    if together > 1:
        bands, count, _ = groups.shape
        tiles = groups.reshape(bands, count, together, group).transpose(0, 2, 1, 3)
        return tiles.reshape(bands * together, count * group)[:n, :k]
    return groups.reshape(n, k) if group <= 0 else groups.reshape(n, groups.shape[1] * group)[:, :k]


def to_binary32(w: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = w.astype(F32)
    bad = np.argwhere(~np.isfinite(narrow))
    if len(bad):
        raise NotFinite(int(bad[0][0]), int(bad[0][1]))
    return narrow


def store_scales(fmt: Format, groups: np.ndarray) -> np.ndarray:
    """The groups' scales in binary32, rounded to the scale dtype and back; refuses what that dtype can't hold."""
    largest, steps = fmt.grid.largest(fmt.asymmetric), fmt.grid.step()
    with np.errstate(under="ignore", over="ignore", invalid="ignore"):
        stored = fmt.grid.spread(groups, fmt.asymmetric) / F32(largest)
        if fmt.scale in ("fp16", "bf16"):
            stored = from_dtype(to_dtype(stored, fmt.scale), fmt.scale)
        exact = fmt.grid.spread(groups.astype(np.float64), fmt.asymmetric) / largest
        over = np.isinf(stored)
        under = np.abs(stored.astype(np.float64) - exact) * steps > exact / 2
    for row, group in np.argwhere(over | under):
        raise (ScaleOverflow if over[row, group] else ScaleUnderflow)(int(row) * fmt.rows, int(group))
    return stored


def nest(scales: np.ndarray, offset: float | None) -> dict[str, np.ndarray]:
    flat = scales.reshape(-1)
    if offset is None:
        total = np.float64(0)
        for start in range(0, len(flat), NESTED_SUM):
            part = np.float64(0)
            for s in flat[start : start + NESTED_SUM]:
                part = part + np.float64(s)
            total = total + part
        offset = F32(total / len(flat)) if len(flat) else F32(0)
    d = flat - F32(offset)
    codes, maxima = np.zeros(len(d), np.uint8), []
    for start in range(0, len(d), NESTED_GROUP):
        part = d[start : start + NESTED_GROUP]
        top = np.abs(part).max()
        maxima.append(top)
        if top > 0:
            t = np.clip(part * (F32(1) / np.maximum(top, F32(1e-38))), F32(-1), F32(1))
            point = np.trunc((t + F32(1)) * F32(0.5) * F32(65535) + F32(0.5))
            t = point / F32(65535) * F32(2) - F32(1)
            codes[start : start + NESTED_GROUP] = nearest_entry(t, DYNAMIC_MAP)
    return {
        "scales": codes.reshape(scales.shape),
        "nested_scales": np.array(maxima, F32).view(np.uint32),
        "nested_offset": np.array([offset], F32).view(np.uint32),
    }


@dataclass
class Logical:
    """Codes [n, k]; scales in binary32 and zeros [rows, groups]; nested planes as stored."""

    codes: np.ndarray
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None
    nested: dict[str, np.ndarray] | None = None


def encode_logical(
    w: np.ndarray, text: str, nested_offset: float | None = None, clamp: bool = False
) -> Logical:
    fmt = parse(text)
    n, k = w.shape
    w = to_binary32(w)
    if fmt.kind == "cast":
        return Logical(fmt.grid.encode(w, clamp))
    groups = split(w, fmt.group, fmt.rows)
    scales = store_scales(fmt, groups)
    blank = scales == 0
    divisor = np.where(blank, F32(1), scales)
    zeros = None
    with np.errstate(under="ignore"):
        if fmt.asymmetric:
            zeros = np.where(blank, np.uint8(0), fmt.grid.zeros(groups, divisor))
        codes = fmt.grid.codes(groups, divisor, zeros)
    # A minifloat keeps the sign of -0 in an all-zero group too: 0 / 1 and -0 / 1 above.
    if fmt.kind != "minifloat":
        codes = np.where(blank[..., None], np.uint8(fmt.grid.zero(fmt.asymmetric)), codes)
    nested = nest(scales, nested_offset) if fmt.scale == "nested" else None
    return Logical(join(codes, n, k, fmt.group, fmt.rows), scales, zeros, nested)


def encode(
    w: np.ndarray, text: str, nested_offset: float | None = None, clamp: bool = False
) -> dict[str, np.ndarray]:
    """The planes of a weight, as bits; OracleError where the specification wants an error."""
    fmt = parse(text)
    logical = encode_logical(w, text, nested_offset, clamp)
    if fmt.kind == "cast":
        return {"codes": logical.codes}
    planes = {"codes": pack_bits(logical.codes, fmt.bits, fmt.grid.high_first)}
    if fmt.scale == "nested":
        planes["scales"] = logical.nested["scales"]
    else:
        planes["scales"] = to_dtype(logical.scales, fmt.scale)
    if fmt.asymmetric:
        planes["zeros"] = pack_bits(logical.zeros, fmt.bits)
    if fmt.scale == "nested":
        planes |= {name: logical.nested[name] for name in ("nested_scales", "nested_offset")}
    return planes


# ---- decode ----


def unpack(planes: dict[str, np.ndarray], text: str, n: int, k: int, layout: str = "rows") -> Logical:
    """Logical codes, scales (binary32) and zeros; layout flat: of the one row of n * k columns."""
    fmt = parse(text)
    if layout == "flat":
        n, k = 1, n * k
    if fmt.kind == "cast":
        return Logical(planes["codes"])
    codes = unpack_bits(planes["codes"], k, fmt.bits, fmt.grid.high_first)
    zeros = unpack_bits(planes["zeros"], groups_in_row(fmt, k), fmt.bits) if fmt.asymmetric else None
    if fmt.scale != "nested":
        return Logical(codes, from_dtype(planes["scales"], fmt.scale), zeros)
    stored = planes["scales"].reshape(-1)
    tops = planes["nested_scales"].view(F32)[np.arange(len(stored)) // NESTED_GROUP]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scales = DYNAMIC_MAP[stored] * tops + planes["nested_offset"].view(F32)[0]
    return Logical(codes, scales.reshape(planes["scales"].shape), zeros)


def decode(planes: dict[str, np.ndarray], text: str, n: int, k: int, layout: str = "rows") -> np.ndarray:
    """The weights [n, k] in binary32."""
    fmt = parse(text)
    logical = unpack(planes, text, n, k, layout)
    if fmt.kind == "cast":
        return fmt.grid.small.value(logical.codes).reshape(n, k)
    codes = logical.codes
    rows, columns = codes.shape
    if fmt.group > 0:
        where = np.arange(columns) // fmt.group
        scales = logical.scales[np.arange(rows) // fmt.rows][:, where]
        zeros = None if logical.zeros is None else logical.zeros[:, where]
    else:
        scales = np.broadcast_to(logical.scales, (rows, columns)) if columns else np.zeros((rows, 0), F32)
        zeros = None if logical.zeros is None else np.broadcast_to(logical.zeros, (rows, columns))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return (fmt.grid.value(codes, zeros) * scales).astype(F32).reshape(n, k)


# ---- compute ----


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [..., k] times decoded weights [n, k] transposed, plus bias [n], in float64."""
    y = x.astype(np.float64) @ w.astype(np.float64).T
    return y if bias is None else y + bias.astype(np.float64)
