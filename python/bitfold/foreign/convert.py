"""A quantized model directory as one of another library, or of bitfold: every weight exact, or asked for.

A weight goes as a QTensor from the one to the other. Where the new place has the same numbers it is regridded, else
the conversion stops with the reason, unless rounding is allowed. Whatever was done, both sides are decoded afterwards
from what lies on the disk, and every value is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import hf
from bitfold.activations import FLOAT, Activations
from bitfold.foreign.owners import QUANTIZE_CONFIG_FILE
from bitfold.foreign.regrid import as_integers, regrid
from bitfold.foreign.scheme import ReadPlane, Store, Unfit
from bitfold.foreign.source import Source, open_source
from bitfold.foreign.targets import TARGETS, Place, with_order
from bitfold.formats import parse
from bitfold.gguf.convert import Count, Progress, Status
from bitfold.qtensor import QTensor, encode
from bitfold.section import ModuleEntry, QuantizationConfig
from bitfold.shards import CheckpointError, TensorSpec, listed, read_directory, read_tensors
from bitfold.writer import SHARD_BYTES, CheckpointWriter, check_target, files_to_copy

BITFOLD, GGUF_BLOCKS, PLAIN = "bitfold", "gguf", "transformers"
"""Targets that are no owner's: bitfold's own checkpoints, those in blocks that a GGUF file has, unquantized ones."""


@dataclass(frozen=True)
class _Own(Store):
    """How bitfold's own checkpoints store a weight: its planes, and the step of static activations."""

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        return entry.parts()

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        g_idx = {} if qtensor.g_idx is None else {"g_idx": qtensor.g_idx}
        return {**qtensor.planes, **g_idx}

    def pack_kept(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(kept)


@dataclass(frozen=True)
class _Plan:
    """What becomes of a model. places: of each module that stays quantized; decoded: modules that become plain weights
    of `dtype`; kept: linear layers that aren't quantized in the new directory; plain: all other tensors; casts:
    whether these become `dtype` too.
    """

    places: Mapping[str, Place]
    decoded: Sequence[str]
    dtype: torch.dtype
    kept: Sequence[str]
    plain: Sequence[str]
    casts: bool = False


def convert(
    source: Source,
    target: Path,
    to: str,
    *,
    decode: torch.dtype | None = None,
    allow_lossy: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    remark: Callable[[str], None] | None = None,
) -> list[Status]:
    """Write `source` as another kind of directory, whole or not at all, and compare the two.

    to: a name of TARGETS, "bitfold", "gguf" (bitfold's, in blocks that a GGUF file has) or "transformers" (plain
    weights of the dtype `decode`); allow_lossy: round weights that have no exact place. Memory: one weight.

    Raises CheckpointError where a weight has no exact place and rounding isn't allowed, and where the target is taken;
    OSError where it can't be written.
    """
    target = check_target(target, force=force)
    remark = remark or (lambda text: None)
    for text in source.remarks:
        remark(text)
    plan = _plan(source, to, decode, allow_lossy)
    specs = _specs(source, plan, allow_lossy)
    weights = sum(math.prod(entry.shape) for entry in source.modules.values())
    count = Count(progress, 2 * weights)
    ordered = False
    rounded: dict[str, list[str]] = {}
    with CheckpointWriter(target, specs, force=force, shard_bytes=shard_bytes) as writer:
        for name, tensor in _plain_tensors(source, plan):
            writer.write(name, tensor)
        for name, entry in source.modules.items():
            place = plan.places.get(name)
            if place is None:
                writer.write(f"{name}.weight", _decoded(source, name, plan.dtype, plan.casts or allow_lossy))
            else:
                qtensor, reason = _moved(source, name, place, allow_lossy)
                if reason:
                    rounded.setdefault(reason, []).append(name)
                ordered |= qtensor.g_idx is not None
                tensors = place.scheme.pack(qtensor)
                if place.activations.needs_calibration:
                    tensors |= place.scheme.pack_kept(source.kept(name))
                for part, tensor in tensors.items():
                    writer.write(f"{name}.{part}", tensor)
            count.add(name, math.prod(entry.shape))
        section = _section(source, plan, to, ordered)
        for file in files_to_copy(source.path):
            if file.name != QUANTIZE_CONFIG_FILE:
                writer.add_copy(file)
        if section is not None and to in TARGETS and TARGETS[to].beside:
            writer.add_json(QUANTIZE_CONFIG_FILE, section)
        config = {**source.config}
        if to == PLAIN:
            config["dtype"] = str(plan.dtype).removeprefix("torch.")
        writer.commit(config if section is None else {**config, "quantization_config": section})
    if to in TARGETS and (text := TARGETS[to].remark(plan.places)):
        remark(text)
    for text in _other_activations(source, plan):
        remark(text)
    for text in _grouped(rounded):
        remark(text)
    return list(_compared(source, target, plan, count))


# ---- what becomes of what ----


def _plan(source: Source, to: str, decode: torch.dtype | None, allow_lossy: bool) -> _Plan:
    stacks = [name for name, entry in source.modules.items() if entry.kind == "experts"]
    if stacks:
        way = (
            "from_pretrained, dequantize() and save_pretrained() make it plain"
            if to == PLAIN
            else "quantize the unquantized model anew"
        )
        raise CheckpointError(
            f"{source.path}: '{stacks[0]}' is a stack of experts, which a conversion doesn't move; {way}"
        )
    linears, ignored = _linears(source)
    plain = [name for name in source.plain if name not in ignored]
    if to == PLAIN:
        assert decode is not None
        return _Plan({}, list(source.modules), decode, [], plain, casts=True)
    linear = {name: entry for name, entry in source.modules.items() if entry.kind == "linear"}
    other = [name for name in source.modules if name not in linear]
    if to == BITFOLD:
        places = {
            name: Place(_Own(), entry.format, entry.layout, entry.activations)
            for name, entry in source.modules.items()
        }
        return _Plan(places, [], source.dtype, [], plain)
    if to == GGUF_BLOCKS:
        places = {name: _block_place(source, name, allow_lossy) for name in source.modules}
        return _Plan(places, [], source.dtype, [], plain)
    try:
        places = TARGETS[to].place(linear, source.dtype)
    except Unfit as error:
        raise CheckpointError(f"{source.path} can't become {to}: {error}") from None
    if not places:
        raise CheckpointError(f"{source.path} has no quantized linear layer that could become {to}")
    return _Plan(places, other, source.dtype, [name for name in linears if name not in places], plain)


def _linears(source: Source) -> tuple[list[str], set[str]]:
    """The names of the model's linear layers, and of tensors that its architecture ignores."""
    if "model_type" not in source.config:
        return [], set()
    model = hf.empty_causal_lm(source.path, dict(source.config), source.dtype)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    unknown = [name for name in source.modules if not _has(model, name)]
    if unknown:
        raise CheckpointError(
            f"{source.path} quantizes {listed(unknown)}, which the model of its config.json doesn't have"
        )
    pattern, state = hf.ignored_names(model), model.state_dict()
    return names, {name for name in source.plain if name not in state and pattern.search(name)}


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _block_place(source: Source, name: str, allow_lossy: bool) -> Place:
    """The smallest block of GGUF that holds a weight exactly; with rounding allowed the nearest."""
    format = parse(source.modules[name].format)
    if format.grid == "block":
        return Place(_Own(), format.canonical)
    if format.grid != "integer":
        return Place(_Own(), "iq4_nl" if format.grid == "codebook" else "q8_0")
    near = as_integers(format)
    fits = (
        ["q8_0"] if near.bits == 8 else ["q4_1", "q8_0"] if near.asymmetric and near.bits == 4 else ["q4_0"]
    )
    if near.asymmetric and near.bits < 4:
        fits = ["q4_0"]  # code - zero is within -7 ... 7
    if len(fits) == 1 or allow_lossy:
        return Place(_Own(), fits[0])
    for block in fits:
        try:
            regrid(source.qtensor(name), block)
        except Unfit:
            continue
        return Place(_Own(), block)
    return Place(_Own(), fits[0])


def _moved(source: Source, name: str, place: Place, allow_lossy: bool) -> tuple[QTensor, str]:
    """The weight as it will be stored, and what rounds it ("": nothing does)."""
    reason = "" if place.activations.exact_outliers else source.rounds(name)
    qtensor = source.qtensor(name)
    entry = source.modules[name]
    try:
        if reason:
            raise Unfit(reason)
        if place.layout != entry.layout:
            raise Unfit("its blocks run across the rows in one of the two, and in the other not")
        moved = regrid(qtensor, place.format)
        place.scheme.specs(_entry(moved), lambda plane: moved.planes[plane])
        if rounds := place.scheme.pack_rounds(moved):
            raise Unfit(rounds)
        return moved, ""
    except ValueError as error:
        if not allow_lossy:
            raise CheckpointError(
                f"{source.path}: '{name}' can't become {place.format} exactly: {error}; --allow-lossy "
                "(allow_lossy=True) rounds it"
            ) from None
        reason = str(error)
    try:
        if place.layout != entry.layout:
            raise Unfit("")
        moved = regrid(qtensor, place.format, rounding=True)
        place.scheme.specs(_entry(moved), lambda plane: moved.planes[plane])
        return moved, reason
    except Unfit:
        pass  # the codes have no place there, so the values are encoded anew
    try:
        values = source.decode(name).to(torch.float32)
        if place.layout == "flat":
            flat = encode(values.reshape(1, -1), place.format)
            moved = QTensor(place.format, entry.matrix, flat.planes, "flat")
        else:
            moved = encode(values, place.format)
        place.scheme.specs(_entry(moved), lambda plane: moved.planes[plane])
        return moved, f"encoded anew: {reason}"
    except ValueError as error:
        raise CheckpointError(f"{source.path}: '{name}' can't become {place.format}: {error}") from None


def _specs(source: Source, plan: _Plan, allow_lossy: bool) -> list[TensorSpec]:
    """All tensors of the new directory. Raises CheckpointError where a weight has no place there, rounded or not."""
    specs = []
    for name in plan.plain:
        tensor = source.plain[name]
        dtype = plan.dtype if plan.casts else tensor.torch_dtype
        specs.append(TensorSpec(name, dtype, tensor.shape))
    for name, entry in source.modules.items():
        place = plan.places.get(name)
        if place is None:
            specs.append(TensorSpec(f"{name}.weight", plan.dtype, entry.shape))
            continue
        for spec in _parts(source, name, place, allow_lossy).values():
            specs.append(TensorSpec(f"{name}.{spec.name}", spec.dtype, spec.shape))
    return specs


def _parts(source: Source, name: str, place: Place, allow_lossy: bool) -> dict[str, TensorSpec]:
    entry = source.modules[name]
    for keeps_order in (True, False) if entry.g_idx and allow_lossy else (True,):
        stored = replace(_stored_as(entry, place), g_idx=entry.g_idx and keeps_order)
        try:
            return place.scheme.specs(stored, lambda plane: source.qtensor(name).planes[plane])
        except Unfit as error:
            reason = error
    hint = "; --allow-lossy (allow_lossy=True) rounds it" if entry.g_idx and not allow_lossy else ""
    raise CheckpointError(f"{source.path}: '{name}' can't become {place.format}: {reason}{hint}")


def _entry(qtensor: QTensor) -> ModuleEntry:
    return ModuleEntry(
        "linear", qtensor.format, qtensor.shape, qtensor.layout, g_idx=qtensor.g_idx is not None
    )


def _decoded(source: Source, name: str, dtype: torch.dtype, rounding: bool) -> Tensor:
    """A weight as plain numbers."""
    values = source.decode(name)
    cast = values.to(dtype)
    if not rounding and not torch.equal(cast.to(torch.float64), values.to(torch.float64)):
        raise CheckpointError(
            f"{source.path}: '{name}' is quantized and no linear layer, and not all of its values are numbers of "
            f"{dtype}; --allow-lossy (allow_lossy=True) rounds them"
        )
    if not cast.isfinite().all() and values.isfinite().all():
        raise ValueError(f"{name} has values beyond {dtype}: decode to bfloat16 or float32")
    return cast


def _plain_tensors(source: Source, plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    stored = sorted((source.plain[name] for name in plan.plain), key=lambda tensor: tensor.path)
    for name, tensor in read_tensors(stored):
        yield name, tensor.to(plan.dtype) if plan.casts else tensor


def _section(source: Source, plan: _Plan, to: str, ordered: bool) -> dict[str, Any] | None:
    """The quantization_config of the new directory."""
    if to == PLAIN:
        return None
    if to in TARGETS:
        return with_order(TARGETS[to].settings(plan.places, plan.kept), ordered).to_json()
    modules = {}
    for name, place in plan.places.items():
        modules[name] = _stored_as(source.modules[name], place)
    for name, (entry, owner) in source.aliases.items():
        modules[name] = replace(_stored_as(entry, plan.places[owner]), layout=entry.layout)
    tied = dict(source.tied)
    for name, (_, owner) in source.aliases.items():
        tied |= {f"{name}.{part}": f"{owner}.{part}" for part in modules[owner].parts()}
    return QuantizationConfig(source.recipe, modules, tied).to_json()


def _stored_as(entry: ModuleEntry, place: Place) -> ModuleEntry:
    """What a module is in its place: what it kept for other activations stays behind."""
    moved = replace(
        entry,
        format=place.format,
        layout=place.layout,
        activations=place.activations,
        x_scale=place.activations.is_static,
    )
    return moved if place.activations.exact_outliers else replace(moved, outliers=0, outlier_dtype=None)


def _other_activations(source: Source, plan: _Plan) -> Iterator[str]:
    """What layers did with their inputs, and no longer do."""
    changed: dict[tuple[Activations, Activations], list[str]] = {}
    for name, entry in source.modules.items():
        after = plan.places[name].activations if name in plan.places else FLOAT
        if entry.activations != after:
            changed.setdefault((entry.activations, after), []).append(name)
    for (before, after), names in changed.items():
        layers = "1 layer" if len(names) == 1 else f"{len(names)} layers"
        yield (
            f"{layers} ('{names[0]}'{', ...' if len(names) > 1 else ''}): the activations were '{before}', and in the "
            f"new directory they are '{after}'"
        )


def _grouped(rounded: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A sentence for each reason, and the weights that it is of."""
    for reason, names in rounded.items():
        weights = "1 weight" if len(names) == 1 else f"{len(names)} weights"
        yield f"{weights} ('{names[0]}'{', ...' if len(names) > 1 else ''}): {reason}"


# ---- comparing ----


def _compared(source: Source, target: Path, plan: _Plan, count: Count) -> Iterator[Status]:
    """Every value of every tensor, decoded from what lies on the disk on both sides."""
    made = open_source(target) if plan.places else None
    stored = read_directory(target) if made is None else made.plain
    for name in plan.plain:
        before = source.plain[name]
        values = [next(read_tensors([tensor]))[1] for tensor in (before, stored[name])]
        yield _status(name, before.dtype, stored[name].dtype, *values)
    for name, entry in source.modules.items():
        place = plan.places.get(name)
        if place is not None and made is not None:
            yield _status(name, entry.format, place.format, source.decode(name), made.decode(name))
        else:
            tensor = stored[f"{name}.weight"]
            plain = next(read_tensors([tensor]))[1]
            yield _status(name, entry.format, tensor.dtype, source.decode(name), plain)
        count.add(name, math.prod(entry.shape))


def _status(name: str, before: str, after: str, one: Tensor, other: Tensor) -> Status:
    largest = relative = 0.0
    if one.shape != other.shape:
        raise CheckpointError(f"'{name}' has become {list(other.shape)}; it was {list(one.shape)}")
    if not torch.equal(one.to(torch.float64), other.to(torch.float64)):
        exact, found = one.to(torch.float64), other.to(torch.float64)
        error = found - exact
        largest = error.abs().max().item()
        norm = torch.linalg.vector_norm(exact).item()
        relative = torch.linalg.vector_norm(error).item() / norm if norm else math.inf
    return Status(name, tuple(one.shape), before, after, largest, relative)
