"""Numbers of b bits in int32 words: the one way in which GPTQ, AWQ and compressed-tensors store codes and zero points.

A row of numbers is a bit stream, least significant bit first, cut into little-endian words of 32 bits. The bytes of
such a row are therefore those of a row of the plane `codes` (docs/formats.md, "The bit stream of codes and zeros"):
what differs between the libraries is along which axis of the matrix a row runs, and in which order its numbers come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold.formats import ceil_div

WORD = 32  # bits
BITS = (2, 3, 4, 8)


def words_of(count: int, bits: int) -> int:
    """Words that `count` numbers fill; the bits left over in the last are 0."""
    return ceil_div(count * bits, WORD)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words_of(count, bits)] as uint8 [rows, count]: the numbers of each row."""
    stream = _bytes(words)
    if bits == 3:  # eight numbers in three bytes; a number may straddle two bytes, and two words
        stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 3))
        triples = stream.reshape(len(stream), -1, 3).to(torch.int32)
        units = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        shifts = torch.arange(0, 24, 3, dtype=torch.int32)
    else:
        units, shifts = stream, torch.arange(0, 8, bits, dtype=torch.uint8)
    numbers = (units[..., None] >> shifts) & (1 << bits) - 1
    return numbers.reshape(len(words), -1)[:, :count].to(torch.uint8).contiguous()


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [rows, count], each below 2^bits, as int32 [rows, words_of(count, bits)]; the inverse of `unpack`."""
    rows, count = numbers.shape
    size = 4 * words_of(count, bits)  # bytes of a row
    per, width = (8, 3) if bits == 3 else (8 // bits, 1)  # numbers of a unit, and its bytes
    units = ceil_div(count, per)
    padded = torch.nn.functional.pad(numbers, (0, units * per - count)).reshape(rows, units, per)
    shifts = torch.arange(0, per * bits, bits, dtype=torch.int32)
    sums = (padded.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)
    stream = torch.stack([sums >> 8 * i & 0xFF for i in range(width)], -1).to(torch.uint8).reshape(rows, -1)
    stream = torch.nn.functional.pad(stream, (0, size - stream.shape[1]))
    return _words(stream)


def to_plane(words: Tensor, bits: int, count: int) -> Tensor:
    """Words [n, words_of(count, bits)] as the plane that has the same bits: uint8 [n, ceil(count * bits / 8)]."""
    size = ceil_div(count * bits, 8)
    stream = _bytes(words)
    return stream if stream.shape[1] == size else stream[:, :size].contiguous()


def from_plane(plane: Tensor) -> Tensor:
    """A plane of codes or zeros [n, bytes] as words; the inverse of `to_plane`."""
    return _words(torch.nn.functional.pad(plane, (0, -plane.shape[1] % 4)))


# Through one dimension, as a matrix of one row or column counts as contiguous whatever its strides are.


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().reshape(-1).view(torch.uint8).reshape(len(words), -1)


def _words(stream: Tensor) -> Tensor:
    return stream.contiguous().reshape(-1).view(torch.int32).reshape(len(stream), -1)
