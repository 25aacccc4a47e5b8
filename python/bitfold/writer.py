"""Writing a checkpoint directory so that it is there as a whole or not at all.

Everything goes into a hidden directory beside the target, is flushed to the disk, and only then takes the
target's name by a rename. config.json is written last, so that what a killed run leaves behind is never taken
for a checkpoint; the next run with the same target removes it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from bitfold.shards import (
    CONFIG_FILE,
    INDEX_FILE,
    CheckpointError,
    ShardWriter,
    TensorSpec,
    index_of,
    plan_shards,
    read_json,
    shard_names,
)

SHARD_BYTES = 4 << 30  # largest file of a checkpoint, unless one tensor is larger
# What goes along from a model directory, and what of it doesn't.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
NOT_COPIED = (CONFIG_FILE, "*.index.json", "bitfold_*.json")
CONVERSION_FILE = "bitfold_conversion.json"  # what became of each tensor: lies in what `bitfold convert` made
_RESERVE = 1 << 20  # bytes beyond the tensors: headers, config, tokenizer


class CheckpointWriter:
    """A context manager that writes a checkpoint: `write` every tensor, then `commit`.

    Left without `commit` (an error, an interrupt) it removes all that it wrote. Tensors may come in any
    order; each goes to disk at once, so memory holds one tensor at a time.

    Args:
        target: the directory to make. It must not exist, unless it is empty, or `force` is given and it is a
            bitfold checkpoint, which is replaced in the moment of `commit`.
        specs: all tensors that will be written, in the order in which they are laid into files.
        force: replace an existing checkpoint.
        shard_bytes: the largest size of a file.

    Raises:
        CheckpointError: the target exists, or there is no room for it.
        OSError: the target can't be written; `filename` names it.
    """

    def __init__(
        self,
        target: Path,
        specs: Sequence[TensorSpec],
        *,
        force: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.target = check_target(target, force=force)
        self._force = force
        self._shards = plan_shards(specs, shard_bytes)
        self._names = shard_names(len(self._shards))
        self._home = {spec.name: i for i, shard in enumerate(self._shards) for spec in shard}
        self._open: dict[int, ShardWriter] = {}
        self._missing = set(self._home)
        self._bytes = sum(spec.nbytes for spec in specs)

    def __enter__(self) -> CheckpointWriter:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.target)
            check_room(self.target, self._bytes)
            self._dir = hidden(self.target, "partial")
            self._dir.mkdir()
        except OSError as error:
            error.filename, error.filename2 = str(self.target), None
            raise
        self._lock = lock(self._dir)
        return self

    def write(self, name: str, tensor: Tensor, part: int | None = None) -> None:
        """Write one announced tensor, or one entry of its first dimension (`part`); its dtype and shape must be those
        announced."""
        i = self._home[name]
        if i not in self._open:
            self._open[i] = ShardWriter(self._dir / self._names[i], self._shards[i])
        if self._open[i].write(name, tensor, part):
            self._missing.remove(name)
        if self._open[i].complete:
            self._open.pop(i).close()

    def add_json(self, name: str, data: Mapping[str, object]) -> None:
        """Write a JSON file into the checkpoint."""
        path = self._dir / name
        with path.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    def add_copy(self, source: Path) -> None:
        """Copy a file into the checkpoint under its own name."""
        path = self._dir / source.name
        shutil.copyfile(source, path)
        sync(path)

    def commit(self, config: Mapping[str, object]) -> None:
        """Write config.json, flush everything and give the checkpoint its name."""
        if self._missing:
            raise RuntimeError(
                f"{len(self._missing)} announced tensors were not written: {sorted(self._missing)[:3]}"
            )
        if len(self._shards) == 1 and not self._shards[0]:
            ShardWriter(self._dir / self._names[0], []).close()
        if len(self._shards) > 1:
            self.add_json(INDEX_FILE, index_of(self._shards))
        self.add_json(CONFIG_FILE, config)
        sync(self._dir)
        if self._force and self.target.exists():
            _replace(self._dir, self.target)
        else:
            os.rename(self._dir, self.target)  # never replaces a directory that holds anything
        sync(self.target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._open.values():
            writer.abandon()
        shutil.rmtree(self._dir, ignore_errors=True)  # after commit it is no longer there
        if self._lock >= 0:
            os.close(self._lock)
        if isinstance(error, OSError) and str(error.filename).startswith(str(self._dir)):
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise CheckpointError(
                    f"{self.target} has come into being while it was being written"
                ) from None
            error.filename, error.filename2 = str(self.target), None


def check_target(target: Path, *, force: bool) -> Path:
    """The target's absolute path, if a checkpoint may be written there; call it before long work.

    Raises CheckpointError where it exists: a checkpoint without `force`, or anything else.
    """
    target = Path(target).resolve()
    if not target.exists():
        return target
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is no directory")
    if not any(target.iterdir()):
        return target
    if not (is_bitfold_checkpoint(target) or (target / CONVERSION_FILE).is_file()):
        raise CheckpointError(
            f"{target} exists and is no bitfold checkpoint, so it is not overwritten; choose another"
        )
    if not force:
        raise CheckpointError(f"{target} exists already; --force (force=True) replaces it")
    return target


def refuse_source(source: Path, target: Path) -> None:
    """Raises CheckpointError where making the directory `target` would replace what is read."""
    if source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} is or contains {source}, which is read; choose another output")


def is_bitfold_checkpoint(path: Path) -> bool:
    """Whether the directory's config.json says that bitfold wrote it."""
    try:
        quantization = read_json(path / CONFIG_FILE).get("quantization_config")
    except (CheckpointError, OSError):
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == "bitfold"


def files_to_copy(source: Path) -> list[Path]:
    """What goes along from a model directory: tokenizer, generation settings, licence; no weights and no
    code.
    """
    return sorted(
        file
        for file in source.iterdir()
        if file.is_file()
        and any(file.match(pattern) for pattern in COPIED)
        and not any(file.match(pattern) for pattern in NOT_COPIED)
    )


# ---- appearing whole or not at all: of directories here, of GGUF files in gguf/writer.py ----


def hidden(target: Path, role: str) -> Path:
    """A new hidden name beside the target. What has the role "partial" is removed by a later run if nobody holds its
    lock.
    """
    return target.parent / f".{target.name}.{role}-{secrets.token_hex(4)}"


def _replace(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`, which keeps its name until then."""
    old = hidden(target, "old")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    rest = hidden(target, "partial")  # a kill from here on leaves what the next run removes
    os.rename(old, rest)
    shutil.rmtree(rest, ignore_errors=True)


def check_room(target: Path, nbytes: int) -> None:
    """Raises CheckpointError where the target's disk has no room for so many bytes."""
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + _RESERVE:
        raise CheckpointError(f"{target} needs {nbytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free")


def remove_abandoned(target: Path) -> None:
    """Remove what killed runs left: partial directories and files whose lock nobody holds."""
    for path in target.parent.iterdir():
        ours = path.name.startswith(f".{target.name}.partial-") and not path.is_symlink()
        if ours and (path.is_dir() or path.is_file()):
            fd = lock(path)
            if fd < 0:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            os.close(fd)


def lock(path: Path) -> int:
    """A descriptor that holds the lock of a directory or a file until it is closed or the process dies; -1 if another
    has it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
