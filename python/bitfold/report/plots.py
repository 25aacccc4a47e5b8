"""The plots of a report, each a function from numbers to a matplotlib figure.

A figure is drawn for a width and with the colours of a palette, so that the page can have it wide and narrow, in
colours that follow its theme, and a file in plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from bitfold.report.histogram import Histogram
from bitfold.report.measure import ModuleError, Tried
from bitfold.report.sizes import ClassSize, place
from bitfold.sensitivity.result import Sensitivity
from bitfold.text import natural

NATS = 1e3  # KL is shown in thousandths of a nat
EXACT = (
    1e-9  # nats: what is nearer to the base differs in the rounding of activations at most (1e-12 in float32)
)
ROW = 0.22  # inches of a row of text


@dataclass(frozen=True)
class Palette:
    """Colours by role, as matplotlib takes them."""

    paper: str
    ink: str
    muted: str
    rule: str
    accent: str
    second: str


def axes_of(width: float, height: float, palette: Palette, columns: int = 1, rows: int = 1) -> list[Axes]:
    """Bare axes of a new figure, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in axes:
        ax.patch.set_visible(False)
        ax.tick_params(which="both", colors=palette.muted, labelcolor=palette.ink, length=3, width=0.8)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(palette.rule)
        for label in (ax.xaxis.label, ax.yaxis.label):
            label.set_color(palette.ink)
    return axes


def figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def bytes_by_class(classes: Sequence[ClassSize], width: float, palette: Palette) -> Figure:
    """Bars of the bytes of each class: codes, then what belongs to them; a mark where the base was."""
    classes = [one for one in classes if one.nbytes > 0.001 * max(c.nbytes for c in classes)]
    (ax,) = axes_of(width, 0.9 + 0.3 * len(classes), palette)
    rows = range(len(classes))
    codes = [one.codes / 1e6 for one in classes]
    others = [one.others / 1e6 for one in classes]
    ax.barh(rows, codes, 0.55, color=palette.accent, label="codes and kept values")
    ax.barh(rows, others, 0.55, left=codes, color=palette.second, label="scales, zero points")
    before = [
        (row, one.source_bytes / 1e6) for row, one in zip(rows, classes, strict=True) if one.source_bytes
    ]
    if before:
        where, marks = zip(*before, strict=True)
        ax.plot(
            marks, where, "|", color=palette.ink, markersize=11, markeredgewidth=2, label="in the base model"
        )
    ax.set_yticks(rows, [one.name for one in classes])
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel("size (MB)")
    figure_of(ax).legend(
        loc="outside upper left", ncols=3 if width > 5 else 1, frameon=False, labelcolor=palette.ink
    )
    return figure_of(ax)


def error_map(
    modules: Sequence[ModuleError],
    value: Callable[[ModuleError], float | None],
    unit: str,
    width: float,
    palette: Palette,
) -> Figure:
    """A cell for each weight, layers across and roles down; the deeper its colour, the larger its value."""
    cells = {place(m.name): v for m in modules if (v := value(m)) is not None}
    layers = sorted({layer for layer, _ in cells}, key=natural)
    roles = list(dict.fromkeys(role for _, role in cells))
    (ax,) = axes_of(width, 1.0 + ROW * 1.25 * len(roles), palette)
    top = max(cells.values(), default=0.0) or 1.0
    for (layer, role), number in cells.items():
        x, y = layers.index(layer), roles.index(role)
        strength = 0.03 + 0.47 * max(0.0, number) / top  # faint enough for the number on it
        ax.barh(y, 0.96, 0.92, left=x - 0.48, color=palette.accent, alpha=strength, linewidth=0)
        if (width - 1.5) / len(layers) > 0.36:
            text = "< 10⁻⁶" if 0 < number < 1e-6 else f"{number:#.3g}".rstrip(".")
            ax.text(x, y, text, ha="center", va="center", color=palette.ink, fontsize=8)
    step = max(1, round(len(layers) * 0.22 / max(0.3, width - 1.5)))
    ax.set_xticks(range(0, len(layers), step), [layer or "none" for layer in layers[::step]])
    ax.set_yticks(range(len(roles)), roles)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_ylim(len(roles) - 0.5, -0.5)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(unit, loc="left", color=palette.ink)
    ax.set_xlabel("layer")
    return figure_of(ax)


