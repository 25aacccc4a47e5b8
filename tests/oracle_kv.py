"""The packed KV cache from its description (docs/kv-cache.md), in float64, one number after the other."""

from __future__ import annotations

import numpy as np
import torch

LARGEST = {"int8": 255.0, "int4": 15.0, "fp8": 448.0}


def rounded(x: np.ndarray, format: str) -> tuple[np.ndarray, np.ndarray]:
    """What numbers [..., n] that share a step become, and that step: a step in float32, as it is stored."""
    x = x.astype(np.float64)
    if format == "fp8":
        step = (np.abs(x).max(-1, keepdims=True).astype("f4") / np.float32(448)).astype(np.float64)
        magnitudes = e4m3()
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = np.where(step > 0, np.abs(x) / step, 0)
        return np.sign(x) * nearest(scaled, magnitudes) * step, step
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    step = ((high.astype("f4") - low.astype("f4")) / np.float32(LARGEST[format])).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        codes = np.where(step > 0, np.rint((x - low) / step), 0)
    return np.clip(codes, 0, LARGEST[format]) * step + low, step


def e4m3() -> np.ndarray:
    """The finite magnitudes of e4m3, ascending: exponents from -6, 8 numbers each, and below them as many steps."""
    numbers = [m * 2.0**-9 for m in range(8)]
    numbers += [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    return np.array(numbers[:-1])  # the last pattern is NaN


def nearest(x: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return numbers[np.abs(x[..., None] - numbers).argmin(-1)]


def decoded(keys, values, format: str, group: int, value_group: int):
    """Keys and values [batch, heads, tokens, head] after packing, and the largest error that half a step allows."""
    keys, values = (np.asarray(x, np.float64) for x in (keys, values))
    batch, heads, tokens, head = keys.shape
    by_channel = keys.reshape(batch, heads, tokens // group, group, head).swapaxes(-1, -2)
    new_keys, _ = rounded(by_channel, format)
    by_token = values.reshape(batch, heads, tokens, head // value_group, value_group)
    new_values, _ = rounded(by_token, format)
    return new_keys.swapaxes(-1, -2).reshape(keys.shape), new_values.reshape(values.shape)


def unpacked(block: np.ndarray, law: dict, format: str, group: int, head: int, value_group: int):
    """Keys and values [group, head] of the bytes of a block, in float64."""
    bits = 4 if format == "int4" else 8

    def codes(at: int, rows: int, columns: int) -> np.ndarray:
        data = block[at : at + rows * columns * bits // 8].reshape(rows, -1)
        if bits == 4:
            data = np.stack([data % 16, data // 16], -1).reshape(rows, columns)
        if format != "fp8":
            return data.astype(np.float64)
        return np.where(data < 128, 1.0, -1.0) * np.append(e4m3(), np.nan)[data % 128]

    def floats(at: int, count: int) -> np.ndarray:
        return block[at : at + 4 * count].view("<f4").astype(np.float64)

    rows, groups = -(-head // 16) * 16, head // value_group
    keys = codes(0, head, group) * floats(law["key_steps"], head)[:, None]
    values = codes(law["value_codes"], group, rows)[:, :head].reshape(group, groups, value_group)
    values = values * floats(law["value_steps"], groups * group).reshape(groups, group).T[..., None]
    if format != "fp8":
        keys = keys + floats(law["key_offsets"], head)[:, None]
        values = values + floats(law["value_offsets"], groups * group).reshape(groups, group).T[..., None]
    return keys.T, values.reshape(group, head)


def attention(query, keys, values, mask, scale: float) -> np.ndarray:
    """[batch, rows, query heads, head] of query [batch, query heads, rows, head]; a row that sees nothing is 0."""
    query, keys, values = (
        x.double().numpy() if torch.is_tensor(x) else np.asarray(x) for x in (query, keys, values)
    )
    shared = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat(shared, 1), values.repeat(shared, 1)
    scores = np.einsum("bhrd,bhtd->bhrt", query, keys) * scale
    if mask is not None:
        bias = np.where(mask.numpy(), 0, -np.inf) if mask.dtype == torch.bool else mask.double().numpy()
        scores = scores + bias
    most = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(most), most, 0))
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhrt,bhtd->brhd", weights, values)
