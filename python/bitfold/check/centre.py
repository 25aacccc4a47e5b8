"""Where the weights of a matrix of integers have their zero: evidence that zero points are too small or too
large by one.

A weight is (code - z) * s. If all zero points that a reader takes from a file are wrong by h, every weight is
too large by h steps of its group: still a smooth heap of numbers, as the true weights are, only not round 0.
Nothing in the codes of one group tells (the range of a group reaches from the first level to the last wherever
its zero lies), and "the mean must be 0" is no proof: there are matrices whose mean is a step away from it. So
three things are looked at, in units of steps, with d the mean of code - z over a group:

- the mean of d over all groups: h if the zero points are wrong, 0 if they are right and the weights have their
  mean at 0;
- what d would be in a group without spread. In a matrix whose mean is not 0, d follows the steps: where
  outliers make them wide compared with the weights, d is small. An error of the zero points is h steps,
  whatever the steps are. So d is regressed on a v that such a mean would be proportional to, row by row (each
  row may have its own mean): d = intercept + slope(row) * v; twice, for two ideas of what the mean follows: v
  the mean absolute deviation of the group's codes (a mean proportional to the spread), and v = 1 / s (the same mean
  in all groups of a row). Where a row is one group, all rows are one regression, on the spread alone. Errors
  are those of a regression whose rows are independent and may differ in their noise;
- weights that were exactly 0, as those of dead columns, padding and empty groups: their codes all lie h beside
  z. Where a step is wide for the weights, codes of a column lie alike by chance too: then many other columns lie alike
  but for one or two codes, and dead ones have no such neighbours.

Sound weights whose mean is a step have a mean like wrong zero points', and only the intercept tells them apart. It
isn't 0 for them: d follows v to the first order only, and codes that end, zero points that are rounded, and steps that
are as wide as the weights' spread bend it. That is no noise: a model's layers have it alike, and no number of groups
makes it smaller. So an intercept is measured against what bends it, not only against its error.

`Centre` holds this for a matrix and `pooled` for several that are read alike; `Centre.judge` decides.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 0.2  # steps: how far from h the mean may be
HALF = 0.5  # steps: from here on a mean is nearer to h than to 0
BENT = 0.7  # steps: a smaller intercept may be bent; those of ten thousand sound matrices off 0 reached 0.51
CERTAIN = 4.0  # standard errors between the mean and 0, and between the mean and h / 2
CLEAR = 5.0  # standard errors between an intercept and 0
APART = 2.0  # and between it and h / 2
_LEAST_GROUPS = 64  # fewer are no evidence
_LEAST_ALONE = 128  # rows that are one group each
_LEAST_ROWS = 32  # of a column whose codes all lie at the same distance from their zero points
LEAST_TOGETHER = 4  # matrices that tell something, to be judged together
_LEAST_EXACT = 4  # such columns, or groups
_RARE = 1e-9  # the chance of so many where no weight was 0
_FOOT = 2  # codes elsewhere, of a column or group that is nearly such a one
_STANDS_OUT = 8  # times as many must there be of those that are such as of those that nearly are
SHIFTS = (-1, 1)


class Verdict(enum.Enum):
    FITS = "fits"  # the weights lie round 0
    OFF = "off"  # they lie round h, and that is no property of the weights
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Estimate:
    """A number of steps and its standard error (infinite where there is no evidence)."""

    value: float = 0.0
    error: float = math.inf


@dataclass(frozen=True)
class Centre:
    """groups: how many were looked at; mean: of d; by_spread, by_step: what d would be in a group without spread, in
    the two ways; exact: by h how many columns and groups have all of their codes at z + h; alone: the matrix is one
    whose rows are one group each. Then no two groups share a row's mean, and only several matrices tell.
    """

    groups: int
    mean: Estimate
    by_spread: Estimate
    by_step: Estimate
    exact: dict[int, int]
    alone: bool = False

    def judge(self, shift: int) -> Verdict:
        """Whether all zero points are too small by `shift` (so that code - z is too large by it)."""
        at, away = self.exact.get(shift, 0), self.exact.get(0, 0)
        if at >= _LEAST_EXACT and at > _STANDS_OUT * away:
            return Verdict.OFF
        if self.groups < _LEAST_GROUPS or not math.isfinite(self.mean.error):
            return Verdict.UNDECIDED
        mean, error = shift * self.mean.value, self.mean.error
        if mean < max(HALF, CERTAIN * error) or (away >= _LEAST_EXACT and away > _STANDS_OUT * at):
            return Verdict.FITS
        near = abs(mean - 1) <= NEAR and mean - CERTAIN * error > HALF
        clear = all(
            shift * found.value >= BENT
            and shift * found.value - APART * found.error > HALF
            and abs(shift * found.value - 1) <= HALF + 2 * found.error
            and shift * found.value > CLEAR * found.error
            for found in (self.by_spread, self.by_step)
        )
        return Verdict.OFF if near and clear and not self.alone else Verdict.UNDECIDED


def measure(codes: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Centre:
    """The evidence of a matrix.

    codes: uint8 [n, k], the columns of a group together; zeros: int [n, G]; scales: float [n, G]; group:
    columns of a group (k for one group a row). A last group that is shorter, and groups whose step is 0 or no
    number, are left out.
    """
    n, whole = len(codes), codes.shape[1] // group
    numbers = codes[:, : whole * group].reshape(n, whole, group)
    z = zeros[:, :whole].to(torch.float32)
    steps = scales[:, :whole].to(torch.float64)
    mean, spread = _moments(numbers)
    used = (steps > 0) & steps.isfinite() & (spread > 0)
    d = mean - z.to(torch.float64)
    exact = _exact(numbers, zeros[:, :whole])
    if whole == 1:
        _, even = _moments(numbers[..., ::2])
        _, odd = _moments(numbers[..., 1::2])
        by_spread = by_step = _intercept_of_halves(d[used], even[used], odd[used])
    else:
        by_spread = _intercept(d, spread, used)
        by_step = _intercept(d, 1 / steps.where(used, torch.ones(())), used)
    return Centre(int(used.sum()), _mean(d, used), by_spread, by_step, exact, alone=whole == 1)


def _moments(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean absolute deviation over the last axis: float64 [n, G]."""
    means, spreads = [], []
    for part in numbers.split(_AT_ONCE):
        wide = part.to(torch.float32)
        means.append(wide.mean(-1))
        spreads.append((wide - means[-1][..., None]).abs().mean(-1))
    return torch.cat(means).to(torch.float64), torch.cat(spreads).to(torch.float64)


