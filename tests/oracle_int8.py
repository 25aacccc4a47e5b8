"""Products of GGUF's blocks with activations of 8 bits, slowly, in numpy: docs/gguf-blocks.md, "Activations of 8 bits".

Whole numbers are int64, and everything else is binary32, operation by operation in the order of the page: the bits of
the result are the contract. Nothing here imports bitfold.
"""

from __future__ import annotations

import numpy as np
from oracle_gguf import F32, FP4, IQ4, LAYOUTS, Parts, fp4_step, number

SMALLEST = F32(2.0**-100)
# What a code stands for, before its scale; and what the integers of sub-blocks are less by.
MEANINGS = {
    "q4_0": lambda c: c - 8,
    "q5_0": lambda c: c - 16,
    "q3_k": lambda c: c - 4,
    "q6_k": lambda c: c - 32,
    "iq4_nl": lambda c: IQ4[c],
    "iq4_xs": lambda c: IQ4[c],
    "mxfp4": lambda c: FP4[c],
}
SCALE_MIDDLES = {"q3_k": 32, "iq4_xs": 32}


def quantize(x: np.ndarray, values: int) -> tuple[np.ndarray, np.ndarray]:
    """binary32 [m, k] -> codes int64 [m, blocks, values] and steps binary32 [m, blocks]."""
    blocks = x.astype(F32).reshape(len(x), x.shape[1] // values, values)
    with np.errstate(all="ignore"):
        largest = np.abs(blocks).max(axis=2)
        finite = np.isfinite(blocks).all(axis=2)
        some = finite & (largest >= SMALLEST)
        steps = np.where(some, largest / F32(127), F32(0)).astype(F32)
        steps[~finite] = np.nan
        inverse = np.where(some, F32(127) / largest, F32(0)).astype(F32)
        scaled = np.where(some[:, :, None], blocks, F32(0)) * inverse[:, :, None]
    assert scaled.dtype == F32
    return np.rint(scaled).astype(np.int64), steps


def integers(parts: Parts, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [blocks, values], and scales and minima [blocks, sub-blocks], as the whole numbers that they mean."""
    codes = MEANINGS.get(name, lambda c: c)(parts.codes)
    none = np.zeros((len(codes), 1), np.int64)
    scales = none + 1 if parts.scales is None else parts.scales - SCALE_MIDDLES.get(name, 0)
    return codes, scales, none if parts.mins is None else parts.mins


def linear(x: np.ndarray, data: np.ndarray, name: str) -> np.ndarray:
    """x [m, k] times the rows that uint8 [n, bytes of a row] means, binary32 [m, n]."""
    layout = LAYOUTS[name]
    n, m = len(data), len(x)
    count = data.shape[1] // layout.bytes
    parts = layout.unpack(data.reshape(-1, layout.bytes))
    codes, scales, mins = integers(parts, name)
    d = (fp4_step(parts.d) if name == "mxfp4" else number(parts.d)).reshape(n, count)
    lows = None if parts.m is None else number(parts.m).reshape(n, count)
    subs = scales.shape[1]
    codes = codes.reshape(n, count, subs, -1)
    scales, mins = scales.reshape(n, count, subs), mins.reshape(n, count, -1)
    x_codes, steps = quantize(x, layout.values)
    x_codes = x_codes.reshape(m, count, subs, layout.values // subs)
    y = np.zeros((m, n), F32)
    with np.errstate(all="ignore"):
        for b in range(count):
            step = steps[:, b, None]
            dots = np.einsum("msi,nsi->mns", x_codes[:, b], codes[:, b])
            total = np.zeros((m, n), F32)
            for s in range(subs):
                total = total + dots[:, :, s].astype(F32) * scales[:, b, s].astype(F32)
            value = total * (d[:, b] * step)
            if lows is not None:
                sums = x_codes[:, b].sum(axis=2)
                if parts.mins is None:  # blocks of 32 columns, which add theirs
                    value = value + sums.astype(F32) * (lows[:, b] * step)
                else:
                    value = value - (sums @ mins[:, b].T).astype(F32) * (lows[:, b] * step)
            y = y + value
    assert y.dtype == F32
    return y
