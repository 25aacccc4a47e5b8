"""GPTQ (Frantar et al. 2022): rounds the columns of a matrix one by one, each after the columns that are still free
have been moved to make up for the errors so far.

What is made small is the error of the layer's output over the inputs that its Hessian H = sum of x xᵀ has seen:
tr(E H Eᵀ), E = W - Q. With the Cholesky factor L Lᵀ = H + damping that is the squared norm of E L, and its component c

    (E L)_c = L_cc e_c + s_c,    s_c = sum over j > c of e_j L_jc

is touched by the columns from c on alone. So the columns are rounded from the last to the first: when the turn comes to
column c, s_c is known, and the weight is rounded where the component would be nought, at w_c + s_c / L_cc. These are
the paper's steps, which it writes with a factor of the inverse of H; the factor of H itself needs no inverse, and half
the work. The columns that matter most lie last.

s is worked out in blocks: what a block gets from the blocks behind it is one product of matrices, and what is left is a
triangle within the block. Everything is transposed, [columns, rows].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.formats import Format
from bitfold.qtensor import QTensor, encode
from bitfold.quantizers import grid as grids
from bitfold.quantizers.grid import Grid

ORDERS = ("static", "none", "groups")
# Damping is raised tenfold from at least LEAST_RAISED while the Cholesky factorisation fails, and not beyond MOST.
LEAST_RAISED, MOST = 1e-4, 1.0


@dataclass(frozen=True)
class GptqOptions:
    """damping: what is added to the Hessian's diagonal, in units of its mean over the columns that have inputs; block:
    columns that are rounded between products of matrices; order:

    - "static": columns in the order of falling diagonal, groups and their scales as plain rounding has them;
    - "none": left to right, the scale of each group found when its turn comes, from the weights as they are then;
    - "groups": in the order of falling diagonal with groups along it (`Solved.g_idx`), their scales as in "none";

    mse: scales are those with the smallest squared error of the group, not those that reach its largest weight.
    measure: whether `Solved` says errors, which costs up to twice the time of everything else.
    """

    damping: float = 0.01
    block: int = 128
    order: str = "static"
    mse: bool = False
    measure: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping is {self.damping}; it must be finite and at least 0")
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be at least 1")
        if self.order not in ORDERS:
            raise ValueError(f"order is {self.order!r}; it must be one of {', '.join(ORDERS)}")


@dataclass(frozen=True)
class Solved:
    """qtensor: the quantized matrix; with a g_idx its columns lie in the order of a stable argsort of it.

    error, rounding_error: tr(E H Eᵀ) / tr(W H Wᵀ) of the result and of plain rounding, H without damping (0 where W
    gives nothing, NaN where nothing was measured); damping: that was used; method: "gptq", or "rtn" where the Hessian
    has no Cholesky factor at any damping; note: one sentence on what was not as asked for, or ""; g_idx: int32 [k], the
    group of every column, for order="groups" with more than one group.
    """

    qtensor: QTensor
    error: float
    rounding_error: float
    damping: float
    method: str
    note: str
    g_idx: Tensor | None = None


def solve(weight: Tensor, hessian: Tensor, format: str, options: GptqOptions = GptqOptions()) -> Solved:
    """Quantizes `weight`, [n, k] of any float dtype, to `format` for inputs with this Hessian: float32 or float64
    [k, k], symmetric, the sum of x xᵀ over the inputs x times any positive factor.

    A column whose inputs are all 0 costs nothing however it is rounded: it has no say in the scale of its group, unless
    all columns of the group are like it, and is rounded to the nearest level.

    Raises ValueError for a format without a grid (grid.py), a shape or dtype that doesn't fit, a NaN or infinity, a
    negative diagonal, and what `bitfold.encode` says of scales.
    """
    parsed = grids.reach(format)
    _check(weight, hessian, parsed, options)
    wide = weight.detach().to(torch.float32)
    diagonal = hessian.diagonal().to(torch.float64)
    live = diagonal > 0
    unit = float(diagonal.sum() / live.sum().clamp(min=1))  # the mean over live columns
    plain = encode(wide, parsed.canonical)
    order = _order(diagonal, options.order)
    factor, damping, note = _factor(hessian, order, unit, options.damping)
    if factor is None:
        error = _direct_error(wide, plain, hessian) if options.measure else math.nan
        return Solved(plain, error, error, damping, "rtn", note)
    search = _without(wide, live, parsed)
    group, g_idx = _groups(parsed, order, options.order)
    # Column c of the work, and of the matrix as it is stored.
    place = order if g_idx is None else g_idx.argsort(stable=True).argsort()[order]
    columns = wide.t()[order]
    moving = options.order != "static" and parsed.group > 0 and parsed.scale != "nested"
    if moving:
        places, grid, loss = _moving(columns, search.t()[order], factor, parsed, group, options)
    else:
        source = search if g_idx is None else search[:, g_idx.argsort(stable=True)]
        as_plain = source is wide and not options.mse
        grid = grids.of(plain) if as_plain else grids.fit(source, parsed.canonical, options.mse)
        places, loss = _fixed(columns, factor, grid, group, options.block)
    stored = torch.empty_like(places)
    stored[place] = places
    solved = grid.assemble(stored)
    error = rounding_error = math.nan
    if options.measure:
        decoded = solved.decode().t()[place]
        whole = _energy(columns, factor, damping)
        error = _ratio(loss - damping * _square(columns - decoded), whole)
        rounding_error = _ratio(_energy(columns - plain.decode().t()[order], factor, damping), whole)
    return Solved(solved, error, rounding_error, damping, "gptq", note, g_idx)


# ---- what comes in ----


def _check(weight: Tensor, hessian: Tensor, format: Format, options: GptqOptions) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is a {weight.dtype} of shape {list(weight.shape)}; it must be a matrix of floats"
        )
    k = weight.shape[1]
    if hessian.shape != (k, k) or hessian.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"hessian is a {hessian.dtype} of shape {list(hessian.shape)}; it must be float32 or float64 [{k}, {k}]"
        )
    if hessian.device != weight.device:
        raise ValueError(f"hessian is on {hessian.device}; it must be on {weight.device} as the weight is")
    if not hessian.sum().isfinite():  # a sum may be infinite where no summand is
        odd = (~hessian.isfinite()).nonzero()
        if len(odd):
            i, j = odd[0].tolist()
            raise ValueError(f"hessian[{i}, {j}] is {float(hessian[i, j])}; it must be finite")
    negative = (hessian.diagonal() < 0).nonzero()
    if len(negative):
        i = int(negative[0])
        raise ValueError(f"hessian[{i}, {i}] is {float(hessian[i, i]):.3g}; a diagonal must be at least 0")
    if options.order == "groups" and format.scale == "nested":
        raise ValueError(
            f"order is 'groups'; for {format.canonical} it must be 'static' or 'none': nested scales have no g_idx"
        )


def _without(weight: Tensor, live: Tensor, format: Format) -> Tensor:
    """The weight whose groups get the scales: 0 in columns without inputs, unless the whole group has none."""
    if bool(live.all()):
        return weight
    k = weight.shape[1]
    group = torch.arange(k, device=weight.device) // (format.group if format.group > 0 else max(k, 1))
    counts = torch.zeros(k, dtype=torch.int64, device=weight.device).index_add_(
        0, group, live.to(torch.int64)
    )
    return torch.where(live | (counts[group] == 0), weight, 0.0)


def _order(diagonal: Tensor, order: str) -> Tensor:
    """The columns, that to be rounded first last: int64 [k]."""
    k = len(diagonal)
    if order == "none":
        return torch.arange(k - 1, -1, -1, device=diagonal.device)
    return diagonal.argsort(descending=True, stable=True).flip(0)


def _groups(format: Format, order: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """The group of each column in `order`, and g_idx where groups don't lie as the format has them."""
    k = len(order)
    if format.group <= 0:
        return torch.zeros_like(order), None
    if kind != "groups" or k <= format.group:
        return order // format.group, None
    group = torch.arange(k - 1, -1, -1, device=order.device) // format.group
    g_idx = torch.empty(k, dtype=torch.int32, device=order.device)
    g_idx[order] = group.to(torch.int32)
    return group, g_idx


