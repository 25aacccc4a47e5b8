"""How far from W the kernel for more than 32 rows of x may be (docs/cuda.md, "More than 32 rows, with wgmma").

It multiplies codes by their scales in fp16, after a power of two for each row of W: each weight is rounded once, and
once more for a codebook's number and for a scale of more than 11 bits; a minimum is added before, as a half, and what
that half lacks meets sums of x. What is far below the row's largest is rounded to a multiple of a subnormal.
"""

from __future__ import annotations

import dataclasses

import bitfold
import numpy as np
import oracle
import oracle_gguf
from cases import bits

UNIT = 2.0**-11  # of a rounding to fp16
SMALLEST = 2.0**-20  # of the largest number that a code and a scale of the row could make
LARGEST = {
    "int8": 256,
    "int4": 16,
    "int3": 8,
    "int2": 4,
    "nf4": 1,
    "fp4": 1,
    "fp8-e4m3": 448,
    "fp8-e5m2": 57344,
}
LARGEST |= {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 128, "q2_k": 15 * 3, "q3_k": 32 * 4}
LARGEST |= {"q4_k": 63 * 15, "q5_k": 63 * 31, "q6_k": 128 * 32, "iq4_nl": 127, "iq4_xs": 32 * 127, "mxfp4": 6}


def roundings(format: str) -> int:
    if format in oracle_gguf.LAYOUTS:
        return 2 if format in ("q6_k", "iq4_xs") else 1  # where a block's scale and an integer make the scale
    fmt = oracle.parse(format)
    return 1 + (fmt.scale in ("fp32", "nested")) + format.startswith(("nf4", "fp4"))


def family(format: str) -> str:
    return next(name for name in LARGEST if format == name or format.startswith(name + "-"))


def minima(qtensor: bitfold.QTensor, shape: tuple[int, int]) -> np.ndarray:
    layout = oracle_gguf.LAYOUTS.get(qtensor.format)
    if layout is None:
        return np.zeros(shape)
    parts = layout.unpack(qtensor.planes["blocks"].numpy().reshape(-1, layout.bytes))
    if parts.m is None:
        return np.zeros(shape)
    with np.errstate(all="ignore"):
        zeros = dataclasses.replace(parts, codes=0 * parts.codes)
        return layout.mean(zeros).astype(np.float64).reshape(shape)


def errors(qtensor: bitfold.QTensor, w: np.ndarray) -> np.ndarray:
    """Of each weight [n, k]."""
    format = str(qtensor.format)
    n, k = w.shape
    if format in oracle_gguf.LAYOUTS:
        layout = oracle_gguf.LAYOUTS[format]
        parts = layout.unpack(qtensor.planes["blocks"].numpy().reshape(-1, layout.bytes))
        if format == "mxfp4":
            d = 2.0 * oracle_gguf.fp4_step(parts.d).astype(np.float64)
        else:
            d = np.abs(parts.d.view(np.float16).astype(np.float64))[:, None]
        largest = LARGEST[format] * d.reshape(n, -1).max(axis=1, initial=0)
        largest = np.maximum(largest, np.abs(minima(qtensor, w.shape)).max(axis=1, initial=0))
    else:
        fmt = oracle.parse(format)
        planes = {name: bits(plane) for name, plane in qtensor.planes.items()}
        scales = np.abs(oracle.unpack(planes, format, n, k).scales.astype(np.float64))
        of_row = np.arange(n) // fmt.rows if fmt.group > 0 else np.arange(n) % len(scales)
        largest = LARGEST[family(format)] * scales.max(axis=1, initial=0)[of_row]
    return roundings(format) * UNIT * np.abs(w.astype(np.float64)) + SMALLEST * largest[:, None]
