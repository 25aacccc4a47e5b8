"""What is looked at in a checkpoint that bitfold quantized: each module's planes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfold.check import sample, values, zeros
from bitfold.check.files import read_one
from bitfold.check.problem import Progress, Report
from bitfold.check.told import tell
from bitfold.experts import expert_name
from bitfold.formats import parse
from bitfold.nn import KEPT_PARTS, check_kept
from bitfold.qtensor import QTensor
from bitfold.section import ModuleEntry, QuantizationConfig, read_quantization
from bitfold.shards import CONFIG_FILE, DTYPES, CheckpointError, StoredTensor


def examine_own(
    path: Path,
    config: dict[str, Any],
    stored: Mapping[str, StoredTensor],
    report: Report,
    progress: Progress | None,
) -> tuple[dict[str, ModuleEntry], set[str]]:
    """The modules' entries, and the names of their tensors."""
    try:
        quantization: QuantizationConfig = read_quantization(path, config)
    except CheckpointError as error:
        report.misread(path / CONFIG_FILE, error)
        return {}, set(stored)
    used = set()
    found = zeros.Zeros()
    for done, (name, entry) in enumerate(quantization.modules.items()):
        names = {part: f"{name}.{part}" for part in entry.parts()}
        places = {part: quantization.tied.get(own, own) for part, own in names.items()}
        used |= set(places.values())
        _own_module(name, entry, places, stored, found, report)
        if progress is not None:
            progress(name, done + 1, len(quantization.modules))
    report.modules = len(quantization.modules)
    found.settle()
    report.findings.update(found.found)
    tell(path, "bitfold", None, found, report)
    return dict(quantization.modules), used


def _own_module(
    name: str,
    entry: ModuleEntry,
    places: Mapping[str, str],
    stored: Mapping[str, StoredTensor],
    found: zeros.Zeros,
    report: Report,
) -> None:
    """places: of each part, the name that it is stored by: that of another module's where the two share a weight, whose
    values are then looked at there."""
    planes = {}
    for part, spec in entry.parts().items():
        full, place = f"{name}.{part}", places[part]
        tensor = stored.get(place)
        if tensor is None:
            was = "is in no file" if place == full else f"is {place}, which is in no file"
            report.fault("tensor-missing", full, was, f"{entry.format} must have it")
        elif (DTYPES.get(tensor.dtype), tensor.shape) != (spec.dtype, spec.shape):
            report.fault(
                "shape",
                full,
                f"is {tensor.dtype} {list(tensor.shape)}",
                f"in {entry.format} of {list(entry.shape)} it must be {spec.dtype} {list(spec.shape)}",
            )
        elif place == full:
            planes[part] = read_one(tensor)
    if len(planes) < len(entry.parts()):
        return
    _check_kept(name, entry, {part: planes.pop(part) for part in KEPT_PARTS if part in planes}, report)
    if entry.kind == "experts":
        one = replace(entry, kind="linear", shape=entry.matrix)
        for expert in range(entry.shape[0]):
            own = {part: plane[expert] for part, plane in planes.items()}
            _matrix(expert_name(name, expert), one, own, None, report)
        return
    _matrix(name, entry, planes, found, report)


def _check_kept(name: str, entry: ModuleEntry, kept: Mapping[str, Tensor], report: Report) -> None:
    """What a layer keeps for its activations."""
    if "outlier_weight" in kept:
        values.check_finite(f"{name}.outlier_weight", kept["outlier_weight"], report)
    try:
        check_kept(kept.get("x_scale"), kept.get("outlier_columns"), entry.shape[-1])
    except ValueError as error:
        was, must = str(error).split("; ", 1)
        report.fault("activations", name, was, must)


def _matrix(
    name: str, entry: ModuleEntry, planes: dict[str, Tensor], found: zeros.Zeros | None, report: Report
) -> None:
    """One matrix. found: what its zero points say, None of an expert, whose planes can't be repaired alone."""
    format = parse(entry.format)
    if format.grid == "block":
        _blocks(name, entry, planes["blocks"], report)
        return
    sound = [
        values.check_scales(
            f"{name}.{part}",
            planes[part],
            report,
            signed=part == "nested_offset" or (format.grid == "integer" and not format.asymmetric),
        )
        for part in ("scales", "nested_scales", "nested_offset")
        if part in planes
    ]
    if format.grid == "cast":
        values.check_finite(f"{name}.codes", planes["codes"], report)
    g_idx = planes.pop("g_idx", None)
    groups = -(-entry.shape[1] // format.group) if format.group > 0 else 1
    if g_idx is not None and not values.check_order(f"{name}.g_idx", g_idx, format.group, groups, report):
        return
    if not all(sound):
        return
    qtensor = QTensor(entry.format, entry.matrix, planes, entry.layout, g_idx)
    values.check_zero_scales(f"{name}.scales", qtensor, report)
    if format.asymmetric and found is not None:
        numbers = sample.of_planes(qtensor)
        if numbers is not None:
            found.found[name] = zeros.judged(zeros.centre_of(numbers), format.bits)


def _blocks(name: str, entry: ModuleEntry, blocks: Tensor, report: Report) -> None:
    """GGUF's blocks have their scales inside: what they decode to must be numbers."""
    for begin in range(0, len(blocks), 256):
        part = blocks[begin : begin + 256].contiguous()
        decoded = QTensor(entry.format, (len(part), entry.shape[1]), {"blocks": part}).decode()
        wrong = ~decoded.isfinite()
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            report.fault(
                "scale-not-finite",
                f"{name}.blocks",
                f"the block of row {begin + row}, column {column} decodes to {decoded[row, column].item()}",
                "scales of blocks must be finite",
            )
            return