def _factor(hessian: Tensor, order: Tensor, unit: float, damping: float) -> tuple[Tensor | None, float, str]:
    """The lower factor of the damped Hessian over its unit, in float32; the damping that it took, and a note."""
    if unit == 0:
        return None, damping, "rounded plainly: the Hessian is 0"
    scaled = (hessian[order][:, order] / unit).to(torch.float32)
    tried = damping
    while True:
        damped = scaled.clone()
        damped.diagonal().add_(tried)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(factor.diagonal().isfinite().all()):
            raised = f"damping raised from {damping:g} to {tried:g}: the Hessian has no Cholesky factor below"
            return factor, tried, raised if tried > damping else ""
        if tried >= MOST:
            return (
                None,
                tried,
                f"rounded plainly: the Hessian has no Cholesky factor, damped by up to {tried:g}",
            )
        tried = min(max(10 * tried, LEAST_RAISED), MOST)


# ---- rounding ----


def _blocks(k: int, block: int) -> Iterator[tuple[int, int]]:
    """Blocks of columns from the last to the first, (begin, end)."""
    for end in range(k, 0, -block):
        yield max(0, end - block), end


def _fixed(columns: Tensor, factor: Tensor, grid: Grid, group: Tensor, block: int) -> tuple[Tensor, float]:
    """Places on a grid that is known beforehand, uint8 [k, n], and the squared norm of E L."""
    k, n = columns.shape
    places = torch.empty(k, n, dtype=torch.uint8, device=columns.device)
    errors = torch.empty_like(columns)
    loss = 0.0
    for begin, end in _blocks(k, block):
        span = slice(begin, end)
        sums = factor[end:, span].t() @ errors[end:]
        places[span], errors[span], lost = _round_columns(
            columns[span], sums, factor[span, span], grid, group[span]
        )
        loss += lost
    return places, loss


