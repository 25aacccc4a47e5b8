"""The encoders of GGUF's blocks once more, slowly, in numpy, from the description in docs/gguf-blocks.md and from
nothing of bitfold: which search serves which type, with what weights, and which codes the stored scales get.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from oracle_gguf import FP4, LAYOUTS, Parts, fp4_step, of_six_bits, six_bits
from oracle_gguf_search import (
    EPS,
    F32,
    away,
    byte,
    entry,
    f,
    first_largest,
    half,
    inverse,
    nearest,
    search_affine,
    search_descent,
    search_positive,
    search_symmetric,
    search_table,
    single,
    total,
    truncated8,
)

# ---- 32 values without importance: x is [blocks, 32] ----


def plain_symmetric(middle: int, x: np.ndarray) -> Parts:
    _, signed = first_largest(x)
    d = signed / F32(-middle)
    codes = truncated8(x * inverse(d)[:, None] + F32(middle + 0.5))
    return Parts(np.minimum(2 * middle - 1, codes), half(d))


def plain_affine(n: int, x: np.ndarray) -> Parts:
    low, high = np.full(len(x), np.finfo(F32).max), np.full(len(x), np.finfo(F32).min)
    for column in x.T:
        low, high = np.where(column < low, column, low), np.where(column > high, column, high)
    d = (high - low) / F32(n)
    codes = truncated8((x - low[:, None]) * inverse(d)[:, None] + F32(0.5))
    return Parts(np.minimum(15, codes) if n == 15 else byte(codes), half(d), half(low))


def q8_0(x: np.ndarray, q: np.ndarray | None) -> Parts:
    d = first_largest(x)[0] / F32(127)
    return Parts(truncated8(away(x * inverse(d)[:, None])), half(d))


def floor_log2(largest: np.ndarray) -> np.ndarray:
    """floor(log2f(x)), which just below a power of two is the power's exponent: the logarithm was rounded."""
    field = largest.view(np.uint32) >> 23
    normal = field > 0
    e = field.astype(np.int64) - 127
    mantissa = (largest.view(np.uint32) & 0x7FFFFF).astype(np.int64)
    a = np.where(e >= 0, e, -e - 1)
    bands = np.array([0, 0, 1, 2, 5, 11, 22, 44])  # by the bits of a
    band = bands[np.floor(np.log2(np.maximum(a, 0.5))).astype(int) + 1]
    rule = np.where(mantissa >= 2**23 - band, e + 1, e)
    rounded = np.log2(np.where(largest > 0, largest, F32(1)).astype(np.float64)).astype(F32)
    return np.where(normal, rule, np.floor(rounded).astype(np.int64))


def mxfp4(x: np.ndarray, q: np.ndarray | None) -> Parts:
    largest = first_largest(x)[0]
    exponent = np.where(largest == 0, 0, byte(floor_log2(largest) - 2 + 127))
    values = FP4.astype(F32)[None, :] * fp4_step(exponent)
    codes = np.abs(values[:, None, :] - x[:, :, None]).argmin(axis=2)  # the first of equals
    return Parts(codes, exponent)


# ---- weights that importance q gives values ----


def weigh(x: np.ndarray, q: np.ndarray, sigma2: np.ndarray) -> np.ndarray:
    return q * np.sqrt(sigma2[:, None] + x * x)


# ---- 256 values: x and q are [blocks, 256] ----


def sub_blocks(x: np.ndarray, size: int) -> np.ndarray:
    return x.reshape(-1, size)


def super_weights(x: np.ndarray, q: np.ndarray, factor: int) -> np.ndarray:
    """[blocks, 256] weights: sigma2 is `factor` * (sum of x * x) / 256."""
    return weigh(x, q, F32(factor) * total(x * x) / F32(256))


def recode_affine(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray, n: int
) -> np.ndarray:
    """Codes again for the stored scales [blocks, sub-blocks]; a sub-block whose scale is zero keeps its codes."""
    size = 256 // scale.shape[1]
    scale, minimum = np.repeat(scale, size, axis=1), np.repeat(minimum, size, axis=1)
    return np.where(scale == 0, codes, np.clip(nearest((x + minimum) / scale), 0, n))


