"""From one kind of checkpoint to another: what is known by its place, and what converts it.

Each pair of kinds is a row of _PAIRS; a new kind is a name in `kind_of` and its rows. Every tensor of a conversion gets
a status, exact or by how much it differs, which is stored beside what was made.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitfold import hf
from bitfold.check.examine import refuse_faults
from bitfold.foreign.owners import OWNERS, read_owner
from bitfold.foreign.targets import TARGETS
from bitfold.formats import parse
from bitfold.outfile import Kind, check_output, write_text
from bitfold.section import read_quantization
from bitfold.shards import CheckpointError
from bitfold.writer import CONVERSION_FILE, is_bitfold_checkpoint, refuse_source

if TYPE_CHECKING:
    from bitfold.gguf.convert import Progress, Status

GGUF, BITFOLD, TRANSFORMERS = "gguf", "bitfold", "transformers"
_REPORT = Kind("report of a conversion", re.compile(r"\{\s*\"source\": "))


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
    """As the arguments of `convert_checkpoint`; kind: what `to` says or means."""

    kind: str
    decode: torch.dtype | None
    dtype: torch.dtype | None
    allow_lossy: bool
    force: bool
    progress: Progress | None
    remark: Callable[[str], None]


def kind_of(path: Path) -> str:
    """What lies at a path: "gguf" (any file; it is read as one), "bitfold", an owner of foreign/owners.py ("gptq") or
    "transformers" (an unquantized directory, or one of yet another library, which reading it will tell)."""
    if not path.exists():
        raise hf.not_there(path)
    if path.is_file():
        return GGUF
    if is_bitfold_checkpoint(path):
        return BITFOLD
    found = read_owner(path)
    return TRANSFORMERS if found is None else found[0].name


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    decode: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    allow_lossy: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint to another kind.

    Args:
        source: a GGUF file, a directory that bitfold, GPTQ, AWQ, compressed-tensors or bitsandbytes quantized, or an
            unquantized Hugging Face directory.
        target: what to make: a file or a directory. It appears as a whole or not at all. What became of each tensor is
            noted in bitfold_conversion.json there, of a file NAME.gguf beside it in NAME.gguf.json.
        to: the kind: "gguf", "gptq", "gptq-v2", "awq", "compressed-tensors", "bitsandbytes" or "bitfold" (a directory
            without quantized weights, if a GGUF file has none). None: "gguf" if the name of `target` ends in .gguf,
            else "bitfold".
        decode: make an unquantized directory instead, all of whose weights have this dtype.
        dtype: of the matrices of a GGUF file made of an unquantized directory; None: as they are stored.
        allow_lossy: round weights that the other kind has no number for, instead of an error with the reason.
        force: replace a file or checkpoint of the same kind, or what a conversion made, that is at `target`.
        progress: told after each piece.

    Raises:
        CheckpointError: the source is incomplete, damaged, or has something that the other kind has no word for, or,
            unless allow_lossy, weights that it can't hold exactly; the target is taken, or has the source, or its disk
            is too small.
        ValueError: the kinds don't go together, or a dtype can't hold the values.
        OSError: the target can't be written.
        MissingExtraError: transformers or gguf is not installed.
    """
    source, target = Path(source), Path(target)
    before = kind_of(source)
    kind = _kind_to(target, to, decode)
    after = TARGETS[kind].owner if kind in TARGETS else kind
    if (before, after) not in _PAIRS:
        raise ValueError(
            f"{source} is {_NAMES[before]}; {_ADVICE.get((before, after), _NO_WAY).format(after=kind)}"
        )
    if decode is not None and after == GGUF:
        raise ValueError("decode was given, but a GGUF file takes dtype")
    if dtype is not None and (before, after) != (TRANSFORMERS, GGUF):
        raise ValueError(
            "dtype was given, which goes with an unquantized directory and a GGUF file to make of it"
        )
    refuse_source(source, target)
    report = target.with_name(f"{target.name}.json") if after == GGUF else target / CONVERSION_FILE
    if report.exists():
        if after == GGUF:
            check_output("the report", report, _REPORT)
        if not force:
            raise CheckpointError(f"{report} exists already; --force (force=True) replaces it")
    if before in OWNERS:
        refuse_faults(source)
    remarks: list[str] = []
    options = _Options(kind, decode, dtype, allow_lossy, force, progress, remarks.append)
    statuses = _PAIRS[before, after](source, target, options)
    after = kind if kind in TARGETS else kind_of(target)
    result = Conversion(source, target, before, after, tuple(statuses), tuple(remarks), report)
    write_text(report, json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")
    return result


def _kind_to(target: Path, to: str | None, decode: torch.dtype | None) -> str:
    """The kind that is to be made."""
    kinds = (GGUF, *TARGETS, BITFOLD)
    if to is not None and to not in kinds:
        raise ValueError(f"to is '{to}'; it must be one of {', '.join(kinds)}")
    file = target.suffix == ".gguf"
    if to is not None and (to == GGUF) != file:
        raise ValueError(
            f"to is '{to}', but the target is {target.name}; the names of GGUF files, and of no others, end in .gguf"
        )
    if to is not None and decode is not None:
        raise ValueError(
            f"decode was given, which makes an unquantized directory, and to is '{to}': it must be None"
        )
    return to or (GGUF if file else BITFOLD if decode is None else TRANSFORMERS)


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


def _bitfold_to_gguf(source: Path, target: Path, options: _Options) -> list[Status]:
    """Blocks go into a file as they are; other formats become blocks first."""
    modules = read_quantization(source, hf.read_config(source)).modules
    formats = [parse(entry.format) for entry in modules.values()]
    blocks = all(format.grid == "block" for format in formats)
    return (_directory_to_gguf if blocks else _through_weights)(source, target, options)


def _through_weights(source: Path, target: Path, options: _Options) -> list[Status]:
    """Weight by weight, from a directory to a directory; GGUF files become one of bitfold's first, or last."""
    from bitfold.foreign.convert import convert
    from bitfold.foreign.source import open_source
    from bitfold.gguf.convert import to_directory, to_file

    lossy, kind = options.allow_lossy, options.kind
    home = target.absolute().parent
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=f".{target.name}.") as folder:
        first: list[Status] = []
        if source.is_file():
            first = [status for status in to_directory(source, Path(folder) / "source") if not status.exact]
            source = Path(folder) / "source"
        made = Path(folder) / "blocks" if kind == GGUF else target
        statuses = convert(
            open_source(source),
            made,
            kind,
            decode=options.decode,
            allow_lossy=lossy,
            force=options.force,
            progress=options.progress,
            remark=options.remark,
        )
        last: list[Status] = []
        if kind == GGUF:
            try:
                last = to_file(made, target, force=options.force, remark=options.remark)
            except CheckpointError as error:  # of a directory that nobody has seen
                raise CheckpointError(str(error).replace(str(made), str(source))) from None
    return [*first, *statuses, *(status for status in last if not status.exact)]


