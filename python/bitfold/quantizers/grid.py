"""The values that a weight can take once its scales are fixed, for whatever rounds weights one by one.

For every format that is reached here a weight of group g and row r is

    value = step[g, r] * level + offset[g, r]

where the levels are whole numbers from `low` to `high` (integers: code - 2^(b-1), or the code with an offset of -zero *
step; most of GGUF's blocks, a group being what has a scale of its own) or a small sorted table (nf4, fp4, iq4_nl,
iq4_xs, mxfp4). Rounding knows a format through this alone.

Scales are transposed, [groups, rows]: the rows of a weight are independent of each other, and lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitfold import grids
from bitfold.formats import Format, parse
from bitfold.qtensor import QTensor, encode, pack

_ops = torch.ops.bitfold

# Of the range of a group, what the search for the best scale tries as the range of its scale.
SHRINK = tuple(1.0 - i / 32 for i in range(23))


@dataclass(frozen=True, eq=False)
class Grid:
    """A matrix' scales and levels.

    n, k: of the weight; width: columns of a group, 0 for all; step, offset: float32 [groups, n]; low, high: the whole
    numbers that are levels, or the first and last place in `table`, float32, ascending; codes: uint8, the stored code
    of each level, from the lowest up; logical: the planes beside the codes as `bitfold.pack` takes them, or the blocks
    that hold the scales.
    """

    format: Format
    n: int
    k: int
    width: int
    step: Tensor
    offset: Tensor
    low: int
    high: int
    table: Tensor | None
    codes: Tensor
    logical: dict[str, Tensor]

    def groups(self, columns: Tensor) -> Tensor:
        """The group of each of `columns` (int64): int64."""
        return columns // self.width if self.width > 0 else torch.zeros_like(columns)

    def round(self, targets: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest levels to columns of numbers: targets float32 [c, n], group int64 [c] -> places, uint8 [c, n],
        counted from the lowest level, and their values, float32 [c, n].

        Whole numbers are ties to even; between two entries of a table the middle takes the lower.
        """
        step, offset = self.step[group], self.offset[group]
        quotient = torch.where(step == 0, 0.0, (targets - offset) / step)
        if self.table is None:
            level = quotient.round().clamp(self.low, self.high)
            place = level - self.low
        else:
            place = torch.bucketize(quotient, (self.table[1:] + self.table[:-1]) * 0.5)
            level = self.table[place]
        return place.to(torch.uint8), level * step + offset

    def assemble(self, places: Tensor) -> QTensor:
        """The quantized matrix of uint8 [n, k] places."""
        in_order = torch.equal(self.codes, torch.arange(len(self.codes)).to(self.codes))
        codes = places if in_order else self.codes[places.to(torch.int64)]
        if self.format.grid == "block":
            blocks = _ops.put_block_codes(self.logical["blocks"], codes, self.format.canonical)
            return QTensor(self.format.canonical, (self.n, self.k), {"blocks": blocks})
        planes: dict[str, Any] = dict(self.logical)
        return pack(codes, format=self.format.canonical, **planes)


def reach(format: str) -> Format:
    """The format, parsed; ValueError where it has no grid of few levels."""
    parsed = parse(format)
    if parsed.grid not in ("integer", "codebook", "block"):
        raise ValueError(
            f"format is {parsed.canonical!r}; it must be of integers (int8, int4, int3, int2), a codebook (nf4, fp4) "
            "or one of GGUF's blocks"
        )
    return parsed


def fit(
    weight: Tensor,
    format: str,
    search: bool = False,
    importance: Tensor | None = None,
    plain: QTensor | None = None,
) -> Grid:
    """The grid of a float32 [n, k] weight whose groups have the scales of plain rounding (`bitfold.encode`).

    search: the range of each group is one of SHRINK times its own, that with the smallest sum of importance * |error|³
    of the group (docs/gptq.md); "-dq" nests the scales that were found. The encoders of blocks search by themselves,
    whatever is asked for. importance: float32 [k], what a column counts where scales are searched for. plain: the
    weight, encoded, where that has been done. Raises what `encode` raises.
    """
    parsed = reach(format)
    if parsed.grid == "block":
        return of(encode(weight, parsed.canonical, importance=importance))
    if search and parsed.scale == "nested" and weight.numel():
        # Its scales are the largest weights of groups: those of a matrix that is cut to the ranges found.
        flat = _search(weight, of(encode(weight, parsed.canonical.replace("-dq", "-sfp32"))), importance)
        most = flat.step.t().repeat_interleave(parsed.group, 1)[:, : flat.k]
        return of(encode(weight.clamp(-most, most), parsed.canonical))
    grid = of(encode(weight, parsed.canonical) if plain is None else plain)
    return _search(weight, grid, importance) if search and weight.numel() else grid


