"""GPTQ as the paper's algorithm 1 has it (Frantar et al. 2022), in float64: column by column with the upper Cholesky
factor of the inverse of the damped Hessian, no blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def damped(hessian: np.ndarray, damping: float) -> np.ndarray:
    """The Hessian with `damping` times its mean diagonal, over the columns that have inputs, added to its diagonal."""
    diagonal = np.diagonal(hessian)
    return hessian + np.eye(len(hessian)) * damping * diagonal[diagonal > 0].mean()


def solve(
    weight: np.ndarray,
    hessian: np.ndarray,
    order: np.ndarray,
    round_column: Callable[[np.ndarray, int, np.ndarray], np.ndarray],
) -> np.ndarray:
    """The rounded weights, float64 [n, k].

    hessian: damped. order: the columns, the first to be rounded first. round_column(w [n], i, moved [n, k]) -> values
    [n] of column order[i], where `moved` are all weights in that order as they are then.
    """
    moved = weight.astype(np.float64)[:, order]
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T  # inverse = upper.T @ upper
    rounded = np.empty_like(moved)
    for i in range(len(order)):
        rounded[:, i] = round_column(moved[:, i], i, moved)
        error = (moved[:, i] - rounded[:, i]) / upper[i, i]
        moved[:, i:] -= np.outer(error, upper[i, i:])
    result = np.empty_like(rounded)
    result[:, order] = rounded
    return result


def left_over(hessian: np.ndarray) -> np.ndarray:
    """What is left of e H eᵀ for an error of 1 in each column, once the columns after it have made up for what they
    can: one over the diagonal of the inverse of H without the columns before it."""
    k = len(hessian)
    return np.array([1 / np.linalg.inv(hessian[i:, i:])[0, 0] for i in range(k)])


def weighted_error(error: np.ndarray, hessian: np.ndarray) -> float:
    """tr(E H Eᵀ)."""
    return float(np.einsum("ij,ij->", error @ hessian, error))


def by_diagonal(hessian: np.ndarray) -> np.ndarray:
    """The columns by falling diagonal; of equal ones the left first."""
    return np.argsort(-np.diagonal(hessian), kind="stable")


def on_grid(step: np.ndarray, offset: np.ndarray, levels: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The nearest of step * level + offset; levels ascending, step and offset [n]."""
    safe = np.where(step == 0, 1.0, step)
    position = np.where(step == 0, 0.0, (column - offset) / safe)
    nearest = np.abs(position[:, None] - levels[None, :]).argmin(1)
    return levels[nearest] * step + offset


def costs(
    weight: np.ndarray,
    steps: np.ndarray,
    zeros: np.ndarray,
    levels: np.ndarray,
    group: int,
    importance: np.ndarray,
) -> np.ndarray:
    """The sum over each group's columns of importance * |w - step * (level - zero)|^3, each weight at its nearest
    level: float64 [steps, groups, n] of steps of that shape, and zeros [groups, n]."""
    sums = np.zeros(steps.shape)
    for column in range(weight.shape[1]):
        g = column // group
        for i, step in enumerate(steps[:, g]):
            values = (levels[None, :] - zeros[g, :, None]) * step[:, None]
            miss = np.abs(weight[:, column, None] - values).min(1)
            sums[i, g] += importance[column] * miss**3
    return sums
