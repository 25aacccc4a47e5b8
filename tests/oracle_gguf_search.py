"""What the encoders of GGUF's blocks are made of, slowly, in numpy: their roundings and their searches for scales,
every operation rounded to binary32, in the order of the description in docs/gguf-blocks.md, and nothing of bitfold.

Sums run over the values of a sub-block one by one; numpy's vectors run across sub-blocks, which are independent. A
sub-block that a search has left early keeps its numbers through masks.
"""

from __future__ import annotations

import numpy as np
from oracle_gguf import IQ4

F32 = np.float32
EPS = F32(1e-15)


# ---- primitives ----


def nearest(v: np.ndarray) -> np.ndarray:
    """RN: the nearest integer, ties to even; what is too large for that wraps as the bits do."""
    bits = np.asarray(v + F32(12582912.0), F32).view(np.int32).astype(np.int64)
    return (bits & 0x7FFFFF) - 4194304


def truncated8(v: np.ndarray) -> np.ndarray:
    """TI8: truncated to int32 (what doesn't fit gives -2^31), its low 8 bits as a signed number."""
    fits = (v > F32(-2147483904)) & (v < F32(2147483648))
    whole = np.where(fits, np.trunc(np.where(fits, v, F32(0))), F32(-2147483648)).astype(np.int64)
    return (whole & 255).astype(np.uint8).astype(np.int8).astype(np.int64)


def away(v: np.ndarray) -> np.ndarray:
    """RA: the nearest whole number, ties away from zero, in binary32."""
    whole = np.trunc(v)
    return np.where(np.abs(v - whole) >= F32(0.5), whole + np.copysign(F32(1), v), whole).astype(F32)


def byte(i: np.ndarray) -> np.ndarray:
    return i & 255


def half(v: np.ndarray) -> np.ndarray:
    """H: bits of the nearest binary16 number; overflow gives infinity, and what is no number the NaN that x86 makes."""
    return np.where(np.isnan(v), np.uint16(0xFE00), v.astype(np.float16).view(np.uint16))


