"""The header of a GGUF file, read within bounds.

A GGUF file (version 2 or 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is

    "GGUF", version (u32), number of tensors (u64), number of key/value pairs (u64)
    pairs: key (string), type (u32), value; a string is its length (u64) and bytes, an array the type of its
        elements, their number (u64) and the elements
    tensors: name (string), number of dimensions (u32), dimensions (u64, row length first), type (u32), offset (u64)
    zeros up to a multiple of the alignment, then the data, where the offsets count from

Every count, length and offset is compared with what is left of the file before anything of that size is made, so
that a damaged file costs a sentence, never memory or time.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitfold.gguf.library import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValue,
    GGUFValueType,
)
from bitfold.gguf.magic import MAGIC
from bitfold.gguf.words import quoted
from bitfold.shards import CheckpointError

VERSIONS = (2, GGUF_VERSION)
ALIGNMENT_KEY = "general.alignment"
MAX_HEADER = 128 << 20  # bytes; a vocabulary of 262,144 tokens with its merges takes some 16 MB
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16  # bytes, the largest page of a processor; files have 32
MAX_NESTING, MAX_NESTED = 4, 1 << 16  # arrays in arrays, how deep and how many at a level; no model has any

NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
}
"""Types of numbers, as struct and numpy spell them; little-endian with "<" in front."""

TEXT = ("utf-8", "surrogateescape")
"""Strings are bytes that should be UTF-8; where they aren't, they survive reading and writing all the same."""

_FEWEST_BYTES = {  # of an element of an array
    **{kind: struct.calcsize(code) for kind, code in NUMBERS.items()},
    GGUFValueType.BOOL: 1,
    GGUFValueType.STRING: 8,
    GGUFValueType.ARRAY: 12,
}
_PAIR_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8  # with empty names and no dimensions
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class StoredInfo:
    """A tensor in a file. shape: outermost dimension first; start: of its first byte, from the file's beginning."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself: pairs and tensors in its order."""

    version: int
    metadata: dict[str, GGUFValue]
    tensors: dict[str, StoredInfo]


def row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    """Bytes of a row; columns is a multiple of the type's block."""
    values, nbytes = GGML_QUANT_SIZES[kind]
    return columns // values * nbytes


def read_header(path: Path, data: mmap.mmap | bytes) -> Header:
    """The header of a whole GGUF file in memory (mapped: only the header is touched).

    Raises CheckpointError, naming the place, for what is no GGUF file, is truncated or contradicts itself.
    """
    return _Scanner(path, data).header()


