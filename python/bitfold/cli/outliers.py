"""`bitfold outliers MODEL --text FILE`: outlier features, and what 8 bits lose in each layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer

from bitfold import hf, layout, recipes
from bitfold.allocation.recipe import RECIPE, to_toml
from bitfold.calibration.data import Calibration
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
    table,
)
from bitfold.cli.eval import read_text
from bitfold.evaluate import Protocol
from bitfold.layout import Source
from bitfold.outfile import check_output, write_text
from bitfold.outliers.columns import ACTIVATION_THRESHOLD, WEIGHT_THRESHOLD, Inputs
from bitfold.outliers.keep import Resolved, resolve
from bitfold.outliers.measure import LAYER_SHARE, TOKEN_SHARE, Outliers, measure
from bitfold.outliers.ways import WAYS
from bitfold.rules import Recipe
from bitfold.sensitivity.ground import CONTEXT, TOKENS, windows_of
from bitfold.text import joined, natural

_WHICH = 4  # columns named in a row of a table
_RECURRING = 12  # channels in a table


def outliers(
    model: Annotated[Path, typer.Argument(help="Directory of an unquantized model.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text like those that the model will read.")],
    threshold: Annotated[
        float, typer.Option(help="From which magnitude on a value is an outlier.")
    ] = ACTIVATION_THRESHOLD,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use; 0: all.")] = TOKENS,
    context: Annotated[
        int, typer.Option(help=f"Tokens of a sequence; 0: the model's, at most {CONTEXT}.")
    ] = 0,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A .toml file with keep_outlier_layers: say which layers its rules pass over."),
    ] = None,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Write what --recipe comes to, plain rules, into this .toml file.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Run the model in float32, bfloat16 or float16.")] = "float32",
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Find columns with outliers, of inputs and of weights, and measure what int8 and LLM.int8() lose in each layer."""
    kind = parse_dtype(dtype)
    if kind is None:
        raise ValueError("--dtype is empty, it must be float32, bfloat16 or float16")
    if not 0 < threshold < float("inf"):
        raise ValueError(f"--threshold is {threshold}, it must be a positive number")
    if save_recipe is not None and recipe is None:
        raise ValueError("--save-recipe is given, which is for --recipe: name one")
    if save_recipe is not None:
        check_output("--save-recipe", save_recipe, RECIPE)
    wanted = None if recipe is None else recipes.get(recipe)
    quiet_transformers()
    words = read_text(text)
    if not words.strip():
        raise ValueError(f"the text {text} is empty")
    source = layout.read_source(model)
    windows = windows_of(source, hf.load_tokenizer(model), words, tokens, context, kind)
    with progress("measuring") as update:
        found = measure(
            source,
            torch.stack(windows.ids),
            threshold=threshold,
            dtype=kind,
            device=parse_device(device),
            progress=update,
        )
    resolved = None
    if wanted is not None:
        rows = Calibration(torch.stack(windows.ids), str(text), 0)
        resolved = resolve_on(source, wanted, rows, dtype=kind, device=parse_device(device))
        if save_recipe is not None:
            write_text(save_recipe, to_toml(resolved.recipe))
    if json:
        whole = {"model": model, "text": text, "protocol": windows.protocol, **as_json(found)}
        print_json({**whole, **({} if resolved is None else {"recipe": resolved.origin.report})})
        return
    show(found, windows.protocol)
    if resolved is not None:
        out.print()
        show_resolved(resolved)
        if save_recipe is not None:
            out.print(f"{save_recipe}: {len(resolved.recipe.rules)} rules", markup=False)


def resolve_on(
    source: Source, recipe: Recipe, rows: Calibration, *, dtype: torch.dtype, device: torch.device
) -> Resolved:
    """Measure which layers a recipe's rules pass over."""
    with progress("layers under their rules") as update:
        return resolve(recipe, source, rows, dtype=dtype, device=device, progress=update)