def pooled(found: Iterable[Centre]) -> Centre:
    """The evidence of several matrices together, with the errors that their scatter tells; of the mean each matrix
    alike.
    """
    parts = list(found)
    exact: dict[int, int] = {}
    for part in parts:
        for h, count in part.exact.items():
            exact[h] = exact.get(h, 0) + count
    means = torch.tensor([part.mean.value for part in parts if math.isfinite(part.mean.error)])
    mean = Estimate()
    if len(means) >= 2:
        mean = Estimate(float(means.mean()), float(means.std() / math.sqrt(len(means))))
    elif len(parts) == 1:
        mean = parts[0].mean
    return Centre(
        sum(part.groups for part in parts),
        mean,
        _weighted([part.by_spread for part in parts]),
        _weighted([part.by_step for part in parts]),
        exact,
    )


_AT_ONCE = 64  # rows as floats
_FLOOR = 0.05  # steps: no single matrix counts as known better than this


def _weighted(estimates: list[Estimate]) -> Estimate:
    """The mean of what several matrices say: each by the inverse of its variance and of the variance between matrices
    (DerSimonian and Laird 1986), as layers differ by more than their errors. The error is the larger of what these tell
    and what the scatter tells.
    """
    known = [found for found in estimates if math.isfinite(found.error)]
    if len(known) < LEAST_TOGETHER:
        return Estimate()
    values = torch.tensor([found.value for found in known], dtype=torch.float64)
    inner = torch.tensor([found.error for found in known], dtype=torch.float64).square().clamp(min=1e-12)
    w = 1 / inner
    rest = float((w * (values - (w * values).sum() / w.sum()).square()).sum()) - (len(known) - 1)
    between = max(_FLOOR**2, rest / float(w.sum() - w.square().sum() / w.sum()))
    w = 1 / (inner + between)
    w = w / w.sum()
    value = float((w * values).sum())
    scatter = float((w * (values - value)).square().sum()) * len(known) / (len(known) - 1)
    return Estimate(value, math.sqrt(max(scatter, 1 / float((1 / (inner + between)).sum()))))


