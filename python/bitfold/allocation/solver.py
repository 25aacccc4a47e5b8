"""The assignment with the smallest sum of costs whose bytes fit: a knapsack with one choice for each item, solved
exactly by HiGHS (`scipy.optimize.milp`, the extra `allocate`).

Bytes are whole numbers and stay so: what the solver, which computes in floats, holds for an answer is counted again,
and an answer over the budget would be forbidden and solved for anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitfold.versions import MissingExtraError

_GAP = 1e6  # the largest cost, as the solver sees it: its absolute gap is 1e-6


@dataclass(frozen=True)
class Option:
    """One way for an item: what it takes, and what it costs."""

    nbytes: int
    cost: float


def solve(items: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...]:
    """The number of the option that each item gets: the sum of costs is the smallest of all choices whose bytes are
    at most `budget`.

    Raises ValueError where no choice fits, an item has no option or a cost is not finite; MissingExtraError where scipy
    is not installed.
    """
    _check(items, budget)
    optimize = require_scipy()
    kept = [_undominated(options) for options in items]
    least = [min(options[i].nbytes for i in numbers) for options, numbers in zip(items, kept, strict=True)]
    room = budget - sum(least)
    # What is above the least of each item, in the largest unit that all of them are whole in: small numbers.
    extra = [[items[j][i].nbytes - least[j] for i in numbers] for j, numbers in enumerate(kept)]
    unit = math.gcd(*(size for sizes in extra for size in sizes)) or 1
    sizes = np.array([size // unit for sizes in extra for size in sizes], dtype=np.float64)
    costs = np.array([items[j][i].cost for j, numbers in enumerate(kept) for i in numbers])
    owners = np.concatenate([np.full(len(numbers), j) for j, numbers in enumerate(kept)])
    lowest = np.array([costs[owners == j].min() for j in range(len(items))])
    above = costs - lowest[owners]
    scale = _GAP / above.max() if above.max() > 0 else 1.0
    limit = room // unit
    while True:
        chosen = _milp(optimize, above * scale, sizes, owners, limit)
        if int(sizes[chosen].sum()) <= room // unit:
            break
        limit -= 1  # a rounding error of the solver's let it through
    return tuple(kept[j][place - int(np.searchsorted(owners, j))] for j, place in enumerate(chosen))


def _milp(optimize: Any, costs: Any, sizes: Any, owners: Any, limit: int) -> Any:
    """The column that is chosen of each owner."""
    from scipy.sparse import csr_array

    count, columns = int(owners[-1]) + 1, len(costs)
    one_each = csr_array((np.ones(columns), (owners, np.arange(columns))), shape=(count, columns))
    with _quiet():
        found = optimize.milp(
            costs,
            integrality=np.ones(columns),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(sizes[None], -np.inf, limit),
            ],
            options={"mip_rel_gap": 0.0},
        )
    if not found.success:
        raise RuntimeError(f"scipy's milp found no assignment: {found.message}")
    chosen = [int(np.argmax(np.where(owners == j, found.x, -1.0))) for j in range(count)]
    return np.array(chosen)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No output of native code: HiGHS 1.12 prints a line of its own working now and then, whatever it is told, and
    stdout is for results."""
    sys.stdout.flush()
    flush = ctypes.CDLL(None).fflush
    flush(None)
    before = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)  # what C has buffered goes the same way
        os.dup2(before, 1)
        os.close(nowhere)
        os.close(before)


def _undominated(options: Sequence[Option]) -> list[int]:
    """The options that no other is both at most as large and at most as dear as, the smallest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].cost, i))
    found: list[int] = []
    for i in order:
        if not found or options[i].cost < options[found[-1]].cost:
            found.append(i)
    return found


def _check(items: Sequence[Sequence[Option]], budget: int) -> None:
    if not items:
        raise ValueError("items is empty, there must be at least one")
    for number, options in enumerate(items):
        if not options:
            raise ValueError(f"item {number} has no option, it must have at least one")
        for option in options:
            if not math.isfinite(option.cost):
                raise ValueError(f"a cost of item {number} is {option.cost}, it must be finite")
    least = sum(min(option.nbytes for option in options) for options in items)
    if budget < least:
        raise ValueError(f"budget is {budget:,} bytes, the smallest choice takes {least:,}")


def require_scipy() -> Any:
    """scipy.optimize. Raises MissingExtraError where it is not installed."""
    try:
        from scipy import optimize
    except ImportError:
        raise MissingExtraError(
            "choosing formats for a budget needs scipy: run pip install 'bitfold[allocate]'"
        ) from None
    return optimize
