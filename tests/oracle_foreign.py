"""Other libraries' checkpoint formats, decoded slowly in numpy and Python integers, from docs/foreign.md alone.

Everything is from bits to float64 weights [n, k]; nothing here knows bitfold's planes.
"""

from __future__ import annotations

import json

import numpy as np

WORD = 1 << 32
# What version 1 of GPTQ subtracts from each word; with 3 bits it is 1 from each zero point, modulo 8.
ONES = {2: 0x55555555, 3: 0, 4: 0x11111111, 8: 0x01010101}


def stream(words: np.ndarray, bits: int, count: int) -> list[int]:
    """The numbers of one row of words: a single large integer, cut into fields."""
    number = sum((int(word) % WORD) << 32 * i for i, word in enumerate(words))
    return [number >> bits * i & (1 << bits) - 1 for i in range(count)]


def gptq(
    tensors: dict[str, np.ndarray], bits: int, group: int, version: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, codes [n, k] and zero points [g, n]."""
    n = tensors["qweight"].shape[1]
    k = tensors["qweight"].shape[0] * 32 // bits
    codes = np.array([stream(tensors["qweight"][:, c], bits, k) for c in range(n)])
    rows = []
    for row in tensors["qzeros"]:
        more = ONES[bits] if version == 1 else 0
        numbers = stream([(int(word) + more) % WORD for word in row], bits, n)
        rows.append([(zero + 1) % 8 for zero in numbers] if (version, bits) == (1, 3) else numbers)
    zeros = np.array(rows)
    g_idx = tensors.get("g_idx", np.arange(k) // (k if group == -1 else group))
    scales = tensors["scales"].astype(np.float64)
    weights = np.array(
        [
            [(int(codes[r, i]) - int(zeros[g_idx[i], r])) * scales[g_idx[i], r] for i in range(k)]
            for r in range(n)
        ]
    )
    return weights, codes, zeros


def awq(tensors: dict[str, np.ndarray], group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, codes [n, k] and zero points [g, n]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def nibbles(words: np.ndarray) -> np.ndarray:
        out = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
        for (row, column), word in np.ndenumerate(words):
            for i in range(8):
                out[row, 8 * column + order[i]] = (int(word) % WORD) >> 4 * i & 15
        return out

    codes, zeros = nibbles(tensors["qweight"]), nibbles(tensors["qzeros"])
    k = len(codes)
    scales = tensors["scales"].astype(np.float64)
    of = np.arange(k) // (k if group == -1 else group)
    return ((codes - zeros[of]) * scales[of]).T, codes.T, zeros


def compressed(tensors: dict[str, np.ndarray], bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Weights of pack-quantized (weight_packed) and int-quantized (weight) integers; group 0: a scale for all."""
    half = 1 << bits - 1
    if "weight_packed" in tensors:
        n, k = (int(size) for size in tensors["weight_shape"])
        signed = np.array([stream(row, bits, k) for row in tensors["weight_packed"]]) - half
    else:
        signed = tensors["weight"].astype(np.int64)
        n, k = signed.shape
    groups = 1 if group <= 0 else -(-k // group)
    of = np.arange(k) // group if group > 0 else np.zeros(k, dtype=np.int64)
    if "weight_g_idx" in tensors:
        of = tensors["weight_g_idx"]
    scales = tensors["weight_scale"].astype(np.float64).reshape(-1, groups)
    zeros = np.zeros(scales.shape, dtype=np.int64)
    if not symmetric:
        stored = tensors["weight_zero_point"]
        if "weight_packed" in tensors:
            columns = [stream(stored[:, g], bits, len(scales)) for g in range(groups)]
            zeros = np.array(columns).T - half
        else:
            zeros = stored.astype(np.int64).reshape(scales.shape)
    scales, zeros = (np.broadcast_to(values, (n, groups)) for values in (scales, zeros))
    return (signed - zeros[:, of]) * scales[:, of]


NF4 = [
    -1,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1,
]
_E2M1 = [0, 0.00520833333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 = [*_E2M1, *(-value for value in _E2M1)]


def four_bits(tensors: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """float32 weights of bitsandbytes' nf4 and fp4: every operation rounded, as the format says."""
    state = json.loads(bytes(tensors[f"weight.quant_state.bitsandbytes__{kind}"]))
    n, k = state["shape"]
    table = np.array(NF4 if kind == "nf4" else FP4, dtype=np.float32)
    absmax = tensors["weight.absmax"]
    if "nested_offset" in state:
        levels, most = tensors["weight.nested_quant_map"], tensors["weight.nested_absmax"]
        offset = np.float32(state["nested_offset"])
        absmax = np.array(
            [levels[code] * most[i // state["nested_blocksize"]] + offset for i, code in enumerate(absmax)],
            dtype=np.float32,
        )
    packed = tensors["weight"].reshape(-1).view(np.uint8)
    flat = np.zeros(n * k, dtype=np.float32)
    for i in range(n * k):
        code = packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15
        flat[i] = table[code] * absmax[i // state["blocksize"]]
    return flat.reshape(n, k)
