"""`bitfold check PATH`: what is wrong with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.check.examine import examine
from bitfold.check.problem import Report
from bitfold.check.repair import Repaired, repair
from bitfold.cli.console import Json, out, paragraph, print_json, progress, quiet_transformers


def check(
    path: Annotated[Path, typer.Argument(help="The directory of a quantized model, or a GGUF file.")],
    repair_to: Annotated[
        Path | None,
        typer.Option(
            "--repair", help="Write the checkpoint there without the faults that have a sure repair."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Look for faults: zero points that are off by one, scales that are no numbers, wrong labels and shapes.

    Exit status 0: none was found (none is left after --repair); 1: some were.
    """
    quiet_transformers()
    with progress("checking") as update:
        if repair_to is None:
            report = examine(path, progress=update)
            result: Report | Repaired = report
        else:
            result = repair(path, repair_to, progress=update)
            report = result.after
    if json:
        print_json(result.to_json())
    elif isinstance(result, Repaired):
        for problem in result.done:
            out.print(paragraph(f"- {problem}: {problem.repair}", indent="  "), markup=False)
        out.print(f"{repair_to}: {len(result.done)} faults repaired", markup=False)
        _show(report)
    else:
        _show(report)
    if not report.sound:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    for problem in report.problems:
        note = f" (--repair: {problem.repair})" if problem.repair else ""
        out.print(paragraph(f"- [{problem.kind}] {problem}{note}", indent="  "), markup=False)
    for doubt in report.doubts:
        out.print(paragraph(f"- {doubt}", indent="  "), markup=False)
    whose = f", {report.owner}" if report.owner else ""
    count = f"{report.modules} quantized modules{whose}"
    faults = f"{len(report.problems)} fault{'s' if len(report.problems) != 1 else ''}"
    out.print(f"{report.path}: {count}: {faults if report.problems else 'no fault found'}", markup=False)
