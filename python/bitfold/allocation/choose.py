"""From measured sensitivities and a budget to a candidate for each weight.

What is made small is the sum of the KLs that each weight costs alone. Where errors are small that is nearly the KL of
all of them together (`Sensitivity.additivity` says how nearly); rounds.py looks again where it isn't.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bitfold import layout
from bitfold.allocation.solver import Option, solve
from bitfold.evaluate import Estimate, ratio
from bitfold.layout import Source
from bitfold.rules import KEEP, METHODS, Assignment
from bitfold.sensitivity.candidates import read
from bitfold.sensitivity.result import CacheEntry, Entry, Sensitivity


@dataclass(frozen=True)
class Limit:
    """A budget. asked: as it was given ("4.25 bits per weight"); nbytes: of all tensors of the checkpoint at most, and
    of the KV cache where it counts; fixed: of tensors that don't take part; caches: bytes of the KV cache by its
    format, the model's own first, empty where it doesn't count."""

    asked: str
    nbytes: int
    fixed: int
    caches: Mapping[str, int] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Bytes for the weights that take part, and the cache."""
        return self.nbytes - self.fixed


@dataclass(frozen=True)
class Allocation:
    """candidates: by the name of the weight, "keep" included; nbytes: of all tensors of the checkpoint; predicted: the
    KLs alone, added up, in nats a token; cache: the KV cache's format, "" where it doesn't count."""

    limit: Limit
    candidates: Mapping[str, str]
    nbytes: int
    predicted: Estimate
    cache: str = ""

    @property
    def cache_nbytes(self) -> int:
        return self.limit.caches[self.cache] if self.cache else 0

    @property
    def total(self) -> int:
        """Bytes that the budget is of."""
        return self.nbytes + self.cache_nbytes

    @property
    def packed_cache(self) -> str | None:
        """The KV cache's format where it is another than the model's own."""
        return self.cache if self.cache and self.cache != next(iter(self.limit.caches)) else None


def limit_of(
    source: Source,
    found: Sensitivity,
    allowed: Sequence[str],
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    caches: Mapping[str, int] | None = None,
) -> Limit:
    """The budget that is meant.

    allowed: the candidates that may be chosen; bits: per weight that takes part, scales included, those that are kept
    counted too; nbytes: of all tensors of the checkpoint, and of the KV cache if `caches` says its
    bytes (`Limit`). Raises ValueError unless exactly one is given, and where it is below the smallest possible size or
    at least that of the model as it is.
    """
    if (bits is None) == (nbytes is None):
        raise ValueError("bits and nbytes are both given or both missing; it must be one of them")
    fixed, kept = sizes_of(source, found)
    caches = dict(caches or {})
    if caches and bits is not None:
        raise ValueError(
            "the target is in bits per weight, which a KV cache has no part in: with a context it must be a size"
        )
    weights = sum(math.prod(module["shape"]) for module in found.modules.values())
    least = fixed + sum(
        min(option.nbytes for option in options.values()) for options in options_of(found, allowed).values()
    )
    least += min(caches.values(), default=0)
    whole = fixed + kept + next(iter(caches.values()), 0)
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
    if nbytes >= whole:
        cache = " with its KV cache" if caches else ""
        raise ValueError(
            f"the target is {asked}, and the model as it is{cache} takes {said(whole)}: there is nothing to choose"
        )
    return Limit(asked, nbytes, fixed, caches)


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


def cache_options(found: Sensitivity, limit: Limit) -> dict[str, Option]:
    """What the KV cache may become, and what that costs: its KL alone; in the model's own dtype nothing.

    Raises ValueError where it wasn't measured.
    """
    options: dict[str, Option] = {}
    for format, nbytes in limit.caches.items():
        if not options:  # the model's own
            options[format] = Option(nbytes, 0.0)
            continue
        entry = found.caches.find(format) if found.caches else None
        if entry is None:
            raise ValueError(
                f"the measurements have no KV cache in {format}: measure it too ('bitfold sensitivity --kv')"
            )
        options[format] = Option(nbytes, entry.kl(found.window_tokens).value)
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
    caches = cache_options(found, limit)
    items = [list(options[name].values()) for name in names]
    chosen = solve([*items, list(caches.values())] if caches else items, limit.room)
    picked = {name: list(options[name])[number] for name, number in zip(names, chosen, strict=False)}
    cache = list(caches)[chosen[-1]] if caches else ""
    nbytes = limit.fixed + sum(options[name][candidate].nbytes for name, candidate in picked.items())
    return Allocation(limit, picked, nbytes, added(found, picked, cache), cache)


def added(found: Sensitivity, picked: Mapping[str, str], cache: str = "") -> Estimate:
    """The KLs of some candidates alone, and of the KV cache, added up window by window."""
    entries: list[Entry | CacheEntry | None] = [
        found.find(name, candidate) for name, candidate in picked.items() if candidate != KEEP
    ]
    if cache and found.caches is not None:
        entries.append(found.caches.find(cache))  # none of the model's own
    sums = [
        math.fsum(entry.window_kl[window] for entry in entries if entry is not None)
        for window in range(len(found.window_tokens))
    ]
    return ratio(sums, found.window_tokens)
