"""`bitfold quantize MODEL OUT`: fold a model directory into another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.console import Json, natural, out, print_json, progress, quiet_transformers, size, table
from bitfold.pipeline import quantize_checkpoint, report
from bitfold.quantize import QuantizationSummary
from bitfold.recipes import RECIPES
from bitfold.writer import SHARD_BYTES


def quantize(
    model: Annotated[Path, typer.Argument(help="Directory with config.json, safetensors and tokenizer.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make.")],
    recipe: Annotated[
        str,
        typer.Option(
            help=f"A preset ({', '.join(RECIPES)}), a format for all linear layers, or a .toml file."
        ),
    ] = "int4-g128",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    clamp: Annotated[
        bool, typer.Option("--clamp", help="With fp16 and bf16: clamp values out of range.")
    ] = False,
    shard_size: Annotated[float, typer.Option(help="Largest size of a file, in GB.")] = SHARD_BYTES / 1e9,
    json: Json = False,
) -> None:
    """Quantize a Hugging Face model directory into a new one, streaming: memory holds one weight."""
    if shard_size <= 0:
        raise ValueError(f"--shard-size is {shard_size}, it must be positive")
    quiet_transformers()
    with progress("quantizing") as update:
        summary = quantize_checkpoint(
            model,
            output,
            recipe,
            force=force,
            clamp=clamp,
            shard_bytes=int(shard_size * 1e9),
            progress=update,
        )
    if json:
        print_json({"output": output, **report(summary)})
    else:
        _show(summary, output)


def _show(summary: QuantizationSummary, output: Path) -> None:
    layers = table("layer", "format", "shape", "size", "bits/weight", "error")
    for module in sorted(summary.modules, key=lambda module: natural(module.name)):
        layers.add_row(
            module.name,
            module.format,
            f"{module.shape[0]} x {module.shape[1]}",
            size(module.bytes_after),
            f"{8 * module.bytes_after / math.prod(module.shape):.3f}",
            f"{module.relative_rmse:.3%}",
        )
    out.print(layers)
    out.print("(error: norm of the change of the weights over norm of the weights)\n")
    out.print(
        f"{output}: recipe {summary.recipe}, {size(summary.bytes_before)} -> {size(summary.bytes_after)}, "
        f"{summary.share:.1%} of {summary.parameters:,} parameters quantized"
    )