def _moving(
    columns: Tensor, search: Tensor, factor: Tensor, format: Format, group: Tensor, options: GptqOptions
) -> tuple[Tensor, Grid, float]:
    """The same where each group gets its scale when its turn comes: from the weights that are best for the columns
    still free, all of them real numbers."""
    k, n = columns.shape
    places = torch.empty(k, n, dtype=torch.uint8, device=columns.device)
    errors = torch.empty_like(columns)
    parts: list[Grid] = []
    loss = 0.0
    first = k
    while first > 0:
        end, first = first, first - int((group[:first] == group[first - 1]).sum())
        inside = torch.empty(end - first, n, device=columns.device)
        sums = factor[end:, first:end].t() @ errors[end:]
        triangle = factor[first:end, first:end]
        moved = search[first:end] + torch.linalg.solve_triangular(triangle.t(), sums, upper=True)
        part = grids.fit(moved.t(), format.canonical, options.mse)
        parts.append(part)
        for begin, stop in _blocks(end - first, options.block):
            span, whole = slice(begin, stop), slice(first + begin, first + stop)
            near = sums[span] + triangle[stop:, span].t() @ inside[stop:]
            zero = torch.zeros(stop - begin, dtype=torch.int64, device=columns.device)
            places[whole], inside[span], lost = _round_columns(
                columns[whole], near, triangle[span, span], part, zero
            )
            loss += lost
        errors[first:end] = inside
    return places, grids.join(parts, k), loss


def _round_columns(
    columns: Tensor, sums: Tensor, triangle: Tensor, grid: Grid, group: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Rounds the columns of a block from the last to the first: columns, sums [c, n], triangle [c, c] -> places, errors
    [c, n], and the squared norm of the block's components of E L."""
    places = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    errors = torch.empty_like(columns)
    sums = sums.clone()
    loss = torch.zeros(columns.shape[1], device=columns.device)
    for c in range(len(columns) - 1, -1, -1):
        diagonal = triangle[c, c]
        place, value = grid.round((columns[c] + sums[c] / diagonal)[None], group[c : c + 1])
        places[c], errors[c] = place[0], columns[c] - value[0]
        loss += (sums[c] + diagonal * errors[c]).square()
        sums[:c] += triangle[c, :c, None] * errors[c]
    return places, errors, float(loss.to(torch.float64).sum())


# ---- errors ----


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum(1, dtype=torch.float64).sum())


def _energy(columns: Tensor, factor: Tensor, damping: float, block: int = 512) -> float:
    """tr(M H Mᵀ) of the undamped H over its unit, Mᵀ = columns [k, n]."""
    total = sum(
        _square(factor[begin:, begin:end].t() @ columns[begin:])
        for begin, end in _blocks(len(columns), block)
    )
    return max(0.0, total - damping * _square(columns))


def _ratio(part: float, whole: float) -> float:
    return max(0.0, part) / whole if whole > 0 else 0.0


def _direct_error(weight: Tensor, qtensor: QTensor, hessian: Tensor) -> float:
    """The same from the Hessian itself, where there is no factor."""
    wide = hessian.to(torch.float64)

    def energy(matrix: Tensor) -> float:
        return float(((matrix.to(torch.float64) @ wide) * matrix).sum())

    return _ratio(energy(weight - qtensor.decode()), energy(weight))