def show_resolved(resolved: Resolved) -> None:
    """Which layers rules pass over, and what they become."""
    passed = [trial for trial in resolved.trials if trial.is_passed_over]
    modules = len({trial.module for trial in resolved.trials})
    named = {rule.pattern: rule for rule in resolved.recipe.rules}
    if passed:
        rows = table("passed over", "by rule", "loss", "columns", "becomes")
        for trial in sorted(passed, key=lambda one: (natural(one.module), one.rule)):
            rule = named[trial.module]
            becomes = rule.format or "kept"
            rows.add_row(
                trial.module,
                f"{trial.rule}",
                f"{trial.loss:.3%}",
                f"{trial.share:.2%}",
                becomes if rule.activations.is_float else f"{becomes}, {rule.activations}",
            )
        out.print(rows)
    out.print(
        paragraph(
            f"{len(resolved.passed_over)} of {modules} layers are above the bound of a rule of {resolved.recipe.name}"
            f"{' (loss: of their output as the rule has it; columns: of the input, with outliers)' if passed else ''}."
        )
    )


def as_json(found: Outliers) -> dict[str, object]:
    """All numbers, and what follows from them."""
    recurring = [{**vars(one), "is_systematic": one.is_systematic} for one in found.recurring]
    ways = {name: way.says for name, way in WAYS.items()}
    return {**dataclasses.asdict(found), "ways": ways, "recurring": recurring}


def show(found: Outliers, protocol: Protocol) -> None:
    """Features of inputs, channels that come again, then weights and losses, a row for each layer."""
    out.print(f"protocol     {protocol}", markup=False)
    out.print()
    out.print(paragraph(f"Columns of inputs that reach {found.threshold:g} (outlier features)"))
    inputs = table(
        "input of",
        "columns",
        "features",
        "median",
        "largest",
        "tokens",
        "in 16 bits",
        "which: tokens, sequences, sign",
    )
    for one in found.inputs:
        inputs.add_row(
            joined(one.names),
            f"{one.columns}",
            f"{len(one.outliers)}",
            f"{one.median:.2f}",
            f"{one.peak:.2f}",
            f"{one.token_share:.1%}",
            f"{one.sixteen:.2%}",
            _which(one),
        )
    out.print(inputs, markup=False)
    out.print(
        paragraph(
            "(median and largest: of the columns' largest magnitudes; tokens: share of those with a feature; in 16 "
            "bits: share of the columns that LLM.int8() multiplies in 16 bits, mean over sequences; last: the largest "
            "features, and of each the share of tokens and of sequences with an outlier, and of its outliers with one "
            "sign)"
        )
    )
    _show_recurring(found)
    out.print()
    out.print(
        paragraph("Columns of weights with outliers, and what the layer's output loses (relative error)")
    )
    layers = table("layer", "shape", "columns", "largest", *WAYS)
    for layer in sorted(found.layers, key=lambda one: natural(one.name)):
        layers.add_row(
            layer.name,
            " x ".join(map(str, layer.shape)),
            f"{len(layer.weight.outliers)}",
            f"{layer.weight.peak:.2f}",
            *(f"{loss:.3%}" for loss in layer.losses.values()),
        )
    out.print(layers)
    out.print(
        paragraph(
            f"(columns: with a weight of {WEIGHT_THRESHOLD:g} times the matrix's root mean square or more; largest: in "
            f"this unit; {'; '.join(f'{name}: {way.says}' for name, way in WAYS.items())})"
        )
    )
    if found.unreached:
        out.print(paragraph(f"No token of the text comes to {', '.join(found.unreached)}."), markup=False)


def _show_recurring(found: Outliers) -> None:
    channels = found.recurring
    if not channels:
        return
    out.print()
    out.print(paragraph("Channels of the residual stream with outliers behind norms"))
    rows = table("channel", "norms", "tokens", "largest", "systematic")
    for one in channels[:_RECURRING]:
        rows.add_row(
            f"{one.index}",
            f"{one.norms} ({one.share:.0%})",
            f"{one.token_share:.1%}",
            f"{one.peak:.2f}",
            "yes" if one.is_systematic else "",
        )
    out.print(rows)
    more = len(channels) - _RECURRING
    rest = f"{more} more; " if more > 0 else ""
    out.print(
        paragraph(
            f"({rest}systematic: behind at least {LAYER_SHARE:.0%} of the norms, in {TOKEN_SHARE:.0%} of the tokens, "
            "as Dettmers et al. 2022 count)"
        )
    )


def _which(one: Inputs) -> str:
    named = ", ".join(
        f"{f.index} ({f.token_share:.0%}, {f.sequence_share:.0%}, {f.same_sign:.0%})"
        for f in one.outliers[:_WHICH]
    )
    more = len(one.outliers) - _WHICH
    return f"{named}, and {more} more" if more > 0 else named