def single(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(F32)


def f(i: np.ndarray | int) -> np.ndarray:
    return np.asarray(i, F32)


def entry(v: np.ndarray) -> np.ndarray:
    """Index of the entry of IQ4 nearest to v, a tie takes the upper one; NaN gives the last."""
    table = IQ4.astype(F32)
    m = np.clip((table <= v[..., None]).sum(axis=-1), 1, 15)
    below = v - table[m - 1] < table[m] - v
    inside = np.where(below, m - 1, m)
    return np.where(v <= table[0], 0, np.where(v >= table[15], 15, np.where(np.isnan(v), 15, inside)))


def first_largest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of [rows, values]: the largest |x| and the signed value of the first that has it; both +0 for zeros."""
    largest, signed = np.zeros(len(x), F32), np.zeros(len(x), F32)
    for column in x.T:
        more = np.abs(column) > largest
        largest, signed = np.where(more, np.abs(column), largest), np.where(more, column, signed)
    return largest, signed


def total(x: np.ndarray, start: int = 0) -> np.ndarray:
    """The sum of each row from the left: of +0 and all values, or with `start` 1 of the first value and the others."""
    s = x[:, 0] if start else np.zeros(len(x), F32)
    for column in x.T[start:]:
        s = s + column
    return s


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b where b is not zero, else 0 (both binary32)."""
    return np.where(b != 0, a / b, F32(0)).astype(F32)


def inverse(d: np.ndarray) -> np.ndarray:
    return ratio(np.ones_like(d), d)


# ---- searches: x, w are [rows, n]; the results are codes [rows, n] and numbers [rows] ----


def search_symmetric(n: int, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SYM: codes 0 ... 2n - 1 and the signed scale of their offset by n."""
    largest, signed = first_largest(x)

    def attempt(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = np.clip(nearest(factor[:, None] * x), -n, n - 1)
        return codes, total(w * x * f(codes)), total(w * f(codes) * f(codes))

    best_codes, a, b = attempt(F32(-n) / signed)
    scale = ratio(a, b)
    best = scale * a
    for s in (*range(-9, 0), *range(1, 10)):
        codes, a, b = attempt(-(F32(n) + F32(0.1) * F32(s)) / signed)
        wins = (b > 0) & (a * a > best * b)
        best_codes = np.where(wins[:, None], codes, best_codes)
        scale = np.where(wins, a / b, scale)
        best = np.where(wins, scale * a, best)
    tiny = largest < EPS
    return np.where(tiny[:, None], 0, best_codes + n), np.where(tiny, F32(0), scale)


def search_descent(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SYM3: codes 0 ... 7 and the signed scale of their offset by 4."""
    n = 4
    largest, signed = first_largest(x)
    w = x * x
    codes = np.clip(nearest((F32(-n) / signed)[:, None] * x), -n, n - 1)
    a, b = total(w * x * f(codes)), total(w * f(codes) * f(codes))
    for _ in range(5):
        before = codes.copy()
        for i in range(x.shape[1]):
            weighted, old = w[:, i] * x[:, i], f(codes[:, i])
            a2 = a - weighted * old
            b2 = b - w[:, i] * old * old
            new = np.clip(nearest(x[:, i] * b2 / a2), -n, n - 1)
            moved = (a2 > 0) & (new != codes[:, i])
            a2, b2 = a2 + weighted * f(new), b2 + w[:, i] * f(new) * f(new)
            moved &= (b2 > 0) & (a2 * a2 * b > a * a * b2)
            codes[:, i] = np.where(moved, new, codes[:, i])
            a, b = np.where(moved, a2, a), np.where(moved, b2, b)
        if (codes == before).all():
            break
    tiny = largest < EPS
    scale = np.where(b > 0, ratio(a, b), F32(0))
    return np.where(tiny[:, None], 0, codes + n), np.where(tiny, F32(0), scale)


def search_affine(
    n: int, x: np.ndarray, w: np.ndarray, rmin: float, rdelta: float, steps: int, mad: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AFF: codes 0 ... n, scale and minimum: x ~ scale * code - minimum."""
    low, high = x[:, 0], x[:, 0]
    for column in x.T[1:]:
        low, high = np.where(column < low, column, low), np.where(column > high, column, high)
    sum_w, sum_x = total(w, start=1), total(w * x, start=1)
    low = np.where(low > 0, F32(0), low)
    flat = high == low
    flat_minimum = -low

    def codes_of(factor: np.ndarray) -> np.ndarray:
        return np.clip(nearest(factor[:, None] * (x - low[:, None])), 0, n)

    def error(scale: np.ndarray, minimum: np.ndarray, codes: np.ndarray) -> np.ndarray:
        e = scale[:, None] * f(codes) + minimum[:, None] - x
        return total(w * np.abs(e)) if mad else total(w * (e * e))

    factor = F32(n) / (high - low)
    scale = F32(1) / factor
    best_codes = codes_of(factor)
    best = error(scale, low, best_codes)
    for s in range(steps + 1):
        factor = (F32(rmin) + F32(rdelta) * F32(s) + F32(n)) / (high - low)
        codes = codes_of(factor)
        c = f(codes)
        p, q, r = total(w * c), total(w * c * c), total(w * c * x)
        d = sum_w * q - p * p
        this_scale = (sum_w * r - sum_x * p) / d
        this_low = (q * sum_x - p * r) / d
        positive = this_low > 0
        this_scale = np.where(positive, r / q, this_scale)
        this_low = np.where(positive, F32(0), this_low)
        e = error(this_scale, this_low, codes)
        wins = (d > 0) & (e < best)
        best_codes = np.where(wins[:, None], codes, best_codes)
        best, scale = np.where(wins, e, best), np.where(wins, this_scale, scale)
        low = np.where(wins, this_low, low)
    return (
        np.where(flat[:, None], 0, best_codes),
        np.where(flat, F32(0), scale),
        np.where(flat, flat_minimum, -low),
    )


def search_positive(n: int, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """POS: codes 0 ... n as bytes, and the scale, of numbers that are seldom negative."""
    largest = np.zeros(len(x), F32)
    for column in x.T:
        largest = np.where(largest > column, largest, column)

    def error(scale: np.ndarray, codes: np.ndarray) -> np.ndarray:
        e = x - scale[:, None] * f(codes)
        return total(w * e * e)

    def codes_of(factor: np.ndarray) -> np.ndarray:
        return nearest(factor[:, None] * x)

    factor = F32(n) / largest
    best = error(F32(1) / factor, byte(codes_of(factor)))
    for s in (*range(-4, 0), *range(1, 5)):
        other = (F32(0.1) * F32(s) + F32(n)) / largest
        e = error(F32(1) / other, np.minimum(n, codes_of(other)))
        wins = e < best
        best, factor = np.where(wins, e, best), np.where(wins, other, factor)
    found = np.minimum(n, codes_of(factor))
    a, b = total(w * x * f(found)), total(w * f(found) * f(found))
    codes = byte(found)
    for _ in range(5):
        changed = False  # counted where sums change: a number below 0 may wrap to the byte that was there
        for i in range(x.shape[1]):
            weighted, old = w[:, i] * x[:, i], f(codes[:, i])
            a2, b2 = a - weighted * old, b - w[:, i] * old * old
            new = np.minimum(n, nearest(x[:, i] * b2 / a2))
            moved = (a2 > 0) & (b2 > 0) & (new != codes[:, i])
            a2, b2 = a2 + weighted * f(new), b2 + w[:, i] * f(new) * f(new)
            moved &= a2 * a2 * b > a * a * b2
            codes[:, i] = np.where(moved, byte(new), codes[:, i])
            a, b = np.where(moved, a2, a), np.where(moved, b2, b)
            changed |= bool(moved.any())
        if not changed:
            break
    tiny = largest < EPS
    scale = np.where(b > 0, ratio(a, b), F32(0))
    return np.where(tiny[:, None], 0, codes), np.where(tiny, F32(0), scale)


# ---- the 16-entry table ----


def search_table(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The scale of each row of 32 values, of either sign; 0 for values below EPS."""
    largest, signed = first_largest(x)

    def attempt(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        v = IQ4[entry(factor[:, None] * x)].astype(F32)
        return total(w * v * x), total(w * v * v)

    a, b = attempt(F32(1) / (-signed / F32(-127)))
    scale = np.where(b > 0, ratio(a, b), F32(0))
    best = scale * a
    for s in range(-7, 8):
        a, b = attempt(F32(s - 127) / signed)
        wins = (b > 0) & (a * a > best * b)
        scale = np.where(wins, a / b, scale)
        best = np.where(wins, scale * a, best)
    return np.where(largest < EPS, F32(0), scale)
