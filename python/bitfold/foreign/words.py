"""Numbers of b bits in int32 words: the one way in which GPTQ, AWQ and compressed-tensors store codes and zero points.

A row of numbers is a bit stream, least significant bit first, cut into little-endian words of 32 bits. The bytes of
such a row are therefore those of a row of the plane `codes` (docs/formats.md, "The bit stream of codes and zeros"):
what differs between the libraries is along which axis of the matrix a row runs, and in which order its numbers come.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold import ops  # noqa: F401 - registers torch.ops.bitfold
from bitfold.formats import ceil_div

WORD = 32  # bits
BITS = (2, 3, 4, 8)


def words_of(count: int, bits: int) -> int:
    """Words that `count` numbers fill; the bits left over in the last are 0."""
    return ceil_div(count * bits, WORD)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words_of(count, bits)] as uint8 [rows, count]: the numbers of each row."""
    planes = [to_plane(words, bits, count), torch.zeros(len(words), 1, dtype=torch.float16)]
    return torch.ops.bitfold.unpack(planes, f"int{bits}-channel", len(words), count, "rows")[0]


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [rows, count], each below 2^bits, as int32 [rows, words_of(count, bits)]; the inverse of `unpack`."""
    scales = torch.zeros(len(numbers), 1, dtype=torch.float16)
    return from_plane(torch.ops.bitfold.pack(numbers.contiguous(), scales, None, f"int{bits}-channel", [])[0])


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