def of(qtensor: QTensor) -> Grid:
    """The grid of a matrix that was quantized: its scales."""
    parsed = reach(qtensor.format)
    n, k = qtensor.shape
    if parsed.grid == "block":
        return _of_blocks(parsed, n, k, qtensor.planes["blocks"])
    logical = qtensor.unpack()._asdict()
    planes = {law.name: logical[law.name] for law in parsed.planes[1:]}
    table, codes = _levels(parsed, qtensor.device)
    middle = 0 if parsed.asymmetric or table is not None else 1 << parsed.bits - 1
    step = _steps(parsed, qtensor, planes).expand(-1, n).contiguous()
    offset = _offset(step, planes)
    width = max(parsed.group, 0)
    return Grid(parsed, n, k, width, step, offset, -middle, len(codes) - 1 - middle, table, codes, planes)


def _of_blocks(format: Format, n: int, k: int, blocks: Tensor) -> Grid:
    step, offset, levels, codes = _ops.block_grid(blocks, format.canonical, n, k)
    whole = torch.equal(levels, levels[0] + torch.arange(len(levels)))
    low = int(levels[0]) if whole else 0
    table = None if whole else levels
    width = k // max(1, len(step))
    high = low + len(levels) - 1
    return Grid(format, n, k, width, step, offset, low, high, table, codes, {"blocks": blocks})


def join(parts: Sequence[Grid], k: int) -> Grid:
    """Grids of matrices of one group each as that of the matrix that has them side by side, k columns together."""
    return replace(
        parts[0],
        k=k,
        step=torch.cat([part.step for part in parts]),
        offset=torch.cat([part.offset for part in parts]),
        logical={name: torch.cat([part.logical[name] for part in parts], 1) for name in parts[0].logical},
    )


def _levels(format: Format, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """The table of a codebook and the code of each entry; equal values (fp4's zeros) are one, with the lower code."""
    if format.grid == "integer":
        return None, torch.arange(1 << format.bits, dtype=torch.uint8, device=device)
    values = grids.code_values(format)
    assert values is not None
    ordered, codes = values.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new].to(device), codes[new].to(torch.uint8).to(device)


def _steps(format: Format, qtensor: QTensor, logical: dict[str, Tensor]) -> Tensor:
    """The scale of every group, float32 [groups, n or 1]."""
    if format.scale == "nested":
        return grids.scales(qtensor)[:, :: format.group].t()
    return logical["scales"].t().to(torch.float32)


def _offset(step: Tensor, logical: dict[str, Tensor]) -> Tensor:
    zeros = logical.get("zeros")
    return torch.zeros_like(step) if zeros is None else -step * zeros.t().to(torch.float32)


def _search(weight: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    """The same grid with each scale times the factor of SHRINK that costs least."""
    scales, zeros = grid.logical["scales"], grid.logical.get("zeros")
    if zeros is not None:
        zeros = zeros.t().to(torch.float32).expand(-1, grid.n).contiguous()

    def found(factors: Sequence[float]) -> list[Tensor]:
        """Steps and costs, [groups, n], of the best of `factors`."""
        tried = torch.tensor(factors, dtype=torch.float32, device=weight.device)
        levels = (grid.table, grid.low, grid.high)
        start, width = grid.step, grid.width or grid.k
        return _ops.search_steps(weight, width, start, tried, scales.dtype, zeros, importance, *levels)

    if scales.shape[0] == grid.n:
        step, _ = found(SHRINK)
    else:  # one scale for all rows, and the cost that of all of them
        step, _ = min(
            (found([factor]) for factor in SHRINK), key=lambda of_all: math.fsum(of_all[1].flatten().tolist())
        )
    stored = step.t()[: scales.shape[0]].to(scales.dtype).contiguous()
    return replace(
        grid, step=step, offset=_offset(step, grid.logical), logical=grid.logical | {"scales": stored}
    )