def _exact(numbers: Tensor, zeros: Tensor) -> dict[int, int]:
    """By h how many groups and columns have all of their codes at z + h, where that is no chance. numbers: uint8 [n, G,
    g]; zeros: int [n, G].
    """
    n, groups, size = numbers.shape
    z = zeros.to(torch.int16)[..., None]
    found = {}
    for h in (*SHIFTS, 0):
        columns = torch.zeros((groups, size), dtype=torch.int64)
        rows = []
        for row in range(0, n, _AT_ONCE):
            part = slice(row, row + _AT_ONCE)
            at = numbers[part] == z[part] + h
            columns += at.sum(0)
            rows.append(at.sum(-1))
        found[h] = _standing_out(torch.cat(rows), size)
        if n >= _LEAST_ROWS:
            found[h] += _standing_out(columns, n)
    return found


def _standing_out(hits: Tensor, size: int) -> int:
    """How many of the units (groups, or columns) with `size` codes each have all of them at one distance, if that is
    no chance: hits has each unit's number of codes at that distance. Chance is what the other units' share of such
    codes would make; as units differ, those that are such must also stand out from those that nearly are.
    """
    count = int((hits == size).sum())
    nearly = int(((hits < size) & (hits >= size - _FOOT)).sum())
    if count == 0 or count <= _STANDS_OUT * nearly:
        return 0
    others = hits[hits < size]
    share = float(others.sum()) / (others.numel() * size) if len(others) else 1.0
    if share == 0:
        return count
    chance = count * (math.log(hits.numel()) + size * math.log(share)) - math.lgamma(count + 1)
    return count if chance < math.log(_RARE) else 0


def _mean(d: Tensor, used: Tensor) -> Estimate:
    """The mean over groups, with the error that the scatter of rows tells."""
    counts = used.sum(1)
    total = int(counts.sum())
    if total == 0 or len(d) < 2:
        return Estimate()
    value = float(d[used].mean())
    rows = ((d - value) * used).sum(1)
    return Estimate(value, float(rows.square().sum().sqrt()) / total)


def _intercept(d: Tensor, v: Tensor, used: Tensor) -> Estimate:
    """a of d = a + slope(row) * v: the part of 1 that is orthogonal to v, within each row. All [n, G]."""
    v, one = v * used, used.to(torch.float64)
    square = v.square().sum(1, keepdim=True).clamp(min=1e-300)
    part = one - v * v.sum(1, keepdim=True) / square
    weight = float(part.square().sum())
    if weight < 1e-6 * max(1.0, float(one.sum())):
        return Estimate()
    value = float((part * d).sum()) / weight
    rest = (d - value) * one
    rest = rest - v * (rest * v).sum(1, keepdim=True) / square
    moments = (part * rest) if len(d) == 1 else (part * rest).sum(1)
    freedom = len(d) / (len(d) - 1) if len(d) > 1 else 1.0
    return Estimate(value, math.sqrt(float(moments.square().sum()) * freedom) / weight)


def _intercept_of_halves(d: Tensor, even: Tensor, odd: Tensor) -> Estimate:
    """a of d = a + slope * v over rows that are one group each, [n]: v is known from two halves of the columns, each
    with an error of its own. One stands for v and the other is its instrument, so that the errors, which would draw the
    slope to 0 and the intercept to the mean, drop out.
    """
    n = len(d)
    if n < _LEAST_ALONE:
        return Estimate()
    x = torch.stack([torch.ones_like(even), even], 1)
    w = torch.stack([torch.ones_like(odd), odd], 1)
    square = w.t() @ x / n
    if abs(float(torch.linalg.det(square))) < 1e-9 * float(square[1, 1]):
        return Estimate()
    inverse = torch.linalg.inv(square)
    solution = inverse @ (w.t() @ d / n)
    rest = d - x @ solution
    moments = w * rest[:, None]
    variance = inverse @ (moments.t() @ moments / n) @ inverse.t() / n
    return Estimate(float(solution[0]), math.sqrt(max(0.0, float(variance[0, 0]))))
