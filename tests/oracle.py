"""docs/formats.md once more, slowly, in numpy: what the tests compare bitfold with.

What encodes is in oracle_encode.py, floats of 16 and 8 bits are in oracle_floats.py. Nothing here imports bitfold, and
every table is typed from the specification. Planes are dicts of numpy arrays of *bits*: float16 and bfloat16 as uint16,
float32 as uint32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from oracle_floats import BF16, E4M3, E5M2, F32, FP16, SmallFloat, from_dtype

TENSOR, CHANNEL = 0, -1
NESTED_GROUP = 256


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

PLANE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "nested": "uint8"}


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


# ---- decode ----


@dataclass
class Logical:
    """Codes [n, k]; scales in binary32 and zeros [rows, groups]; nested planes as stored."""

    codes: np.ndarray
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None
    nested: dict[str, np.ndarray] | None = None


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