def sensitivity_map(found: Sensitivity, names: Sequence[str], width: float, palette: Palette) -> Figure:
    """A cell for each weight of `names` and each candidate, the smallest left; colours on a log scale."""
    candidates = found.candidates
    cells = {
        (name, candidate): NATS * found.kl(entry).value
        for name in names
        for candidate in candidates
        if (entry := found.find(name, candidate)) is not None
    }
    (ax,) = axes_of(width, 1.3 + ROW * len(names), palette)
    logs = {key: math.log10(max(value, 1e-6)) for key, value in cells.items()}
    low, high = min(logs.values(), default=0.0), max(logs.values(), default=1.0)
    room = (width - 2.2) / max(1, len(candidates))
    for (name, candidate), value in cells.items():
        x, y = candidates.index(candidate), names.index(name)
        strength = 0.03 + 0.47 * (logs[name, candidate] - low) / max(high - low, 1e-9)
        ax.barh(y, 0.96, 0.92, left=x - 0.48, color=palette.accent, alpha=strength, linewidth=0)
        if room > 0.36:
            text = f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"
            ax.text(x, y, text, ha="center", va="center", color=palette.ink, fontsize=min(8.0, 16 * room))
    ax.set_xticks(range(len(candidates)), candidates, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), [name.removeprefix("model.") for name in names])
    ax.set_xlim(-0.5, len(candidates) - 0.5)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title("KL alone (10⁻³ nats per token)", loc="left", color=palette.ink)
    return figure_of(ax)