class _Scanner:
    """A place in the file, which moves on as values are taken; nothing is taken that isn't there."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path = path
        self.data = data
        self.at = 0
        self.end = min(len(data), MAX_HEADER)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is no valid GGUF file: {what}")

    # ---- what the file is made of ----

    def need(self, nbytes: int, what: str) -> None:
        """Raises CheckpointError unless so many bytes follow."""
        left = self.end - self.at
        if nbytes <= left:
            return
        if self.end < len(self.data):
            raise self.error(
                f"{what} goes beyond the first {MAX_HEADER >> 20} MiB, where the header must end"
            )
        raise CheckpointError(
            f"{self.path} is truncated or damaged: {what} needs {nbytes} bytes at {self.at}, where {left} are left"
        )

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        self.need(length, what)
        begin, self.at = self.at, self.at + length
        return str(self.data[begin : self.at], *TEXT)

    def value_type(self, what: str) -> GGUFValueType:
        code = self.number("I", what)
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.error(f"{what} has the type {code}, which GGUF doesn't have") from None

    def value(self, kind: GGUFValueType, what: str, depth: int = 0) -> GGUFValue:
        if kind == GGUFValueType.ARRAY:
            return self.array(what, depth)
        if kind == GGUFValueType.STRING:
            return GGUFValue(self.string(what), kind)
        if kind == GGUFValueType.BOOL:
            return GGUFValue(self.booleans(1, what)[0], kind)
        return GGUFValue(self.number(NUMBERS[kind], what), kind)

    def array(self, what: str, depth: int) -> GGUFValue:
        """The value is a list; of an array of arrays, a list of such values."""
        kind = self.value_type(what)
        count = self.number("Q", what)
        self.need(count * _FEWEST_BYTES[kind], f"{what}, an array of {count} elements,")
        elements: list[Any]
        if kind == GGUFValueType.STRING:
            elements = self.strings(count, what)
        elif kind == GGUFValueType.BOOL:
            elements = self.booleans(count, what)
        elif kind == GGUFValueType.ARRAY:
            if depth == MAX_NESTING or count > MAX_NESTED:
                raise self.error(f"{what} has {count} arrays in an array, {depth} deep")
            elements = [self.array(what, depth + 1) for _ in range(count)]
        else:
            numbers = np.frombuffer(self.data, "<" + NUMBERS[kind], count, self.at)
            self.at += numbers.nbytes
            elements = numbers.tolist()
        return GGUFValue(elements, GGUFValueType.ARRAY, kind)

    def strings(self, count: int, what: str) -> list[str]:
        """`string`, so many times: in a loop of its own, for vocabularies have hundreds of thousands."""
        data, at, end, length_at = self.data, self.at, self.end, _LENGTH.unpack_from
        found = []
        for _ in range(count):
            begin = at + 8
            if begin > end:
                break
            at = begin + length_at(data, at)[0]
            if at > end:
                break
            found.append(str(data[begin:at], *TEXT))
        if len(found) < count:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: {what} has {count} strings, and number {len(found)} goes beyond "
                f"the end of the {'file' if end == len(data) else 'header'}"
            )
        self.at = at
        return found

    def booleans(self, count: int, what: str) -> list[bool]:
        self.need(count, what)
        raw = self.data[self.at : self.at + count]
        self.at += count
        if raw.strip(b"\0\1"):
            raise self.error(f"{what} is a truth value of {max(raw)}; it must be 0 or 1")
        return [byte == 1 for byte in raw]

    # ---- what it says ----

    def header(self) -> Header:
        version = self.version()
        tensor_count = self.number("Q", "the number of tensors")
        pair_count = self.number("Q", "the number of key/value pairs")
        self.need(pair_count * _PAIR_BYTES, f"a header of {pair_count} key/value pairs")
        metadata: dict[str, GGUFValue] = {}
        for _ in range(pair_count):
            key = self.string(f"the key of pair {len(metadata)}")
            what = quoted(key)
            if key in metadata:
                raise self.error(f"the key {what} is there twice")
            metadata[key] = self.value(self.value_type(what), what)
        self.need(tensor_count * _TENSOR_BYTES, f"a header of {tensor_count} tensors")
        infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(tensor_count):
            name = self.string(f"the name of tensor {len(infos)}")
            if name in infos:
                raise self.error(f"the tensor {quoted(name)} is there twice")
            infos[name] = self.tensor(quoted(name))
        return Header(version, metadata, self.placed(infos, self.alignment(metadata)))

    def version(self) -> int:
        if self.data[: len(MAGIC)] != MAGIC:
            found = bytes(self.data[: len(MAGIC)])
            raise CheckpointError(
                f"{self.path} is no GGUF file: it begins with {found!r}, not with {MAGIC!r}"
            )
        self.at = len(MAGIC)
        version = self.number("I", "the version")
        if version in VERSIONS:
            return version
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file; bitfold reads little-endian ones: convert it with "
                "gguf-convert-endian of the gguf package"
            )
        raise self.error(f"its version is {version}; it must be {' or '.join(map(str, VERSIONS))}")

    def tensor(self, what: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        """Shape, type and offset."""
        count = self.number("I", what)
        if count > MAX_DIMENSIONS:
            raise self.error(f"{what} has {count} dimensions; there must be at most {MAX_DIMENSIONS}")
        shape = tuple(self.number("Q", what) for _ in range(count))[::-1]
        code = self.number("I", what)
        offset = self.number("Q", what)
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise self.error(f"{what} has the tensor type {code}, which bitfold doesn't know") from None
        if 0 in shape:
            raise self.error(f"{what} has a dimension of 0 in {list(shape)}")
        values, _ = GGML_QUANT_SIZES[kind]
        columns = shape[-1] if shape else 1
        if columns % values:
            raise self.error(
                f"{what} is {kind.name} with rows of {columns}; they must be a multiple of {values}"
            )
        return shape, kind, offset

    def alignment(self, metadata: dict[str, GGUFValue]) -> int:
        given = metadata.get(ALIGNMENT_KEY, GGUFValue(GGUF_DEFAULT_ALIGNMENT, GGUFValueType.UINT32))
        if given.type != GGUFValueType.UINT32:
            raise self.error(f"'{ALIGNMENT_KEY}' has the type {given.type.name}; it must be UINT32")
        if not 1 <= given.value <= MAX_ALIGNMENT or given.value & (given.value - 1):
            raise self.error(
                f"'{ALIGNMENT_KEY}' is {given.value}; it must be a power of two, at most {MAX_ALIGNMENT}"
            )
        return given.value

    def placed(
        self, infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]], alignment: int
    ) -> dict[str, StoredInfo]:
        """The tensors with the places of their bytes, which lie in the file and apart from one another."""
        begin, size = -(-self.at // alignment) * alignment, len(self.data)
        tensors = {}
        for name, (shape, kind, offset) in infos.items():
            nbytes = math.prod(shape[:-1]) * row_bytes(kind, shape[-1] if shape else 1)
            if offset % alignment:
                raise self.error(
                    f"{quoted(name)} lies at offset {offset}; it must be a multiple of {alignment}"
                )
            if begin + offset + nbytes > size:
                raise CheckpointError(
                    f"{self.path} is truncated or damaged: {quoted(name)} ends at byte {begin + offset + nbytes}, the "
                    f"file at {size}"
                )
            tensors[name] = StoredInfo(name, shape, kind, begin + offset, nbytes)
        in_order = sorted(tensors.values(), key=lambda info: info.start)
        for one, next_one in itertools.pairwise(in_order):
            if one.start + one.nbytes > next_one.start:
                raise self.error(f"the bytes of {quoted(one.name)} and {quoted(next_one.name)} overlap")
        return tensors
