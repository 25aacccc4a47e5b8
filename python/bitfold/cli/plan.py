"""`bitfold plan MODEL`: what every recipe and every file type of GGUF would cost, before anything is computed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bitfold import layout, recipes
from bitfold.budget import (
    CLASSES,
    UNQUANTIZED,
    Budget,
    budget,
    nominal_bytes,
    unquantized,
)
from bitfold.cli.console import Json, out, paragraph, print_json, quiet_transformers, table
from bitfold.cli.plan_training import plan_train
from bitfold.gguf import mixes
from bitfold.gguf.budget import gguf_budget
from bitfold.gguf.mixes import Mix
from bitfold.kv.blocks import FORMATS as QUANTIZED
from bitfold.layout import Source
from bitfold.memory import KV_FORMATS, Run, run_of
from bitfold.presets import RECIPES
from bitfold.rules import Recipe
from bitfold.text import size
from bitfold.training import ADAPTER_DTYPES, CONTEXT, OPTIMIZERS, Training

# int4-g128 is the recipe that `quantize` takes when none is named: the one to explain the table with.
EXAMPLE = "int4-g128"


def plan(
    model: Annotated[
        Path | None, typer.Argument(help="Directory with a config.json; safetensors are not needed.")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this recipe (again for more): a preset, a format, a .toml file, or a file type of GGUF (Q8_0)."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence; 0: the model's, at most 4096.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    kv_format: Annotated[
        str, typer.Option(help=f"Of the KV cache: {', '.join(KV_FORMATS)}; default: the model's dtype.")
    ] = "",
    fit: Annotated[str, typer.Option(help="Say which recipes fit into so much memory: 24GB, 16GiB.")] = "",
    params: Annotated[str, typer.Option(help="Without a model: the sizes of so many parameters: 7e9.")] = "",
    train: Annotated[
        str, typer.Option(help="What fine-tuning takes: qlora (adapters on a base in nf4-dq, or --recipe).")
    ] = "",
    rank: Annotated[int, typer.Option(help="With --train: of the adapters.")] = 16,
    adapter_dtype: Annotated[
        str, typer.Option(help=f"With --train: {', '.join(ADAPTER_DTYPES)}; PEFT's default is fp32.")
    ] = "fp32",
    optimizer: Annotated[str, typer.Option(help=f"With --train: {', '.join(OPTIMIZERS)}.")] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option(help="With --train: compute activations again in the backward pass.")
    ] = True,
    json: Json = False,
) -> None:
    """Show what each recipe would cost: bytes by class of tensors, bits per weight, memory to run."""
    count = _parse_count(params) if params else None
    limit = parse_size(fit) if fit else None
    if model is None and count is None:
        raise ValueError("MODEL is missing; give a model directory, or --params")
    if model is None:
        assert count is not None
        if json:
            print_json({"parameters": count, "bytes": nominal_bytes(count)})
            return
        _show_nominal({f"{count:,.0f} parameters": nominal_bytes(count)})
        return
    quiet_transformers()
    source = layout.read_source(model, config_suffices=True)
    if train:
        training = Training(rank, adapter_dtype, optimizer, context or CONTEXT, batch, checkpointing)
        plan_train(source, train, recipe or [], training, limit, json)
        return
    run = run_of(source, context or None, batch, kv_format or None)
    if recipe:
        budgets, refused = _plan_all(source, [_get(name) for name in recipe], run)
    else:
        quantized = [mix for mix in mixes.MIXES.values() if mix.is_quantized]
        budgets, refused = _plan_all(source, [*RECIPES.values(), *quantized], run)
        budgets = {UNQUANTIZED: unquantized(source, run), **budgets}
    if json:
        print_json(_to_json(model, source, run, budgets, refused, limit, count))
        return
    _show(source, run, budgets, refused, limit, count)


def parse_size(text: str, option: str = "--fit") -> int:
    """Bytes: "24GB" is 24 * 10^9, "24GiB" 24 * 2^30; a bare number is bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{option} is {text!r}; it must be a size such as 24GB or 24GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def _parse_count(text: str) -> float:
    try:
        count = float(text.replace("_", ""))
    except ValueError:
        count = 0
    if not 1 <= count < 1e18:
        raise ValueError(f"--params is {text!r}; it must be a number of parameters such as 7e9")
    return count


