"""`bitfold quantize MODEL OUT`: fold a model directory into another, or a model into a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from bitfold import hf, layout, recipes
from bitfold.calibration.data import SAMPLES
from bitfold.calibration.processes import is_first
from bitfold.calibration.run import quantize_calibrated
from bitfold.cli.allocate import Options as Budget
from bitfold.cli.allocate import choose
from bitfold.cli.console import (
    Json,
    parse_device,
    parse_dtype,
    progress,
    quiet_transformers,
)
from bitfold.cli.outliers import resolve_on, show_resolved
from bitfold.cli.quantize_gguf import DEFAULT_MIX, Options, quantize_to_gguf
from bitfold.cli.quantize_shown import show_plan, show_result
from bitfold.cli.sensitivity import Include, Samples, Seed, SequenceLength
from bitfold.gguf import mixes
from bitfold.outliers.keep import Resolved
from bitfold.pipeline import Origin, quantize_checkpoint
from bitfold.presets import RECIPES
from bitfold.quantize import QuantizationSummary
from bitfold.rules import Recipe
from bitfold.sensitivity.ground import CONTEXT, TOKENS, Texts, calibration_of
from bitfold.writer import SHARD_BYTES, check_target

DEFAULT_RECIPE = "int4-g128"


def quantize(
    model: Annotated[
        Path,
        typer.Argument(
            help="Directory with config.json, safetensors and tokenizer; for a GGUF file also a GGUF file."
        ),
    ],
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Directory to make, or a GGUF file: OUT.gguf.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help=f"A preset ({', '.join(RECIPES)}), a format for all linear layers, or a .toml file; for OUT.gguf a "
            f"file type ({', '.join(mixes.MIXES).lower()}). Default: {DEFAULT_RECIPE}, for OUT.gguf {DEFAULT_MIX}."
        ),
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint or GGUF file that is there.")
    ] = False,
    clamp: Annotated[
        bool, typer.Option("--clamp", help="With fp16 and bf16: clamp values out of range.")
    ] = False,
    shard_size: Annotated[float, typer.Option(help="Largest size of a file, in GB.")] = SHARD_BYTES / 1e9,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what each tensor would get, and write nothing.")
    ] = False,
    calibration: Annotated[
        str,
        typer.Option(
            help="Text to calibrate on, for gptq-, awq- and smoothquant- recipes, and for activations (llm-int8, "
            "w8a8-static): a file, JSON lines (.jsonl, field text), or dataset:NAME[:CONFIG[:SPLIT]]."
        ),
    ] = "",
    samples: Samples = SAMPLES,
    sequence_length: SequenceLength = 0,
    seed: Seed = 0,
    allow_uncalibrated: Annotated[
        bool,
        typer.Option(
            "--allow-uncalibrated", help="Calibration: round plainly, and mark, what the text never reaches."
        ),
    ] = False,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Calibration: folder for finished blocks. Default: a hidden one beside OUT."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Calibration: drop the blocks of a run that was stopped.")
    ] = False,
    activations: Annotated[
        str, typer.Option(help="Calibration: keep what goes into a block in ram, or on disk.")
    ] = "ram",
    dtype: Annotated[
        str, typer.Option(help="Calibration: compute in float32, bfloat16 or float16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Calibration: where to compute.")] = "cpu",
    imatrix: Annotated[
        Path | None, typer.Option(help="GGUF: importance of columns, as 'bitfold imatrix' writes it.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            help="GGUF: PATTERN=TYPE, for names in which the regular expression is found; may be repeated."
        ),
    ] = None,
    token_embedding_type: Annotated[str, typer.Option(help="GGUF: a type for the token embedding.")] = "",
    output_tensor_type: Annotated[str, typer.Option(help="GGUF: a type for the output head.")] = "",
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="GGUF: keep the output head as it is.")
    ] = False,
    pure: Annotated[bool, typer.Option("--pure", help="GGUF: one type for all tensors.")] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="GGUF: quantize again what is quantized already.")
    ] = False,
    errors: Annotated[bool, typer.Option("--errors", help="GGUF: measure the error of each tensor.")] = False,
    target_bpw: Annotated[
        float, typer.Option(help="Choose formats for so many bits per weight, scales included, by --text.")
    ] = 0,
    target_size: Annotated[
        str, typer.Option(help="Choose formats for a checkpoint of at most so many bytes: 4.5GB, 4GiB.")
    ] = "",
    text: Annotated[
        Path | None, typer.Option(help="Budget: UTF-8 text to choose by; not the one to judge the result by.")
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="Budget: what 'bitfold sensitivity' measured; made with --text where it isn't."),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(
            help="Budget: formats to choose from, with commas between; default: those of 'bitfold sensitivity'."
        ),
    ] = "",
    include: Include = None,
    tokens: Annotated[int, typer.Option(help="Budget: tokens of the text to use; 0: all.")] = TOKENS,
    window: Annotated[
        int,
        typer.Option(
            help=f"Budget: tokens of a window of the text; 0: the model's context, at most {CONTEXT}."
        ),
    ] = 0,
    context: Annotated[
        int | None,
        typer.Option(
            help="With --target-size: count the KV cache of so many tokens too, and choose its format along."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="With --context: sequences at once.")] = 1,
    rounds: Annotated[
        int, typer.Option(help="Budget: how often to measure anew around the choice, at most.")
    ] = 1,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Budget: write the recipe that was chosen into this .toml file.")
    ] = None,
    json: Json = False,
) -> None:
    """Quantize a model into a new directory or a GGUF file, streaming: memory holds a weight at most, a decoder block
    with --calibration. A calibration that was stopped goes on where it was."""
    if shard_size <= 0:
        raise ValueError(f"--shard-size is {shard_size}, it must be positive")
    if model.is_dir():  # a GGUF file needs no transformers, whose import takes a second
        quiet_transformers()
    options = Options(
        imatrix=imatrix,
        tensor_types=tuple(tensor_type or ()),
        token_embedding_type=token_embedding_type,
        output_tensor_type=output_tensor_type,
        leave_output_tensor=leave_output_tensor,
        pure=pure,
        allow_requantize=allow_requantize,
        errors=errors,
    )
    calibrated = _Calibrated(
        text=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        allow_uncalibrated=allow_uncalibrated,
        work_dir=work_dir,
        restart=restart,
        activations=activations,
        dtype=dtype,
        device=device,
    )
    budget = Budget(
        target_bpw=target_bpw,
        target_size=target_size,
        text=text,
        sensitivity=sensitivity,
        formats=formats,
        include=tuple(include or ()),
        tokens=tokens,
        window=window,
        context=context,
        batch=batch,
        rounds=rounds,
        save_recipe=save_recipe,
    )
    budget.check()
    if budget.asked and recipe:
        raise ValueError(
            f"{budget.given()[0]} chooses a recipe, but --recipe is given too: leave one of them away"
        )
    if not calibration and calibrated != _Calibrated():
        name = next(f.name for f in fields(calibrated) if getattr(calibrated, f.name) != f.default)
        raise ValueError(f"--{name.replace('_', '-')} is given, which is for --calibration: name a text")
    if _means_gguf(model, output, recipe):
        if budget.asked:
            raise ValueError(
                f"{budget.given()[0]} is given, but formats are chosen for directories alone: name a directory"
            )
        if calibration:
            raise ValueError(
                "--calibration is given; a GGUF file has no use for it: 'bitfold imatrix' is its way"
            )
        if clamp or shard_size != SHARD_BYTES / 1e9:
            raise ValueError(
                f"{'--clamp' if clamp else '--shard-size'} is given; a GGUF file has no use for it"
            )
        quantize_to_gguf(model, output, recipe, options, force=force, dry_run=dry_run, json=json)
        return
    if options.given():
        raise ValueError(f"{options.given()[0]} is given, which is for GGUF files: name the output OUT.gguf")
    if output is None and not dry_run:
        raise ValueError("OUT is missing; name the directory to make, or add --dry-run")
    if output is not None:
        check_target(output, force=force)
    if calibration and clamp:
        raise ValueError("--clamp is given; --calibration has no use for it")
    wanted: str | Recipe = recipe or DEFAULT_RECIPE
    origin = None
    calibrates = bool(calibration)
    if budget.asked:
        chosen = choose(
            model,
            budget,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            dtype=dtype,
            device=device,
            json=json,
        )
        wanted, origin = chosen.recipe, chosen.origin
        calibrates = chosen.needs_calibration
    elif recipes.get(wanted).keeps_outlier_layers:
        resolved = _resolve(model, recipes.get(wanted), calibrated, json)
        wanted, origin = resolved.recipe, resolved.origin
        calibrates = resolved.recipe.gains
    if dry_run:
        show_plan(model, wanted, json, origin)
        return
    assert output is not None
    shard_bytes = int(shard_size * 1e9)
    if calibrates:
        summary = _calibrate(model, output, wanted, calibrated, force, shard_bytes, origin)
        if is_first():
            show_result(summary, output, json, origin)
        return
    with progress("quantizing") as update:
        summary = quantize_checkpoint(
            model,
            output,
            wanted,
            force=force,
            clamp=clamp,
            shard_bytes=shard_bytes,
            origin=origin,
            progress=update,
        )
    show_result(summary, output, json, origin)


@dataclass(frozen=True)
class _Calibrated:
    """The options for --calibration."""

    text: str = ""
    samples: int = SAMPLES
    sequence_length: int = 0
    seed: int = 0
    allow_uncalibrated: bool = False
    work_dir: Path | None = None
    restart: bool = False
    activations: str = "ram"
    dtype: str = "float32"
    device: str = "cpu"


def _calibrate(
    model: Path,
    output: Path,
    recipe: str | Recipe,
    options: _Calibrated,
    force: bool,
    shard_bytes: int,
    origin: Origin | None,
) -> QuantizationSummary:
    dtype = parse_dtype(options.dtype)
    if dtype is None:
        raise ValueError("--dtype is empty, it must be float32, bfloat16 or float16")
    with progress("calibrating") as update:
        return quantize_calibrated(
            model,
            output,
            recipe,
            options.text,
            samples=options.samples,
            sequence_length=options.sequence_length or None,
            seed=options.seed,
            allow_uncalibrated=options.allow_uncalibrated,
            dtype=dtype,
            device=parse_device(options.device),
            activations=options.activations,
            work_dir=options.work_dir,
            restart=options.restart,
            force=force,
            shard_bytes=shard_bytes,
            origin=origin,
            progress=update,
        )


def _resolve(model: Path, recipe: Recipe, options: _Calibrated, json: bool) -> Resolved:
    """The plain rules that a recipe with keep_outlier_layers comes to on the calibration text."""
    source = layout.read_source(model)
    rows = calibration_of(
        source,
        hf.load_tokenizer(model),
        Texts("", 0, 0, options.text, options.samples, options.sequence_length or None, options.seed),
    )
    if rows is None:
        raise ValueError(
            f"recipe {recipe.name!r} keeps layers by what they lose on a text: add --calibration FILE"
        )
    dtype = parse_dtype(options.dtype)
    if dtype is None:
        raise ValueError("--dtype is empty, it must be float32, bfloat16 or float16")
    resolved = resolve_on(source, recipe, rows, dtype=dtype, device=parse_device(options.device))
    if not json and is_first():
        show_resolved(resolved)
    return resolved


def _means_gguf(model: Path, output: Path | None, recipe: str) -> bool:
    """Whether a GGUF file is to be made: the output's name says so; without one, a model or a recipe that means nothing
    else.

    Raises ValueError where they contradict each other.
    """
    only_mix = mixes.is_mix_alone(recipe)
    if output is None:
        return only_mix or model.is_file()
    if output.suffix.lower() == ".gguf":
        return True
    if only_mix:
        raise ValueError(f"{recipe} is a file type of GGUF: name the output {output}.gguf, not {output}")
    if model.is_file():
        raise ValueError(
            f"{model} is no directory of a model; of a GGUF file another can be made, if the output is named "
            f"{output}.gguf"
        )
    return False
