"""GPTQ (Frantar et al. 2022): rounds the columns of a matrix one by one, each after the columns that are still free
have been moved to make up for the errors so far.

What is made small is the error of the layer's output over the inputs that its Hessian H = sum of x xᵀ has seen:
tr(E H Eᵀ), E = W - Q. With U upper and Uᵀ U = H + damping that is the squared norm of E Uᵀ, and its component c

    (E Uᵀ)_c = U_cc e_c + s_c,    s_c = sum over j > c of U_cj e_j

is touched by the columns from c on alone. So the columns are rounded from the last to the first: when the turn comes to
column c, s_c is known, and the weight is rounded where the component would be nought, at w_c + s_c / U_cc. These are
the paper's steps, which it writes with a factor of the inverse of H; the factor of H itself needs no inverse, and half
the work. The columns that matter most lie last.

Both the factor and the loop over columns are native on the CPU (csrc/cpu/gptq.cpp): torch's own give other bits with
another number of threads, which one rounded weight turns into other weights. On a GPU the loop is native too
(csrc/cuda/gptq.cu), and the factor torch's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.formats import Format
from bitfold.qtensor import QTensor, encode
from bitfold.quantizers import grid as grids
from bitfold.quantizers.grid import Grid

_ops = torch.ops.bitfold

ORDERS = ("static", "none", "groups")
# Damping is raised tenfold from at least LEAST_RAISED while the Cholesky factorisation fails, and not beyond MOST.
LEAST_RAISED, MOST = 1e-4, 1.0
_MEASURED = 1024  # rows whose error is measured at a time: what it takes of memory


@dataclass(frozen=True)
class GptqOptions:
    """damping: what is added to the Hessian's diagonal, in units of its mean over the columns that have inputs; order:

    - "static": columns in the order of falling diagonal, groups and their scales as plain rounding has them;
    - "none": left to right, the scale of each group found when its turn comes, from the weights as they are then
      (nested scales and blocks: as with "static");
    - "groups": in the order of falling diagonal with groups along it (`Solved.g_idx`), their scales as in "none";

    search: the scale of a group is the one that suits all its weights best, each counting as much as an error of its
    column costs that later columns can't make up for; without it, the one that reaches the largest weight (GGUF's
    blocks: always what their encoders search for).
    measure: whether `Solved` says errors, for which the loop over columns runs twice more.
    """

    damping: float = 0.01
    order: str = "static"
    search: bool = True
    measure: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping is {self.damping}; it must be finite and at least 0")
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
    [k, k], symmetric, the sum of x xᵀ over the inputs x times any positive factor. Both on the CPU, or, for formats
    with planes, on one GPU, where the result is too.

    A column whose inputs are all 0 costs nothing however it is rounded: it has no say in the scale of its group, unless
    all columns of the group are like it, and is rounded to the nearest level.

    Raises ValueError for a format without a grid (grid.py), a shape or dtype that doesn't fit, a NaN or infinity, a
    negative diagonal, GGUF's blocks on a GPU, and what `bitfold.encode` says of scales.
    """
    parsed = grids.reach(format)
    _check(weight, hessian, parsed, options)
    wide = weight.detach().to(torch.float32).contiguous()
    diagonal = hessian.diagonal().to(torch.float64)
    live = diagonal > 0
    unit = float(diagonal.sum() / live.sum().clamp(min=1))  # the mean over live columns
    plain = encode(wide, parsed.canonical)
    order = _order(diagonal, options.order)
    factor, damping, note = _factor(hessian, order, unit, options.damping)
    if factor is None:
        error = _direct_error(wide, plain, hessian) if options.measure else math.nan
        return Solved(plain, error, error, damping, "rtn", note)
    del hessian  # as large as its factor: gone from here on, unless the caller keeps it
    quiet = _without(wide, live, parsed)
    g_idx = _g_idx(parsed, order) if options.order == "groups" else None
    if options.order != "static" and _moves(parsed):
        qtensor, loss = _moving(wide, quiet, order, factor, parsed, g_idx, options.search)
    else:
        if parsed.grid == "block":
            grid = grids.fit(quiet, parsed.canonical, importance=(diagonal / unit).to(torch.float32))
        else:
            importance = _importance(factor)[order.argsort()]
            known = plain if quiet is wide else None
            grid = grids.fit(quiet, parsed.canonical, options.search, importance, known)
        codes, _, losses = _columns(wide, order, factor, 0, grid, grid.groups(order))
        qtensor, loss = grid.assemble(codes), float(losses.sum())
    if not options.measure:
        return Solved(qtensor, math.nan, math.nan, damping, "gptq", note, g_idx)
    whole = _energy(wide, order, factor, damping)
    decoded = qtensor.decode() if g_idx is None else qtensor.decode()[:, g_idx.argsort(stable=True).argsort()]
    error = _ratio(loss - damping * _square(decoded.sub_(wide)), whole)
    del decoded
    rounding_error = _ratio(_energy(plain.decode().sub_(wide), order, factor, damping), whole)
    return Solved(qtensor, error, rounding_error, damping, "gptq", note, g_idx)


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
    if format.grid == "block" and weight.is_cuda:
        raise ValueError(
            f"weight is on {weight.device}; for {format.canonical} it must be on the CPU: a GPU takes no blocks apart"
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
    if options.order == "groups" and format.group > 0 and not _moves(format):
        raise ValueError(
            f"order is 'groups'; for {format.canonical} it must be 'static' or 'none': its scales depend on each other"
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


def _g_idx(format: Format, order: Tensor) -> Tensor | None:
    """The group of every column where groups lie along the order: int32 [k]. None for a single group."""
    k = len(order)
    if format.group <= 0 or k <= format.group:
        return None
    g_idx = torch.empty(k, dtype=torch.int32, device=order.device)
    g_idx[order] = (torch.arange(k - 1, -1, -1, device=order.device) // format.group).to(torch.int32)
    return g_idx


def _factor(hessian: Tensor, order: Tensor, unit: float, damping: float) -> tuple[Tensor | None, float, str]:
    """The factor of the damped Hessian over its unit, float32; the damping that it took, and a note."""
    if unit == 0:
        return None, damping, "rounded plainly: the Hessian is 0"
    tried = damping
    while True:
        factor, info = (_torch_factor if hessian.is_cuda else _ops.gptq_factor)(hessian, order, unit, tried)
        if int(info) == 0:
            raised = f"damping raised from {damping:g} to {tried:g}: the Hessian has no Cholesky factor below"
            return factor, tried, raised if tried > damping else ""
        if tried >= MOST:
            return (
                None,
                tried,
                f"rounded plainly: the Hessian has no Cholesky factor, damped by up to {tried:g}",
            )
        tried = min(max(10 * tried, LEAST_RAISED), MOST)


def _torch_factor(hessian: Tensor, order: Tensor, unit: float, damping: float) -> tuple[Tensor, Tensor]:
    """`gptq_factor` by torch, for a GPU: damped in the Hessian's dtype, factored in float32."""
    damped = hessian[order[:, None], order].div_(unit)
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped.to(torch.float32), upper=True)
    return factor.contiguous(), info


# ---- rounding ----


def _moves(format: Format) -> bool:
    """Whether scales of groups can be found one by one."""
    return format.group > 0 and format.scale != "nested" and format.grid != "block"


def _importance(factor: Tensor) -> Tensor:
    """What the square of an error costs in each column, in their order, that no column after it makes up for: U_cc²."""
    return factor.diagonal().square()


def _columns(
    weight: Tensor,
    order: Tensor,
    factor: Tensor,
    begin: int,
    grid: Grid,
    group: Tensor,
    behind: Tensor | None = None,
) -> list[Tensor]:
    """Places, errors and losses of columns from `begin` on (csrc/torch/gptq.hpp)."""
    return _ops.gptq_columns(
        weight, order, factor, begin, grid.step, grid.offset, group, grid.table, grid.low, grid.high, behind
    )


def _moving(
    weight: Tensor,
    quiet: Tensor,
    order: Tensor,
    factor: Tensor,
    format: Format,
    g_idx: Tensor | None,
    search: bool,
) -> tuple[QTensor, float]:
    """The quantized matrix where each group gets its scale when its turn comes, and the squared norm of E Uᵀ.

    The scale is that of the weights as they are then: those that are best for the columns still free, if all of them
    were real numbers.
    """
    n, k = weight.shape
    group = order // format.group if g_idx is None else g_idx[order]
    # Where each column is stored.
    place = order if g_idx is None else g_idx.argsort(stable=True).argsort()[order]
    places = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    errors = torch.empty(k, n, device=weight.device)
    one = torch.ones(1, n, device=weight.device)
    parts: list[Grid] = []
    loss = 0.0
    first = k
    while first > 0:
        end, first = first, first - int((group[:first] == group[first - 1]).sum())
        columns, behind = order[first:end], errors[end:]
        inside = torch.arange(end - first, device=weight.device)
        zero = torch.zeros_like(inside)
        free = quiet[:, columns].contiguous()
        _, shifts, _ = _ops.gptq_columns(
            free, inside, factor, first, one, one, zero, None, 0, 0, behind, round=False
        )
        importance = _importance(factor)[first:end].contiguous()
        part = grids.fit(free - shifts.t(), format.canonical, search, importance)
        parts.append(part)
        codes, errors[first:end], losses = _columns(
            weight[:, columns].contiguous(), inside, factor, first, part, zero, behind
        )
        places[:, place[first:end]] = codes
        loss += float(losses.sum())
    return grids.join(parts, k).assemble(places), loss


# ---- errors ----


def _square(matrix: Tensor) -> float:
    return math.fsum(float(rows.square().sum(dtype=torch.float64)) for rows in matrix.split(_MEASURED))


def _energy(matrix: Tensor, order: Tensor, factor: Tensor, damping: float) -> float:
    """tr(M H Mᵀ) of the undamped H over its unit: the loss of M where every weight becomes 0."""
    group = torch.zeros_like(order)
    total = 0.0
    for rows in matrix.split(_MEASURED):
        nought = torch.zeros(1, len(rows), device=matrix.device)
        _, _, losses = _ops.gptq_columns(rows, order, factor, 0, nought, nought, group, None, 0, 0)
        total += float(losses.sum())
    return max(0.0, total - damping * _square(matrix))


def _ratio(part: float, whole: float) -> float:
    return max(0.0, part) / whole if whole > 0 else 0.0


def _direct_error(weight: Tensor, qtensor: QTensor, hessian: Tensor) -> float:
    """The error of plain rounding from the Hessian itself, where there is no factor."""
    wide = hessian.to(torch.float64)

    def energy(matrix: Tensor) -> float:
        return float(((matrix.to(torch.float64) @ wide) * matrix).sum())

    return _ratio(energy(weight - qtensor.decode()), energy(weight))