def _get(name: str) -> Recipe | Mix:
    """A recipe, or a file type of GGUF: in capitals where its name is a format's too ("Q8_0")."""
    mix = mixes.find(name)
    return mix if mix is not None and mixes.is_mix_alone(name) else recipes.get(name)


def _plan_all(
    source: Source, chosen: Sequence[Recipe | Mix], run: Run
) -> tuple[dict[str, Budget], dict[str, str]]:
    """Budgets by recipe, and for recipes that don't fit the model why; one recipe alone raises its error."""
    budgets, refused = {}, {}
    for recipe in chosen:
        try:
            plan_one = gguf_budget if isinstance(recipe, Mix) else budget
            budgets[recipe.name] = plan_one(source, recipe, run)  # type: ignore[arg-type]
        except ValueError as error:
            if len(chosen) == 1:
                raise
            refused[recipe.name] = str(error)
    return budgets, refused


# ---- as JSON ----


def _to_json(
    model: Path,
    source: Source,
    run: Run,
    budgets: dict[str, Budget],
    refused: dict[str, str],
    limit: int | None,
    count: float | None,
) -> dict[str, object]:
    parameters = next(iter(budgets.values())).parameters if budgets else 0
    return {
        "model": model,
        "parameters": parameters,
        "sizes_from": "safetensors headers" if source.has_weights else "config.json",
        "nominal_bytes": nominal_bytes(parameters),
        **({"params": count, "params_bytes": nominal_bytes(count)} if count is not None else {}),
        "run": dataclasses.asdict(run),
        **({"fit": limit} if limit is not None else {}),
        "recipes": {name: _budget_json(one, limit) for name, one in budgets.items()},
        "refused": refused,
    }


def _budget_json(one: Budget, limit: int | None) -> dict[str, object]:
    return {
        "bytes": one.nbytes,
        "class_bytes": one.class_bytes(),
        "bits_per_weight": one.bits_per_weight,
        "quantized_bits_per_weight": one.quantized_bits_per_weight,
        "memory": {**dataclasses.asdict(one.memory), "total": one.memory.total},
        **({"fits": one.memory.total <= limit} if limit is not None else {}),
        "notes": one.notes,
        "modules": [dataclasses.asdict(entry) for entry in one.entries],
    }


# ---- as text ----


