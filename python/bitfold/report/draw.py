"""Figures into files and into the page.

In the page an SVG takes its colours from the page's variables. A figure is drawn with stand-in colours that
nothing else uses, and they are exchanged in the text of the SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from bitfold.pages import colours
from bitfold.report.plots import Palette

Draw = Callable[[float, Palette], Figure]
"""A plot but for its width (inches) and its palette."""

WIDE, NARROW = 7.6, 3.65  # inches: the text column, and a phone's
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bitfold",  # the same figure gives the same file
    "hatch.linewidth": 0.8,
}
_ROLES = tuple(field.name for field in fields(Palette))
_STAND_INS = {role: f"#0{i}0{i}0{i}" for i, role in enumerate(_ROLES, 1)}


def save(draw: Draw, stem: Path) -> tuple[Path, Path]:
    """Write a plot as stem.png and stem.svg, in the colours of the light theme."""
    names = colours()
    palette = Palette(**{role: names[role][0] for role in _ROLES})
    paths = stem.with_suffix(".png"), stem.with_suffix(".svg")
    with matplotlib.rc_context(_STYLE):
        figure = draw(WIDE, palette)
        figure.patch.set(visible=True, facecolor=palette.paper)
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def inline(draw: Draw, name: str, alt: str) -> Markup:
    """A plot for the page, wide and narrow; its style shows the one that fits. alt: what it shows, for those
    who don't see it.
    """
    wide, narrow = (
        _inline(draw, width, f"{name}-{kind}", alt) for width, kind in ((WIDE, "w"), (NARROW, "n"))
    )
    return Markup(f'<div class="plot-wide">{wide}</div><div class="plot-narrow">{narrow}</div>')


def _inline(draw: Draw, width: float, prefix: str, alt: str) -> str:
    with matplotlib.rc_context(_STYLE):
        buffer = io.StringIO()
        draw(width, Palette(**_STAND_INS)).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    # A hundredth of a point is enough, within tags: what stands between them is to be read.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d\d)\d+", r"\1", tag.group()), text)
    text = re.sub(r"font-family: [^;]*; ?", "", text)  # the page's own
    for role, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{role})")
    # Ids must be unique in the page; those that nothing refers to go.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(
        r' id="([^"]+)"', lambda m: f' id="{prefix}-{m.group(1)}"' if m.group(1) in used else "", text
    )
    text = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", text)
    # The box alone says how large it is: the style scales it. Links between parts need no namespace in HTML.
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    start = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box.group(1)}" style="width: {width}in">'
    text = re.sub(r"<svg[^>]*>", lambda m: start, text, count=1, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    return re.sub(r"\s*\n\s*", "\n", text)
