"""Whether codes, zero points and scales belong together, and which other way to read them would make them so.

Two things hold in any matrix whose groups were scaled by what is in them. The mean of a group's codes follows
its zero point: where weights reach further down than up, both are large. And codes are spread less where the
step is wide for the weights, so that along a row, whose weights are about alike, log s and the log of the
codes' standard deviation are correlated negatively. Outputs in another order (AWQ's nibbles) or zero points off
in a few groups (borrows that ran from one number of a word into the next) break one of them, and the right
reading restores it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitfold.check.sample import Numbers

_LEAST = 64  # groups
_WHOLE = -0.3  # a correlation of log s with the log of the codes' spread, of parts that fit
_PART = 0.6  # of it that an order may have where another is right: some outputs of eight are in their places in both
_CERTAIN = 6.0  # standard errors between two correlations, with half the groups counted: neighbours are alike
_SCATTER = 0.5  # by how much the right order makes the variance of mean code - zero point smaller, at least
_NEIGHBOURS = 16  # zero points into which a borrow may have run
_ALIKE = 8  # others that are read as one number, to tell the mean of such groups


def group_means(numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the codes of each whole group: float64 [n, G]."""
    n, whole = len(numbers.codes), numbers.codes.shape[1] // numbers.group
    parts = numbers.codes[:, : whole * numbers.group].reshape(n, whole, numbers.group).split(64)
    means = [part.to(torch.float32).mean(-1) for part in parts]
    spreads = [part.to(torch.float32).std(-1, unbiased=False) for part in parts]
    return torch.cat(means).to(torch.float64), torch.cat(spreads).to(torch.float64)


@dataclass(frozen=True)
class Together:
    """correlation: of log s with the log of the codes' spread, along rows; scatter: variance of mean code -
    zero point; groups: how many were looked at.
    """

    correlation: float
    scatter: float
    groups: int


def together(
    numbers: Numbers, means: Tensor, spreads: Tensor, codes: Sequence[int] | None, zeros: Sequence[int] | None
) -> Together:
    """How well the parts fit if output 8c + i has the codes that are read at 8c + codes[i], and likewise its
    zeros.
    """
    scales = numbers.scales[:, : means.shape[1]].to(torch.float64)
    z = numbers.zeros[:, : means.shape[1]].to(torch.float64)
    if codes is not None:
        means, spreads = _eights(means, codes), _eights(spreads, codes)
    if zeros is not None:
        z = _eights(z, zeros)
    used = (scales > 0) & scales.isfinite() & (spreads > 0)
    count = int(used.sum())
    x = torch.where(used, scales.where(used, torch.ones(())).log(), torch.nan)
    y = torch.where(used, spreads.where(used, torch.ones(())).log(), torch.nan)
    x, y = x - x.nanmean(1, keepdim=True), y - y.nanmean(1, keepdim=True)
    product, xx, yy = ((a * b).nansum() for a, b in ((x, y), (x, x), (y, y)))
    correlation = float(product / (xx * yy).sqrt()) if float(xx * yy) > 1e-12 * max(1, count) else math.nan
    d = (means - z)[used]
    return Together(correlation, float(d.var()) if count > 1 else math.nan, count)


def _eights(values: Tensor, order: Sequence[int]) -> Tensor:
    n = len(values) // 8 * 8
    return values[:n].reshape(-1, 8, values.shape[1])[:, list(order)].reshape(n, -1)


@dataclass(frozen=True)
class Order:
    """In which orders of outputs in eights codes and zero points fit; None for the one in which they were read.
    sure: whether it is known which of them lie in another order, and not only that they lie in different ones.
    """

    codes: Sequence[int] | None
    zeros: Sequence[int] | None
    sure: bool


