"""llama.cpp's importance files: for each matrix of a model, how large its inputs are, column by column.

An encoder weighs the error of a column by the mean square of what it is multiplied with. The files hold sums of squares
and numbers of tokens, so that they can be added up, in one of two forms:

- GGUF: general.type = "imatrix", imatrix.datasets (strings), imatrix.chunk_count and imatrix.chunk_size (u32); for each
  matrix F32 tensors <name>.in_sum2 [experts, columns] and <name>.counts [experts, 1], whole numbers; of a matrix that
  is no stack [columns] and [1];
- the older .dat, little-endian: i32 number of entries; each an i32 length and a name, i32 calls, i32 number of values,
  and the values in F32: mean squares times calls, those of a stack of experts one after the other. Then perhaps i32
  number of chunks, i32 length and the name of the data set.

Every length is compared with what is left of the file before anything of that size is made.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

from bitfold.gguf.imatrix import Entry, Imatrix
from bitfold.gguf.importance import Importance
from bitfold.gguf.layout import TensorInfo, lay_out
from bitfold.gguf.library import GGMLQuantizationType, GGUFValue, GGUFValueType
from bitfold.gguf.magic import is_gguf
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.reader import read_gguf
from bitfold.gguf.scan import TEXT
from bitfold.gguf.writer import GgufWriter
from bitfold.outfile import write_file
from bitfold.shards import CheckpointError

TYPE, DATASETS = "imatrix", "imatrix.datasets"
CHUNK_COUNT, CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
_LONGEST_SHOWN = 80  # characters of a name in a message
SUFFIXES = {".gguf": "GGUF", ".dat": "the older form"}


# ---- reading ----


def read_imatrix(path: str | Path) -> Imatrix:
    """What a file of either form holds.

    Raises CheckpointError for a file that is missing, truncated or no importance file, and for importance that is not
    finite, negative or zero for a whole tensor.
    """
    path = Path(path)
    try:
        in_gguf = is_gguf(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else "is a directory, no importance file"
        )
        raise CheckpointError(f"{path} {reason}") from None
    imatrix = _of_gguf(path) if in_gguf else _Legacy(path).imatrix()
    if not imatrix.entries:
        raise CheckpointError(f"{path} has importance for no tensor")
    for name, entry in imatrix.entries.items():
        _check(path, name, entry)
    return imatrix


def read_importance(path: str | Path) -> Importance:
    """What quantizing makes of an importance file. Raises as `read_imatrix`."""
    imatrix = read_imatrix(path)
    means = {name: entry.mean() for name, entry in imatrix.entries.items()}
    return Importance(str(path), means, imatrix.datasets[0] if imatrix.datasets else "", imatrix.chunks)


def _shown(name: str) -> str:
    """A name in quotes, on one line and not too long, whatever a damaged file makes of it."""
    return repr(name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + " ...")


def _check(path: Path, name: str, entry: Entry) -> None:
    bad = ~entry.sums.isfinite() | (entry.sums < 0)
    if bad.any():
        expert, column = bad.nonzero()[0].tolist()
        value = entry.sums[expert, column].item()
        raise CheckpointError(
            f"{path} has the importance {value} for column {column} of {_shown(name)}; it must be finite and not "
            "negative"
        )
    blank = (entry.sums == 0).all(dim=1) & (entry.counts > 0)
    if blank.any():
        which = f" of expert {int(blank.nonzero()[0])}" if len(blank) > 1 else ""
        raise CheckpointError(f"{path} has zero importance for all columns{which} of {_shown(name)}")


def _of_gguf(path: Path) -> Imatrix:
    model = read_gguf(path)
    kind = model.metadata.get("general.type")
    if kind is None or kind.value != TYPE:
        raise CheckpointError(
            f"{path} is a GGUF file, but no importance file: its general.type is not '{TYPE}'"
        )
    datasets = model.metadata.get(DATASETS)
    if datasets is None or datasets.type != GGUFValueType.ARRAY or datasets.sub_type != GGUFValueType.STRING:
        raise CheckpointError(f"{path} has no array of strings '{DATASETS}', which importance files have")
    chunks, chunk_size = (_unsigned(path, model, key) for key in (CHUNK_COUNT, CHUNK_SIZE))
    entries = {}
    for name, tensor in model.tensors.items():
        stem = name.removesuffix(SUMS)
        if stem != name:
            entries[stem] = _entry(path, stem, tensor, model.tensors.get(stem + COUNTS))
        elif not name.endswith(COUNTS) or name.removesuffix(COUNTS) + SUMS not in model.tensors:
            raise CheckpointError(
                f"{path} has a tensor {_shown(name)}; an importance file has pairs named {SUMS} and {COUNTS}"
            )
    return Imatrix(entries, tuple(datasets.value), chunks, chunk_size)


def _unsigned(path: Path, model: GgufModel, key: str) -> int:
    value = model.metadata.get(key)
    if value is None or value.type != GGUFValueType.UINT32:
        raise CheckpointError(f"{path} has no 32-bit number '{key}', which importance files have")
    return value.value


def _entry(path: Path, name: str, sums: GgufTensor, counts: GgufTensor | None) -> Entry:
    if counts is None:
        raise CheckpointError(f"{path} has {_shown(name + SUMS)} without {_shown(name + COUNTS)}")
    for tensor in (sums, counts):
        if tensor.type != GGMLQuantizationType.F32 or len(tensor.shape) > 2 or 0 in tensor.shape:
            found = f"{tensor.type.name} {list(tensor.shape)}"
            raise CheckpointError(
                f"{_shown(tensor.name)} in {path} is {found}; it must be F32 with one or two dimensions"
            )
    numbers = counts.read(0, counts.rows)
    if numbers.numel() != sums.rows:
        raise CheckpointError(f"{path} has {numbers.numel()} counts for {sums.rows} rows of {_shown(name)}")
    if not (numbers.isfinite() & (numbers >= 0) & (numbers < 2**62)).all():
        raise CheckpointError(f"{path} has a count for {_shown(name)} that is no number of tokens")
    # Copied, for what is read lies in the mapped file.
    return Entry(sums.read(0, sums.rows).clone(), numbers.reshape(-1).round().long())


class _Legacy:
    """A place in a file of the older form, which moves on as values are taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes < 0 or nbytes > len(self.data) - self.at:
            raise CheckpointError(
                f"{self.path} is no importance file, or a damaged one: {what} needs {nbytes} bytes at {self.at}, where "
                f"{len(self.data) - self.at} are left"
            )
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def number(self, what: str) -> int:
        return struct.unpack("<i", self.take(4, what))[0]

    def text(self, what: str) -> str:
        return str(self.take(self.number(f"the length of {what}"), what), *TEXT)

    def imatrix(self) -> Imatrix:
        entries: dict[str, Entry] = {}
        for i in range(self.number("the number of entries")):
            name = self.text(f"the name of entry {i}")
            calls = self.number(f"the calls of {_shown(name)}")
            raw = self.take(
                4 * self.number(f"the number of values of {_shown(name)}"),
                f"the importance of {_shown(name)}",
            )
            if name in entries or not raw:
                raise CheckpointError(
                    f"{self.path} has {_shown(name)} {'twice' if raw else 'without values'}"
                )
            sums = torch.from_numpy(np.frombuffer(raw, "<f4").astype(np.float32))
            entries[name] = Entry(sums[None], torch.tensor([max(calls, 1)]))
        if self.at == len(self.data):
            return Imatrix(entries)
        chunks = self.number("the number of chunks")
        return Imatrix(entries, (self.text("the data set"),), max(chunks, 0))


