"""AWQ (Lin et al. 2023): columns that meet large inputs are scaled up before they are rounded, and groups are clipped.

Rounding W diag(s) and dividing by s again leaves a smaller error in the columns with a large s, and hardly a larger one
in the others, as long as few columns set the scale of their group. So s = m^alpha with m the mean absolute input of
each column, and alpha the best of a grid (equation 5 of the paper); then each group's range is cut to the best of a few
shares of it. The best is what changes the layer's output least, over all inputs x that the Gram matrix G, the sum of
x x^T, has seen:

    sum over x of |E x|^2 = tr(E G E^T),    E = what rounding changes

So no token is looked at again: for a group of g columns, G's own g x g block is enough, and for all columns a product
with G. That product is most of the work. But rounding errors of different columns have little to do with each other:
what two inputs have in common matters only where it is much, and that is a part of G of low rank, G = L L^T + a rest of
which the diagonal is enough. All points of the grid are ranked by |E L|^2 + sum over j of rest_jj |E_j|^2, and only the
best few are compared by the whole product.

Everything is done for a few rows at a time, on whatever threads `map` has: pieces don't depend on each other, so the
result is the same for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitfold.formats import Format, ceil_div, parse
from bitfold.qtensor import QTensor, encode

LEAST = 1e-3  # inputs are taken to be at least so large, relative to their mean over the columns
SHRINK = tuple(1 - i / 20 for i in range(11))  # shares of a group's range that are tried
_RANK = 64  # of what inputs have in common
_PIECE = 1 << 19  # weights that one thread works on at a time
_PANEL = 512  # columns of G that are multiplied at a time

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""As Python's `map`: how pieces of work are done, each on one thread, results in order."""


@dataclass(frozen=True)
class AwqOptions:
    """grid: points of alpha, 0, 1 / grid, ... below 1; finalists: how many of them are compared by the product with G;
    clip: whether groups are clipped; then: "round", or "gptq": columns are scaled, and GPTQ rounds them (unclipped).
    """

    grid: int = 20
    finalists: int = 2
    clip: bool = True
    then: str = "round"

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid is {self.grid}; it must be at least 1")
        if self.finalists < 1:
            raise ValueError(f"finalists is {self.finalists}; it must be at least 1")
        if self.then not in ("round", "gptq"):
            raise ValueError(f"then is {self.then!r}; it must be 'round' or 'gptq'")


@dataclass(frozen=True, eq=False)
class Scaled:
    """scales: float64 [channels], for the columns; inputs are divided by them. alpha: the exponent; energy,
    rounding_errors, errors: for each weight tr(W G W^T), and tr(E G E^T) with plain rounding and with the scales.
    """

    scales: Tensor
    alpha: float
    energy: tuple[float, ...]
    rounding_errors: tuple[float, ...]
    errors: tuple[float, ...]


def candidates(magnitudes: Tensor, grid: int) -> Tensor:
    """The scales of every point of the grid, of geometric mean 1: mean absolute inputs [c] -> float64 [grid, c]."""
    m = magnitudes.to(torch.float64)
    if not (m.isfinite() & (m >= 0)).all():
        raise ValueError("magnitudes has a negative or not finite entry; it must hold mean absolute inputs")
    mean = m.mean()
    if mean == 0:
        return torch.ones(grid, len(m), dtype=torch.float64, device=m.device)
    logs = m.clamp(min=LEAST * mean).log()
    alphas = torch.arange(grid, dtype=torch.float64, device=m.device) / grid
    return (alphas[:, None] * (logs - logs.mean())).exp()


@dataclass(frozen=True, eq=False)
class Shared:
    """Matrices that have their inputs in common. weights: [n, k] each; formats: theirs; gram: [k, k], the sum of x x^T
    over all inputs."""

    weights: Sequence[Tensor]
    formats: Sequence[str]
    gram: Tensor


