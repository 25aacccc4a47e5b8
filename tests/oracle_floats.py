"""The floats of docs/formats.md, in numpy: each type smaller than binary32 is the list of all its values."""

from __future__ import annotations

import numpy as np

F32 = np.float32


class SmallFloat:
    """A float type of at most 16 bits: the list of its values, and nearest-even rounding onto that list."""

    def __init__(self, name: str, exponent_bits: int, mantissa_bits: int, infinities: bool = True):
        self.name = name
        self.bits = 1 + exponent_bits + mantissa_bits
        codes = np.arange(2 ** (self.bits - 1))
        exponent, mantissa = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
        unit = np.ldexp(1.0, np.maximum(exponent, 1) - (2 ** (exponent_bits - 1) - 1) - mantissa_bits)
        magnitudes = np.where(exponent == 0, mantissa, mantissa + 2**mantissa_bits) * unit
        # The first code that is not finite keeps its formula's value here: it is what overflow is measured against.
        self.overflow = int(codes[exponent == exponent.max()][0]) if infinities else int(codes[-1])
        self.magnitudes = magnitudes[: self.overflow + 1]
        self.largest = float(magnitudes[self.overflow - 1])
        values = np.where(codes < self.overflow, magnitudes, np.nan)
        if infinities:
            values[self.overflow] = np.inf
        self.values = np.concatenate([values, -values])  # code -> value

    def code(self, x: np.ndarray, saturate: bool = False) -> np.ndarray:
        """Nearest code, ties to the even one; what is beyond the largest value gets the overflow code, or saturates."""
        x = np.asarray(x, np.float64)
        middles = (self.magnitudes[:-1] + self.magnitudes[1:]) / 2
        index = np.searchsorted(middles, np.abs(x), side="left")
        tie = (index < len(middles)) & (np.abs(x) == middles[np.minimum(index, len(middles) - 1)])
        index = index + (tie & (index % 2 == 1))
        index = np.minimum(index, self.overflow - 1) if saturate else np.minimum(index, self.overflow)
        return (index + np.signbit(x) * 2 ** (self.bits - 1)).astype(
            np.uint16 if self.bits == 16 else np.uint8
        )

    def value(self, code: np.ndarray) -> np.ndarray:
        return self.values[np.asarray(code, np.int64)].astype(F32)  # exact: all are binary32 numbers

    def beyond(self, x: np.ndarray) -> np.ndarray:
        return (self.code(x) & (2 ** (self.bits - 1) - 1)) >= self.overflow


FP16 = SmallFloat("fp16", 5, 10)
BF16 = SmallFloat("bf16", 8, 7)
E4M3 = SmallFloat("fp8-e4m3", 4, 3, infinities=False)
E5M2 = SmallFloat("fp8-e5m2", 5, 2)


def to_dtype(x: np.ndarray, name: str) -> np.ndarray:
    """Bits of binary32 numbers rounded to fp16, bf16 or fp32 (fp64: the float64 itself)."""
    x = np.asarray(x, F32)
    if name in ("fp16", "bf16"):
        small = FP16 if name == "fp16" else BF16
        bits = small.code(x)
        return np.where(np.isnan(x), np.uint16(0x7FFF), bits)
    return x.view(np.uint32) if name == "fp32" else x.astype(np.float64)


def from_dtype(bits: np.ndarray, name: str) -> np.ndarray:
    """Binary32 numbers of the bits of fp16, bf16 or fp32 numbers."""
    return bits.view(F32) if name == "fp32" else (FP16 if name == "fp16" else BF16).value(bits)