# ---- writing ----


def check_target_imatrix(path: Path, *, force: bool) -> Path:
    """The absolute path, if an importance file may be written there; call it before long work.

    Raises ValueError where the name's ending says no form, CheckpointError where it exists: an importance file without
    `force`, or anything else.
    """
    target = Path(path).resolve()
    if target.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} must end in {' or '.join(f'{end} ({form})' for end, form in SUFFIXES.items())}"
        )
    if target.exists():
        try:
            read_imatrix(target)
        except CheckpointError:
            raise CheckpointError(
                f"{target} exists and is no importance file, so it is not overwritten; choose another"
            ) from None
        if not force:
            raise CheckpointError(f"{target} exists already; --force (force=True) replaces it")
    return target


def write_imatrix(path: str | Path, imatrix: Imatrix, *, force: bool = False) -> None:
    """Write a file in the form that the name's ending says: .gguf, or .dat for the older one.

    It appears whole or not at all.

    Raises as `check_target_imatrix`, and OSError where it can't be written.
    """
    target = check_target_imatrix(Path(path), force=force)
    if target.suffix == ".gguf":
        _write_gguf(target, imatrix, force)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, _legacy_bytes(imatrix), replace=force)


def _write_gguf(target: Path, imatrix: Imatrix, force: bool) -> None:
    metadata = {
        "general.type": GGUFValue(TYPE, GGUFValueType.STRING),
        DATASETS: GGUFValue(list(imatrix.datasets), GGUFValueType.ARRAY, GGUFValueType.STRING),
        CHUNK_COUNT: GGUFValue(imatrix.chunks, GGUFValueType.UINT32),
        CHUNK_SIZE: GGUFValue(imatrix.chunk_size, GGUFValueType.UINT32),
    }
    tensors = {}
    for name, entry in imatrix.entries.items():
        stacked = len(entry.counts) > 1  # one expert is no dimension
        tensors[name + SUMS] = entry.sums if stacked else entry.sums[0]
        tensors[name + COUNTS] = entry.counts.float()[:, None] if stacked else entry.counts.float()
    infos = [
        TensorInfo(name, tuple(tensor.shape), GGMLQuantizationType.F32) for name, tensor in tensors.items()
    ]
    with GgufWriter(target, lay_out(metadata, infos), force=force) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()


def _legacy_bytes(imatrix: Imatrix) -> bytes:
    """A call is a chunk here; an expert that saw no token is written as one whose columns all count alike."""
    parts = [struct.pack("<i", len(imatrix.entries))]
    calls = max(imatrix.chunks, 1)
    for name, entry in imatrix.entries.items():
        values = (entry.mean() * calls).reshape(-1).numpy().astype("<f4").tobytes()
        parts += [_packed(name), struct.pack("<ii", calls, len(values) // 4), values]
    parts += [struct.pack("<i", imatrix.chunks), _packed(imatrix.datasets[0] if imatrix.datasets else "")]
    return b"".join(parts)


def _packed(text: str) -> bytes:
    raw = text.encode(*TEXT)
    return struct.pack("<i", len(raw)) + raw
