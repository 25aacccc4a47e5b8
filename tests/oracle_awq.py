"""AWQ straight from the paper (Lin et al. 2023, equations 4 and 5), slowly, in numpy's float64, token by token.

Nothing here knows of Gram matrices, rankings or pieces: candidates are rounded by the oracle of formats, and an error
is that of the layer's outputs.
"""

from __future__ import annotations

import numpy as np
import oracle
import oracle_encode

LEAST = 1e-3  # of the mean over channels: inputs are taken to be at least so large


def rounded(w: np.ndarray, format: str) -> np.ndarray:
    """What a format makes of a matrix, float64."""
    n, k = w.shape
    return oracle.decode(oracle_encode.encode(w.astype(np.float32), format), format, n, k).astype(np.float64)


def scales(magnitudes: np.ndarray, alpha: float) -> np.ndarray:
    """m^alpha, divided by its geometric mean."""
    m = np.maximum(magnitudes, LEAST * magnitudes.mean())
    s = m**alpha
    return s / np.exp(np.log(s).mean())


def output_error(w: np.ndarray, changed: np.ndarray, x: np.ndarray) -> float:
    """The squared change of the output over all tokens: x [tokens, k]."""
    return float((((changed - w) @ x.T) ** 2).sum())


def scale_errors(w: np.ndarray, format: str, x: np.ndarray, magnitudes: np.ndarray, grid: int) -> list[float]:
    """The error of Q(W diag(s)) diag(s)^-1 for alpha = 0, 1 / grid, ..."""
    errors = []
    for point in range(grid):
        s = scales(magnitudes, point / grid)
        errors.append(output_error(w, rounded(w * s, format) / s, x))
    return errors


def clip_errors(
    row: np.ndarray, format: str, x: np.ndarray, shares: list[float], asymmetric: bool
) -> list[float]:
    """Of one group [width] of one row, its inputs [tokens, width]: the error of each share of its range."""
    errors = []
    for share in shares:
        if asymmetric:
            low, high = share * min(0.0, row.min()), share * max(0.0, row.max())
        else:
            high = share * np.abs(row).max()
            low = -high
        clipped = rounded(np.clip(row, low, high)[None], format)
        errors.append(output_error(row[None], clipped, x))
    return errors
