"""Where the weights of a checkpoint go when it becomes one of another library: a scheme and a format for each, and what
the configuration then says.

Formats are chosen so that the values stay the same where the library has a place for them (regrid.py); where it has
none, the nearest is named, and only rounding leads there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitfold.activations import FLOAT, Activations, llm_int8
from bitfold.foreign import awq, bitsandbytes, compressed_tensors
from bitfold.foreign.awq import AwqConfig, AwqScheme
from bitfold.foreign.bitsandbytes import BitsAndBytesConfig, EightBitScheme, FourBitScheme
from bitfold.foreign.compressed_tensors import CompressedConfig, CompressedScheme
from bitfold.foreign.finegrained import BlockScheme, FineGrainedConfig
from bitfold.foreign.gptq import GptqConfig, GptqScheme
from bitfold.foreign.regrid import nearest_integers
from bitfold.foreign.scheme import Config, Store, Unfit, integer
from bitfold.formats import parse
from bitfold.section import ModuleEntry

GROUPS = (1024, 512, 256, 128, 64, 32, 16)
"""Group sizes that the libraries take."""


@dataclass(frozen=True)
class Place:
    """How a weight will be stored, the format that it must have before, and what its layer then does with its input."""

    scheme: Store
    format: str
    layout: str = "rows"
    activations: Activations = FLOAT


Entries = Mapping[str, ModuleEntry]
Places = Mapping[str, Place]


@dataclass(frozen=True)
class Target:
    """A kind of checkpoint to make.

    name: as --to has it; owner: of foreign/owners.py; place: for each module its place, given the dtype of the model's
    other tensors; settings: the configuration, given the places and the linear layers that aren't quantized; beside:
    whether the owner wants its configuration in quantize_config.json, too; remark: what to know of a checkpoint with
    such places.

    place raises Unfit, with the reason, where a module has none.
    """

    name: str
    owner: str
    place: Callable[[Entries, torch.dtype], dict[str, Place]]
    settings: Callable[[Places, Sequence[str]], Config]
    beside: bool = False
    remark: Callable[[Places], str] = lambda places: ""


def _group(group: int) -> int:
    """The largest group size that the libraries take and that divides a format's, so that its scales are only
    repeated.
    """
    if group <= 0:
        return -1
    found = next((size for size in GROUPS if group % size == 0), None)
    if found is None:
        raise Unfit(f"its groups have {group} columns; they must have a multiple of 16")
    return found


# ---- GPTQ ----


def _place_gptq(version: int) -> Callable[[Entries, torch.dtype], dict[str, Place]]:
    def place(entries: Entries, dtype: torch.dtype) -> dict[str, Place]:
        places = {}
        for name, entry in entries.items():
            near = nearest_integers(parse(entry.format))
            group = _group(near.group)
            format = integer(near.bits, group, near.asymmetric, torch.float16)
            places[name] = Place(GptqScheme(near.bits, group, not near.asymmetric, version), format)
        return places

    return place


def _gptq(places: Places, kept: Sequence[str]) -> GptqConfig:
    schemes = {name: place.scheme for name, place in places.items() if isinstance(place.scheme, GptqScheme)}
    default = Counter(schemes.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    rules = []
    for name, scheme in schemes.items():
        if scheme != default:
            settings = {"bits": scheme.bits, "group_size": scheme.group, "sym": scheme.symmetric}
            dynamic[f"+:{_exactly(name)}"] = settings
            rules.append(("+", _exactly(name), scheme))
    heads = ("lm_head", "output")
    for name in kept:
        if name not in heads:
            dynamic[f"-:{_exactly(name)}"] = {}
            rules.append(("-", _exactly(name), default))
    head = any(name in heads for name in schemes)
    return GptqConfig(default, lm_head=head, rules=tuple(rules), dynamic=dynamic)


def _refused(places: Places) -> str:
    """What GPTQModel says to version 1 with zero points that anyone but itself wrote."""
    if all(parse(place.format).asymmetric is False for place in places.values()):
        return ""
    return (
        "GPTQModel loads version 1 with zero points only from its own writer, whose way of storing a zero point of 0 "
        "others read otherwise; gptq-v2 has neither trouble"
    )


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


# ---- AWQ ----


def _place_awq(entries: Entries, dtype: torch.dtype) -> dict[str, Place]:
    near = {name: nearest_integers(parse(entry.format)) for name, entry in entries.items()}
    groups = {name: _group(format.group) for name, format in near.items()}
    group = min(groups.values(), key=lambda size: 1 << 30 if size == -1 else size)
    zero_point = any(format.asymmetric for format in near.values())
    scheme = AwqScheme(group, zero_point)
    # One setting for all: smaller groups repeat the scales of larger ones, and symmetric codes have zero points of 8.
    format = integer(awq.BITS, group, zero_point, torch.float16)
    return {name: Place(scheme, format) for name in entries}


def _awq(places: Places, kept: Sequence[str]) -> AwqConfig:
    scheme = next(iter(places.values())).scheme
    assert isinstance(scheme, AwqScheme)
    return AwqConfig(scheme, tuple(kept))


# ---- compressed-tensors ----


def _place_compressed(entries: Entries, dtype: torch.dtype) -> dict[str, Place]:
    places = {}
    for name, entry in entries.items():
        format = parse(entry.format)
        wanted = entry.activations if entry.activations.kind in ("fp8", "fp8-static") else FLOAT
        if format.family == compressed_tensors.FP8:
            scheme = CompressedScheme(
                compressed_tensors.FLOATS, "float", 8, format.group, rows=format.group_rows
            )
        else:
            format = nearest_integers(format)
            scheme = CompressedScheme(
                compressed_tensors.PACKED, "int", format.bits, format.group, not format.asymmetric
            )
        places[name] = Place(replace(scheme, activations=wanted), format.canonical, activations=wanted)
    return places


def _compressed(places: Places, kept: Sequence[str]) -> CompressedConfig:
    groups: dict[CompressedScheme, list[str]] = {}
    for name, place in places.items():
        assert isinstance(place.scheme, CompressedScheme)
        groups.setdefault(place.scheme, []).append(name)
    if len(groups) == 1:
        return CompressedConfig(((("Linear",), next(iter(groups))),), tuple(kept))
    return CompressedConfig(tuple((tuple(names), scheme) for scheme, names in groups.items()), tuple(kept))


# ---- transformers' fine-grained fp8 ----


def _place_fine(entries: Entries, dtype: torch.dtype) -> dict[str, Place]:
    sizes = Counter(
        (format.group_rows, format.group)
        for entry in entries.values()
        if (format := parse(entry.format)).family == compressed_tensors.FP8 and format.group_rows > 1
    )
    scheme = BlockScheme(*sizes.most_common(1)[0][0]) if sizes else BlockScheme()
    return {name: Place(scheme, scheme.format) for name in entries}


def _rounds_inputs(places: Places) -> str:
    """What happens to inputs there, whatever they were here."""
    scheme = next(iter(places.values())).scheme
    assert isinstance(scheme, BlockScheme)
    return f"transformers {scheme.left_out} as the new directory's layers run; bitfold doesn't"


def _fine(places: Places, kept: Sequence[str]) -> FineGrainedConfig:
    scheme = next(iter(places.values())).scheme
    assert isinstance(scheme, BlockScheme)
    return FineGrainedConfig(scheme, tuple(kept))


# ---- bitsandbytes ----


def _place_bitsandbytes(entries: Entries, dtype: torch.dtype) -> dict[str, Place]:
    """One kind for all: that of most modules; the others have no exact place."""
    kinds = {name: _kind(entry) for name, entry in entries.items()}
    kind = Counter(kinds.values()).most_common(1)[0][0]
    if kind == "int8":
        wanted = _llm_int8(entries)
        place = Place(EightBitScheme(wanted), bitsandbytes.INT8, activations=wanted)
        return dict.fromkeys(entries, place)
    places = {}
    for name, entry in entries.items():
        format = parse(entry.format)
        fits = format.family == kind and format.group in bitsandbytes.BLOCKS
        block = format.group if fits else 64
        nested = "-dq" if fits and format.scale == "nested" else ""
        layout = "rows" if entry.shape[1] % block == 0 else "flat"
        places[name] = Place(FourBitScheme(kind, dtype), parse(f"{kind}-b{block}{nested}").canonical, layout)
    return places


def _llm_int8(entries: Entries) -> Activations:
    """What its int8 layers do with their inputs, by one threshold for all: that of most of those that have one. Nothing
    but LLM.int8() and plain int8 is known there."""
    kinds = ("int8", "llm-int8")
    found = Counter(
        entry.activations.threshold for entry in entries.values() if entry.activations.kind in kinds
    )
    return llm_int8(found.most_common(1)[0][0]) if found else llm_int8()


def _kind(entry: ModuleEntry) -> str:
    format = parse(entry.format)
    if format.family in bitsandbytes.KINDS:
        return format.family
    return "int8" if format.bits == 8 and nearest_integers(format).group == -1 else "nf4"


def _bitsandbytes(places: Places, kept: Sequence[str]) -> BitsAndBytesConfig:
    scheme = next(iter(places.values())).scheme
    assert isinstance(scheme, FourBitScheme | EightBitScheme)
    nested = any(parse(place.format).scale == "nested" for place in places.values())
    return BitsAndBytesConfig(scheme, tuple(kept), nested)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("gptq", "gptq", _place_gptq(1), _gptq, beside=True, remark=_refused),
        Target("gptq-v2", "gptq", _place_gptq(2), _gptq, beside=True),
        Target("awq", "awq", _place_awq, _awq),
        Target("compressed-tensors", "compressed-tensors", _place_compressed, _compressed),
        Target("bitsandbytes", "bitsandbytes", _place_bitsandbytes, _bitsandbytes),
        Target("fp8", "fp8", _place_fine, _fine, remark=_rounds_inputs),
    )
}


def with_order(config: Config, ordered: bool) -> Config:
    """The configuration, saying whether columns were quantized in another order, where it has a word for that."""
    return replace(config, desc_act=ordered) if isinstance(config, GptqConfig) else config
