"""`bitfold imatrix MODEL --text FILE -o OUT`: how much the columns of each matrix count, for `quantize --imatrix`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold import hub
from bitfold.cli.console import Device, Dtype, Json, load_model, out, print_json, progress
from bitfold.cli.eval import read_text
from bitfold.imatrix import CHUNK_SIZE, chunks_of, measure


def imatrix(
    model: Annotated[Path, typer.Argument(help="A model, quantized or not.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text like those that the model will read.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to make: .gguf, or .dat for llama.cpp's older form.")
    ],
    chunk_size: Annotated[int, typer.Option(help="Tokens that are read at a time.")] = CHUNK_SIZE,
    max_chunks: Annotated[int, typer.Option(help="Read the first chunks of the text only; 0: all.")] = 0,
    head: Annotated[bool, typer.Option("--head", help="Measure the output head too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an importance file that is there.")] = False,
    dtype: Dtype = "",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure the importance of each matrix's columns, as llama-imatrix does, by letting the model read a text."""
    from bitfold.gguf.imatrix_file import check_target_imatrix, write_imatrix

    check_target_imatrix(output, force=force)
    data = read_text(text)
    chunks = chunks_of(data, hub.load_tokenizer(model), chunk_size=chunk_size, max_chunks=max_chunks or None)
    subject = load_model(model, device, dtype)
    with progress("reading") as update:
        found = measure(
            subject,
            chunks,
            dataset=str(text),
            head=head,
            progress=lambda done, total: update("", done, total),
        )
    write_imatrix(output, found, force=force)
    if json:
        print_json(
            {
                "model": model,
                "text": text,
                "output": output,
                "entries": len(found.entries),
                "chunks": found.chunks,
                "chunk_size": found.chunk_size,
            }
        )
        return
    out.print(f"{output}: {len(found.entries)} matrices, {found.chunks} chunks of {found.chunk_size} tokens")
