"""`bitfold convert A B`: a checkpoint as one of another kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitfold.cli.console import (
    Json,
    out,
    paragraph,
    parse_dtype,
    print_json,
    progress,
    quiet_transformers,
    table,
)
from bitfold.convert import Conversion, convert_checkpoint
from bitfold.foreign.targets import TARGETS
from bitfold.text import natural

if TYPE_CHECKING:
    from bitfold.gguf.convert import Status


def convert(
    source: Annotated[Path, typer.Argument(help="A GGUF file, or the directory of a model.")],
    target: Annotated[Path, typer.Argument(help="What to make: NAME.gguf for a file, else a directory.")],
    to: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(TARGETS)}, gguf or bitfold; default: gguf where the target is NAME.gguf, else bitfold."
        ),
    ] = "",
    decode: Annotated[
        str,
        typer.Option(help="Make unquantized weights: float32, bfloat16 or float16; default: keep blocks."),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Of a GGUF file's matrices: float32, bfloat16 or float16; default: as stored.")
    ] = "",
    allow_lossy: Annotated[
        bool,
        typer.Option("--allow-lossy", help="Round weights that the other kind can't hold exactly."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is there, if it is of that kind.")
    ] = False,
    json: Json = False,
) -> None:
    """Convert between checkpoints of bitfold, GPTQ, AWQ, compressed-tensors, bitsandbytes, and GGUF files.

    Values stay the same to the bit, or you are told; the status of every tensor is shown and stored.
    """
    quiet_transformers()
    with progress("converting") as update:
        result = convert_checkpoint(
            source,
            target,
            to=to or None,
            decode=parse_dtype(decode, "--decode"),
            dtype=parse_dtype(dtype),
            allow_lossy=allow_lossy,
            force=force,
            progress=update,
        )
    if json:
        print_json(result.to_json())
    else:
        _show(result)


def _show(result: Conversion) -> None:
    shown = table("tensor", "number", "from", "to", "largest error", "relative")
    for (pattern, before, after), statuses in _alike(result.tensors).items():
        largest = max(status.largest for status in statuses)
        relative = max(status.relative for status in statuses)
        errors = ("exact", "") if largest == 0 else (f"{largest:.3g}", f"{relative:.3g}")
        shown.add_row(pattern, f"{len(statuses)}", before, after, *errors)
    out.print(shown)
    for remark in result.remarks:
        out.print(paragraph(f"- {remark}", indent="  "), markup=False)
    kept = sum(status.exact for status in result.tensors)
    whole = "all exact" if result.exact else f"{kept} of them exact"
    count = f"{len(result.tensors)} tensors, {whole}"
    out.print(f"{result.target}: {count}; each is listed in {result.report}", markup=False)


def _alike(tensors: Iterable[Status]) -> dict[tuple[str, str, str], list[Status]]:
    """Tensors of the same types that differ in the number of their layer alone, by the name with `*` in its place."""
    groups: dict[tuple[str, str, str], list[Status]] = {}
    for status in tensors:
        pattern = ".".join("*" if part.isdigit() else part for part in status.name.split("."))
        groups.setdefault((pattern, status.before, status.after), []).append(status)
    return dict(sorted(groups.items(), key=lambda item: natural(item[0][0])))
