"""How the weights of a matrix lie on the grid of their format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.formats import parse
from bitfold.grids import code_entropy, grid, positions
from bitfold.qtensor import QTensor

BINS = 128


@dataclass(frozen=True)
class Histogram:
    """The weights of one matrix in units of the grid: each over the scale of its own group (and shifted by
    its zero point), so that one picture holds all groups.

    edges: of the bins; counts: weights in them, None where the base model wasn't given; grid: the values
    that the format has; used: how many of its codes occur; codes: how many there are; entropy: of the codes,
    in bits of `bits`.
    """

    name: str
    format: str
    edges: tuple[float, ...]
    counts: tuple[int, ...] | None
    grid: tuple[float, ...]
    used: int
    codes: int
    bits: int
    entropy: float


def histogram(name: str, qtensor: QTensor, weight: Tensor | None) -> Histogram | None:
    """None where there is no grid to draw: fp16 and bf16, and GGUF's blocks."""
    format = parse(qtensor.format)
    values = grid(format)
    if values is None:
        return None
    used, entropy = code_entropy(qtensor)
    low, high = float(values[0]), float(values[-1])
    counts = None
    if weight is not None:
        where = positions(weight, qtensor).flatten()
        low, high = min(low, float(where.min())), max(high, float(where.max()))
        bins = ((where - low) * (BINS / (high - low))).to(torch.int64).clamp_(0, BINS - 1)
        counts = tuple(torch.bincount(bins, minlength=BINS).tolist())
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    return Histogram(
        name=name,
        format=format.canonical,
        edges=tuple(edges.tolist()),
        counts=counts,
        grid=tuple(values.tolist()),
        used=used,
        codes=1 << format.bits,
        bits=format.bits,
        entropy=entropy,
    )
