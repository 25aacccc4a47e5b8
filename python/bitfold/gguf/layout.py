"""Where everything will lie in a GGUF file, before a weight is read: the bytes of its header, the places of its data.

scan.py describes the file; it is written as version 3, little-endian, tensors in the order given and each at a multiple
of the alignment, with zeros between them and after the last.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bitfold.gguf.library import (
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValue,
    GGUFValueType,
)
from bitfold.gguf.magic import MAGIC
from bitfold.gguf.scan import ALIGNMENT_KEY, NUMBERS, TEXT, row_bytes
from bitfold.gguf.words import quoted
from bitfold.shards import CheckpointError

MAX_NAME = 63  # bytes of a tensor's name; llama.cpp refuses files with longer ones


@dataclass(frozen=True)
class TensorInfo:
    """A tensor to be written. shape: outermost dimension first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1] if self.shape else 1)


@dataclass(frozen=True)
class Layout:
    """header: all bytes before the data; starts: of each tensor from the beginning of the file, in its order; nbytes:
    of the whole file."""

    header: bytes
    infos: tuple[TensorInfo, ...]
    starts: tuple[int, ...]
    nbytes: int


def lay_out(metadata: Mapping[str, GGUFValue], infos: Iterable[TensorInfo]) -> Layout:
    """The layout of a file. The metadata must begin with general.architecture.

    Raises CheckpointError for names that are too long, ValueError for a value that its type can't hold.
    """
    infos = tuple(infos)
    alignment = metadata[ALIGNMENT_KEY].value if ALIGNMENT_KEY in metadata else GGUF_DEFAULT_ALIGNMENT
    pairs = b"".join(_string(key) + _typed(key, value) for key, value in metadata.items())
    starts, described, at = [], [], 0
    for info in infos:
        name = info.name.encode(*TEXT)
        if len(name) > MAX_NAME:
            raise CheckpointError(
                f"the tensor {quoted(info.name)} has a name of {len(name)} bytes; GGUF allows {MAX_NAME}"
            )
        dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
        described.append(_string(info.name) + dimensions + struct.pack("<IQ", info.type, at))
        starts.append(at)
        at += padded(info.nbytes, alignment)
    header = (
        MAGIC + struct.pack("<IQQ", GGUF_VERSION, len(infos), len(metadata)) + pairs + b"".join(described)
    )
    header = header.ljust(padded(len(header), alignment), b"\0")
    return Layout(header, infos, tuple(len(header) + start for start in starts), len(header) + at)


def padded(nbytes: int, alignment: int) -> int:
    """nbytes, rounded up to a multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


# ---- values ----


def _string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode(*TEXT)
    return struct.pack("<Q", len(raw)) + raw


def _strings(texts: Iterable[str | bytes]) -> bytes:
    """`_string`, many times: vocabularies have hundreds of thousands."""
    pack = struct.Struct("<Q").pack
    parts: list[bytes] = []
    for text in texts:
        raw = text if isinstance(text, bytes) else text.encode(*TEXT)
        parts += (pack(len(raw)), raw)
    return b"".join(parts)


def _typed(key: str, value: GGUFValue) -> bytes:
    try:
        return struct.pack("<I", value.type) + _value(value)
    except (struct.error, OverflowError, TypeError, AttributeError) as error:
        shown = repr(value.value)
        shown = shown if len(shown) <= 80 else shown[:80] + " ..."
        raise ValueError(f"the value of {quoted(key)} is no {value.type.name}: {shown} ({error})") from error


def _value(value: GGUFValue) -> bytes:
    if value.type == GGUFValueType.ARRAY:
        return _array(value)
    if value.type == GGUFValueType.STRING:
        return _string(value.value)
    if value.type == GGUFValueType.BOOL:
        return struct.pack("<?", value.value)
    return struct.pack("<" + NUMBERS[value.type], value.value)


def _array(value: GGUFValue) -> bytes:
    """An array; without sub_type its elements tell their type, as the gguf package has it."""
    elements = value.value
    kind = value.sub_type
    if kind is None:
        kind = GGUFValueType.UINT8 if isinstance(elements, bytes) else GGUFValueType.get_type(elements[0])
    head = struct.pack("<IQ", kind, len(elements))
    if kind == GGUFValueType.STRING:
        return head + _strings(elements)
    if kind == GGUFValueType.ARRAY:
        return head + b"".join(map(_array, elements))
    if kind == GGUFValueType.BOOL:
        return head + bytes(map(bool, elements))
    code = NUMBERS[kind]
    if code in "fd":
        return head + np.array(elements, "<" + code).tobytes()
    return head + struct.pack(f"<{len(elements)}{code}", *elements)