def search_scales(
    weights: Sequence[Tensor],
    formats: Sequence[str],
    gram: Tensor,
    magnitudes: Tensor,
    options: AwqOptions = AwqOptions(),
    *,
    spread: Tensor | None = None,
    map: Map = map,
) -> Scaled:
    """The scales of the channels that matrices with one input have in common.

    weights, formats, gram: as in `Shared`; magnitudes: the mean absolute input of each channel [c]; spread: int64 [k],
    the channel of each column (None: its own).

    Raises ValueError for shapes that don't fit, and what `encode` raises.
    """
    shared = [Shared(weights, formats, gram)]
    return search_common_scales(lambda: shared, magnitudes, options, spread=spread, map=map)


@torch.no_grad()
def search_common_scales(
    inputs: Callable[[], Iterable[Shared]],
    magnitudes: Tensor,
    options: AwqOptions = AwqOptions(),
    *,
    spread: Tensor | None = None,
    map: Map = map,
) -> Scaled:
    """The scales of channels that several inputs have in common, of which each token is in some (experts that one norm
    feeds): those with the smallest sum of the changes of all outputs. Lists of the result are in the order of inputs.

    inputs: called twice, so that one Gram matrix at a time need be there; the rest as in `search_scales`.
    """
    points = candidates(magnitudes, options.grid)
    columns = points if spread is None else points[:, spread]
    ranks = []
    for shared in inputs():
        _check(shared.weights, shared.formats, shared.gram)
        if columns.shape[1] != shared.gram.shape[0]:
            raise ValueError(
                f"magnitudes are of {columns.shape[1]} columns; they must be of the {shared.gram.shape[0]} that gram "
                "has"
            )
        (parts,) = map(sketch, [shared.gram])
        ranks += [
            _ranks(w, f, parts, columns, map) for w, f in zip(shared.weights, shared.formats, strict=True)
        ]
    order = _total(ranks).argsort(stable=True)[: options.finalists].tolist()
    trial = sorted({0, *order})
    errors, energy = [], []
    for shared in inputs():
        gram = shared.gram.to(torch.float32)
        for weight, format in zip(shared.weights, shared.formats, strict=True):
            errors.append(_errors(weight, format, gram, columns[trial], map))
            energy.append(float(_energy(weight, gram, map)))
    exact = torch.stack(errors)  # [weights, trials]
    best = min(range(len(trial)), key=lambda i: (float(exact[:, i].sum()), i))
    return Scaled(
        points[trial[best]],
        trial[best] / options.grid,
        tuple(energy),
        tuple(exact[:, 0].tolist()),
        tuple(exact[:, best].tolist()),
    )


def _check(weights: Sequence[Tensor], formats: Sequence[str], gram: Tensor) -> None:
    if not weights or len(weights) != len(formats):
        raise ValueError(
            f"there are {len(weights)} weights and {len(formats)} formats; "
            "there must be at least one, and as many of both"
        )
    k = gram.shape[0]
    if gram.shape != (k, k):
        raise ValueError(f"gram has shape {list(gram.shape)}; it must be square")
    for weight, format in zip(weights, formats, strict=True):
        parse(format).check_columns(k)
        if weight.dim() != 2 or weight.shape[1] != k:
            raise ValueError(
                f"a weight has shape {list(weight.shape)}; it must be [n, {k}] as gram is {k}x{k}"
            )
        if not weight.isfinite().all():
            row, column = (~weight.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"weight[{row}, {column}] is {weight[row, column].item()}; it must be finite")


