"""The plots of columns with outliers, and of what 8 bits lose to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bitfold.outliers.columns import Columns, Inputs
from bitfold.outliers.measure import Layer, Recurring
from bitfold.report.plots import ROW, Palette, axes_of, figure_of
from bitfold.text import joined

_SMALLEST = 1e-6  # of losses: what is below is drawn there


def outlier_columns(
    columns: Sequence[Columns], threshold: float, unit: str, width: float, palette: Palette
) -> Figure:
    """One row a matrix: from the median of its columns' largest magnitudes to the largest, and the threshold."""
    (ax,) = axes_of(width, 0.8 + ROW * len(columns), palette)
    for row, entry in enumerate(columns):
        ax.plot([entry.median, entry.peak], [row, row], color=palette.muted, linewidth=1)
        ax.plot(entry.median, row, "|", color=palette.ink, markersize=7, markeredgewidth=1.2)
        ax.plot(
            entry.peak,
            row,
            "o",
            markersize=4.5,
            markeredgecolor=palette.second if entry.outliers else palette.accent,
            color=palette.second if entry.outliers else palette.accent,
        )
    ax.axvline(threshold, color=palette.second, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.text(threshold, -0.7, f"{threshold:g}", color=palette.second, ha="center", va="bottom", fontsize=8)
    ax.set_yticks(range(len(columns)), [joined(entry.names) for entry in columns])
    ax.set_ylim(len(columns) - 0.4, -0.6)
    if columns and max(entry.peak for entry in columns) > 4 * threshold:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.set_xlabel(unit)
    return figure_of(ax)


def features(
    inputs: Sequence[Inputs], recurring: Sequence[Recurring], width: float, palette: Palette
) -> Figure:
    """Channels of the residual stream across, norms down; a dot where a channel has outliers, larger with more tokens.
    Channels that are outlier features by the paper's rule have their number."""
    (ax,) = axes_of(width, 1.1 + ROW * len(inputs), palette)
    named = [one.index for one in recurring if one.is_systematic]
    for channel in named:
        ax.axvline(channel, color=palette.rule, linewidth=0.8, zorder=0)
    for row, one in enumerate(inputs):
        for feature in one.outliers:
            ax.plot(
                feature.index,
                row,
                "o",
                markersize=2.5 + 4.5 * feature.token_share,
                color=palette.second if feature.index in named else palette.accent,
                markeredgewidth=0,
            )
    _number(named, inputs[0].columns, width, ax, palette)
    ax.set_yticks(range(len(inputs)), [joined(one.names) for one in inputs])
    ax.set_ylim(len(inputs) - 0.4, -0.6)
    ax.set_xlim(-0.02 * inputs[0].columns, 1.02 * inputs[0].columns)
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.set_xlabel("channel of the residual stream")
    return figure_of(ax)


def _number(channels: Sequence[int], columns: int, width: float, ax: Axes, palette: Palette) -> None:
    """Numbers above the rows; those too near to one another for numbers of their own share one place."""
    room = 0.36 * columns / max(1.0, width - 2.6)  # channels that a number takes
    places: list[list[int]] = []
    for channel in sorted(channels):
        if places and channel - places[-1][-1] < room * (1 + len(places[-1])) / 2:
            places[-1].append(channel)
        else:
            places.append([channel])
    for place in places:
        said = ", ".join(map(str, place)) if len(place) <= 3 else f"{place[0]} … {place[-1]}"
        ax.text(
            sum(place) / len(place), -0.7, said, color=palette.second, ha="center", va="bottom", fontsize=8
        )


def losses(layers: Sequence[Layer], ways: Sequence[str], width: float, palette: Palette) -> Figure:
    """A row for each layer, a mark for what its output loses in each way, on a log scale."""
    (ax,) = axes_of(width, 1.1 + ROW * len(layers), palette)
    looks: Mapping[str, tuple[str, str, str]] = {
        way: (marker, colour, fill)
        for way, (marker, colour, fill) in zip(
            ways,
            (
                ("o", palette.second, palette.second),
                ("D", palette.second, palette.paper),
                ("D", palette.accent, palette.paper),
                ("o", palette.accent, palette.accent),
            ),
            strict=True,
        )
    }
    for row, layer in enumerate(layers):
        values = [max(_SMALLEST, loss) for loss in layer.losses.values()]
        ax.plot([100 * min(values), 100 * max(values)], [row, row], color=palette.rule, linewidth=1, zorder=0)
    for way, (marker, colour, fill) in looks.items():
        values = [100 * max(_SMALLEST, layer.losses[way]) for layer in layers]
        ax.plot(
            values,
            range(len(layers)),
            marker,
            markersize=4.5,
            markeredgewidth=1.1,
            markeredgecolor=colour,
            markerfacecolor=fill,
            label=way,
        )
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(layers)), [layer.name.removeprefix("model.") for layer in layers])
    ax.set_ylim(len(layers) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.set_xlabel("relative error of the layer's output (%)")
    figure_of(ax).legend(
        loc="outside upper left", ncols=4 if width > 5 else 2, frameon=False, labelcolor=palette.ink
    )
    return figure_of(ax)