def better_order(numbers: Numbers, orders: Sequence[Sequence[int]]) -> Order | None:
    """An order in which codes, zero points and scales fit together; None where nothing is wrong, or nothing
    certain.
    """
    if len(numbers.codes) % 8:
        return None
    means, spreads = group_means(numbers)
    now = together(numbers, means, spreads, None, None)
    if now.groups < _LEAST:
        return None
    codes, correlation = None, now.correlation
    found = [(together(numbers, means, spreads, order, None), order) for order in orders]
    best, order = min(found, key=lambda item: item[0].correlation)
    error = math.sqrt(2 / (now.groups / 2))
    apart = math.atanh(max(now.correlation, -0.999)) - math.atanh(max(best.correlation, -0.999))
    if best.correlation < _WHOLE and now.correlation > _PART * best.correlation and apart > _CERTAIN * error:
        codes, correlation = order, best.correlation
    zeros = None
    if len(numbers.zeros.unique()) > 1:
        here = together(numbers, means, spreads, codes, None)
        found = [(together(numbers, means, spreads, codes, order), order) for order in orders]
        best, order = min(found, key=lambda item: item[0].scatter)
        if best.scatter < _SCATTER * here.scatter:
            zeros = order
    return None if codes is None and zeros is None else Order(codes, zeros, correlation < _WHOLE)


@dataclass(frozen=True)
class Borrows:
    """Zero points that are read one larger than if each had been taken from its word by itself. share: how far the
    means of their groups' codes are from those of a zero point that is what was read (0) towards those of one that is
    smaller by one (1); error: of that; count: how many there are.
    """

    share: float
    error: float
    count: int


def borrows(numbers: Numbers, single: Tensor) -> Borrows:
    """single: int [n, G], the zero points if each is taken from its word by itself.

    Zero points that a borrow touched are compared with others that are read as the same number, and with others that
    are read as the next smaller one. Compared with all others they would differ in sound layers too: a 0 is never one
    of them, and its groups have another mean than the rest where weights don't lie round 0.
    """
    means, _ = group_means(numbers)
    z = numbers.zeros[:, : means.shape[1]].to(torch.int64)
    touched = z - single[:, : means.shape[1]] == 1
    count = int(touched.sum())
    values = int(z.max()) + 1
    others = z[~touched].bincount(minlength=values)
    known = others >= _ALIKE
    known[1:] = known[1:] & known[:-1]
    known[0] = False
    used = known[z]
    t = touched[used].to(torch.float64)
    if count < 2 or float(t.sum()) < 2:
        return Borrows(0.0, math.inf, count)
    of_others = torch.zeros(values, dtype=torch.float64).index_add(0, z[~touched], means[~touched])
    of_others = of_others / others.clamp(min=1)
    smaller = (of_others[1:] - of_others[:-1]).clamp(
        min=0
    )  # by how much the mean is for the next smaller zero point
    z = z[used]
    x, y = t * smaller[z - 1], -means[used]
    alike = z.bincount(minlength=values).clamp(min=1)[z]

    def within(value: Tensor) -> Tensor:
        """Less its mean over the zero points that are read as the same number."""
        return value - torch.zeros(values, dtype=value.dtype).index_add(0, z, value)[z] / alike

    x, y = within(x), within(y)
    weight = x.square().sum()
    if float(weight) < 1e-6:
        return Borrows(0.0, math.inf, count)
    share = (x * y).sum() / weight
    rest = (y - share * x).square() + 0.01
    return Borrows(float(share), float((x.square() * rest).sum().sqrt() / weight), count)


def by_themselves(found: Sequence[Borrows]) -> Borrows | None:
    """All modules' evidence together, where it says that zero points were packed each by itself; else None."""
    count = sum(part.count for part in found)
    known = [part for part in found if math.isfinite(part.error)]
    if not known or count < _NEIGHBOURS:
        return None
    total = sum(part.error**-2 for part in known)
    share = sum(part.share * part.error**-2 for part in known) / total
    error = total**-0.5
    return Borrows(share, error, count) if abs(share - 1) <= 0.4 and share - 5 * error > 0.5 else None


def reordered(numbers: Numbers, order: Order) -> Numbers:
    """The numbers in the orders that `better_order` found."""
    return replace(
        numbers,
        codes=numbers.codes if order.codes is None else _eights(numbers.codes, order.codes),
        zeros=numbers.zeros if order.zeros is None else _eights(numbers.zeros, order.zeros),
    )
