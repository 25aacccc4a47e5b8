"""What was measured, as a file: JSON, and which model and text it is of.

A file may be unfinished: whatever was measured before a run was stopped is in it, and is not measured again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bitfold.evaluate import Estimate, Protocol, ratio
from bitfold.fields import Fields
from bitfold.outfile import Kind, write_text
from bitfold.shards import CheckpointError, read_json

VERSION = 1
FILE = Kind("sensitivity file", re.compile(r"\{\s*\"version\": \d+,\s*\"of\": \{"))


@dataclass(frozen=True)
class Entry:
    """One weight as one candidate, everything else unquantized.

    module: the first that has the weight; candidate: "gptq-int4-g64", ...; nbytes: of its planes; window_kl: sums of KL
    over the scored tokens of each window, in nats; output_error: norm of the change of the layer's output on the text
    over norm of the output (None: of an embedding or a head); weight_error: the same of the weights.
    """

    module: str
    candidate: str
    nbytes: int
    window_kl: tuple[float, ...]
    output_error: float | None
    weight_error: float

    def kl(self, window_tokens: Sequence[int]) -> Estimate:
        """Mean KL, in nats a token."""
        return ratio(self.window_kl, window_tokens)


@dataclass(frozen=True)
class CacheEntry:
    """The KV cache in a format, everything else unquantized. window_kl: as of an Entry."""

    format: str
    window_kl: tuple[float, ...]

    def kl(self, window_tokens: Sequence[int]) -> Estimate:
        """Mean KL, in nats a token."""
        return ratio(self.window_kl, window_tokens)


@dataclass(frozen=True)
class Caches:
    """The KV cache in each format (sensitivity/cache.py). zero: the largest KL of a cache that packs nothing: 0, or the
    measurement would have failed."""

    entries: tuple[CacheEntry, ...]
    zero: float

    def find(self, format: str) -> CacheEntry | None:
        return next((entry for entry in self.entries if entry.format == format), None)


@dataclass(frozen=True)
class Together:
    """All weights as one candidate: as `bitfold.quantize_calibrated` makes them if it is calibrated. added: the sum of
    the KLs alone; together: the KL of the model; both in nats a token."""

    candidate: str
    added: float
    together: Estimate

    @property
    def ratio(self) -> float:
        """1 where KLs add up; above where errors of several weights meet."""
        return self.together.value / self.added if self.added > 0 else 1.0


@dataclass(frozen=True)
class Sensitivity:
    """A measurement. of: what it is of, by the name that a message has (`measure.fingerprint`); modules: names of the
    weights that took part, with the names of those that share them, shape and bytes as stored; zero: the largest KL
    of the unchanged model, over all blocks that were run from: 0, or the measurement would have failed; seen: hashes of
    the text's passages (`calibration.overlap.to_json`); overlap: which share of them is in the calibration text too, 0
    to 1; finished: whether all that was asked for is there; caches: the KV cache in each format, None where it wasn't
    asked for.
    """

    of: Mapping[str, str]
    protocol: Protocol
    window_tokens: tuple[int, ...]
    calibration: str
    modules: Mapping[str, Mapping[str, Any]]
    entries: tuple[Entry, ...]
    zero: float
    additivity: tuple[Together, ...]
    seen: Mapping[str, Any]
    overlap: float
    finished: bool
    caches: Caches | None = None

    def find(self, module: str, candidate: str) -> Entry | None:
        return self._index.get((module, candidate))

    @cached_property
    def _index(self) -> dict[tuple[str, str], Entry]:
        return {(entry.module, entry.candidate): entry for entry in self.entries}

    @property
    def candidates(self) -> tuple[str, ...]:
        """All that were measured, each once, the smallest first (bytes over all modules that have it, a weight)."""
        bits: dict[str, list[float]] = {}
        for entry in self.entries:
            n, k = self.modules[entry.module]["shape"]
            bits.setdefault(entry.candidate, []).append(8 * entry.nbytes / (n * k))
        return tuple(sorted(bits, key=lambda name: (sum(bits[name]) / len(bits[name]), name)))

    def kl(self, entry: Entry) -> Estimate:
        return entry.kl(self.window_tokens)


def restrict(found: Sensitivity, names: Sequence[str]) -> Sensitivity:
    """The measurements of some weights alone. Raises ValueError for one that wasn't measured."""
    for name in names:
        if name not in found.modules:
            raise ValueError(f"the measurements have none of {name}: measure it too (--include)")
    if set(names) == set(found.modules):
        return found
    return dataclasses.replace(
        found,
        modules={name: found.modules[name] for name in names},
        entries=tuple(entry for entry in found.entries if entry.module in set(names)),
        additivity=(),
    )


def write(path: Path, found: Sensitivity) -> None:
    """Write the file, whole or not at all."""
    data = {"version": VERSION, **dataclasses.asdict(found)}
    write_text(path, json.dumps(data, indent=1) + "\n")


def read(path: str | Path) -> Sensitivity:
    """A file that `write` made. Raises CheckpointError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: 'bitfold sensitivity' makes such a file")
    data = read_json(path)
    if data.get("version") != VERSION:
        raise CheckpointError(f"{path} is no sensitivity file of this version of bitfold: measure anew")
    fields = Fields(data, path, "")
    window_tokens = fields.sizes("window_tokens", least=1)
    windows = len(window_tokens)
    modules = {name: _read_module(module) for name, module in fields.objects("modules").items()}
    caches = fields.section("caches") if data.get("caches") is not None else None
    return Sensitivity(
        of=fields.texts("of"),
        protocol=_read_protocol(fields.section("protocol")),
        window_tokens=window_tokens,
        calibration=fields.take("calibration", str),
        modules=modules,
        entries=tuple(_read_entry(entry, tuple(modules), windows) for entry in fields.entries("entries")),
        zero=fields.number("zero"),
        additivity=tuple(map(_read_together, fields.entries("additivity"))),
        seen=fields.take("seen", dict),
        overlap=fields.number("overlap"),
        finished=fields.take("finished", bool),
        caches=None if caches is None else _read_caches(caches, windows),
    )


def _read_module(fields: Fields) -> dict[str, Any]:
    return {
        "names": list(fields.names("names")),
        "shape": list(fields.sizes("shape", 2, least=1)),
        "kept_bytes": fields.take("kept_bytes", int),
        "block": fields.optional("block", int),
    }


def _read_protocol(fields: Fields) -> Protocol:
    kinds = {"str": str, "int": int, "bool": bool}
    return Protocol(
        **{
            field.name: fields.take(field.name, kinds[str(field.type)])
            for field in dataclasses.fields(Protocol)
        }
    )


def _read_entry(fields: Fields, modules: tuple[str, ...], windows: int) -> Entry:
    module = fields.take("module", str)
    if module not in modules:
        fields.refuse("module", "one of those in modules")
    return Entry(
        module=module,
        candidate=fields.take("candidate", str),
        nbytes=fields.take("nbytes", int),
        window_kl=fields.numbers("window_kl", windows),
        output_error=fields.optional_number("output_error"),
        weight_error=fields.number("weight_error"),
    )


def _read_together(fields: Fields) -> Together:
    together = fields.section("together")
    estimate = Estimate(together.number("value"), together.optional_number("error"))
    return Together(fields.take("candidate", str), fields.number("added"), estimate)


def _read_caches(fields: Fields, windows: int) -> Caches:
    entries = (
        CacheEntry(one.take("format", str), one.numbers("window_kl", windows))
        for one in fields.entries("entries")
    )
    return Caches(tuple(entries), fields.number("zero"))
