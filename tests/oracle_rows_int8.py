"""Products with x rounded to 8 bits, row by row, slowly, in numpy: docs/activations.md, "The product, exactly".

Whole numbers are int64. `real` is binary32, operation by operation in the order of the page, where the bits of the
result are the contract, or binary64, where x is. Nothing here imports bitfold.
"""

from __future__ import annotations

import numpy as np

SMALLEST = 2.0**-100
PART = 65536


def outliers(x: np.ndarray, threshold: float, per_row: bool, columns: list[int]) -> np.ndarray:
    """Which numbers of x [m, k] are multiplied as they are."""
    large = np.isfinite(x) & (np.abs(x) >= x.dtype.type(threshold)) if threshold else np.zeros(x.shape, bool)
    found = large if per_row else np.broadcast_to(large.any(axis=0), x.shape).copy()
    found[:, columns] = True
    return found


def quantize(x: np.ndarray, taken: np.ndarray, x_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """x [m, k] of `real` -> codes int64 [m, k] and steps [m]."""
    real = x.dtype.type
    finite = np.isfinite(x).all(axis=1)
    rest = np.where(taken | ~finite[:, None], real(0), x)
    with np.errstate(all="ignore"):
        if x_scale is not None:
            steps = np.full(len(x), real(np.float32(x_scale)))
            inverse = real(1) / steps
        else:
            largest = np.abs(rest).max(axis=1, initial=real(0))
            some = largest >= SMALLEST
            steps = np.where(some, largest / real(127), real(0)).astype(real)
            inverse = np.where(some, real(127) / np.where(some, largest, real(1)), real(0)).astype(real)
        codes = np.clip(np.rint(rest * inverse[:, None]), -127, 127).astype(np.int64)
    return codes, np.where(finite, steps, real("nan")).astype(real)


def linear(
    x: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    bias: np.ndarray | None = None,
    threshold: float = 0.0,
    per_row: bool = False,
    x_scale: float | None = None,
    columns: list[int] | None = None,
    copy: np.ndarray | None = None,
) -> np.ndarray:
    """x [m, k] binary32 or binary64; codes uint8 [n, k], scales and zeros [n]; bias [n]; copy [n, c] -> [m, n]."""
    real = x.dtype.type
    columns = columns or []
    m, k = x.shape
    taken = outliers(x, threshold, per_row, columns)
    x_codes, steps = quantize(x, taken, x_scale)
    whole = codes.astype(np.int64) - zeros.astype(np.int64)[:, None]
    scales = scales.astype(real)
    y = np.zeros((m, len(codes)), real)
    with np.errstate(all="ignore"):
        for first in range(0, max(k, 1), PART):
            sums = x_codes[:, first : first + PART] @ whole[:, first : first + PART].T
            value = sums.astype(real) * (steps[:, None] * scales)
            y = value if first == 0 else y + value
        alone = np.where(taken & np.isfinite(x).all(axis=1)[:, None], x, real(0))
        loose = np.zeros_like(y)
        for c in range(k):
            if c not in columns and alone[:, c].any():
                loose = loose + alone[:, c, None] * whole[:, c].astype(real)
        y = y + scales * loose
        if columns:
            exact = np.zeros_like(y)
            for place, c in enumerate(columns):
                exact = exact + alone[:, c, None] * copy[:, place].astype(real)
            y = y + exact
        if bias is not None:
            y = y + bias.astype(real)
    assert y.dtype == real
    return y
