"""From one kind of checkpoint to another: what is known by its place, and what converts it.

Each pair of kinds is a row of _PAIRS; a new kind is a name in `kind_of` and its rows. Every tensor of a conversion gets
a status, exact or by how much it differs, which is stored beside what was made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitfold.shards import CheckpointError
from bitfold.writer import is_bitfold_checkpoint

if TYPE_CHECKING:
    from bitfold.gguf.convert import Progress, Status

REPORT_FILE = "bitfold_conversion.json"
GGUF, BITFOLD, TRANSFORMERS = "gguf", "bitfold", "transformers"


@dataclass(frozen=True)
class Conversion:
    """What was converted. before, after: the kinds; tensors: what became of each; remarks: what the new kind doesn't
    say; report: the file that says all this."""

    source: Path
    target: Path
    before: str
    after: str
    tensors: tuple[Status, ...]
    remarks: tuple[str, ...]
    report: Path

    @property
    def exact(self) -> bool:
        """Every value of every tensor is the same."""
        return all(status.exact for status in self.tensors)

    def to_json(self) -> dict[str, Any]:
        tensors = [{**vars(status), "exact": status.exact} for status in self.tensors]
        return {
            "source": str(self.source),
            "target": str(self.target),
            "from": self.before,
            "to": self.after,
            "exact": self.exact,
            "remarks": list(self.remarks),
            "tensors": tensors,
        }


@dataclass(frozen=True)
class _Options:
    """As the arguments of `convert_checkpoint`."""

    decode: torch.dtype | None
    dtype: torch.dtype | None
    force: bool
    progress: Progress | None
    remark: Callable[[str], None]


def kind_of(path: Path) -> str:
    """What lies at a path: "gguf" (any file; it is read as one), "bitfold" or "transformers" (an unquantized directory,
    or one that another library quantized, which reading it will tell)."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        return GGUF
    return BITFOLD if is_bitfold_checkpoint(path) else TRANSFORMERS


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    decode: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint to another kind.

    Args:
        source: a GGUF file, a directory that bitfold quantized in GGUF's block formats, or an unquantized Hugging Face
            directory.
        target: what to make: a GGUF file if the name ends in .gguf, else a directory: a checkpoint of bitfold's with
            the blocks of a GGUF file (an unquantized one, if it has none). It appears as a whole or not at all. What
            became of each tensor is noted in bitfold_conversion.json there, of a file NAME.gguf beside it in
            NAME.gguf.json.
        decode: make an unquantized directory instead, all of whose weights have this dtype.
        dtype: of the matrices of a GGUF file made of an unquantized directory; None: as they are stored.
        force: replace a file or checkpoint of the same kind that is at `target`.
        progress: told after each piece.

    Raises:
        CheckpointError: the source is incomplete, damaged, or has something that the other kind has no word for; the
            target is taken or its disk too small.
        ValueError: the kinds don't go together, or a dtype can't hold the values.
        OSError: the target can't be written.
        MissingExtraError: transformers or gguf is not installed.
    """
    source, target = Path(source), Path(target)
    before = kind_of(source)
    after = GGUF if target.suffix == ".gguf" else BITFOLD if decode is None else TRANSFORMERS
    if (before, after) not in _PAIRS:
        raise ValueError(
            f"{source} is {_NAMES[before]}; {_ADVICE.get((before, after), _NO_WAY).format(after=after)}"
        )
    if decode is not None and after == GGUF:
        raise ValueError("decode was given, but a GGUF file takes dtype")
    if dtype is not None and (before, after) != (TRANSFORMERS, GGUF):
        raise ValueError(
            "dtype was given, which goes with an unquantized directory and a GGUF file to make of it"
        )
    report = target.with_name(f"{target.name}.json") if after == GGUF else target / REPORT_FILE
    if report.exists() and not force:
        raise CheckpointError(f"{report} exists already; --force (force=True) replaces it")
    remarks: list[str] = []
    statuses = _PAIRS[before, after](source, target, _Options(decode, dtype, force, progress, remarks.append))
    result = Conversion(source, target, before, kind_of(target), tuple(statuses), tuple(remarks), report)
    report.write_text(json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _gguf_to_directory(source: Path, target: Path, options: _Options) -> list[Status]:
    from bitfold.gguf.convert import to_directory

    return to_directory(source, target, decode=options.decode, force=options.force, progress=options.progress)


def _directory_to_gguf(source: Path, target: Path, options: _Options) -> list[Status]:
    from bitfold.gguf.convert import to_file

    return to_file(
        source,
        target,
        dtype=options.dtype,
        force=options.force,
        progress=options.progress,
        remark=options.remark,
    )


_PAIRS: dict[tuple[str, str], Callable[[Path, Path, _Options], list[Status]]] = {
    (GGUF, BITFOLD): _gguf_to_directory,
    (GGUF, TRANSFORMERS): _gguf_to_directory,
    (BITFOLD, GGUF): _directory_to_gguf,
    (TRANSFORMERS, GGUF): _directory_to_gguf,
}
_NAMES = {GGUF: "a GGUF file", BITFOLD: "a checkpoint of bitfold's", TRANSFORMERS: "an unquantized directory"}
_NO_WAY = "bitfold can't convert it to {after}"
_ADVICE = {
    (GGUF, GGUF): "to quantize it into another one use bitfold quantize",
    (TRANSFORMERS, BITFOLD): "to quantize it use bitfold quantize, or name a .gguf file to make",
}
