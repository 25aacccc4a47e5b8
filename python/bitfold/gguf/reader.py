"""GGUF files as models: mapped into memory, split ones put together, tensors read a few rows at a time."""

from __future__ import annotations

import mmap
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitfold.gguf.library import GGMLQuantizationType, GGUFValue
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.scan import Header, StoredInfo, read_header, row_bytes
from bitfold.gguf.words import quoted
from bitfold.shards import CheckpointError

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_GIVE_BACK_EVERY = 256 << 20  # bytes read before mapped pages are given back
# Copy on write. Linux would count the whole file as memory of the process, and refuse one larger than it has; the flag
# that says not to has no name in Python before 3.13.
_LINUX = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if _LINUX else 0)

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.I8: torch.int8,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I64: torch.int64,
}
"""Types whose values are numbers of torch. Of all others a row is bytes."""


def read_gguf(path: str | Path) -> GgufModel:
    """The model in a GGUF file, or in the files of a split one, of which `path` is the first.

    Reads the headers and maps the data. The keys that describe the split are left out.

    Raises CheckpointError for a file that is missing, truncated, damaged or no GGUF file, and for split files that
    are incomplete or don't belong together.
    """
    path = Path(path)
    first = _File(path)
    files = [first, *(_File(part) for part in _others(path, first.header))]
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        if len(files) > 1:
            _check_part(file, number, len(files))
        for name in file.header.tensors:
            if name in tensors:
                raise CheckpointError(
                    f"{file.path} has the tensor {quoted(name)}, which an earlier part has too"
                )
            tensors[name] = file.tensor(name)
    total = _number(first.header, SPLIT_TENSORS)
    if total is not None and total != len(tensors):
        raise CheckpointError(f"{path} says there are {total} tensors, but its files have {len(tensors)}")
    split = (SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)
    metadata = {key: value for key, value in first.header.metadata.items() if key not in split}
    return GgufModel(metadata, tensors, tuple(file.path for file in files))


# ---- split files ----


def _number(header: Header, key: str) -> int | None:
    value: GGUFValue | None = header.metadata.get(key)
    return value.value if value is not None and isinstance(value.value, int) else None


def _others(path: Path, header: Header) -> list[Path]:
    """The files after the first of a split model: none if it is in one file."""
    count = _number(header, SPLIT_COUNT) or 0
    if count <= 1:
        return []
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} files of a model; its name must end in -00001-of-{count:05d}.gguf"
        )
    names = [f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    if path.name != names[0]:
        raise CheckpointError(f"{path} is no first file of a model; give {path.with_name(names[0])}")
    return [path.with_name(name) for name in names[1:]]


def _check_part(file: _File, number: int, count: int) -> None:
    found = (_number(file.header, SPLIT_NO), _number(file.header, SPLIT_COUNT))
    if found != (number, count):
        raise CheckpointError(
            f"{file.path} is to be part {number} of {count} by its name, but has {SPLIT_NO} {found[0]} and "
            f"{SPLIT_COUNT} {found[1]}"
        )


# ---- mapped files ----


class _File:
    """One file, mapped. What its tensors read lies in the map, which lives as long as any of them.

    Pages that were read are given back from time to time, so that reading a file of any size keeps little of it in
    this process. What is still in use comes back from the file by itself.

    Who writes to a tensor (training does, load_state_dict) writes to this process's own copy of a page, never to the
    file. That is for after the last read: pages that are given back forget what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            what = "is no file" if path.exists() else "is missing"
            raise CheckpointError(f"{path} {what}; it must be a GGUF file")
        if not path.stat().st_size:
            raise CheckpointError(f"{path} is empty, no GGUF file")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, _PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.header = read_header(path, self._map)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._read = 0

    def tensor(self, name: str) -> GgufTensor:
        info = self.header.tensors[name]
        return GgufTensor(name, info.shape, info.type, self._reader(info))

    def _reader(self, info: StoredInfo) -> Callable[[int, int], Tensor]:
        columns = info.shape[-1] if info.shape else 1
        stride = row_bytes(info.type, columns)
        dtype = PLAIN.get(info.type)
        rows = info.nbytes // stride

        def read(begin: int, end: int) -> Tensor:
            if not 0 <= begin <= end <= rows:
                raise IndexError(f"rows {begin} to {end} of {quoted(info.name)}, which has {rows}")
            raw = self._slice(info.start + begin * stride, (end - begin) * stride)
            if dtype is None:
                return raw.view(end - begin, stride)
            if raw.data_ptr() % dtype.itemsize:  # possible where general.alignment is 1 or 2
                raw = raw.clone()
            return raw.view(dtype).view(end - begin, columns)

        return read

    def _slice(self, start: int, nbytes: int) -> Tensor:
        if hasattr(mmap, "MADV_WILLNEED"):
            if self._read > _GIVE_BACK_EVERY:
                self._map.madvise(mmap.MADV_DONTNEED)
                self._read = 0
            self._read += nbytes
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + nbytes - page)
        # A storage of its own: torch saves storages whole, and none that is seen as two dtypes.
        return torch.from_numpy(self._bytes[start : start + nbytes])
