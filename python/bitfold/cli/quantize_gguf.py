"""`bitfold quantize MODEL OUT.gguf`: the half of the command that makes GGUF files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitfold.cli.console import err, out, paragraph, print_json, progress, say, table
from bitfold.gguf import mixes
from bitfold.gguf.assign import Choice, Overrides, fallback_notes
from bitfold.text import natural, size

if TYPE_CHECKING:
    from bitfold.gguf.quantize import Plan, Summary

DEFAULT_MIX = "q4_k_m"


@dataclass(frozen=True)
class Options:
    """What the options say that mean GGUF files alone. tensor_types: "PATTERN=TYPE" each; errors: measure them."""

    imatrix: Path | None
    tensor_types: tuple[str, ...]
    token_embedding_type: str
    output_tensor_type: str
    leave_output_tensor: bool
    pure: bool
    allow_requantize: bool
    errors: bool

    def given(self) -> list[str]:
        """The options that were given, as they are spelled."""
        return [
            f"--{name.replace('_', '-').removesuffix('s')}" for name, value in vars(self).items() if value
        ]

    def overrides(self) -> Overrides:
        """Raises ValueError for a type or a pattern that is none."""
        patterns = []
        for text in self.tensor_types:
            pattern, equals, kind = text.rpartition("=")
            if not (pattern and equals):
                raise ValueError(f"--tensor-type is {text!r}; it must be PATTERN=TYPE, as attn_v=q8_0")
            patterns.append((pattern, kind))
        return Overrides(
            pure=self.pure,
            keep_output=self.leave_output_tensor,
            embedding=self.token_embedding_type or None,
            output=self.output_tensor_type or None,
            patterns=tuple(patterns),
        )


def quantize_to_gguf(
    model: Path, output: Path | None, recipe: str, options: Options, *, force: bool, dry_run: bool, json: bool
) -> None:
    """Plan and, unless it is a dry run, write the file."""
    mix = mixes.get(recipe or DEFAULT_MIX)
    overrides = options.overrides()
    from bitfold.gguf.imatrix_file import read_importance
    from bitfold.gguf.quantize import plan_gguf, quantize_gguf, read_model
    from bitfold.gguf.writer import check_target_file

    if output is not None:
        check_target_file(output, force=force)
    importance = None if options.imatrix is None else read_importance(options.imatrix)
    with err.status(f"reading {model}"):
        source = read_model(model, remark=say)
    if dry_run:
        plan = plan_gguf(
            source, mix, overrides, importance=importance, allow_requantize=options.allow_requantize
        )
        print_json(plan_json(plan)) if json else show_plan(plan)
        return
    if output is None:
        raise ValueError("OUT is missing; name the file to make, or add --dry-run")
    with progress("quantizing") as update:
        summary = quantize_gguf(
            source,
            output,
            mix,
            overrides,
            importance=importance,
            allow_requantize=options.allow_requantize,
            measure=options.errors,
            force=force,
            progress=update,
        )
    if json:
        print_json({"output": output, **summary_json(summary)})
    else:
        show_summary(summary, output)


# ---- as JSON ----


def plan_json(plan: Plan) -> dict[str, object]:
    return {
        "recipe": plan.mix.name,
        "file_bytes": plan.file_bytes,
        "tensor_bytes": plan.tensor_bytes,
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight,
        "fallbacks": fallback_notes(plan.choices),
        "tensors": [
            {
                **vars(choice),
                "bytes": info.nbytes,
                "bits_per_weight": 8 * info.nbytes / max(1, choice.parameters),
            }
            for choice, info in zip(plan.choices, plan.layout.infos, strict=True)
        ],
    }


def summary_json(summary: Summary) -> dict[str, object]:
    data = plan_json(summary.plan)
    tensors = zip(data.pop("tensors"), summary.tensors, strict=True)  # type: ignore[call-overload]
    return {
        **data,
        "bytes_before": summary.bytes_before,
        "tensors": [
            {**one, "bytes_before": made.bytes_before, "relative_rmse": made.relative_rmse}
            for one, made in tensors
        ],
    }


# ---- as text ----


@dataclass(frozen=True)
class Row:
    """Tensors that differ in their layer alone. name: with `*` for the layer; layers: "" outside of layers."""

    name: str
    layers: str
    shape: tuple[int, ...]
    before: str
    after: str
    nbytes: int
    reason: str
    errors: tuple[float, ...]


def show_plan(plan: Plan) -> None:
    """The whole assignment, with the reason of each, and the size of the file."""
    nbytes = [info.nbytes for info in plan.layout.infos]
    _show_rows(_rows(plan.choices, nbytes, [None] * len(nbytes)), with_reasons=True)
    out.print(
        paragraph(
            f"{plan.mix.name} would make a file of {plan.file_bytes:,} bytes: {plan.tensor_bytes:,} of tensor data, "
            f"{plan.bits_per_weight:.3f} bits for each of {plan.parameters:,} weights. Nothing was written."
        )
    )


def show_summary(summary: Summary, output: Path) -> None:
    plan = summary.plan
    made = summary.tensors
    rows = _rows(plan.choices, [one.bytes_after for one in made], [one.relative_rmse for one in made])
    _show_rows(rows, with_reasons=False)
    for note in fallback_notes(plan.choices):
        out.print(paragraph(f"- {note}", indent="  "), markup=False)
    out.print(
        f"{output}: {plan.mix.name}, {size(summary.bytes_before)} -> {size(plan.tensor_bytes)} of tensor data, "
        f"{plan.bits_per_weight:.3f} bits per weight, a file of {plan.file_bytes:,} bytes",
        markup=False,
    )


def _rows(choices: Sequence[Choice], nbytes: Sequence[int], errors: Sequence[float | None]) -> list[Row]:
    groups: dict[tuple, list[int]] = {}
    for place, choice in enumerate(choices):
        name = ".".join("*" if part.isdigit() else part for part in choice.name.split("."))
        key = (name, choice.shape, choice.before, choice.after, choice.fallback or choice.reason)
        groups.setdefault(key, []).append(place)
    rows = []
    for (name, shape, before, after, reason), places in groups.items():
        layers = [int(part) for place in places for part in choices[place].name.split(".") if part.isdigit()]
        measured = tuple(error for place in places if (error := errors[place]) is not None)
        total = sum(nbytes[place] for place in places)
        rows.append(Row(name, ranges(layers), shape, before, after, total, reason, measured))
    # Alike names together, in the order of their first layers.
    return sorted(
        rows, key=lambda row: (natural(row.name), natural(row.layers.replace("-", ".").replace(", ", ".")))
    )


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs put together: "0-3, 6, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _show_rows(rows: Sequence[Row], *, with_reasons: bool) -> None:
    measured = any(row.errors for row in rows)
    shown = table("tensor", "layers", "shape", "from", "to", "size", *(["error"] if measured else []))
    for row in rows:
        error = f"{math.sqrt(sum(e * e for e in row.errors) / len(row.errors)):.3%}" if row.errors else ""
        shape = " x ".join(map(str, row.shape))
        cells = (row.name, row.layers, shape, row.before, row.after, size(row.nbytes))
        shown.add_row(*cells, *([error] if measured else []))
    out.print(shown)
    if measured:
        out.print(
            "(error: norm of the change of the weights over norm of the weights; of layers, its square mean)"
        )
    if with_reasons:
        reasons = Counter((row.after, row.reason) for row in rows)
        for kind, reason in reasons:
            names = dict.fromkeys(row.name for row in rows if (row.after, row.reason) == (kind, reason))
            out.print(paragraph(f"- {kind} ({reason}): {', '.join(names)}", indent="  "), markup=False)
