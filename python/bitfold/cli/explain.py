"""`bitfold explain`: what a format does to a number, how numbers are rounded, what a name means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from bitfold.cli.console import Json, out, paragraph, print_json, table
from bitfold.explain.names import Meaning, explain_name
from bitfold.explain.number import Stored, explain_number
from bitfold.explain.walk import Scheme, walk


def explain(
    what: Annotated[
        list[str],
        typer.Argument(
            help="A number; several numbers; or the name of a recipe, a format, a GGUF type or a GGUF file.",
            metavar="NUMBER... | NAME",
        ),
    ],
    bits: Annotated[int, typer.Option(help="With several numbers: bits of a code.")] = 8,
    group: Annotated[
        int, typer.Option(help="With several numbers: how many share a scale; 0: half of them.")
    ] = 0,
    absmax: Annotated[
        float,
        typer.Option(help="With one number: the largest weight of its group; 0: the next power of two."),
    ] = 0,
    json: Json = False,
) -> None:
    """Show the bits of a number in every format, the rounding of several, or what a name means."""
    numbers = _numbers(what)
    if numbers is None:
        meanings = explain_name(what[0])
        print_json({"meanings": meanings}) if json else _show_meanings(meanings)
    elif len(numbers) == 1:
        stored = explain_number(numbers[0], absmax or None)
        print_json({"number": numbers[0], "formats": stored}) if json else _show_number(what[0], stored)
    else:
        schemes = walk(numbers, bits, group or None)
        print_json({"numbers": numbers, "bits": bits, "schemes": schemes}) if json else _show_walk(schemes)


def _numbers(words: Sequence[str]) -> list[float] | None:
    """The numbers that are meant, None for a name. Raises ValueError for a mixture."""
    numbers = []
    for word in words:
        # Negative numbers are let through as arguments, and with them whatever else begins with a dash.
        if word.startswith("--"):
            raise ValueError(f"{word} is no option of explain; it has --bits, --group, --absmax and --json")
        try:
            numbers.append(float(word))
        except ValueError:
            if len(words) == 1:
                return None
            raise ValueError(f"{word!r} is no number; give numbers alone, or one name") from None
    return numbers


# ---- one number ----


def _show_number(text: str, stored: list[Stored]) -> None:
    out.print(f"{text} as a float: sign, exponent, mantissa")
    shown = table("format", "bits", "stored", "error")
    for one in stored:
        if one.scale is None:
            shown.add_row(one.format, one.bits, _number(one.value), _error(one))
    out.print(shown)
    codes = [one for one in stored if one.scale is not None]
    largest = max(one.largest for one in codes)
    out.print()
    out.print(
        paragraph(
            f"{text} as a code. A code needs a scale; this one comes from a group whose largest weight is "
            f"{largest:.6g} (--absmax)."
        )
    )
    shown = table("format", "code", "bits", "scale", "stored", "error")
    for one in codes:
        shown.add_row(
            one.format, str(one.code), one.bits, _number(one.scale or 0), _number(one.value), _error(one)
        )
    out.print(shown)
    out.print("\nWhat each can write (codes: with that scale), and the step to the next number")
    shown = table("format", "least above 0", "largest", "step here")
    for one in stored:
        shown.add_row(one.format, _number(one.smallest), _number(one.largest), _number(one.spacing))
    out.print(shown)
    for one in stored:
        if one.note:
            out.print(f"{one.format}: {one.note}")


def _number(value: float) -> str:
    return f"{value:.8g}"


def _error(one: Stored) -> str:
    return f"{one.error:+.2e}" if one.error else "0"


# ---- several numbers ----


def _show_walk(schemes: list[Scheme]) -> None:
    for place, scheme in enumerate(schemes, 1):
        out.print(f"{place}. {scheme.name}")
        out.print(paragraph(f"   scale = {scheme.scale_rule}", indent="   "))
        zero = scheme.steps[0].zero
        rounded = "rounded" if zero is None else f"rounded + {zero}"
        scales = len({step.scale for step in scheme.steps}) > 1
        columns = [
            "number",
            *(["scale"] if scales else []),
            "number / scale",
            rounded,
            "code",
            "decoded",
            "error",
        ]
        shown = table(*columns)
        for step in scheme.steps:
            clamped = f" (clamped from {step.rounded})" if step.code != step.rounded else ""
            shown.add_row(
                f"{step.number:g}",
                *([f"{step.scale:.6g}"] if scales else []),
                f"{step.quotient:.3f}",
                str(step.rounded),
                f"{step.code}{clamped}",
                f"{step.decoded:.6g}",
                # A hundred-thousandth of a step is the input's own rounding to 32 bits.
                f"{step.error:+.2g}" if abs(step.error) > 1e-5 * step.scale else "0",
            )
        out.print(shown)
        out.print(f"   codes {scheme.lowest} to {scheme.highest}; largest error {scheme.largest_error:.4g}\n")


# ---- a name ----


def _show_meanings(meanings: list[Meaning]) -> None:
    for place, meaning in enumerate(meanings):
        if place:
            out.print()
        out.print(f"{meaning.name} ({meaning.kind})", markup=False)
        for label, text in meaning.facts:
            out.print(paragraph(f"  {label:<13}{text}", indent=" " * 15), markup=False)
