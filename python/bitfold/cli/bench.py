"""`bitfold bench`: the kernels beside torch and the peers that are installed."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bitfold.bench.cases import Case, Rows
from bitfold.bench.machine import machine
from bitfold.bench.peers import LIBRARIES
from bitfold.bench.run import FORMATS, MORE_OPS, OPS, RESULTS, Settings, run
from bitfold.bench.validate import WrongResultError
from bitfold.cli.console import Json, err, out, print_json, say, table
from bitfold.outfile import check_output, write_text

_DEFAULTS = Settings()
QUIET = 0.5  # load average below which a machine has nothing else to do


def bench(
    ops: Annotated[str, typer.Option(help=f"Some of {', '.join((*OPS, *MORE_OPS))}.")] = ",".join(OPS),
    formats: Annotated[str, typer.Option(help="Formats, separated by commas.")] = ",".join(FORMATS),
    shape: Annotated[list[str] | None, typer.Option(help="NxK of the weight; may be repeated.")] = None,
    batches: Annotated[str, typer.Option(help="Rows of the activations.")] = ",".join(
        map(str, _DEFAULTS.batches)
    ),
    tokens: Annotated[str, typer.Option(help="That kv attends to.")] = ",".join(map(str, _DEFAULTS.tokens)),
    dtypes: Annotated[str, typer.Option(help="Of activations: bf16, fp16, fp32.")] = ",".join(
        _DEFAULTS.dtypes
    ),
    peers: Annotated[str, typer.Option(help=f"Some of {', '.join(LIBRARIES)}, or none.")] = ",".join(
        LIBRARIES
    ),
    threads: Annotated[int, typer.Option(help="Threads; 0: torch's number.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: the current GPU.")] = _DEFAULTS.device,
    seconds: Annotated[float, typer.Option(help="For each case, at least.")] = _DEFAULTS.seconds,
    output: Annotated[Path | None, typer.Option("--out", help="JSON file to write.")] = None,
    json: Json = False,
) -> None:
    """Validate and time linear, encode and decode, beside torch and the peers that are installed."""
    settings = Settings(
        ops=_names(ops),
        formats=_names(formats),
        shapes=tuple(_shape(text) for text in shape) if shape else _DEFAULTS.shapes,
        batches=tuple(_number("batches", text) for text in _names(batches)),
        tokens=tuple(_number("tokens", text) for text in _names(tokens)),
        dtypes=_names(dtypes),
        peers=() if peers == "none" else _names(peers),
        threads=threads,
        seconds=seconds,
        device=device,
    )
    if output is not None:
        check_output("--out", output, RESULTS)
    load = machine()["load"]
    if load > QUIET:
        say(f"the load of the last minute is {load}: these will be the figures of a busy machine")
    threads_before = torch.get_num_threads()
    try:
        with err.status("measuring what the memory gives") as status:

            def on_case(case: Case, rows: Rows) -> None:
                status.update(f"after {case}")
                if not json:
                    _show_case(case, rows)

            report = run(settings, on_case)
    except WrongResultError as error:
        raise ValueError(str(error)) from error
    finally:
        torch.set_num_threads(threads_before)
    if output is not None:
        write_text(output, jsonlib.dumps(report, indent=1) + "\n")
    if json:
        print_json(report)
    else:
        _show_end(report)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number(option: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--{option} names {text!r}; it must name whole numbers")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    n, cross, k = text.partition("x")
    if not (cross and n.isdecimal() and k.isdecimal()):
        raise ValueError(f"--shape is {text!r}; it must be NxK, as 4096x4096")
    return int(n), int(k)


def _show_case(case: Case, rows: Rows) -> None:
    ceilings = [row["name"] for row in rows if row["kind"] == "ceiling"]
    title = "import" if case.op == "import" else str(case)
    columns = [title, "ms", "quartiles", "GB/s", *(f"of {name}" for name in ceilings)]
    # Only what some row of the case has.
    ends = {
        "x torch": lambda row: f"{row['over_torch']:.2f}" if row.get("over_torch") else "",
        "x peer": lambda row: f"{row['over_peer']:.2f}" if row.get("over_peer") else "",
        "M weights/s": lambda row: (
            f"{row['weights_per_s_per_core'] / 1e6:.1f}" if "weights_per_s_per_core" in row else ""
        ),
        "regime": lambda row: row["plan"]["regime"] if "plan" in row else "",
    }
    ends = {name: show for name, show in ends.items() if any(show(row) for row in rows)}
    view = table(*columns, *ends)
    for row in rows:
        ms = row["ms"]
        shares = [f"{row['shares'][name]:.0%}" if "shares" in row else "" for name in ceilings]
        view.add_row(
            row["name"],
            f"{ms['median']:.3f}",
            f"{ms['q1']:.3f} {ms['q3']:.3f}",
            f"{row['GB_per_s']:.2f}" if "GB_per_s" in row else "",
            *shares,
            *(show(row) for show in ends.values()),
        )
    out.print(view)
    out.print()


def _show_end(report: dict[str, Any]) -> None:
    for name, facts in report["ceilings"].items():
        out.print(f"{name}: {facts['GB_per_s']} GB/s ({facts['way']})", markup=False)
    for library, why in report["absent"].items():
        out.print(f"absent: {library}, {why}", markup=False)
    for entry in report["refused"]:
        out.print(f"left out: {entry['peer']} at {entry['n']}x{entry['k']}, {entry['why']}", markup=False)
    view = table("bar", "wanted", "worst", "met", "at")
    for verdict in report["bars"]:
        sense = "<=" if verdict["sense"] == "at most" else ">="
        met = {True: "yes", False: "no", None: "-"}[verdict["met"]]
        measured = "" if verdict["measured"] is None else f"{verdict['measured']:.4g}"
        place = verdict["at"] or verdict["why"]
        view.add_row(verdict["bar"], f"{sense} {verdict['wanted']:g}", measured, met, place)
    out.print()
    out.print(view)
