"""`bitfold recipes`: the presets, what they are for, and what they cost on the demo model."""

from __future__ import annotations

import dataclasses

from bitfold.cli.console import Json, out, paragraph, print_json, table
from bitfold.figures import demo_figures
from bitfold.recipes import RECIPES


def recipes(json: Json = False) -> None:
    """List the presets with their bits, what they are for, and their measured KL on the demo model."""
    figures = demo_figures()
    if json:
        source = dataclasses.asdict(figures)
        measured = source.pop("recipes")
        presets = {
            name: {
                "description": recipe.description,
                "use": recipe.use,
                "rules": recipe.rules,
                "demo": measured.get(name),
            }
            for name, recipe in RECIPES.items()
        }
        print_json({"measured": source, "recipes": presets})
        return
    shown = table("recipe", "bits/weight", "KL", "+-", "same top token")
    for name in RECIPES:
        figure = figures.recipes.get(name)
        if figure is None:
            shown.add_row(name, "not measured")
            continue
        shown.add_row(
            name,
            f"{figure.bits_per_weight:.2f}",
            f"{1e3 * figure.mean_kl:.3f}",
            f"{1e3 * figure.mean_kl_error:.3f}",
            f"{figure.top1:.1%}",
        )
    out.print(shown)
    out.print(
        paragraph(
            "bits/weight: of the quantized weights, scales included. KL: mean divergence from the 16-bit model in "
            "thousandths of a nat a token, 0 is no difference, with its standard error. same top token: how often "
            "both models put the same token first."
        )
    )
    out.print(
        paragraph(
            f"Measured on the demo model of {figures.base_bytes / 1e6:.2f} MB at commit {figures.commit} "
            f"({figures.machine}, {figures.isa}): {figures.protocol}. Another model loses more or less: measure "
            "it with 'bitfold eval'."
        )
    )
    out.print()
    for name, recipe in RECIPES.items():
        out.print(paragraph(f"{name:<15} {recipe.description}: {recipe.use}", indent=" " * 16), markup=False)
