"""Writing a GGUF file in its order while the next tensor is computed, so that it appears as a whole or not at all.

As with checkpoint directories (bitfold/writer.py) everything goes into a hidden file beside the target, which is
flushed to the disk and only then gets the target's name. What a killed run leaves is hidden, and removed by the next
run with the same target.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from bitfold.gguf.layout import Layout
from bitfold.gguf.magic import is_gguf
from bitfold.shards import CheckpointError, reserve, write_at
from bitfold.writer import check_room, hidden, lock, remove_abandoned, sync

_WAITING = 2  # pieces handed to the writing thread that are not yet written, at most


class GgufWriter:
    """A context manager that writes one file: `write` all bytes of all tensors in the layout's order, then `commit`.

    Left without `commit` (an error, an interrupt) it removes what it wrote. A thread writes what it is handed while the
    caller computes the next piece.

    Args:
        target: the file to make. It must not exist, unless `force` is given and it is a GGUF file, which is replaced in
            the moment of `commit`.
        layout: what will be written.
        force: replace an existing GGUF file.

    Raises:
        CheckpointError: the target exists, or there is no room for it.
        OSError: the target can't be written; `filename` names it.
    """

    def __init__(self, target: Path, layout: Layout, *, force: bool = False) -> None:
        self.target = check_target_file(target, force=force)
        self._force = force
        self._layout = layout
        self._tensor = 0  # the one that is being written
        self._done = 0  # bytes of it
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> GgufWriter:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.target)
            check_room(self.target, self._layout.nbytes)
            self._partial = hidden(self.target, "partial")
            self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._lock = lock(self._partial)
        except OSError as error:
            error.filename, error.filename2 = str(self.target), None
            raise
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bitfold-gguf")
        try:
            reserve(self._fd, self._layout.nbytes)
            write_at(self._fd, 0, self._layout.header)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def write(self, name: str, data: Tensor) -> None:
        """The next bytes of a tensor: whole rows, of any dtype. They must stay as they are until they are written.

        Tensors come in the order of the layout, each as a whole before the next.
        """
        info = self._layout.infos[self._tensor]
        raw = data.detach().contiguous().reshape(-1).view(torch.uint8)
        if name != info.name or self._done + raw.nbytes > info.nbytes:
            raise RuntimeError(
                f"{raw.nbytes} bytes of '{name}' where '{info.name}' has {self._done} of {info.nbytes}"
            )
        start = self._layout.starts[self._tensor] + self._done
        self._submit(start, raw)
        self._done += raw.nbytes
        if self._done == info.nbytes:
            self._tensor, self._done = self._tensor + 1, 0

    def _submit(self, start: int, raw: Tensor) -> None:
        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(write_at, self._fd, start, raw.numpy().data))

    def commit(self) -> None:
        """Wait for what is being written, flush it and give the file its name."""
        if self._tensor < len(self._layout.infos):
            raise RuntimeError(f"'{self._layout.infos[self._tensor].name}' and what follows were not written")
        while self._waiting:
            self._waiting.popleft().result()
        os.fsync(self._fd)
        if self._force:
            os.replace(self._partial, self.target)
        else:
            self._take_name()
        sync(self.target.parent)

    def _take_name(self) -> None:
        """Rename, but never over a file: a link can't do that."""
        try:
            os.link(self._partial, self.target)
            os.unlink(self._partial)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            check_target_file(self.target, force=False)  # a file system without links: as good as it gets
            os.rename(self._partial, self.target)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._partial.unlink(missing_ok=True)  # after commit it is no longer there
        os.close(self._fd)
        if self._lock >= 0:
            os.close(self._lock)
        if not isinstance(error, OSError):
            return
        if error.errno == errno.EEXIST:
            raise CheckpointError(f"{self.target} has come into being while it was being written") from None
        if error.filename is None or str(error.filename) == str(self._partial):
            error.filename, error.filename2 = str(self.target), None


def check_target_file(target: Path, *, force: bool) -> Path:
    """The target's absolute path, if a GGUF file may be written there; call it before long work.

    Raises CheckpointError where it exists: a GGUF file without `force`, or anything else.
    """
    target = Path(target).resolve()
    if not target.exists():
        return target
    if not target.is_file():
        raise CheckpointError(f"{target} exists and is no file")
    if not is_gguf(target):
        raise CheckpointError(
            f"{target} exists and is no GGUF file, so it is not overwritten; choose another"
        )
    if not force:
        raise CheckpointError(f"{target} exists already; --force (force=True) replaces it")
    return target
