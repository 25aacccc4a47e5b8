"""Looking again: what each weight would cost as something else, in the model that the last choice made.

The KLs of weights quantized alone add up where errors are small. A round measures what they leave out: with all weights
as chosen, one after the other becomes something a little smaller or larger, and the solver chooses anew with the
differences of KL to the whole. A choice is kept if the model that it makes is nearer to the unquantized one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from bitfold.allocation.choose import Allocation, options_of
from bitfold.allocation.solver import Option, solve
from bitfold.evaluate import Estimate
from bitfold.sensitivity import ground as grounds
from bitfold.sensitivity.cache import CacheProbe
from bitfold.sensitivity.candidates import read
from bitfold.sensitivity.result import Sensitivity
from bitfold.sensitivity.walk import Ground, walk

STEPS = 2  # sizes up and down that a round tries

Progress = Callable[[str, int, int], None]
"""Told as work goes on: what is worked on, the work done so far, the work to do in all."""


@dataclass(frozen=True)
class Round:
    """A choice, and what came of it. number: 0 for that from the KLs alone; changed: weights that got something else
    than in the round before; measured: KL of the whole model on the text, in nats a token, by way of the chosen KV
    cache where that counts; window_kl: its sums over windows; weights_kl: the same of the weights alone."""

    number: int
    allocation: Allocation
    changed: int
    measured: Estimate
    window_kl: tuple[float, ...]
    weights_kl: tuple[float, ...]

    @property
    def predicted(self) -> Estimate:
        return self.allocation.predicted


def run(
    ground: Ground,
    found: Sensitivity,
    first: Allocation,
    allowed: Sequence[str],
    count: int,
    *,
    told: Callable[[Round], None] = lambda round: None,
    progress: Progress | None = None,
) -> tuple[Round, ...]:
    """The first choice measured, and up to `count` rounds after it; stops early where a round changes nothing or makes
    it worse. The best is that with the smallest measured KL (`best`).

    ground: of the text to measure on, with a calibration text where a candidate needs one; allowed: candidates that may
    be chosen; told: of each round when it is measured.
    """
    modules = _build(ground, first, progress)
    probe = CacheProbe(ground) if first.cache else None
    rounds = [_measured(ground, probe, 0, first, 0, modules)]
    told(rounds[0])
    for number in range(1, count + 1):
        before = rounds[-1]
        allocation = _again(ground, probe, found, before, allowed, modules, progress)
        changed = _changed(allocation, before.allocation)
        if changed:
            modules = _build(ground, allocation, progress)
            rounds.append(_measured(ground, probe, number, allocation, changed, modules))
        else:
            rounds.append(dataclasses.replace(before, number=number, allocation=allocation, changed=0))
        told(rounds[-1])
        if rounds[-1].measured.value >= before.measured.value:
            break
    return tuple(rounds)


def best(rounds: Sequence[Round]) -> Round:
    """The round with the smallest measured KL, the first of several."""
    return min(rounds, key=lambda one: one.measured.value)


def _changed(one: Allocation, other: Allocation) -> int:
    """The KV cache counts as a weight does."""
    weights = sum(one.candidates[name] != other.candidates[name] for name in one.candidates)
    return weights + (one.cache != other.cache)


def _build(ground: Ground, allocation: Allocation, progress: Progress | None) -> dict[str, nn.Module]:
    assignment = {name: read(text) for name, text in allocation.candidates.items()}
    tell = (lambda what: progress(what, 0, 1)) if progress else (lambda what: None)
    return grounds.build(ground, assignment, tell)


def _measured(
    ground: Ground,
    probe: CacheProbe | None,
    number: int,
    allocation: Allocation,
    changed: int,
    modules: Mapping[str, nn.Module],
) -> Round:
    weights = sums = grounds.divergence(ground, modules)
    if probe is not None:
        sums = probe.divergence(allocation.packed_cache, modules)
    return Round(number, allocation, changed, grounds.mean(ground, sums), sums, weights)


def neighbours(options: Mapping[str, Option], chosen: str, steps: int = STEPS) -> list[str]:
    """The options up to so many sizes below and above the chosen one, leaving out what costs more than a smaller one
    does alone, the chosen one included; the smallest first."""
    order = sorted(options, key=lambda name: (options[name].nbytes, options[name].cost, name))
    kept: list[str] = []
    for name in order:
        if name == chosen or not kept or options[name].cost < min(options[other].cost for other in kept):
            kept.append(name)
    place = kept.index(chosen)
    return kept[max(0, place - steps) : place + steps + 1]


def _again(
    ground: Ground,
    probe: CacheProbe | None,
    found: Sensitivity,
    before: Round,
    allowed: Sequence[str],
    modules: Mapping[str, nn.Module],
    progress: Progress | None,
) -> Allocation:
    """The best choice among the neighbours of the last one, by differences of KL to the whole model of that; of the KV
    cache all formats are tried."""
    options = options_of(found, allowed)
    chosen = before.allocation.candidates
    tried = {name: neighbours(options[name], chosen[name]) for name in options}
    differences: dict[tuple[str, str], list[float]] = {}
    total, done = sum(len(names) - 1 for names in tried.values()), 0
    for stop in walk(ground, modules):
        name = stop.part.name
        for text in tried[name]:
            sums: Sequence[float] = before.weights_kl
            if text != chosen[name]:
                if progress is not None:
                    progress(f"{name} as {text} instead of {chosen[name]}", done, total)
                candidate = read(text)
                sums = stop.divergence(None if candidate.format is None else stop.round(candidate))
                done += 1
            differences[name, text] = [a - b for a, b in zip(sums, before.weights_kl, strict=True)]
    limit, caches = before.allocation.limit, _cache_differences(probe, before, modules)
    scored = sum(ground.windows.scored)
    names = list(tried)
    items = [
        [Option(options[n][t].nbytes, math.fsum(differences[n, t]) / scored) for t in tried[n]] for n in names
    ]
    if caches:
        items.append([Option(limit.caches[f], math.fsum(sums) / scored) for f, sums in caches.items()])
    numbers = solve(items, limit.room)
    picked = {name: tried[name][number] for name, number in zip(names, numbers, strict=False)}
    cache = list(caches)[numbers[-1]] if caches else ""
    chosen_differences = [differences[name, text] for name, text in picked.items()]
    if caches:
        chosen_differences.append(caches[cache])
    sums = [
        math.fsum([whole, *(one[window] for one in chosen_differences)])
        for window, whole in enumerate(before.window_kl)
    ]
    nbytes = limit.fixed + sum(options[n][t].nbytes for n, t in picked.items())
    return dataclasses.replace(
        before.allocation,
        candidates=picked,
        nbytes=nbytes,
        predicted=grounds.mean(ground, sums),
        cache=cache,
    )


def _cache_differences(
    probe: CacheProbe | None, before: Round, modules: Mapping[str, nn.Module]
) -> dict[str, list[float]]:
    """Of each format of the KV cache, with all weights as chosen: sums over windows above those of the chosen one."""
    found: dict[str, list[float]] = {}
    for number, format in enumerate(before.allocation.limit.caches if probe is not None else ()):
        assert probe is not None
        if format == before.allocation.cache:
            sums = before.window_kl
        else:
            sums = probe.divergence(format if number else None, modules)
        found[format] = [a - b for a, b in zip(sums, before.window_kl, strict=True)]
    return found