def recode_symmetric(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, n: int) -> np.ndarray:
    scale = np.repeat(scale, 256 // scale.shape[1], axis=1)
    return np.where(scale == 0, codes, np.clip(nearest(x / scale), -n, n - 1) + n)


def q2_k(x: np.ndarray, q: np.ndarray | None) -> Parts:
    groups = sub_blocks(x, 16)
    if q is None:
        codes, scale, minimum = search_affine(3, groups, np.abs(groups), -0.5, 0.1, 15, mad=True)
        scale, minimum = scale.reshape(-1, 16), minimum.reshape(-1, 16)
        top_scale, top_minimum = (np.maximum(v.max(axis=1), F32(0)) for v in (scale, minimum))
        scales = np.where(top_scale > 0, byte(nearest((F32(15) / top_scale)[:, None] * scale).T), 0).T
        mins = np.where(
            top_minimum > 0, byte(nearest((F32(15) / top_minimum)[:, None] * minimum).T * 16), 0
        ).T
        d, dmin = (np.where(v > 0, v / F32(15), F32(0)) for v in (top_scale, top_minimum))
    else:
        w = sub_blocks(super_weights(x, q, 1), 16)
        codes, scale, minimum = search_affine(3, groups, w, -0.9, 0.05, 36)
        sums = total(w).reshape(-1, 16)
        scales, d = search_positive(15, scale.reshape(-1, 16), sums)
        mins, dmin = search_positive(15, minimum.reshape(-1, 16), sums)
        mins = byte(mins * 16)
    both = scales | mins
    d, dmin = half(d), half(dmin)
    effective = single(d)[:, None] * f(both & 15)
    codes = recode_affine(x, codes.reshape(-1, 256), effective, single(dmin)[:, None] * f(both >> 4), 3)
    return Parts(codes, d, dmin, both & 15, both >> 4)


def q3_k(x: np.ndarray, q: np.ndarray | None) -> Parts:
    groups = sub_blocks(x, 16)
    if q is None:
        codes, scale = search_descent(groups)
        scale = scale.reshape(-1, 16)
        _, top = first_largest(scale)
        k = F32(-32) / top
        signed = (byte(nearest(k[:, None] * scale))).astype(np.uint8).astype(np.int8).astype(np.int64)
        scales = np.where((top == 0)[:, None], 0, np.clip(signed, -32, 31) + 32)
        d = np.where(top == 0, F32(0), F32(1) / k)
    else:
        w = sub_blocks(super_weights(x, q, 2), 16)
        codes, scale = search_symmetric(4, groups, w)
        scales, d = search_symmetric(32, scale.reshape(-1, 16), total(w).reshape(-1, 16))
    d = half(d)
    codes = recode_symmetric(x, codes.reshape(-1, 256), single(d)[:, None] * f(scales - 32), 4)
    return Parts(codes, d, scales=scales)


def q45_k(n: int, x: np.ndarray, q: np.ndarray | None) -> Parts:
    groups = sub_blocks(x, 32)
    if q is None:
        w = np.sqrt(total(groups * groups) / F32(32))[:, None] + np.abs(groups)
        search = (-1.0, 0.1, 20) if n == 15 else (-0.5, 0.1, 15)
        codes, scale, minimum = search_affine(n, groups, w, *search)
        integers, steps = [], []
        for numbers in (scale.reshape(-1, 8), minimum.reshape(-1, 8)):
            top = np.maximum(numbers.max(axis=1), F32(0))
            k = np.where(top > 0, F32(63) / top, F32(0))
            integers.append(np.minimum(63, byte(nearest(k[:, None] * numbers))))
            steps.append(half(top / F32(63)))
    else:
        w = sub_blocks(super_weights(x, q, 2), 32)
        codes, scale, minimum = search_affine(n, groups, w, -0.9, 0.05, 36)
        sums = total(w).reshape(-1, 8)
        found = [search_positive(63, v.reshape(-1, 8), sums) for v in (scale, minimum)]
        integers = [np.minimum(63, codes) if n == 31 else codes for codes, _ in found]
        steps = [half(step) for _, step in found]
    # As they can be read again: an integer that wrapped below zero has spilt over another one's high bits.
    scales, mins = of_six_bits(six_bits(*integers))
    d, dmin = steps
    effective = single(d)[:, None] * f(scales)
    codes = recode_affine(x, codes.reshape(-1, 256), effective, single(dmin)[:, None] * f(mins), n)
    return Parts(codes, d, dmin, scales, mins)


def q6_k(x: np.ndarray, q: np.ndarray | None) -> Parts:
    groups = sub_blocks(x, 16)
    codes, scale = search_symmetric(32, groups, groups * groups if q is None else sub_blocks(q, 16))
    scale = scale.reshape(-1, 16)
    largest, top = first_largest(scale)
    k = F32(-128) / top
    d = half(F32(1) / k)
    scales = np.minimum(127, nearest(k[:, None] * scale))
    codes = recode_symmetric(x, codes.reshape(-1, 256), single(d)[:, None] * f(scales), 32)
    blank = largest < EPS
    return Parts(
        np.where(blank[:, None], 0, codes),
        np.where(blank, np.uint16(0), d),
        scales=np.where(blank[:, None], 0, scales),
    )


# ---- the 16-entry table ----


def table_scales(x: np.ndarray, q: np.ndarray | None) -> np.ndarray:
    """[blocks, values] -> the scales of all sub-blocks of 32."""
    w = x * x if q is None else weigh(x, q, total(x * x) * F32(2 / x.shape[1]))
    return search_table(sub_blocks(x, 32), sub_blocks(w, 32)).reshape(len(x), -1)


def iq4_nl(x: np.ndarray, q: np.ndarray | None) -> Parts:
    scale = table_scales(x, q)[:, 0]
    return Parts(entry(inverse(scale)[:, None] * x), half(scale))


def iq4_xs(x: np.ndarray, q: np.ndarray | None) -> Parts:
    scale = table_scales(x, q)
    d = -first_largest(scale)[1] / F32(32)
    integers = np.clip(nearest(inverse(d)[:, None] * scale), -32, 31)
    steps = inverse(d[:, None] * f(integers))
    return Parts(entry(np.repeat(steps, 32, axis=1) * x), half(d), scales=integers + 32)


# ---- 32 values with importance: a row's mean square is a weight of all its blocks ----


def searched(name: str, x: np.ndarray, w: np.ndarray) -> Parts:
    if name in ("q4_0", "q5_0"):
        codes, scale = search_symmetric(8 if name == "q4_0" else 16, x, w)
        return Parts(codes, half(scale))
    codes, scale, minimum = search_affine(15 if name == "q4_1" else 31, x, w, -0.9, 0.05, 36)
    return Parts(codes, half(scale), half(-minimum))


PLAIN = {
    "q4_0": lambda x: plain_symmetric(8, x),
    "q4_1": lambda x: plain_affine(15, x),
    "q5_0": lambda x: plain_symmetric(16, x),
    "q5_1": lambda x: plain_affine(31, x),
}
SEARCHED: dict[str, Callable[[np.ndarray, np.ndarray | None], Parts]] = {
    "q8_0": q8_0,
    "mxfp4": mxfp4,
    "q2_k": q2_k,
    "q3_k": q3_k,
    "q4_k": lambda x, q: q45_k(15, x, q),
    "q5_k": lambda x, q: q45_k(31, x, q),
    "q6_k": q6_k,
    "iq4_nl": iq4_nl,
    "iq4_xs": iq4_xs,
}


def encode(x: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """binary32 [n, k] -> uint8 [n, bytes of a row]; importance: binary32 [k]. Infinite scales are stored as such."""
    layout = LAYOUTS[name]
    n, k = x.shape
    if x.size == 0:
        return np.zeros((n, k // layout.values * layout.bytes), np.uint8)
    blocks = x.reshape(-1, layout.values)
    with np.errstate(all="ignore"):
        if name in PLAIN and importance is None:
            parts = PLAIN[name](blocks)
        else:
            q = None if importance is None else np.tile(importance, (n, 1)).reshape(blocks.shape)
            if name in PLAIN:
                sigma2 = np.repeat(total(x * x) / F32(k), k // layout.values)
                parts = searched(name, blocks, weigh(blocks, q, sigma2))
            else:
                parts = SEARCHED[name](blocks, q)
    return layout.pack(parts).reshape(n, -1)
