"""`bitfold sensitivity MODEL --text FILE`: what each weight loses in each format, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitfold.calibration.data import SAMPLES, SEQUENCE_LENGTH
from bitfold.calibration.overlap import NOTABLE
from bitfold.cli.console import (
    Device,
    Json,
    out,
    paragraph,
    parse_device,
    parse_dtype,
    print_json,
    progress,
    quiet_transformers,
    say,
    table,
)
from bitfold.cli.eval import read_text
from bitfold.evaluate import Estimate
from bitfold.sensitivity.candidates import CALIBRATED, PLAIN
from bitfold.sensitivity.ground import CONTEXT, TOKENS, Texts
from bitfold.sensitivity.measure import measure
from bitfold.sensitivity.result import Sensitivity
from bitfold.text import estimate, natural

_NATS = 1e3  # KL is shown in thousandths of a nat
COLUMNS = 10  # candidates in a table

Text = Annotated[Path, typer.Option(help="UTF-8 text to measure on; not the one to judge the result by.")]
Formats = Annotated[
    str,
    typer.Option(
        help="Formats to try, with commas between, gptq- in front of those that are calibrated. Default: "
        f"{', '.join(PLAIN)}; with --calibration {', '.join(CALIBRATED)}."
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration: rows of tokens.")]
SequenceLength = Annotated[
    int,
    typer.Option(help=f"Calibration: tokens of a row; 0: the model's context, at most {SEQUENCE_LENGTH}."),
]
Seed = Annotated[int, typer.Option(help="Calibration: which rows of the text.")]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Also an embedding or the output head of this name ('*.embed_tokens'); may be repeated."
    ),
]


def sensitivity(
    model: Annotated[Path, typer.Argument(help="Directory of an unquantized model.")],
    text: Text,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write everything here; a run that was stopped goes on from it."),
    ] = None,
    formats: Formats = "",
    calibration: Annotated[
        str, typer.Option(help="Text to calibrate gptq- formats on, as 'bitfold quantize' takes it.")
    ] = "",
    samples: Samples = SAMPLES,
    sequence_length: SequenceLength = 0,
    seed: Seed = 0,
    include: Include = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use; 0: all.")] = TOKENS,
    window: Annotated[
        int,
        typer.Option("--window", "--context", help=f"Tokens of a window; 0: the model's, at most {CONTEXT}."),
    ] = 0,
    kv: Annotated[
        bool,
        typer.Option("--kv", help="Also measure the KV cache in each of its formats (docs/allocation.md)."),
    ] = False,
    additivity: Annotated[
        bool,
        typer.Option(help="Also quantize all weights at once, to see whether what they lose alone adds up."),
    ] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Measure anew what the file holds.")] = False,
    dtype: Annotated[str, typer.Option(help="Compute in float32, bfloat16 or float16.")] = "float32",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Measure how far predictions move when one weight alone is quantized: KL and output error, by format."""
    kind = parse_dtype(dtype)
    if kind is None:
        raise ValueError("--dtype is empty, it must be float32, bfloat16 or float16")
    quiet_transformers()
    texts = Texts(
        read_text(text),
        tokens,
        window,
        calibration,
        samples,
        sequence_length or None,
        seed,
    )
    with progress("measuring") as update:
        found = measure(
            model,
            texts,
            formats.split(","),
            include=tuple(include or ()),
            additivity=additivity,
            caches=kv,
            output=output,
            restart=restart,
            dtype=kind,
            device=parse_device(device),
            progress=update,
        )
    warn_of_overlap(found)
    if json:
        print_json({"model": model, "text": text, "output": output, **as_json(found)})
        return
    show(found)
    if output is not None:
        out.print(f"{output}: {len(found.entries)} measurements", markup=False)


def warn_of_overlap(found: Sensitivity) -> None:
    """Say where weights were calibrated on the text that they were measured on."""
    if found.overlap >= NOTABLE:
        say(
            f"warning: {found.overlap:.0%} of the passages of the text are in the calibration text too, so calibrated "
            "formats look better than they are: measure on another text"
        )


def as_json(found: Sensitivity) -> dict[str, object]:
    """The numbers; the sums of single windows and the hashes of passages stay out."""
    entries = [
        {
            "module": entry.module,
            "candidate": entry.candidate,
            "bytes": entry.nbytes,
            "kl": found.kl(entry),
            "output_error": entry.output_error,
            "weight_error": entry.weight_error,
        }
        for entry in found.entries
    ]
    return {
        "protocol": found.protocol,
        "calibration": found.calibration,
        "overlap": found.overlap,
        "zero": found.zero,
        "modules": found.modules,
        "entries": entries,
        **({"kv_cache": _caches_json(found)} if found.caches else {}),
        "additivity": [{**vars(one), "ratio": one.ratio} for one in found.additivity],
    }


def _caches_json(found: Sensitivity) -> dict[str, object]:
    assert found.caches is not None
    entries = [{"format": e.format, "kl": e.kl(found.window_tokens)} for e in found.caches.entries]
    return {"entries": entries, "zero": found.caches.zero}


def show(found: Sensitivity) -> None:
    """One row a weight, one column a candidate; then how KLs add up."""
    out.print(f"protocol     {found.protocol}")
    out.print(
        paragraph("KL of one weight alone, in thousandths of a nat a token, and the output's relative error")
    )
    names = sorted(found.modules, key=natural)
    for first in range(0, len(found.candidates), COLUMNS):
        columns = found.candidates[first : first + COLUMNS]
        shown = table("weight", *columns)
        for name in names:
            shown.add_row(name, *(_cell(found, name, candidate) for candidate in columns))
        out.print(shown)
    out.print(f"the unchanged model, run from every block on: {found.zero:g}")
    if found.caches is not None:
        out.print()
        shown = table("KV cache in", "KL")
        for one in found.caches.entries:
            shown.add_row(one.format, thousandths(one.kl(found.window_tokens)))
        out.print(shown)
        out.print(f"a KV cache that packs nothing: {found.caches.zero:g}")
    if found.additivity:
        out.print()
        show_additivity(found)


def _cell(found: Sensitivity, name: str, candidate: str) -> str:
    entry = found.find(name, candidate)
    if entry is None:
        return ""
    kl = _short(_NATS * found.kl(entry).value)
    return kl if entry.output_error is None else f"{kl} {entry.output_error:6.2%}"


def _short(value: float) -> str:
    return f"{value:.4g}" if value >= 1e-4 else f"{value:.1e}"


def show_additivity(found: Sensitivity) -> None:
    """What the KLs alone add up to, beside the KL of all weights at once."""
    rows = {one.candidate: one for one in found.additivity}
    shown = table("all weights as", "alone, added up", "together", "together / added")
    for name in [c for c in found.candidates if c in rows]:
        one = rows[name]
        shown.add_row(name, f"{_NATS * one.added:.4g}", thousandths(one.together), f"{one.ratio:.3f}")
    out.print(shown)


def thousandths(value: Estimate) -> str:
    """A KL in thousandths of a nat, with its standard error."""
    return estimate(Estimate(_NATS * value.value, None if value.error is None else _NATS * value.error))