_DIRECTORIES = (BITFOLD, *OWNERS)
_PAIRS: dict[tuple[str, str], Callable[[Path, Path, _Options], list[Status]]] = {
    (GGUF, BITFOLD): _gguf_to_directory,
    (GGUF, TRANSFORMERS): _gguf_to_directory,
    (BITFOLD, GGUF): _bitfold_to_gguf,
    (TRANSFORMERS, GGUF): _directory_to_gguf,
    **{(GGUF, owner): _through_weights for owner in OWNERS},
    **{(owner, GGUF): _through_weights for owner in OWNERS},
    **{(before, TRANSFORMERS): _through_weights for before in _DIRECTORIES},
    **{(before, after): _through_weights for before in _DIRECTORIES for after in _DIRECTORIES},
}
del _PAIRS[BITFOLD, BITFOLD]
_NAMES = {
    GGUF: "a GGUF file",
    BITFOLD: "a checkpoint of bitfold's",
    TRANSFORMERS: "an unquantized directory",
    **{name: f"a checkpoint of {owner.title}'s" for name, owner in OWNERS.items()},
}
_NO_WAY = "bitfold can't convert it to {after}"
_ADVICE = {
    (GGUF, GGUF): "to quantize it into another one use bitfold quantize",
    (TRANSFORMERS, BITFOLD): "to quantize it use bitfold quantize, or name a .gguf file to make",
    **{
        (TRANSFORMERS, owner): "quantize it first, by bitfold quantize, to convert it to {after}"
        for owner in OWNERS
    },
}
