"""Draws what `bitfold bench` wrote, for the README.

    python bench/plot.py bench/results/NAME.json docs/images/linear.svg

One panel for each shape and batch of the linear cases: speed over torch's F.linear, bitfold's formats and the peers.
There are two drawings, linear-light.svg and linear-dark.svg, for a <picture> that shows the one that fits the page.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours: of the page, text and lines, bars of bitfold and of peers, and torch's line."""

    page: str
    text: str
    faint: str
    bitfold: str
    peer: str
    torch: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#d1d9e0", bitfold="#0b7285", peer="#adb5bd", torch="#c92a2a"),
    "dark": Theme("#0d1117", "#e6edf3", "#3d444d", bitfold="#3bc9db", peer="#6c757d", torch="#ff8787"),
}
WIDTH, ROW, PANEL_HEAD = 10.5, 0.19, 0.6  # inches


def panels(report: dict[str, Any], dtype: str) -> dict[tuple[int, int, int], dict[str, dict[str, Any]]]:
    """(n, k, m) -> name -> row, of bitfold and the peers."""
    found: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["op"] == "linear" and row["dtype"] == dtype and row["kind"] in ("bitfold", "peer"):
            found.setdefault((row["n"], row["k"], row["m"]), {})[row["name"]] = row
    return found


def draw(report: dict[str, Any], dtype: str, theme: Theme) -> Figure:
    """A grid of bar charts: a row of panels for each shape, a column for each batch, the same names in all."""
    cases = panels(report, dtype)
    if not cases:
        raise SystemExit(f"no linear cases with {dtype} activations in the report")
    shapes = sorted({key[:2] for key in cases})
    batches = sorted({key[2] for key in cases})
    names = list(dict.fromkeys(name for rows in cases.values() for name in rows))[::-1]
    figure, axes = plt.subplots(
        len(shapes),
        len(batches),
        figsize=(WIDTH, len(shapes) * (len(names) * ROW + PANEL_HEAD) + 0.4),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for i, (n, k) in enumerate(shapes):
        for j, m in enumerate(batches):
            panel(axes[i][j], names, cases.get((n, k, m), {}), theme)
            axes[i][j].set_title(f"{n} x {k}, m = {m}", color=theme.text, fontsize=8, loc="left")
    cpu, threads = report["machine"]["cpu"], report["settings"]["threads"]
    figure.suptitle(
        f"x @ W^T with {dtype} activations: speed over torch's {dtype} F.linear (line: 1). "
        f"{cpu}, {report['machine']['isa']}, {threads} thread{'s' if threads > 1 else ''}",
        color=theme.text,
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure


def panel(axis: Axes, names: list[str], rows: dict[str, dict[str, Any]], theme: Theme) -> None:
    """Horizontal bars with their numbers; thin lines are the quartiles of the contestant's time."""
    top = 1.0
    for place, name in enumerate(names):
        if name not in rows:
            continue
        row = rows[name]
        speed, ms = row["over_torch"], row["ms"]
        low, high = (speed * ms["median"] / ms[quartile] for quartile in ("q3", "q1"))
        axis.barh(place, speed, color=theme.bitfold if row["kind"] == "bitfold" else theme.peer, height=0.7)
        axis.plot([low, high], [place, place], color=theme.text, linewidth=0.8, alpha=0.7)
        axis.annotate(
            f"{speed:.2f}",
            (max(speed, high), place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=theme.text,
        )
        top = max(top, high)
    axis.axvline(1, color=theme.torch, linewidth=1)
    axis.set_xlim(0, 1.25 * top)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(colors=theme.text, labelsize=7, length=0)
    axis.set_facecolor("none")
    for side, spine in axis.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(theme.faint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="JSON of bitfold bench")
    parser.add_argument(
        "image", type=Path, help="NAME.svg: NAME-light.svg and NAME-dark.svg are written; or .png"
    )
    parser.add_argument("--dtype", default="bf16", help="of the activations")
    args = parser.parse_args()
    report = json.loads(args.report.read_text(encoding="utf-8"))
    for name, theme in THEMES.items():
        figure = draw(report, args.dtype, theme)
        path = args.image.with_stem(f"{args.image.stem}-{name}")
        # An SVG has the page behind it; its salt and its missing date make the same file of the same report.
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            if path.suffix == ".svg":
                figure.savefig(path, transparent=True, metadata={"Date": None})
            else:
                figure.savefig(path, dpi=110, facecolor=theme.page)


if __name__ == "__main__":
    main()
