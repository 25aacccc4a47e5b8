"""Timing: contestants take turns, and a turn starts with the caches and threads of its own library.

A machine that slows down for a second then slows all contestants alike. Their order is drawn anew for each round,
the same in every run: what one leaves in the caches and the heap is found by another one each time. Libraries bring
OpenMP pools of their own, whose threads spin for a while after their work: with more than one thread a turn first waits
until the others' sleep, and the first call of a short one, which wakes its own, isn't counted.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

CALLS_PER_TURN = 4  # of a short call: one that isn't counted, and three that are
SHORT = 0.02  # seconds: a call below it has turns of several calls
SETTLE = 0.02  # seconds: GNU's OpenMP spins for up to so long, by its default count of iterations
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Spread:
    """Seconds of a call: median and quartiles over `samples` calls."""

    median: float
    q1: float
    q3: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        q1, median, q3 = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        )
        return cls(median, q1, q3, len(seconds))

    def as_ms(self) -> dict[str, float]:
        """The same in milliseconds, for JSON."""
        values = asdict(self)
        samples = values.pop("samples")
        return {**{name: round(value * 1e3, 6) for name, value in values.items()}, "samples": samples}


class Clock(Protocol):
    """What a call takes, on some device."""

    def turn(self, run: Callable[[], object]) -> Callable[[], list[float]]:
        """A function that makes one turn of `run` and gives the seconds of calls. Calls run, to know it."""
        ...


@dataclass(frozen=True)
class CpuClock:
    """The time that the caller waits. threads: of the libraries' pools."""

    threads: int

    def turn(self, run: Callable[[], object]) -> Callable[[], list[float]]:
        calls = _turn_length(run)
        return lambda: _turn(run, calls, settle=self.threads > 1)


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    seconds: float,
    *,
    clock: Clock,
    min_rounds: int = MIN_ROUNDS,
) -> dict[str, Spread]:
    """Spread of each contestant's calls, over rounds in which each has one turn.

    seconds: rounds go on until so many have passed, and for `min_rounds` at least. A call that a contestant
    makes must not reuse what its last CALLS_PER_TURN calls left in the cache; that is the contestant's care.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    turns = {name: clock.turn(run) for name, run in contestants.items()}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, rounds, order = time.perf_counter(), 0, list(contestants)
        draw = random.Random(0)
        while rounds < min_rounds or time.perf_counter() - start < seconds:
            draw.shuffle(order)
            for name in order:
                times[name].extend(turns[name]())
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Spread.of(samples) for name, samples in times.items()}


def _turn_length(run: Callable[[], object]) -> int:
    # A first call allocates and looks things up; a long one is long without that.
    return CALLS_PER_TURN if _seconds(run) < 10 * SHORT and _seconds(run) < SHORT else 1


def _turn(run: Callable[[], object], calls: int, *, settle: bool) -> list[float]:
    if settle:
        time.sleep(SETTLE)
    if calls == 1:
        return [_seconds(run)]
    run()
    return [_seconds(run) for _ in range(calls - 1)]


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
