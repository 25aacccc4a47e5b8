"""From measured sensitivities and a budget to a candidate for each weight.

What is made small is the sum of the KLs that each weight costs alone. Where errors are small that is nearly the KL of
all of them together (`Sensitivity.additivity` says how nearly); rounds.py looks again where it isn't.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitfold import layout
from bitfold.allocation.solver import Option, solve
from bitfold.evaluate import Estimate, ratio
from bitfold.layout import Source
from bitfold.recipes import KEEP, METHODS, Assignment
from bitfold.sensitivity.candidates import read
from bitfold.sensitivity.result import Sensitivity


@dataclass(frozen=True)
class Limit:
    """A budget. asked: as it was given ("4.25 bits per weight"); nbytes: of all tensors of the checkpoint at most;
    fixed: of those that don't take part."""

    asked: str
    nbytes: int
    fixed: int

    @property
    def room(self) -> int:
        """Bytes for the weights that take part."""
        return self.nbytes - self.fixed


@dataclass(frozen=True)
class Allocation:
    """candidates: by the name of the weight, "keep" included; nbytes: of all tensors of the checkpoint; predicted: the
    KLs alone, added up, in nats a token."""

    limit: Limit
    candidates: Mapping[str, str]
    nbytes: int
    predicted: Estimate


def limit_of(
    source: Source,
    found: Sensitivity,
    allowed: Sequence[str],
    *,
    bits: float | None = None,
    nbytes: int | None = None,
) -> Limit:
    """The budget that is meant.

    allowed: the candidates that may be chosen; bits: per weight that takes part, scales included, those that are kept
    counted too; nbytes: of all tensors of the checkpoint. Raises ValueError unless exactly one is given, and where it
    is below the smallest possible size or at least that of the model as it is.
    """
    if (bits is None) == (nbytes is None):
        raise ValueError("bits and nbytes are both given or both missing; it must be one of them")
    fixed, kept = sizes_of(source, found)
    weights = sum(math.prod(module["shape"]) for module in found.modules.values())
    least = fixed + sum(
        min(option.nbytes for option in options.values()) for options in options_of(found, allowed).values()
    )
    if bits is not None:
        if not (math.isfinite(bits) and bits > 0):
            raise ValueError(f"the target is {bits} bits per weight, it must be a positive number")
        nbytes = fixed + math.floor(bits * weights / 8)
    assert nbytes is not None

    def said(total: int) -> str:
        return f"{total:,} bytes" if bits is None else f"{8 * (total - fixed) / weights:.4g} bits per weight"

    asked = said(nbytes) if bits is None else f"{bits:g} bits per weight"
    if nbytes < least:
        raise ValueError(
            f"the target is {asked}, less than the smallest that the candidates allow, {said(least)}"
        )
    if nbytes >= fixed + kept:
        raise ValueError(
            f"the target is {asked}, and the model as it is takes {said(fixed + kept)}: there is nothing to choose"
        )
    return Limit(asked, nbytes, fixed)


def sizes_of(source: Source, found: Sensitivity) -> tuple[int, int]:
    """Bytes of the tensors that don't take part, and of those that do as they are stored."""
    kept = {name: Assignment(None, None, "") for name in source.infos}
    total = sum(step.nbytes for step in layout.steps(source, kept, compare_tied=False))
    own = sum(module["kept_bytes"] for module in found.modules.values())
    return total - own, own


def options_of(found: Sensitivity, allowed: Sequence[str]) -> dict[str, dict[str, Option]]:
    """What each weight may become, and what that costs: its KL alone, in nats a token; kept it costs nothing."""
    options: dict[str, dict[str, Option]] = {
        name: {KEEP: Option(module["kept_bytes"], 0.0)} for name, module in found.modules.items()
    }
    for entry in found.entries:
        if _is_allowed(entry.candidate, found.modules[entry.module]["block"], allowed):
            options[entry.module][entry.candidate] = Option(entry.nbytes, found.kl(entry).value)
    return options


def _is_allowed(candidate: str, block: int | None, allowed: Sequence[str]) -> bool:
    """Outside of the decoder blocks, where nothing can be calibrated, a calibrated candidate allows the plain one."""
    if candidate in allowed:
        return True
    return block is None and any(f"{method}-{candidate}" in allowed for method in METHODS)


def allowed_of(found: Sensitivity, asked: Sequence[str]) -> tuple[str, ...]:
    """The candidates that are asked for; none: all that were measured.

    Raises ValueError for one that wasn't measured.
    """
    names = [str(read(text)) for text in asked if text]
    for name in names:
        if name not in found.candidates and name != KEEP:
            raise ValueError(
                f"candidate {name!r} was not measured, it must be one of {', '.join(found.candidates)}"
            )
    return tuple(names) or found.candidates


def choose(found: Sensitivity, limit: Limit, allowed: Sequence[str]) -> Allocation:
    """The assignment with the smallest sum of KLs within the budget."""
    options = options_of(found, allowed)
    names = list(options)
    chosen = solve([list(options[name].values()) for name in names], limit.room)
    picked = {name: list(options[name])[number] for name, number in zip(names, chosen, strict=True)}
    nbytes = limit.fixed + sum(options[name][candidate].nbytes for name, candidate in picked.items())
    return Allocation(limit, picked, nbytes, added(found, picked))


def added(found: Sensitivity, picked: Mapping[str, str]) -> Estimate:
    """The KLs of some candidates alone, added up window by window."""
    entries = [found.find(name, candidate) for name, candidate in picked.items() if candidate != KEEP]
    sums = [
        math.fsum(entry.window_kl[window] for entry in entries if entry is not None)
        for window in range(len(found.window_tokens))
    ]
    return ratio(sums, found.window_tokens)