def weights_on_grid(histograms: Sequence[Histogram], width: float, palette: Palette) -> Figure:
    """One panel a matrix: its weights as an area, and a line at every value that its format has."""
    drawn = [h for h in histograms if h.counts is not None]
    columns = 2 if width > 5 else 1
    rows = -(-len(drawn) // columns)
    axes = axes_of(width, 1.75 * rows, palette, columns, rows)
    for ax, h in zip(axes, drawn, strict=False):
        assert h.counts is not None
        total = max(1, sum(h.counts))
        shares = [100 * count / total for count in h.counts]
        dense = len(h.grid) > 64
        top = max(shares) * 1.08
        ax.vlines(
            h.grid,
            0,
            0.12 * top if dense else top,
            color=palette.second,
            linewidth=0.35 if dense else 0.8,
            zorder=3,
        )
        ax.stairs(shares, h.edges, fill=True, color=palette.accent, alpha=0.45, linewidth=0)
        ax.stairs(shares, h.edges, color=palette.accent, linewidth=0.9, baseline=None)
        ax.set_title(
            f"{h.name.removeprefix('model.')}: {h.format}", fontsize=8.5, loc="left", color=palette.ink
        )
        ax.set_ylim(0, top)
        pad = 0.02 * (h.edges[-1] - h.edges[0])
        ax.set_xlim(h.edges[0] - pad, h.edges[-1] + pad)
        ax.yaxis.set_major_locator(MaxNLocator(3))
    for i, ax in enumerate(axes):
        if i >= len(drawn):
            ax.set_visible(False)
            continue
        if i % columns == 0:
            ax.set_ylabel("% of weights")
        if i >= len(drawn) - columns:
            ax.set_xlabel("weight / scale (grid units)")
    return figure_of(axes[0])


def size_against_kl(tried: Sequence[Tried], width: float, palette: Palette) -> Figure:
    """A point a recipe, KL on a log scale with two standard errors; filled where nothing is both smaller and
    nearer. Recipes that are `EXACT` are left to the table: they would make the log scale all empty.
    """
    drawn = [one for one in tried if one.comparison.mean_kl.value > EXACT]
    (ax,) = axes_of(width, 3.6 if width > 5 else 4.2, palette)
    for one in drawn:
        kl = one.comparison.mean_kl
        error = min(2 * (kl.error or 0.0), 0.95 * kl.value)
        x, y = one.nbytes / 1e6, kl.value * NATS
        best = is_best(one, tried)
        ax.errorbar(x, y, error * NATS, color=palette.muted, linewidth=1, capsize=2)
        ax.plot(
            x,
            y,
            "o",
            markersize=7,
            markeredgewidth=1.4,
            markeredgecolor=palette.accent,
            markerfacecolor=palette.accent if best else palette.paper,
            zorder=3,
        )
    ax.set_yscale("log")
    ax.margins(x=0.12, y=0.12)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y", color=palette.rule, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlabel("size of the model (MB)")
    ax.set_ylabel("mean KL (10⁻³ nats per token)")
    _place_labels(
        ax, [(one.name, one.nbytes / 1e6, one.comparison.mean_kl.value * NATS) for one in drawn], palette
    )
    return figure_of(ax)


def is_best(one: Tried, tried: Sequence[Tried]) -> bool:
    """Whether no other recipe is both at most as large and nearer to the base (or as near and smaller)."""
    size, kl = one.nbytes, one.comparison.mean_kl.value
    return not any(
        (t.nbytes <= size and t.comparison.mean_kl.value < kl)
        or (t.nbytes < size and t.comparison.mean_kl.value <= kl)
        for t in tried
    )


# Where a name may stand by its point: offset in points, alignment across and up. The last are led to by a line.
_PLACES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (8, 8, "left", "bottom"),
    (-8, 8, "right", "bottom"),
    (8, -8, "left", "top"),
    (-8, -8, "right", "top"),
    (22, 12, "left", "bottom"),
    (-22, 12, "right", "bottom"),
    (22, -12, "left", "top"),
    (-22, -12, "right", "top"),
    (30, 26, "left", "bottom"),
    (-30, 26, "right", "bottom"),
    (30, -26, "left", "top"),
    (-30, -26, "right", "top"),
    (26, 44, "left", "bottom"),
    (26, -44, "left", "top"),
)


def _place_labels(ax: Axes, points: Sequence[tuple[str, float, float]], palette: Palette) -> None:
    """Names beside points, each where it covers no point and no name before it, if there is such a place."""
    figure = figure_of(ax)
    figure.draw_without_rendering()
    radius = 6.0  # pixels around a point
    taken = []
    for _, x, y in points:
        px, py = ax.transData.transform((x, y))
        taken.append((px - radius, py - radius, px + radius, py + radius))
    frame = ax.get_window_extent()

    def cost(label: Annotation) -> float:
        box = label.get_window_extent()
        covered = sum(
            max(0.0, min(box.x1, b[2]) - max(box.x0, b[0])) * max(0.0, min(box.y1, b[3]) - max(box.y0, b[1]))
            for b in taken
        )
        outside = max(0.0, frame.x0 - box.x0) + max(0.0, box.x1 - frame.x1)
        return covered + 50 * (outside + max(0.0, frame.y0 - box.y0) + max(0.0, box.y1 - frame.y1))

    for name, x, y in points:
        best: Annotation | None = None
        best_cost = 0.0
        for dx, dy, horizontal, vertical in _PLACES:
            far = abs(dx) > 20
            label = ax.annotate(
                name,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=8.5,
                color=palette.ink,
                arrowprops={"arrowstyle": "-", "color": palette.muted, "linewidth": 0.7} if far else None,
            )
            now = cost(label)
            if best is None or now < best_cost - 1e-6:
                if best is not None:
                    best.remove()
                best, best_cost = label, now
            else:
                label.remove()
            if best_cost == 0:
                break
        assert best is not None
        box = best.get_window_extent()
        taken.append((box.x0, box.y0, box.x1, box.y1))
