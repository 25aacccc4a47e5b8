"""The blocks of GGUF once more, slowly, in numpy: how they lie in bytes, and what they mean.

Written from the description of the blocks in docs/gguf-blocks.md and from nothing else; nothing here imports bitfold.
What encodes is in oracle_gguf_encode.py. A block is taken apart into codes [blocks, values], float16 numbers and the
small integers of its sub-blocks [blocks, sub-blocks]; `Layout.pack` is the way back. Decoding is in binary32, every
operation rounded, in the order written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

F32 = np.float32

IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # twice the value of E2M1


@dataclass
class Parts:
    """What blocks hold. codes: as stored, 0 or more (Q8_0: signed); d, m: uint16 bits of float16 (MXFP4: d is the
    exponent's byte); scales, mins: integers of the sub-blocks as stored, without their offset.
    """

    codes: np.ndarray
    d: np.ndarray
    m: np.ndarray | None = None
    scales: np.ndarray | None = None
    mins: np.ndarray | None = None


# ---- pieces of layouts: [blocks, numbers] <-> [blocks, bytes] ----


def half_to_bytes(half: np.ndarray) -> np.ndarray:
    """Bits of a 16-bit number [blocks] -> its two bytes, the low one first."""
    return np.stack([half & 255, half >> 8], axis=1).astype(np.uint8)


def half_of_bytes(data: np.ndarray) -> np.ndarray:
    return data[:, 0].astype(np.uint16) + (data[:, 1].astype(np.uint16) << 8)


def nibbles(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return ((low & 15) | (high & 15) << 4).astype(np.uint8)


def half_split(codes: np.ndarray) -> np.ndarray:
    """[blocks, 32] -> 16 bytes: value j in the low nibble of byte j, value j + 16 in the high one."""
    return nibbles(codes[:, :16], codes[:, 16:])


def of_half_split(data: np.ndarray) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], axis=1).astype(np.int64)


def word(flags: np.ndarray) -> np.ndarray:
    """[blocks, 32] of 0 and 1 -> 4 bytes: value i in bit i."""
    return np.packbits(flags.astype(np.uint8), axis=1, bitorder="little")


def of_word(data: np.ndarray) -> np.ndarray:
    return np.unpackbits(data, axis=1, bitorder="little").astype(np.int64)


def two_bits(codes: np.ndarray) -> np.ndarray:
    """[blocks, 256] -> 64 bytes: value 128 h + 32 k + l in bits 2k, 2k + 1 of byte 32 h + l."""
    cube = codes.reshape(-1, 2, 4, 32) & 3
    return sum(cube[:, :, k] << 2 * k for k in range(4)).reshape(-1, 64).astype(np.uint8)


def of_two_bits(data: np.ndarray) -> np.ndarray:
    cube = data.reshape(-1, 2, 32).astype(np.int64)
    return np.stack([(cube >> 2 * k) & 3 for k in range(4)], axis=2).reshape(-1, 256)


def high_bits(codes: np.ndarray, bit: int) -> np.ndarray:
    """[blocks, 256] -> 32 bytes: bit `bit` of value 32 k + l in bit k of byte l."""
    cube = (codes.reshape(-1, 8, 32) >> bit) & 1
    return sum(cube[:, k] << k for k in range(8)).astype(np.uint8)


def of_high_bits(data: np.ndarray) -> np.ndarray:
    return np.stack([(data.astype(np.int64) >> k) & 1 for k in range(8)], axis=1).reshape(-1, 256)


def pairs(codes: np.ndarray) -> np.ndarray:
    """[blocks, 256] -> 128 bytes: value 64 g + l in the low nibble of byte 32 g + l, value 64 g + 32 + l in the high
    one.
    """
    cube = codes.reshape(-1, 4, 2, 32)
    return nibbles(cube[:, :, 0], cube[:, :, 1]).reshape(-1, 128)


def of_pairs(data: np.ndarray) -> np.ndarray:
    cube = data.reshape(-1, 4, 32).astype(np.int64)
    return np.stack([cube & 15, cube >> 4], axis=2).reshape(-1, 256)


def six_bits(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of 6 bits -> 12 bytes. A byte beyond 6 bits spills over what lies above it."""
    head, tail = [scales[:, :4], mins[:, :4]], [scales[:, 4:], mins[:, 4:]]
    first = [(a | (b >> 4) << 6) & 255 for a, b in zip(head, tail, strict=True)]
    return np.concatenate([*first, nibbles(*tail)], axis=1).astype(np.uint8)


def of_six_bits(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c = (data[:, start : start + 4].astype(np.int64) for start in (0, 4, 8))
    scales = np.concatenate([a & 63, (c & 15) + 16 * (a >> 6)], axis=1)
    mins = np.concatenate([b & 63, (c >> 4) + 16 * (b >> 6)], axis=1)
    return scales, mins


def twelve(scales: np.ndarray) -> np.ndarray:
    """Sixteen numbers of 6 bits -> 12 bytes (Q3_K): low four bits in nibbles, high two bits in the last four bytes."""
    low = nibbles(scales[:, :8], scales[:, 8:])
    high = sum((scales[:, 4 * k : 4 * k + 4] >> 4) << 2 * k for k in range(4))
    return np.concatenate([low, high], axis=1).astype(np.uint8)


def of_twelve(data: np.ndarray) -> np.ndarray:
    low = np.concatenate([data[:, :8] & 15, data[:, :8] >> 4], axis=1).astype(np.int64)
    high = np.concatenate([(data[:, 8:] >> 2 * k) & 3 for k in range(4)], axis=1).astype(np.int64)
    return low + 16 * high


# ---- the layouts: parts -> bytes and back ----


def pack_q4_0(p: Parts) -> np.ndarray:
    return np.concatenate([half_to_bytes(p.d), half_split(p.codes)], axis=1)


def unpack_q4_0(b: np.ndarray) -> Parts:
    return Parts(of_half_split(b[:, 2:]), half_of_bytes(b))


def pack_q4_1(p: Parts) -> np.ndarray:
    return np.concatenate([half_to_bytes(p.d), half_to_bytes(p.m), half_split(p.codes)], axis=1)


def unpack_q4_1(b: np.ndarray) -> Parts:
    return Parts(of_half_split(b[:, 4:]), half_of_bytes(b), half_of_bytes(b[:, 2:]))


def pack_q5_0(p: Parts) -> np.ndarray:
    return np.concatenate([half_to_bytes(p.d), word(p.codes >> 4), half_split(p.codes)], axis=1)


def unpack_q5_0(b: np.ndarray) -> Parts:
    return Parts(of_half_split(b[:, 6:]) + 16 * of_word(b[:, 2:6]), half_of_bytes(b))


def pack_q5_1(p: Parts) -> np.ndarray:
    head = [half_to_bytes(p.d), half_to_bytes(p.m)]
    return np.concatenate([*head, word(p.codes >> 4), half_split(p.codes)], axis=1)


def unpack_q5_1(b: np.ndarray) -> Parts:
    codes = of_half_split(b[:, 8:]) + 16 * of_word(b[:, 4:8])
    return Parts(codes, half_of_bytes(b), half_of_bytes(b[:, 2:]))


def pack_q8_0(p: Parts) -> np.ndarray:
    return np.concatenate([half_to_bytes(p.d), p.codes.astype(np.uint8)], axis=1)


def unpack_q8_0(b: np.ndarray) -> Parts:
    return Parts(b[:, 2:].astype(np.int8).astype(np.int64), half_of_bytes(b))


def pack_q2_k(p: Parts) -> np.ndarray:
    tail = [half_to_bytes(p.d), half_to_bytes(p.m)]
    return np.concatenate([nibbles(p.scales, p.mins), two_bits(p.codes), *tail], axis=1)


def unpack_q2_k(b: np.ndarray) -> Parts:
    scales, mins = (b[:, :16] & 15).astype(np.int64), (b[:, :16] >> 4).astype(np.int64)
    return Parts(of_two_bits(b[:, 16:80]), half_of_bytes(b[:, 80:]), half_of_bytes(b[:, 82:]), scales, mins)


def pack_q3_k(p: Parts) -> np.ndarray:
    planes = [high_bits(p.codes, 2), two_bits(p.codes)]
    return np.concatenate([*planes, twelve(p.scales), half_to_bytes(p.d)], axis=1)


def unpack_q3_k(b: np.ndarray) -> Parts:
    codes = of_two_bits(b[:, 32:96]) + 4 * of_high_bits(b[:, :32])
    return Parts(codes, half_of_bytes(b[:, 108:]), scales=of_twelve(b[:, 96:108]))


def pack_q4_k(p: Parts) -> np.ndarray:
    head = [half_to_bytes(p.d), half_to_bytes(p.m), six_bits(p.scales, p.mins)]
    return np.concatenate([*head, pairs(p.codes)], axis=1)


def unpack_q4_k(b: np.ndarray) -> Parts:
    return Parts(of_pairs(b[:, 16:]), half_of_bytes(b), half_of_bytes(b[:, 2:]), *of_six_bits(b[:, 4:16]))


def pack_q5_k(p: Parts) -> np.ndarray:
    head = [half_to_bytes(p.d), half_to_bytes(p.m), six_bits(p.scales, p.mins)]
    return np.concatenate([*head, high_bits(p.codes, 4), pairs(p.codes)], axis=1)


def unpack_q5_k(b: np.ndarray) -> Parts:
    codes = of_pairs(b[:, 48:]) + 16 * of_high_bits(b[:, 16:48])
    return Parts(codes, half_of_bytes(b), half_of_bytes(b[:, 2:]), *of_six_bits(b[:, 4:16]))


def pack_q6_k(p: Parts) -> np.ndarray:
    cube = p.codes.reshape(-1, 2, 2, 2, 32)  # half, nibble, which 32 bytes of the half, l
    low = nibbles(cube[:, :, 0], cube[:, :, 1]).reshape(-1, 128)
    tail = [p.scales.astype(np.uint8), half_to_bytes(p.d)]
    return np.concatenate([low, two_bits(p.codes >> 4), *tail], axis=1)


def unpack_q6_k(b: np.ndarray) -> Parts:
    low = b[:, :128].reshape(-1, 2, 2, 32).astype(np.int64)
    codes = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 256) + 16 * of_two_bits(b[:, 128:192])
    return Parts(codes, half_of_bytes(b[:, 208:]), scales=b[:, 192:208].astype(np.int8).astype(np.int64))


def pack_iq4_xs(p: Parts) -> np.ndarray:
    high = sum((p.scales[:, j] >> 4) << 2 * j for j in range(8)).astype(np.uint16)
    low = nibbles(p.scales[:, 0::2], p.scales[:, 1::2])
    codes = half_split(p.codes.reshape(-1, 32)).reshape(-1, 128)
    return np.concatenate([half_to_bytes(p.d), half_to_bytes(high), low, codes], axis=1)


def unpack_iq4_xs(b: np.ndarray) -> Parts:
    high = half_of_bytes(b[:, 2:]).astype(np.int64)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(-1, 8).astype(np.int64)
    scales = low + 16 * np.stack([(high >> 2 * j) & 3 for j in range(8)], axis=1)
    return Parts(of_half_split(b[:, 8:].reshape(-1, 16)).reshape(-1, 256), half_of_bytes(b), scales=scales)


def pack_mxfp4(p: Parts) -> np.ndarray:
    return np.concatenate([p.d[:, None].astype(np.uint8), half_split(p.codes)], axis=1)


def unpack_mxfp4(b: np.ndarray) -> Parts:
    return Parts(of_half_split(b[:, 1:]), b[:, 0].astype(np.int64))


# ---- what parts mean ----


def number(half: np.ndarray) -> np.ndarray:
    """float16 bits [blocks] -> binary32 [blocks, 1], exact."""
    return half.view(np.float16).astype(F32)[:, None]


def spread(numbers: np.ndarray, values: int) -> np.ndarray:
    """[blocks, sub-blocks] -> [blocks, values] in binary32."""
    return np.repeat(numbers, values // numbers.shape[1], axis=1).astype(F32)


def symmetric(middle: int) -> Callable[[Parts], np.ndarray]:
    return lambda p: (p.codes - middle).astype(F32) * number(p.d)


def affine(p: Parts) -> np.ndarray:
    return p.codes.astype(F32) * number(p.d) + number(p.m)


def scales_and_mins(p: Parts) -> np.ndarray:
    scale, minimum = number(p.d) * spread(p.scales, 256), number(p.m) * spread(p.mins, 256)
    return scale * p.codes.astype(F32) - minimum


def signed_scales(
    scale_middle: int, meaning: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Parts], np.ndarray]:
    return lambda p: number(p.d) * spread(p.scales - scale_middle, 256) * meaning(p.codes).astype(F32)


def fp4_step(exponent: np.ndarray) -> np.ndarray:
    """Half of the E8M0 number of a byte, [blocks, 1]: 2^(e - 128), in binary32 sub-normals too."""
    return np.ldexp(1.0, exponent.astype(int) - 128).astype(F32)[:, None]


# ---- the table ----


@dataclass(frozen=True)
class Layout:
    values: int
    bytes: int
    pack: Callable[[Parts], np.ndarray]
    unpack: Callable[[np.ndarray], Parts]
    mean: Callable[[Parts], np.ndarray]
    halves: tuple[int, ...] = (0,)  # offsets of its float16 numbers


LAYOUTS = {
    "q4_0": Layout(32, 18, pack_q4_0, unpack_q4_0, symmetric(8)),
    "q4_1": Layout(32, 20, pack_q4_1, unpack_q4_1, affine, (0, 2)),
    "q5_0": Layout(32, 22, pack_q5_0, unpack_q5_0, symmetric(16)),
    "q5_1": Layout(32, 24, pack_q5_1, unpack_q5_1, affine, (0, 2)),
    "q8_0": Layout(32, 34, pack_q8_0, unpack_q8_0, symmetric(0)),
    "q2_k": Layout(256, 84, pack_q2_k, unpack_q2_k, scales_and_mins, (80, 82)),
    "q3_k": Layout(256, 110, pack_q3_k, unpack_q3_k, signed_scales(32, lambda c: c - 4), (108,)),
    "q4_k": Layout(256, 144, pack_q4_k, unpack_q4_k, scales_and_mins, (0, 2)),
    "q5_k": Layout(256, 176, pack_q5_k, unpack_q5_k, scales_and_mins, (0, 2)),
    "q6_k": Layout(256, 210, pack_q6_k, unpack_q6_k, signed_scales(0, lambda c: c - 32), (208,)),
    "iq4_nl": Layout(32, 18, pack_q4_0, unpack_q4_0, lambda p: number(p.d) * IQ4[p.codes].astype(F32)),
    "iq4_xs": Layout(256, 136, pack_iq4_xs, unpack_iq4_xs, signed_scales(32, lambda c: IQ4[c])),
    "mxfp4": Layout(32, 17, pack_mxfp4, unpack_mxfp4, lambda p: FP4[p.codes].astype(F32) * fp4_step(p.d), ()),
}


def decode(data: np.ndarray, name: str) -> np.ndarray:
    """uint8 [n, bytes of a row] -> binary32 [n, k]."""
    layout = LAYOUTS[name]
    n, size = data.shape
    k = size // layout.bytes * layout.values
    if data.size == 0:
        return np.zeros((n, k), F32)
    with np.errstate(all="ignore"):
        values = layout.mean(layout.unpack(data.reshape(-1, layout.bytes)))
    assert values.dtype == F32
    return values.reshape(n, k)
