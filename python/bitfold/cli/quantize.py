"""`bitfold quantize MODEL OUT`: fold a model directory into another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from bitfold.budget import Entry, plan_checkpoint
from bitfold.cli.console import Json, out, paragraph, print_json, progress, quiet_transformers, table
from bitfold.pipeline import quantize_checkpoint, report
from bitfold.quantize import QuantizationSummary
from bitfold.recipes import RECIPES
from bitfold.text import natural, size
from bitfold.writer import SHARD_BYTES, check_target


def quantize(
    model: Annotated[Path, typer.Argument(help="Directory with config.json, safetensors and tokenizer.")],
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="Directory to make.")] = None,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what each layer would get, and write nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Quantize a Hugging Face model directory into a new one, streaming: memory holds one weight."""
    if shard_size <= 0:
        raise ValueError(f"--shard-size is {shard_size}, it must be positive")
    quiet_transformers()
    if dry_run:
        _dry_run(model, output, recipe, force, json)
        return
    if output is None:
        raise ValueError("OUT is missing; name the directory to make, or add --dry-run")
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


def _dry_run(model: Path, output: Path | None, recipe: str, force: bool, json: bool) -> None:
    """Everything up to the first weight: config.json alone is enough."""
    if output is not None:
        check_target(output, force=force)
    plan = plan_checkpoint(model, recipe)
    if json:
        modules = [{**vars(entry), "parameters": entry.parameters} for entry in plan.entries]
        print_json({"recipe": plan.recipe, "bytes": plan.nbytes, "notes": plan.notes, "modules": modules})
        return
    shown = table("tensor", "layers", "shape", "format", "size")
    for name, entries in _alike(entry for entry in plan.entries if entry.tensor_class != "rest").items():
        shape = " x ".join(map(str, entries[0].shape))
        nbytes = sum(entry.nbytes for entry in entries)
        shown.add_row(name, f"{len(entries)}", shape, entries[0].format, size(nbytes))
    out.print(shown)
    reasons = Counter((entry.format, entry.reason) for entry in plan.entries)
    for (format, reason), count in reasons.items():
        tensors = f"{count} tensor{'s' if count > 1 else ''}"
        out.print(paragraph(f"- {tensors} in {format}: {reason}", indent="  "), markup=False)
    weights = sum(entry.parameters for entry in plan.entries if entry.quantized)
    out.print(
        paragraph(
            f"Recipe {plan.recipe} would quantize {weights / plan.parameters:.1%} of {plan.parameters:,} parameters "
            f"and write {plan.nbytes:,} bytes of tensor data, {plan.bits_per_weight:.3f} bits per weight. Nothing "
            "was written."
        )
    )


def _alike(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries that differ in the number of their layer alone, by the name with `*` in its place."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Entry]] = {}
    for entry in entries:
        pattern = ".".join("*" if part.isdigit() else part for part in entry.name.split("."))
        groups.setdefault((pattern, entry.format, entry.shape), []).append(entry)
    patterns = Counter(pattern for pattern, *_ in groups)
    named: dict[str, list[Entry]] = {}
    for (pattern, *_), group in groups.items():
        # A pattern that stands for two formats says nothing: its layers are named one by one.
        if len(group) == 1 or patterns[pattern] > 1:
            named.update({entry.name: [entry] for entry in group})
        else:
            named[pattern] = group
    return dict(sorted(named.items(), key=lambda item: natural(item[0])))


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