def _show_nominal(rows: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    shown = table("every parameter in", *names)
    for title, sizes in rows.items():
        shown.add_row(title, *(_short(value) for value in sizes.values()))
    out.print(shown)


def _short(count: float) -> str:
    """Bytes in decimal units as people quote them: "28 GB", "13.48 GB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.2f}".rstrip("0").rstrip(".") + f" {units[0]}"


def _show(
    source: Source,
    run: Run,
    budgets: dict[str, Budget],
    refused: dict[str, str],
    limit: int | None,
    count: float | None,
) -> None:
    if budgets:
        _show_counts(budgets, count)
        _show_checkpoint(source, budgets)
        _show_memory(run, budgets, limit)
        _show_notes(budgets)
    for reason in dict.fromkeys(refused.values()):
        names = [name for name, given in refused.items() if given == reason]
        out.print(paragraph(f"No plan for {', '.join(names)}: {reason}."), markup=False)


def _show_counts(budgets: dict[str, Budget], count: float | None) -> None:
    one = budgets.get(EXAMPLE) or next(iter(budgets.values()))
    parameters = one.parameters
    rows = {f"{parameters:,} parameters": nominal_bytes(parameters)}
    if count is not None:
        rows[f"{count:,.0f} parameters"] = nominal_bytes(count)
    _show_nominal(rows)
    if count is not None and count != parameters:
        word = "fewer" if parameters < count else "more"
        out.print(
            paragraph(
                f"The model has {abs(parameters / count - 1):.1%} {word} parameters than {count:,.0f}: the number "
                "in a model's name is rounded."
            )
        )
    bits = one.quantized_bits_per_weight
    if bits is None:
        return
    quantized = [entry for entry in one.entries if entry.quantized]
    kept = [entry for entry in one.entries if not entry.quantized]
    weights = sum(entry.parameters for entry in quantized)
    out.print(
        paragraph(
            f"A recipe costs more than its bits say. {one.recipe} needs {_short(one.nbytes)}: "
            f"{_short(sum(entry.nbytes for entry in quantized))} for {weights:,} weights at {bits:.3f} bits "
            f"(codes and scales), and {_short(sum(entry.nbytes for entry in kept))} for "
            f"{sum(entry.parameters for entry in kept):,} parameters that are not quantized."
        )
    )
    out.print()


def _unit(largest: float) -> tuple[float, str]:
    """The decimal unit that gives the largest number of a table one to three digits before the point."""
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    return next(((factor, name) for name, factor in units.items() if largest >= factor), (1e3, "kB"))


def _show_checkpoint(source: Source, budgets: dict[str, Budget]) -> None:
    factor, unit = _unit(max(one.nbytes for one in budgets.values()))
    classes = [name for name in CLASSES if any(name in one.class_bytes() for one in budgets.values())]
    known = "the headers of its files" if source.has_weights else "config.json alone"
    out.print(f"The checkpoint, in {unit} of tensor data (from {known})")
    shown = table("recipe", *classes, "total", "bits/weight")
    for name, one in budgets.items():
        sizes = one.class_bytes()
        cells = [f"{sizes[column] / factor:.2f}" if column in sizes else "" for column in classes]
        shown.add_row(name, *cells, f"{one.nbytes / factor:.2f}", f"{one.bits_per_weight:.2f}")
    out.print(shown)
    out.print()


def _show_memory(run: Run, budgets: dict[str, Budget], limit: int | None) -> None:
    factor, unit = _unit(max(one.memory.total for one in budgets.values()))
    out.print(
        f"Memory to run it, in {unit} (context {run.context}, batch {run.batch}, KV cache {run.kv_format}, "
        f"threads {run.threads})"
    )
    columns = ["weights", "KV cache", "activation", "workspace", "total"]
    shown = table("recipe", *columns, *(["fits"] if limit is not None else []))
    for name, one in budgets.items():
        memory = one.memory
        parts = (memory.weights, memory.kv_cache, memory.activation, memory.workspace)
        cells = ["?" if part is None else f"{part / factor:.2f}" for part in (*parts, memory.total)]
        if limit is not None:
            cells.append("yes" if memory.total <= limit else "no")
        shown.add_row(name, *cells)
    out.print(shown)
    out.print()
    if limit is not None:
        fitting = [name for name, one in budgets.items() if one.memory.total <= limit]
        out.print(paragraph(f"Into {size(limit)} fit: {', '.join(fitting) or 'none of them'}."))
    remarks = [
        "No kernel keeps a repacked copy of the weights today.",
        "Python, torch and what a model's own code holds come on top.",
    ]
    if run.kv_format in QUANTIZED:
        remarks.insert(
            0,
            f"The KV cache in {run.kv_format} is bitfold.QuantizedCache; with another attention function than "
            "'bitfold' each layer's is decoded in every call, which comes on top.",
        )
    out.print(paragraph(" ".join(remarks)))
    out.print()


def _show_notes(budgets: dict[str, Budget]) -> None:
    """Each exception once, with the recipes it concerns where it doesn't concern all that quantize."""
    chosen = {name: one for name, one in budgets.items() if name != UNQUANTIZED} or budgets
    concerned: dict[str, list[str]] = {}
    for name, one in chosen.items():
        for note in one.notes:
            concerned.setdefault(note, []).append(name)
    out.print("Exceptions, and why")
    of_gguf = [name for name in chosen if name in mixes.MIXES]
    shared = {tuple(chosen): "", tuple(of_gguf): "GGUF: "}
    shared |= {tuple(name for name in chosen if name not in of_gguf): "recipes: "} if of_gguf else {}
    for note, names in concerned.items():
        prefix = shared.get(tuple(names), f"{', '.join(names)}: ")
        out.print(paragraph(f"- {prefix}{note}", indent="  "), markup=False)
