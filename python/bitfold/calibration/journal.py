"""Finished blocks on the disk, so that a run that was stopped goes on where it was.

A folder holds what the run is of (fingerprint.json), and for each finished block its tensors and what is to be
reported. A file is written under another name, flushed, and renamed; a block's report comes after its tensors, and is
what says that the block is finished. So whenever a run is killed, what is there is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bitfold.calibration import activations
from bitfold.shards import CheckpointError, StoredTensor, read_header, read_json
from bitfold.writer import lock, sync

FINGERPRINT_FILE = "fingerprint.json"
# The names of what runs write there.
_OURS = re.compile(rf"(fingerprint\.json|block-\d{{5,}}\.(json|safetensors))(\.new)?|{activations.NAMES}")


class Journal:
    """The folder of one run, its alone while it is open; a context manager.

    Args:
        folder: made where it isn't there; one that is there goes on, if it is of the same run.
        fingerprint: what the run is of, by name: texts and numbers. They are compared one by one.
        restart: drop what is there.

    Raises:
        CheckpointError: the folder is of another run (the message says what is different), is no such folder, or
        another
            process has it.
        OSError: it can't be written.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder, self._fingerprint, self._restart = folder, dict(fingerprint), restart
        self.finished = 0

    def __enter__(self) -> Journal:
        made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        if self._lock < 0:
            raise CheckpointError(f"{self.folder} is in use: another run is calibrating for this output")
        try:
            self._begin(made)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _begin(self, made: bool) -> None:
        path = self.folder / FINGERPRINT_FILE
        others = [file.name for file in self.folder.iterdir() if not _OURS.fullmatch(file.name)]
        before = read_json(path) if path.exists() else {}
        if (others and not before) or (before and not before.keys() & self._fingerprint.keys()):
            raise CheckpointError(
                f"{self.folder} holds other files than those of a calibration; choose another folder"
            )
        if self._restart or not before:
            self._clear()
            self._write_json(path, self._fingerprint)
            sync(self.folder.parent)
            before = self._fingerprint
        different = [name for name, value in self._fingerprint.items() if before.get(name) != value]
        if different:
            name = different[0]
            raise CheckpointError(
                f"{self.folder} has blocks of a run with another {name} ({_short(before.get(name))}, now "
                f"{_short(self._fingerprint[name])}): --restart (restart=True) drops them and starts anew"
            )
        self.finished = self._count()

    def _clear(self) -> None:
        """Remove what runs write; the last block first and the fingerprint last, so that what a kill leaves is
        whole."""
        path = self.folder / FINGERPRINT_FILE
        for file in sorted(self.folder.iterdir(), reverse=True):
            if file != path and _OURS.fullmatch(file.name):
                file.unlink()
        path.unlink(missing_ok=True)

    def _count(self) -> int:
        count = 0
        while self._report(count).exists():
            count += 1
        return count

    def _report(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"

    def _tensors(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def add(self, block: int, tensors: Mapping[str, Tensor], report: Sequence[Mapping[str, Any]]) -> None:
        """Keep a finished block: its tensors by their names in the checkpoint, and what is to be reported of it."""
        path = self._tensors(block)
        new = path.with_name(f"{path.name}.new")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new)
        sync(new)
        os.rename(new, path)
        self._write_json(self._report(block), {"modules": list(report)})
        self.finished = block + 1

    def _write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        new = path.with_name(f"{path.name}.new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, path)
        sync(self.folder)

    def tensors(self, block: int) -> dict[str, StoredTensor]:
        """The tensors of a finished block: where they are."""
        return read_header(self._tensors(block))

    def report(self, block: int) -> list[dict[str, Any]]:
        """What `add` was told to report of a finished block."""
        return read_json(self._report(block))["modules"]

    def drop(self) -> None:
        """Remove the folder, whose blocks are in a checkpoint, unless somebody has put files of their own there."""
        self._clear()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.finished == 0:
            self.drop()  # there is nothing to go on with
        os.close(self._lock)


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = str(value)
    return f"{text[:12]}..." if len(text) > 40 else text
