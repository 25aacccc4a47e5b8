"""`bitfold explore -o explore.html`: a page to try out what formats do to numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.console import Json, out, print_json, size
from bitfold.explore.page import render
from bitfold.explore.tables import tables
from bitfold.outfile import PAGE, check_output, write_text


def explore(
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("explore.html"),
    json: Json = False,
) -> None:
    """Write an interactive page, one file: number lines, bits to toggle, outliers, one scale and many."""
    check_output("--output", output, PAGE)
    write_text(output, render())
    if json:
        print_json({"output": output, "bytes": output.stat().st_size, "tables": tables()})
        return
    out.print(f"{output}: {size(output.stat().st_size)}, one file: open it in a browser", markup=False)
