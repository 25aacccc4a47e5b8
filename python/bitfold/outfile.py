"""Single files that lie beside models - pages, recipes, measurements - and never take the place of anything else."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from bitfold.shards import CheckpointError
from bitfold.writer import check_room, hidden, remove_abandoned, sync

_HEAD = 1 << 12  # bytes that a mark is looked for in


@dataclass(frozen=True)
class Kind:
    """What is written into a file. name: as messages call it; mark: what all such files begin with."""

    name: str
    mark: re.Pattern[str]


PAGE = Kind(
    "page of bitfold's", re.compile(r"<!doctype html>.*<meta name=\"generator\" content=\"bitfold\b", re.S)
)


def check_output(option: str, path: Path, kind: Kind) -> None:
    """Look whether such a file may be written there; call it before long work.

    A file of that kind is replaced and an empty one filled; a device or a pipe is written to.

    Raises ValueError where the directory isn't there, or the path is one or a file of another kind; option: its name.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{option} is '{path}', in a directory that doesn't exist")
    if path.is_dir():
        raise ValueError(f"{option} is '{path}', which is a directory; it must be a file")
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(_HEAD).decode("utf-8", errors="replace")
    if head and not kind.mark.match(head):
        raise ValueError(
            f"{option} is '{path}', which exists and is no {kind.name}, so it is not overwritten; choose another"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file that `check_output` let pass. Raises as `write_file`."""
    data = text.encode("utf-8")
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_bytes(data)
    else:
        write_file(path.resolve(), data, replace=True)


def write_file(target: Path, data: bytes, *, replace: bool) -> None:
    """Make a file appear, whole or not at all; replace: in the place of one that is there.

    Raises CheckpointError where there is no room for it, or a file without `replace`; OSError where it can't be
    written: `filename` names it.
    """
    partial = hidden(target, "partial")
    try:
        remove_abandoned(target)
        check_room(target, len(data))
        partial.write_bytes(data)
        sync(partial)
        if replace:
            os.replace(partial, target)
        else:
            os.link(partial, target)  # unlike a rename it never replaces a file
        sync(target.parent)
    except FileExistsError:
        raise CheckpointError(f"{target} has come into being while it was being written") from None
    except OSError as error:
        error.filename, error.filename2 = str(target), None
        raise
    finally:
        partial.unlink(missing_ok=True)
