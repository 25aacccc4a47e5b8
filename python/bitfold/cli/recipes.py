"""`bitfold recipes`: the presets and what they cost on the demo model; the file types of GGUF; what they are for."""

from __future__ import annotations

import dataclasses

from bitfold.cli.console import Json, out, paragraph, print_json, table
from bitfold.explain.gguf import exceptions
from bitfold.figures import demo_figures
from bitfold.gguf import example, mixes
from bitfold.presets import RECIPES


def recipes(json: Json = False) -> None:
    """List the presets with their bits, what they are for, and their measured KL on the demo model; the file types of
    GGUF with their sizes."""
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
        print_json({"measured": source, "recipes": presets, "gguf": _gguf_json()})
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
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        text = f"{name:<{width}} {recipe.description}: {recipe.use}"
        out.print(paragraph(text, indent=" " * (width + 1)), markup=False)
    out.print()
    _show_gguf()


def _gguf_json() -> dict[str, object]:
    sizes = {mix.name: example.size(mix) for mix in mixes.MIXES.values()}
    return {
        mix.name.lower(): {
            "file_type": mix.number,
            "most_tensors": mix.default,
            "use": mix.use,
            "exceptions": exceptions(mix),
            "example": example.NAME,
            "bytes": sizes[mix.name][0],
            "bits_per_weight": sizes[mix.name][1],
        }
        for mix in mixes.MIXES.values()
    }


def _show_gguf() -> None:
    shown = table("for OUT.gguf", "most tensors", f"{example.NAME}, GB", "bits/weight")
    for mix in mixes.MIXES.values():
        nbytes, bits = example.size(mix)
        shown.add_row(mix.name.lower(), mix.default, f"{nbytes / 1e9:.2f}", f"{bits:.2f}")
    out.print(shown)
    out.print(
        paragraph(
            "The file types of llama.cpp, with its rules for which tensor gets which type ('bitfold explain q4_k_m'); "
            "bits/weight: of all tensors."
        )
    )
    out.print()
    for mix in mixes.MIXES.values():
        out.print(paragraph(f"{mix.name.lower():<15} {mix.use}", indent=" " * 16), markup=False)
