"""`bitfold plan MODEL --train qlora`: what fine-tuning takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bitfold import recipes
from bitfold.cli.console import out, paragraph, print_json, table
from bitfold.layout import Source
from bitfold.text import size
from bitfold.training import Training, TrainingMemory, plan_training

METHODS = {"qlora": ("nf4-dq",)}
"""Ways to train, and the recipes of their base where none are named."""
_PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "total")


def plan_train(
    source: Source, method: str, names: Sequence[str], training: Training, limit: int | None, json: bool
) -> None:
    """Print the plan of a training; limit: bytes that it is to fit into."""
    if method not in METHODS:
        raise ValueError(f"--train is {method!r}; it must be one of {', '.join(METHODS)}")
    plans = {
        recipe.name: plan_training(source, recipe, training)
        for recipe in map(recipes.get, names or METHODS[method])
    }
    if json:
        found = {name: {**dataclasses.asdict(plan), "total": plan.total} for name, plan in plans.items()}
        print_json({"model": source.path, "training": dataclasses.asdict(training), "recipes": found})
        return
    _show(plans, training, limit)


def _show(plans: dict[str, TrainingMemory], training: Training, limit: int | None) -> None:
    factor, unit = (1e9, "GB") if max(plan.total for plan in plans.values()) >= 1e9 else (1e6, "MB")
    kept = "activations computed again" if training.checkpointing else "activations kept"
    out.print(
        f"Memory to train it, in {unit} (rank {training.rank} in {training.adapter_dtype}, {training.optimizer}, "
        f"context {training.context}, batch {training.batch}, {kept})"
    )
    shown = table("recipe", *_PARTS, *(["fits"] if limit is not None else []))
    for name, plan in plans.items():
        cells = [f"{getattr(plan, part) / factor:.2f}" for part in _PARTS]
        if limit is not None:
            cells.append("yes" if plan.total <= limit else "no")
        shown.add_row(name, *cells)
    out.print(shown)
    out.print()
    one = next(iter(plans.values()))
    out.print(
        paragraph(
            f"{one.parameters:,} parameters train. Of the weights {size(one.linears)} are quantized linear layers. "
            "Memory that kernels take for themselves, Python and torch come on top."
        )
    )
    if limit is not None:
        fitting = [name for name, plan in plans.items() if plan.total <= limit]
        out.print(paragraph(f"Into {size(limit)} fit: {', '.join(fitting) or 'none of them'}."))
