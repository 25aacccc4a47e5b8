"""What `bitfold quantize` prints of a directory: what it would make of each tensor, and what it made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from bitfold.budget import Entry, plan_checkpoint
from bitfold.cli.console import out, paragraph, print_json, table
from bitfold.experts import stack_name
from bitfold.pipeline import Origin, report
from bitfold.quantize import CalibrationSummary, ModuleSummary, QuantizationSummary
from bitfold.rules import Recipe
from bitfold.text import natural, size


def show_plan(model: Path, recipe: str | Recipe, json: bool, origin: Origin | None) -> None:
    """What --dry-run tells, everything up to the first weight: config.json alone is enough, unless formats are to be
    chosen."""
    plan = plan_checkpoint(model, recipe)
    if json:
        modules = [{**vars(entry), "parameters": entry.parameters} for entry in plan.entries]
        whole = {"recipe": plan.recipe, "bytes": plan.nbytes, "notes": plan.notes, "modules": modules}
        print_json({**whole, **(origin.described if origin else {})})
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


def show_result(summary: QuantizationSummary, output: Path, json: bool, origin: Origin | None = None) -> None:
    """What was made of each layer, and of the model."""
    if json:
        print_json({"output": output, **report(summary), **(origin.described if origin else {})})
    else:
        _show(summary, output)


def _show(summary: QuantizationSummary, output: Path) -> None:
    calibrations = [module.calibration for module in summary.modules if module.calibration is not None]
    known = {title: show for title, show in _FOUND.items() if show(calibrations)}
    layers = table("layer", "format", "shape", "size", "bits/weight", "error", *known)
    modules = sorted(summary.modules, key=lambda module: natural(module.name))
    stacks: dict[str, list[ModuleSummary]] = {}
    for module in modules:
        stacks.setdefault(stack_name(module.name), []).append(module)
    for name, stack in stacks.items():
        first, nbytes = stack[0], sum(module.bytes_after for module in stack)
        found = [module.calibration for module in stack if module.calibration is not None]
        layers.add_row(
            name,
            first.format,
            " x ".join(map(str, [len(stack), *first.shape] if name != first.name else first.shape)),
            size(nbytes),
            f"{8 * nbytes / (len(stack) * math.prod(first.shape)):.3f}",
            f"{max(module.relative_rmse for module in stack):.3%}",
            *(show(found) for show in known.values()),
        )
    out.print(layers)
    out.print("(error: norm of the change of the weights over norm of the weights)")
    if len(stacks) < len(modules):
        out.print("(of experts: the largest error of one of them)")
    if "output error" in known:
        out.print(
            paragraph(
                "(output error: norm of the change of the layer's output on the calibration text over norm of the "
                "output; of rounding: with every weight rounded to nearest)"
            )
        )
    if "input step" in known:
        out.print("(input step: one for all inputs of the layer, which are rounded to multiples of it)")
    if "16-bit columns" in known:
        out.print("(16-bit columns: usual outlier columns, whose weights are kept in 16 bits too)")
    for module in modules:
        if module.calibration is not None and module.calibration.note:
            out.print(paragraph(f"- {module.name}: {module.calibration.note}", indent="  "), markup=False)
    out.print()
    out.print(
        f"{output}: recipe {summary.recipe}, {size(summary.bytes_before)} -> {size(summary.bytes_after)}, "
        f"{summary.share:.1%} of {summary.parameters:,} parameters quantized"
    )


def _largest(numbers: Iterable[float | None], form: str) -> str:
    """The largest of those that are known."""
    known = [number for number in numbers if number is not None]
    return format(max(known), form) if known else ""


_FOUND: dict[str, Callable[[Iterable[CalibrationSummary]], str]] = {
    "output error": lambda found: _largest((one.output_error for one in found), ".3%"),
    "of rounding": lambda found: _largest((one.rounding_error for one in found), ".3%"),
    "input step": lambda found: _largest((one.x_scale for one in found), ".4g"),
    "16-bit columns": lambda found: _largest((one.outliers for one in found), ""),
}
"""What calibration found of layers, by the title of its column: "" where it isn't known."""
