"""docs/formats.md once more, slowly, in numpy: how weights become planes. Every step is one numpy operation on float32,
and nothing here imports bitfold; which code a weight gets is the affair of its grid in oracle.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from oracle import (
    CHANNEL,
    DYNAMIC_MAP,
    NESTED_GROUP,
    TENSOR,
    Format,
    Logical,
    ceil_div,
    nearest_entry,
    pack_bits,
    parse,
)
from oracle_floats import F32, SmallFloat, from_dtype, to_dtype

NESTED_SUM = 1024


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


def cast(w: np.ndarray, small: SmallFloat, clamp: bool) -> np.ndarray:
    beyond = small.beyond(w)
    if beyond.any() and not clamp:
        row, column = np.argwhere(beyond)[0]
        raise CastOverflow(int(beyond.sum()), int(row), int(column))
    return small.code(w, saturate=True)


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


def encode_logical(
    w: np.ndarray, text: str, nested_offset: float | None = None, clamp: bool = False
) -> Logical:
    fmt = parse(text)
    n, k = w.shape
    w = to_binary32(w)
    if fmt.kind == "cast":
        return Logical(cast(w, fmt.grid.small, clamp))
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
