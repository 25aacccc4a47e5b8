"""`bitfold report OUT -o report.html`: a page that shows what quantizing did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitfold.cli.console import (
    DTYPES,
    Device,
    Json,
    out,
    parse_device,
    parse_dtype,
    print_json,
    progress,
    quiet_transformers,
    size,
)
from bitfold.cli.eval import read_text
from bitfold.cli.outliers import as_json as outliers_as_json
from bitfold.cli.sensitivity import as_json
from bitfold.outfile import PAGE, check_output, write_text
from bitfold.sensitivity import result
from bitfold.versions import MissingExtraError

if TYPE_CHECKING:
    from bitfold.report.measure import Report
    from bitfold.report.sizes import ClassSize, TensorSize


def report(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="OUT...", help="The quantized model; further ones are compared with it."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    base: Annotated[Path | None, typer.Option(help="The unquantized model.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text whose activations are looked at; default: that of --text.")
    ] = None,
    recipes: Annotated[
        str, typer.Option("--try", help="Recipes to quantize the base with and compare, with commas between.")
    ] = "",
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="What 'bitfold sensitivity' measured of the unquantized model, to show it."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Write each plot as PNG and SVG here.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to compare recipes on; 0: all.")] = 8192,
    attribution_tokens: Annotated[
        int,
        typer.Option(help="Tokens to measure each weight alone on, and activations; 0: don't measure them."),
    ] = 2048,
    context: Annotated[int, typer.Option(help="Tokens of a window; 0: the model's, at most 2048.")] = 0,
    dtype: Annotated[
        str, typer.Option(help=f"Compute in {', '.join(DTYPES)}; float32 keeps rounding out of the figures.")
    ] = "float32",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Show on one page where bytes and errors of a quantized model are: OUT, with --base and --text for more."""
    try:
        from bitfold.report.page import render, save_plots
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("matplotlib", "jinja2", "markupsafe"):
            raise
        raise MissingExtraError(
            "the report needs matplotlib and jinja2: run pip install 'bitfold[report]'"
        ) from None
    from bitfold.report.measure import Options, measure

    check_output("--output", output, PAGE)
    if plots is not None and plots.exists() and not plots.is_dir():
        raise ValueError(f"--plots is '{plots}', which is a file; it must be a directory, there or not")
    quiet_transformers()
    options = Options(
        base=base,
        text=None if text is None else read_text(text),
        calibration=None if calibration is None else read_text(calibration),
        others=tuple(checkpoints[1:]),
        recipes=tuple(filter(None, (name.strip() for name in recipes.split(",")))),
        tokens=tokens,
        attribution_tokens=attribution_tokens,
        context=context,
        dtype=parse_dtype(dtype) or DTYPES["float32"],
        device=parse_device(device),
        sensitivity=None if sensitivity is None else result.read(sensitivity),
    )
    with progress("measuring") as update:
        measured = measure(checkpoints[0], options, update)
    write_text(output, render(measured))
    drawn = save_plots(measured, plots) if plots is not None else []
    if json:
        print_json({"output": output, "plots": drawn, **_fields(measured)})
        return
    out.print(f"{output}: {size(output.stat().st_size)}, one file", markup=False)
    if drawn:
        out.print(f"{plots}: {len(drawn)} files", markup=False)


def _fields(report: Report) -> dict[str, object]:
    """The numbers of a report; bins of histograms and sums of single windows stay out."""

    def sizes(entries: Sequence[TensorSize | ClassSize]) -> list[dict[str, object]]:
        return [{**vars(e), "nbytes": e.nbytes, "bits_per_weight": e.bits_per_weight} for e in entries]

    def without(prefixes: tuple[str, ...], entry: object) -> dict[str, object]:
        return {name: value for name, value in vars(entry).items() if not name.startswith(prefixes)}

    shown = {} if report.sensitivity is None else as_json(report.sensitivity)
    return {
        **vars(report),
        "sensitivity": shown or None,
        "outliers": None if report.outliers is None else outliers_as_json(report.outliers),
        "nbytes": report.nbytes,
        "tensors": sizes(report.tensors),
        "classes": sizes(report.classes),
        "histograms": [without(("edges", "counts"), h) for h in report.histograms],
        "tried": [{**vars(one), "comparison": without(("window_",), one.comparison)} for one in report.tried],
    }
