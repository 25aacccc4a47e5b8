"""Activations of 8-bit floats (docs/activations-fp8.md) once more, in numpy: what the tests compare linear_fp8 with."""

from __future__ import annotations

import numpy as np
from oracle_floats import E4M3, F32


def round_rows(x: np.ndarray, x_scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 and scales in binary32 of the rows of x [m, k]; a row that has no scale: NaN."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        x = x.astype(F32)
        if x_scale is None:
            largest = np.abs(x).max(axis=1, initial=0)
            scales = np.where(np.isfinite(x).all(axis=1), largest / F32(448), F32(np.nan))
        else:
            scales = np.where(np.isnan(x).any(axis=1), F32(np.nan), F32(x_scale))
        none = np.isnan(scales)
        divisor = np.where(none | (scales == 0), F32(1), scales)
        quotient = np.where(none[:, None], F32(0), x) / divisor[:, None]
        codes = E4M3.code(np.clip(quotient, -1e30, 1e30), saturate=True)
    return np.where(none[:, None], np.uint8(0x7F), codes), scales.astype(F32)


def rounded(x: np.ndarray, x_scale: float | None = None) -> np.ndarray:
    """What x stands for then, in float64."""
    codes, scales = round_rows(x, x_scale)
    return E4M3.value(codes).astype(np.float64) * scales.astype(np.float64)[:, None]


def linear(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, x_scale: float | None = None
) -> np.ndarray:
    """x [m, k] rounded, times decoded weights [n, k] transposed, plus bias [n], in float64."""
    y = rounded(x, x_scale) @ w.astype(np.float64).T
    return y if bias is None else y + bias.astype(np.float64)
