"""Safetensors files and directories of them: what they hold, and writing them as a stream.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype,
shape, byte range) and the bytes of the tensors without gaps (https://huggingface.co/docs/safetensors).
Tensors are read with the library, which maps the file. The library's writer wants all tensors of a file at
once; the writer here knows the sizes beforehand, writes the header first and each tensor at its place when it
comes, so that writing a file of any size needs no memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20  # bytes; the library's own limit
_WRITE_CHUNK = 64 << 20  # bytes handed to one write call
_REMAP_EVERY = 256 << 20  # bytes read from one mapping of a file before it is dropped


class CheckpointError(ValueError):
    """A model directory, or a file of one, is not what it must be. The message is one sentence."""


def listed(names: list[str]) -> str:
    """'1 tensor ('a')', '3 tensors ('a', 'b', ...)'."""
    shown = ", ".join(f"'{name}'" for name in names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `dtype` is safetensors' code ("BF16"), `nbytes` its size in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    path: Path

    @property
    def torch_dtype(self) -> torch.dtype:
        """Raises CheckpointError for a dtype that torch tensors are not made of here."""
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor '{self.name}' has a dtype bitfold can't read: {self.dtype}"
            )
        return DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes; reads nothing but the header.

    Raises CheckpointError where the file is missing, is no safetensors file, or is shorter than its header
    says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER, size):
                raise CheckpointError(f"{path} is truncated or no safetensors file: it is {size} bytes long")
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    if len(raw) < length:
        raise CheckpointError(f"{path} is truncated: its header has {len(raw)} of {length} bytes")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header can't be read")
    header.pop("__metadata__", None)
    entries = sorted(_header_entry(path, name, fields) for name, fields in header.items())
    ends = [stop for _, stop, *_ in entries]
    wanted = 8 + length + (ends[-1] if ends else 0)
    if size != wanted:
        what = "truncated" if size < wanted else "damaged"
        raise CheckpointError(f"{path} is {what}: its header describes {wanted} bytes, the file has {size}")
    tensors = {}
    for (start, stop, dtype, shape, name), previous in zip(entries, [0, *ends], strict=False):
        bad_size = dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize
        if start != previous or bad_size:
            raise CheckpointError(
                f"{path} is damaged: the bytes of '{name}' don't fit its shape or its neighbours"
            )
        tensors[name] = StoredTensor(name, dtype, shape, stop - start, path)
    return tensors


def _header_entry(path: Path, name: str, fields: Any) -> tuple[int, int, str, tuple[int, ...], str]:
    """Where a tensor begins and ends, its dtype, shape and name."""
    try:
        start, stop = fields["data_offsets"]
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        sound = isinstance(dtype, str) and all(map(is_whole, (start, stop, *shape)))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path} is damaged: its header has no dtype, shape and data_offsets of '{name}'"
        )
    return start, stop, dtype, shape, name


def is_whole(value: object) -> bool:
    """Whether it is a whole number, not negative, that a size may be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def read_directory(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a model directory: model.safetensors, or the shards that the index names.

    Raises CheckpointError for anything missing, truncated or contradictory.
    """
    index_path = path / INDEX_FILE
    if not index_path.exists():
        if not (path / SINGLE_FILE).exists():
            hint = "; convert its .bin files to safetensors first" if any(path.glob("*.bin")) else ""
            raise CheckpointError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        return read_header(path / SINGLE_FILE)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map")
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index_path} names the file '{file_name}', which is not in the directory itself"
            )
        tensors.update(read_header(path / file_name))
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].path.name != file_name:
            raise CheckpointError(
                f"{path / file_name} lacks the tensor '{name}', which {INDEX_FILE} says it holds"
            )
    return tensors


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError where the file is missing, no JSON, or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def read_tensors(tensors: Iterable[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors one by one, memory-mapped, in the order given (best: file by file).

    The mapping is dropped and made anew every few hundred MiB, so that pages already read leave the process,
    provided the caller lets go of the tensors.
    """
    handle, path, mapped = None, None, 0
    for stored in tensors:
        if handle is None or path != stored.path or mapped > _REMAP_EVERY:
            handle = _open(stored.path)
            path, mapped = stored.path, 0
        mapped += stored.nbytes
        try:
            yield stored.name, handle.get_tensor(stored.name)
        except SafetensorError as error:
            raise CheckpointError(f"{stored.path}: tensor '{stored.name}' can't be read ({error})") from None


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is no valid safetensors file ({error})") from None


class ShardWriter:
    """Writes one safetensors file whose tensors arrive in any order.

    The file's space is reserved at once, so that a full disk shows at the start. Tensors lie in descending
    order of their element size, which keeps each aligned to it, and the first at a multiple of 64 bytes.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path = path
        self._specs = {spec.name: spec for spec in specs}
        self._parts: dict[str, set[int]] = {}  # what is still to come of tensors that come in parts
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        size = 0
        for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
            self._offsets[spec.name] = size
            header[spec.name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [size, size + spec.nbytes],
            }
            size += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % 64)
        self._start = 8 + len(text)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with named(path):
            reserve(self._fd, self._start + size)
            write_at(self._fd, 0, len(text).to_bytes(8, "little") + text)

    @property
    def complete(self) -> bool:
        return not self._specs

    def write(self, name: str, tensor: Tensor, part: int | None = None) -> bool:
        """Write a tensor of exactly the announced dtype and shape, each name once; part: of the first dimension, where
        only this entry of it is given, and each of them is to come once. Returns whether the tensor is whole now."""
        spec = self._specs[name]
        shape = spec.shape if part is None else spec.shape[1:]
        if tensor.dtype != spec.dtype or tuple(tensor.shape) != shape:
            raise RuntimeError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, announced {spec}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        offset = self._offsets[name] + (part or 0) * flat.nbytes
        if flat.numel():
            with named(self.path):
                write_at(self._fd, self._start + offset, flat.view(torch.uint8).numpy().data)
        left = self._parts.setdefault(name, set(range(spec.shape[0])) if part is not None else set())
        if part is not None:
            left.remove(part)
        if not left:
            del self._specs[name]
        return not left

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                with named(self.path):
                    os.fsync(fd)
            finally:
                os.close(fd)

    def abandon(self) -> None:
        """Close the file as it is; it is about to be removed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Cut the tensors, in their order, into files of at most `shard_bytes` (a larger tensor is a file by
    itself).
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """model.safetensors for one file, model-00001-of-0000N.safetensors for more."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index_of(shards: Sequence[Sequence[TensorSpec]]) -> Mapping[str, object]:
    """The content of model.safetensors.index.json."""
    names = shard_names(len(shards))
    return {
        "metadata": {"total_size": sum(spec.nbytes for shard in shards for spec in shard)},
        "weight_map": {spec.name: name for shard, name in zip(shards, names, strict=True) for spec in shard},
    }


def reserve(fd: int, size: int) -> None:
    """Give an empty file its size and, where the file system can, its room on the disk; it reads as zeros."""
    os.ftruncate(fd, size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EOPNOTSUPP,
        ):  # the file system can't: then writing will tell
            raise


def write_at(fd: int, offset: int, data: bytes | memoryview) -> None:
    """Write all of the bytes (one-dimensional, contiguous) at their place."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view[:_WRITE_CHUNK], offset)
        view, offset = view[written:], offset + written


class named:
    """Give an OSError of a bare descriptor the name of its file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self._path)
