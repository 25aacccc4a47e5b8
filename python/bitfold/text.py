"""Numbers and names as people read them: what the command line and the pages share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitfold.evaluate import Estimate


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def size(count: float) -> str:
    """Bytes in decimal units: "3.42 MB"."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.3g} {units[0]}"


def estimate(value: Estimate, digits: int = 4) -> str:
    """A number with its standard error, "3.142 ± 0.002"."""
    if value.error is None:
        return f"{value.value:.{digits}g}"
    places = max(0, 1 - math.floor(math.log10(value.error))) if value.error > 0 else digits
    return f"{value.value:.{places}f} ± {value.error:.{places}f}"


def joined(names: Sequence[str]) -> str:
    """Modules of one parent as one name: "layers.0.self_attn.{q,k,v}_proj"."""
    short = [name.removeprefix("model.") for name in names]
    if len(short) == 1:
        return short[0]
    start = next(i for i in range(len(short[0])) if len({name[: i + 1] for name in short}) > 1)
    stop = next(i for i in range(1, len(short[0])) if len({name[-i:] for name in short}) > 1) - 1
    middles = ",".join(name[start : len(name) - stop] for name in short)
    return f"{short[0][:start]}{{{middles}}}{short[0][len(short[0]) - stop :] if stop else ''}"
