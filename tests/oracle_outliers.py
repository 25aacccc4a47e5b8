"""Outlier features and int8 in numpy float64, from the papers: slow, and nothing of bitfold.

LLM.int8() (Dettmers et al. 2022, sections 3.1 and 3.2): a row of x has the step max|x| / 127, a row of W has one too;
columns in which some row reaches the threshold are taken out and multiplied as they are.
"""

from __future__ import annotations

import numpy as np


def rounded(values: np.ndarray, group: int | None = None) -> np.ndarray:
    """Each row, or each `group` columns of it, rounded to 8 bits with one step."""
    found = np.zeros(values.shape)
    for i, row in enumerate(values):
        for start in range(0, len(row), group or len(row)):
            part = row[start : start + (group or len(row))]
            step = np.abs(part).max() / 127
            if step > 0:
                found[i, start : start + len(part)] = np.rint(part / step) * step
    return found


def outlier_columns(x: np.ndarray, threshold: float) -> list[int]:
    return [j for j in range(x.shape[1]) if any(abs(value) >= threshold for value in x[:, j])]


def int8(x: np.ndarray, w: np.ndarray, group: int | None = None) -> np.ndarray:
    return rounded(x, group) @ rounded(w, group).T


def llm_int8(x: np.ndarray, w: np.ndarray, threshold: float, *, exact: bool) -> np.ndarray:
    """exact: outlier columns of W are as they were; else they went through the 8 bits of their rows."""
    kept = outlier_columns(x, threshold)
    others = [j for j in range(x.shape[1]) if j not in kept]
    in_8 = rounded(w)
    return rounded(x[:, others]) @ in_8[:, others].T + x[:, kept] @ (w if exact else in_8)[:, kept].T


WAYS = {
    "int8": lambda x, w, t: int8(x, w),
    "int8-g128": lambda x, w, t: int8(x, w, 128),
    "llm-int8": lambda x, w, t: llm_int8(x, w, t, exact=False),
    "llm-int8-exact": lambda x, w, t: llm_int8(x, w, t, exact=True),
}


def losses(calls: list[np.ndarray], w: np.ndarray, threshold: float) -> dict[str, float]:
    """Relative output error over calls [tokens, k], by way."""
    found = {}
    for way, compute in WAYS.items():
        change = sum(((compute(x, w, threshold) - x @ w.T) ** 2).sum() for x in calls)
        found[way] = float(np.sqrt(change / sum(((x @ w.T) ** 2).sum() for x in calls)))
    return found


def features(calls: list[np.ndarray], threshold: float) -> dict[int, dict[str, float]]:
    """Of each column with an outlier: peak, shares of tokens and sequences, of one sign, and mean magnitude."""
    x = np.concatenate(calls)
    found = {}
    for j in outlier_columns(x, threshold):
        hits = x[np.abs(x[:, j]) >= threshold, j]
        found[j] = {
            "peak": np.abs(x[:, j]).max(),
            "token_share": len(hits) / len(x),
            "sequence_share": sum(bool(outlier_columns(call[:, [j]], threshold)) for call in calls)
            / len(calls),
            "same_sign": max((hits > 0).sum(), (hits < 0).sum()) / len(hits),
            "mean": np.abs(x[:, j]).mean(),
        }
    return found