def _pieces(weight: Tensor, format: Format) -> Iterator[Tensor]:
    """Runs of rows that are rounded by themselves as within the matrix."""
    n, k = weight.shape
    whole = format.group == 0 or format.scale == "nested"  # scales of the matrix depend on all of its rows
    together = format.group_rows
    yield from weight.split(max(together, n if whole else _PIECE // k // together * together))


def _rounding(scaled: Tensor, format: Format) -> Tensor | None:
    """What rounding changes: [r, k] in float32; None where the groups' scales are out of the range of their dtype."""
    try:
        return encode(scaled, format.canonical).decode().sub_(scaled)
    except ValueError:  # all else that `encode` refuses has been looked at before (`_check`)
        return None


@dataclass(frozen=True, eq=False)
class _Sketch:
    """G as L L^T + diag(rest): float32 [k, rank] and [k]."""

    common: Tensor
    rest: Tensor

    def over(self, s: Tensor) -> _Sketch:
        """Of inputs that are divided by s."""
        return _Sketch(self.common / s[:, None], self.rest / s.square())


def sketch(gram: Tensor) -> _Sketch:
    """The largest part of G of rank _RANK, nearly (Halko et al. 2011, algorithms 4.4 and 5.3, from a fixed seed)."""
    k = len(gram)
    g = gram.to(torch.float32)
    start = torch.randn(k, min(_RANK, k), generator=torch.Generator().manual_seed(0)).to(g.device)
    basis = torch.linalg.qr(g @ torch.linalg.qr(g @ start).Q).Q
    values, vectors = torch.linalg.eigh((basis.T @ (g @ basis)).to(torch.float64))
    common = basis @ (vectors * values.clamp(min=0).sqrt()).to(torch.float32)
    return _Sketch(common, (g.diagonal() - common.square().sum(1)).clamp(min=0))


def _ranks(weight: Tensor, format: str, parts: _Sketch, columns: Tensor, map: Map) -> Tensor:
    """About tr(E G E^T) for each row of `columns`, scales [points, k]: float64 [points]."""
    parsed, factors = parse(format), columns.to(torch.float32)
    sketches = [parts.over(s) for s in factors]
    lost = torch.tensor(math.inf, dtype=torch.float64, device=weight.device)

    def piece(rows: Tensor) -> Tensor:
        rows = rows.to(torch.float32)
        errors = []
        for s, parts in zip(factors, sketches, strict=True):
            e = _rounding(rows * s, parsed)
            if e is None:
                errors.append(lost)
                continue
            common = (e @ parts.common).square_().sum(dtype=torch.float64)
            errors.append(common + (e.square_() @ parts.rest).sum(dtype=torch.float64))
        return torch.stack(errors)

    return _total(map(piece, _pieces(weight, parsed)))


def _errors(weight: Tensor, format: str, gram: Tensor, columns: Tensor, map: Map) -> Tensor:
    """tr(E G E^T) for each row of `columns`, scales [points, k]: float64 [points]."""
    parsed, factors = parse(format), columns.to(torch.float32)
    lost = torch.tensor(math.inf, dtype=torch.float64, device=weight.device)

    def piece(rows: Tensor) -> Tensor:
        rows = rows.to(torch.float32)
        changes = [_rounding(rows * s, parsed) for s in factors]
        return torch.stack(
            [lost if e is None else quadratic(e.div_(s), gram) for e, s in zip(changes, factors, strict=True)]
        )

    return _total(map(piece, _pieces(weight, parsed)))


def _energy(weight: Tensor, gram: Tensor, map: Map) -> Tensor:
    pieces = weight.split(max(1, _PIECE // weight.shape[1]))
    return _total(map(lambda rows: quadratic(rows.to(torch.float32), gram), pieces))


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def quadratic(e: Tensor, gram: Tensor) -> Tensor:
    """The sum over rows of e G e^T, from one triangle of G, by half of the products: float64."""
    sums = []
    for start in range(0, e.shape[1], _PANEL):
        stop = min(start + _PANEL, e.shape[1])
        panel = e[:, start:stop]
        product = e[:, :start] @ gram[:start, start:stop]
        product.mul_(2).addmm_(panel, gram[start:stop, start:stop])
        sums.append(product.mul_(panel).sum(1).sum(dtype=torch.float64))
    return torch.stack(sums).sum()


@torch.no_grad()
def output_error(
    weight: Tensor, qtensor: QTensor, gram: Tensor, *, columns: Tensor | None = None, map: Map = map
) -> float:
    """tr(E G E^T) of any quantized matrix; columns: as in `search_clip`."""
    factors = None if columns is None else columns.to(torch.float32)

    def piece(rows: tuple[Tensor, Tensor]) -> Tensor:
        e = rows[1].sub_(rows[0].to(torch.float32))
        return quadratic(e if factors is None else e.div_(factors), gram)

    size = max(1, _PIECE // weight.shape[1])
    pieces = zip(weight.split(size), qtensor.decode().split(size), strict=True)
    return float(_total(map(piece, pieces)))


# ---- clipping ----


def can_clip(format: str) -> bool:
    """Whether the range of each group is set by its own largest weights, which alone make clipping a choice."""
    parsed = parse(format)
    return (
        parsed.grid in ("integer", "codebook", "minifloat")
        and (parsed.group != 0 and parsed.group_rows == 1)
        and parsed.scale != "nested"
    )


@torch.no_grad()
def search_clip(
    weight: Tensor, format: str, gram: Tensor, *, columns: Tensor | None = None, map: Map = map
) -> Tensor:
    """For every group the share of its range, of SHRINK, that changes its part of the output least.

    weight: [n, k]; gram: [k, k], the sum of x x^T; columns: [k], what the weight's columns have been multiplied by
    since gram was summed. Returns float32 [n, groups]: 1 where clipping doesn't help.

    Raises ValueError for a format whose groups don't set their own ranges (`can_clip`), and shapes that don't fit.
    """
    _check([weight], [format], gram)
    if not can_clip(format):
        raise ValueError(f"format is {format!r}; it must have ranges that each group's largest weights set")
    parsed = parse(format)
    blocks = _diagonal_blocks(gram, columns, parsed)

    def piece(rows: Tensor) -> Tensor:
        rows = rows.to(torch.float32)
        low, high = _ranges(rows, parsed)
        best, share = torch.full_like(low, math.inf), torch.ones_like(low)
        for shrink in SHRINK:
            clipped = _clamp(rows, low * shrink, high * shrink, parsed)
            e = _rounding(clipped, parsed)
            if e is None:
                continue
            error = _group_errors(e.add_(clipped).sub_(rows), blocks)
            better = error < best
            best, share = torch.where(better, error, best), torch.where(better, shrink, share)
        return share

    return torch.cat(list(map(piece, weight.split(max(1, _PIECE // weight.shape[1])))))


def quantize(weight: Tensor, format: str, shrink: Tensor | None = None) -> QTensor:
    """Rounds a matrix, its groups clipped to `shrink` [n, groups] of their ranges; raises what `encode` raises."""
    parsed = parse(format)
    if shrink is None:
        return encode(weight, parsed.canonical)
    rows = weight.detach().to(torch.float32)
    low, high = _ranges(rows, parsed)
    return encode(_clamp(rows, low * shrink, high * shrink, parsed), parsed.canonical)


def _width(format: Format, k: int) -> int:
    """Columns of a group."""
    return format.group if format.group > 0 else k


def _grouped(rows: Tensor, format: Format) -> Tensor:
    """[r, k] -> [r, groups, columns of a group], the last group filled up with zeros."""
    width = _width(format, rows.shape[1])
    return pad(rows, (0, -rows.shape[1] % width)).unflatten(1, (-1, width))


def _ranges(rows: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Lowest and highest number that each group's scale reaches: [r, groups] each."""
    grouped = _grouped(rows, format)
    if format.asymmetric:
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    high = grouped.abs().amax(-1)
    return -high, high


def _clamp(rows: Tensor, low: Tensor, high: Tensor, format: Format) -> Tensor:
    grouped = _grouped(rows, format)
    return grouped.clamp(low[..., None], high[..., None]).flatten(1)[:, : rows.shape[1]].contiguous()


def _diagonal_blocks(gram: Tensor, columns: Tensor | None, format: Format) -> Tensor:
    """G's blocks on the diagonal, of the inputs of the columns as they are now: float32 [groups, width, width]."""
    k = len(gram)
    width = _width(format, k)
    blocks = gram.new_zeros(ceil_div(k, width), width, width, dtype=torch.float32)
    for group, start in enumerate(range(0, k, width)):
        stop = min(start + width, k)
        block = gram[start:stop, start:stop].to(torch.float64)
        if columns is not None:
            block = block / columns[start:stop, None] / columns[start:stop]
        blocks[group, : stop - start, : stop - start] = block
    return blocks


def _group_errors(e: Tensor, blocks: Tensor) -> Tensor:
    """e G e^T of each group by itself: [r, k] -> [r, groups]."""
    groups, width, _ = blocks.shape
    parts = pad(e, (0, groups * width - e.shape[1])).unflatten(1, (groups, width)).transpose(0, 1)
    return torch.einsum("grj,grj->rg", torch.bmm(parts, blocks), parts)
