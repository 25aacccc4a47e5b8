"""All that is looked at in a checkpoint, in order: files, configuration, tensors of each module, zero points,
the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold import hf
from bitfold.check import sample, values, zeros
from bitfold.check.files import read_files
from bitfold.check.problem import Report
from bitfold.checkpoint import ModuleEntry, QuantizationConfig, listed, read_quantization
from bitfold.experts import expert_name
from bitfold.foreign import gptq
from bitfold.foreign.owners import OWNERS, Owner, read_owner
from bitfold.foreign.scheme import Config
from bitfold.formats import parse
from bitfold.qtensor import QTensor
from bitfold.shards import (
    CONFIG_FILE,
    DTYPES,
    CheckpointError,
    StoredTensor,
    read_json,
    read_tensors,
)
from bitfold.versions import MissingExtraError
from bitfold.writer import is_bitfold_checkpoint

Progress = Callable[[str, int, int], None]
_FLOATS = ("F64", "F32", "F16", "BF16")
_TELLING = {part: owner for owner in OWNERS.values() for part in owner.parts if part != "weight"}
MOST_WEIGHTS = 1 << 40  # of one matrix; more is a shape that overflowed


def examine(path: str | Path, *, thorough: bool = True, progress: Progress | None = None) -> Report:
    """What is wrong with a checkpoint: a model directory, quantized by bitfold, by one of the owners of
    foreign/ or not at all, or a GGUF file.

    thorough: look at all numbers of tensors that aren't quantized too, and at the model that config.json
    describes (which loading does by itself); progress: told after each module.

    Raises CheckpointError where there is nothing to look at.
    """
    path = Path(path)
    if path.is_file():
        from bitfold.check.gguf_file import examine_file

        return examine_file(path, progress)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    report = Report(path)
    stored = read_files(path, report)
    if not stored:
        return report
    try:
        config = read_json(path / CONFIG_FILE)
    except CheckpointError as error:
        report.fault(
            "configuration",
            path / CONFIG_FILE,
            str(error).removeprefix(f"{path / CONFIG_FILE} "),
            "it must be there",
        )
        config = {}
    if is_bitfold_checkpoint(path):
        report.owner = "bitfold"
        entries, used = _own(path, config, stored, report, progress)
    else:
        entries, used = _foreign(path, stored, report, progress)
    plain = {name: tensor for name, tensor in stored.items() if name not in used}
    if thorough:
        for name, tensor in plain.items():
            if tensor.dtype in _FLOATS:
                values.check_finite(name, _one(tensor), report)
        if config and not any(problem.kind == "configuration" for problem in report.problems):
            _check_model(path, config, entries, plain, report)
    return report


# ---- checkpoints of others ----


def _foreign(
    path: Path, stored: Mapping[str, StoredTensor], report: Report, progress: Progress | None
) -> tuple[dict[str, ModuleEntry], set[str]]:
    """The modules' entries, and the names of their tensors."""
    try:
        found = read_owner(path)
    except CheckpointError as error:
        report.fault("configuration", path, str(error), "it must be one that bitfold reads")
        return {}, set(stored)
    if found is None:
        telling = {_TELLING[part].title for name in stored for part in _TELLING if name.endswith(f".{part}")}
        if telling:
            report.fault(
                "configuration",
                path / CONFIG_FILE,
                f"has no quantization_config, and tensors are those of {' or '.join(sorted(telling))}",
                "it must say how the weights are quantized",
            )
            return {}, set(stored)
        return {}, set()
    owner, settings = found
    report.owner = owner.name
    modules = owner.modules(stored)
    used = {f"{name}.{part}" for name, parts in modules.items() for part in parts}
    if not _check_owner(path, owner, modules, stored, used, report):
        return {}, set(stored)
    entries: dict[str, ModuleEntry] = {}
    found_zeros = zeros.Zeros()
    for done, (name, parts) in enumerate(modules.items()):
        entry = _module(owner, settings, name, parts, stored, found_zeros, report)
        if entry is not None:
            entries[name] = entry
        if progress is not None:
            progress(name, done + 1, len(modules))
    report.modules = len(modules)
    found_zeros.settle()
    report.findings.update(found_zeros.found)
    _check_borrows(found_zeros, report)
    _judge(path, owner, settings, found_zeros, report)
    _check_labels(path, owner, settings, entries, report)
    return entries, used


def _check_owner(
    path: Path,
    owner: Owner,
    modules: Mapping[str, tuple[str, ...]],
    stored: Mapping[str, StoredTensor],
    used: set[str],
    report: Report,
) -> bool:
    """Whether the tensors are those of the owner that the configuration names."""
    rows = [
        (stored[f"{name}.qweight"].shape, stored[f"{name}.scales"].shape)
        for name, parts in modules.items()
        if {"qweight", "scales"} <= set(parts)
    ]
    rows = [pair for pair in rows if len(pair[0]) == len(pair[1]) == 2]
    wide = sum(codes[1] == scales[1] for codes, scales in rows)
    packed = sum(8 * codes[1] == scales[1] for codes, scales in rows)
    other = {"gptq": packed, "awq": wide}.get(owner.name, 0)
    if rows and other > len(rows) / 2:
        title = OWNERS["awq" if owner.name == "gptq" else "gptq"].title
        report.fault(
            "owner",
            path / CONFIG_FILE,
            f"says that the weights are {owner.title}'s, and {other} of {len(rows)} are packed as {title}'s",
            f"quant_method must be '{title.lower()}', or the tensors must be {owner.title}'s",
        )
        return False
    others: dict[str, list[str]] = {}
    for name in stored:
        part = next((part for part in _TELLING if name.endswith(f".{part}")), None)
        if part is None or name in used:
            continue
        if part in owner.parts:
            report.fault(
                "tensor-missing",
                name,
                f"is there without a {' or '.join(owner.signature)} of '{name.removesuffix('.' + part)}'",
                "a module must have all of its tensors",
            )
        else:
            others.setdefault(_TELLING[part].title, []).append(name)
    for title, names in others.items():
        report.fault(
            "two-methods",
            path,
            f"has {listed(names)} of {title}, and its configuration says {owner.title}",
            "all tensors must be of one method",
        )
    for name in modules:
        if f"{name}.weight" in stored and "weight" not in modules[name]:
            report.fault(
                "two-methods",
                f"{name}.weight",
                f"is there beside a quantized weight of {owner.title}",
                "a module must have one of them",
            )
    if not modules:
        report.fault(
            "owner",
            path,
            f"says that it is quantized by {owner.title}, and no module is",
            f"its modules must have {' or '.join(owner.signature)}",
        )
        return False
    return True


def _module(
    owner: Owner,
    settings: Config,
    name: str,
    parts: tuple[str, ...],
    stored: Mapping[str, StoredTensor],
    found: zeros.Zeros,
    report: Report,
) -> ModuleEntry | None:
    scheme = settings.scheme(name)
    if scheme is None:
        report.fault(
            "configuration",
            name,
            "is quantized, and the configuration says that it isn't",
            "both must say the same",
        )
        return None
    own = [part for part in parts if part not in owner.beside]
    tensors = {part: _one(stored[f"{name}.{part}"]) for part in own}
    sound = [
        values.check_scales(
            f"{name}.{part}",
            tensors[part],
            report,
            signed=part in ("scales", "weight_scale") and _may_be_signed(scheme),
        )
        for part in values.SCALES
        if part in tensors
    ]
    try:
        entry = _entry(owner, scheme, name, tensors, report)
    except ValueError as error:
        report.fault("shape", name, str(error), "its tensors must fit each other and the configuration")
        return None
    if entry is None or not all(sound):
        return entry
    try:
        _zero_scales(owner, scheme, name, tensors, report)
        finding = zeros.look(owner.name, name, scheme, tensors, report)
    except ValueError as error:
        report.fault("values", name, str(error), "its values must be those of the configuration")
        return None
    if finding is not None:
        found.found[name] = finding
    return entry


def _entry(
    owner: Owner, scheme: Any, name: str, tensors: Mapping[str, Tensor], report: Report
) -> ModuleEntry | None:
    """The module's entry; None, and a fault, where g_idx isn't one. Raises ValueError as the scheme does."""
    part = next((part for part in ("g_idx", "weight_g_idx") if part in tensors), None)
    if "weight_shape" in tensors and tensors["weight_shape"].numel() == 2:
        n, k = map(int, tensors["weight_shape"].tolist())
        if min(n, k) < 1 or n * k > MOST_WEIGHTS:
            raise ValueError(f"weight_shape is {[n, k]}, which is no shape of a matrix")
    entry: ModuleEntry = scheme.entry(tensors)
    if part is not None and tensors[part].dim() == 1:
        groups = 1 if scheme.group <= 0 else -(-entry.shape[1] // scheme.group)
        if not values.check_order(f"{name}.{part}", tensors[part], scheme.group, groups, report):
            return None
    return entry


def _may_be_signed(scheme: Any) -> bool:
    return (
        zeros.symmetric_label(scheme)
        if hasattr(scheme, "symmetric") or hasattr(scheme, "zero_point")
        else False
    )


def _zero_scales(owner: Owner, scheme: Any, name: str, tensors: Mapping[str, Tensor], report: Report) -> None:
    """Unpack the module where a scale is 0 and see whose."""
    for part in values.SCALES:
        scales = tensors.get(part)
        if (
            scales is not None
            and scales.is_floating_point()
            and "nested" not in part
            and bool((scales == 0).any())
        ):
            values.check_zero_scales(f"{name}.{part}", sample.as_stored(scheme).unpack(tensors), report)


def _judge(path: Path, owner: Owner, settings: Any, found: zeros.Zeros, report: Report) -> None:
    """Zero points that are wrong by one: the label's fault if it is that of all modules, else each module's."""
    off = {name: finding for name, finding in found.found.items() if finding.shift}
    moves = {finding.shift for finding in off.values()}
    version = getattr(getattr(settings, "default", None), "version", None)
    telling = [finding for finding in found.found.values() if not finding.undecided]
    right = {1: -1, 2: 1}.get(version or 0)
    if off and len(off) == len(telling) and moves == {right}:
        other = 3 - int(version or 0)
        report.fault(
            "zeros-off-by-one",
            path / CONFIG_FILE,
            f"says version {version} of GPTQ's format, and the zero points of all {len(off)} modules that tell are "
            f"those of version {other}: read as they are labelled, {_how(list(off.values()))}",
            f"checkpoint_format must be '{_FORMATS[other]}'",
            zeros.RELABEL,
        )
        report.labels["checkpoint_format"] = _FORMATS[other]
    else:
        for name, finding in off.items():
            _one_off(f"{name}.{_ZEROS[owner.name]}", finding, report)
    open_ = [name for name, finding in found.found.items() if finding.undecided and not finding.shift]
    if open_:
        report.doubt(
            path,
            f"whether the zero points of {listed_modules(open_)} are right is undecided: their weights don't lie "
            "round 0, which may be so or may be the zero points' fault",
        )


def _check_borrows(found: zeros.Zeros, report: Report) -> None:
    """Of version 1 of GPTQ: whether 1 was subtracted from whole words."""
    if found.alone is None:
        return
    report.alone = True
    for name, finding in found.found.items():
        if finding.borrows is not None and finding.borrows.count:
            report.fault(
                "zeros-borrow",
                f"{name}.qzeros",
                "zero points that stand above a 0 in their word are too large by one (over all modules by "
                f"{found.alone.share:.2f} +- {found.alone.error:.2f}): each was packed by itself",
                "1 must be subtracted from whole words",
                zeros.REBORROW,
            )


def _check_labels(
    path: Path, owner: Owner, settings: Any, entries: Mapping[str, ModuleEntry], report: Report
) -> None:
    """Labels of the configuration that tensors contradict."""
    if any(problem.kind == "symmetry" for problem in report.problems):
        report.labels |= {"gptq": {"sym": False}, "awq": {"zero_point": True}}.get(owner.name, {})
    ordered = [name for name, entry in entries.items() if entry.g_idx]
    if owner.name == "gptq" and ordered and not settings.desc_act:
        report.fault(
            "desc_act",
            path / CONFIG_FILE,
            f"says desc_act false, and g_idx of {listed_modules(ordered)} isn't in order",
            "it must be true: loaders that believe it take no notice of g_idx",
            zeros.RELABEL,
        )
        report.labels["desc_act"] = True


_FORMATS = {version: name for name, version in gptq.FORMATS.items()}
_ZEROS = {"gptq": "qzeros", "awq": "qzeros", "compressed-tensors": "weight_zero_point", "bitfold": "zeros"}


def _one_off(where: str, finding: zeros.Finding, report: Report) -> None:
    size = "small" if finding.shift > 0 else "large"
    change = "larger by one" if finding.shift > 0 else "smaller by one"
    report.fault(
        "zeros-off-by-one",
        where,
        f"its zero points are too {size} by one: {_how([finding])}",
        f"each must be {change}",
        zeros.REWRITE_ZEROS.format(change=change),
    )


def _how(findings: list[zeros.Finding]) -> str:
    if all(finding.symmetric for finding in findings):
        return "all of them are next to the middle of the codes, where symmetric weights have theirs"
    means = [finding.centre.mean.value for finding in findings if finding.centre is not None]
    means = [mean for mean in means if math.isfinite(mean)]
    mean = sum(means) / max(1, len(means))
    return f"the weights of a group average {mean:+.2f} steps, whatever its step is"


def listed_modules(names: list[str]) -> str:
    """'1 module (a)', '3 modules (a, b, ...)'."""
    shown = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
    return f"{len(names)} module{'s' if len(names) > 1 else ''} ({shown})"


# ---- bitfold's own ----


def _own(
    path: Path,
    config: dict[str, Any],
    stored: Mapping[str, StoredTensor],
    report: Report,
    progress: Progress | None,
) -> tuple[dict[str, ModuleEntry], set[str]]:
    try:
        quantization: QuantizationConfig = read_quantization(path, config)
    except CheckpointError as error:
        report.fault(
            "configuration", path / CONFIG_FILE, str(error), "it must be one that this bitfold reads"
        )
        return {}, set(stored)
    used = set()
    found = zeros.Zeros()
    for done, (name, entry) in enumerate(quantization.modules.items()):
        parts = entry.parts()
        used |= {f"{name}.{part}" for part in parts}
        _own_module(name, entry, stored, found, report)
        if progress is not None:
            progress(name, done + 1, len(quantization.modules))
    report.modules = len(quantization.modules)
    found.settle()
    report.findings.update(found.found)
    _judge(path, _OWN, None, found, report)
    tied = set(quantization.tied) | set(quantization.tied.values())
    entries = {name: entry for name, entry in quantization.modules.items() if f"{name}.weight" not in tied}
    return entries, used


_OWN = Owner("bitfold", "bitfold", (), (), lambda section, origin: None)  # type: ignore[arg-type, return-value]


def _own_module(
    name: str, entry: ModuleEntry, stored: Mapping[str, StoredTensor], found: zeros.Zeros, report: Report
) -> None:
    planes = {}
    for part, spec in entry.parts().items():
        tensor = stored.get(f"{name}.{part}")
        if tensor is None:
            report.fault("tensor-missing", f"{name}.{part}", "is in no file", f"{entry.format} must have it")
        elif (DTYPES.get(tensor.dtype), tensor.shape) != (spec.dtype, spec.shape):
            report.fault(
                "shape",
                f"{name}.{part}",
                f"is {tensor.dtype} {list(tensor.shape)}",
                f"in {entry.format} of {list(entry.shape)} it must be {spec.dtype} {list(spec.shape)}",
            )
        else:
            planes[part] = _one(tensor)
    if len(planes) < len(entry.parts()):
        return
    if entry.kind == "experts":
        one = replace(entry, kind="linear", shape=entry.matrix)
        for expert in range(entry.shape[0]):
            own = {part: plane[expert] for part, plane in planes.items()}
            _matrix(expert_name(name, expert), one, own, None, report)
        return
    _matrix(name, entry, planes, found, report)


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


# ---- the model ----


def _check_model(
    path: Path,
    config: dict[str, Any],
    entries: Mapping[str, ModuleEntry],
    plain: Mapping[str, StoredTensor],
    report: Report,
) -> None:
    """Names and shapes of all tensors against the model that config.json describes."""
    if "model_type" not in config:
        report.doubt(
            path / CONFIG_FILE, "names no model_type, so names and shapes were not compared with a model's"
        )
        return
    try:
        model = hf.empty_causal_lm(path, config, torch.float32)
    except (CheckpointError, MissingExtraError) as error:
        report.doubt(path / CONFIG_FILE, f"names and shapes were not compared with a model's: {error}")
        return
    wanted: dict[str, tuple[int, ...]] = {}
    owners: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted[name] = tuple(tensor.shape)
        owners.setdefault(id(tensor), []).append(name)
    for name, entry in entries.items():
        shape = wanted.get(entry.weight_of(name))
        if shape is None:
            report.fault(
                "model",
                name,
                "is quantized, and the model of config.json has no such layer",
                "both must agree",
            )
        elif shape != entry.shape:
            report.fault("model", name, f"is {list(entry.shape)}", f"config.json makes it {list(shape)}")
    ignored = hf.ignored_names(model)
    for name, tensor in plain.items():
        if name in wanted:
            if tensor.shape != wanted[name]:
                report.fault(
                    "model", name, f"is {list(tensor.shape)}", f"config.json makes it {list(wanted[name])}"
                )
        elif not ignored.search(name):
            report.fault(
                "model",
                name,
                "is in the files, and the model of config.json has no such tensor",
                "both must agree",
            )
    there = set(plain) | {entry.weight_of(name) for name, entry in entries.items()}
    broken = {
        problem.where.split(".q")[0] for problem in report.problems if problem.kind in ("shape", "values")
    }
    for names in owners.values():
        if not there & set(names) and not any(name.removesuffix(".weight") in broken for name in names):
            report.fault("tensor-missing", names[0], "is in no file", "the model of config.json must have it")


def _one(tensor: StoredTensor) -> Tensor:
    return next(iter(read_tensors([tensor])))[1]


def refuse_faults(path: Path) -> None:
    """Raises CheckpointError, with the first fault and the way to see them all, where a directory that another library
    quantized has any. Doubts refuse nothing.
    """
    report = examine(path, thorough=False)
    if report.sound:
        return
    first, more = report.problems[0], len(report.problems) - 1
    others = f" ({more} more)" if more else ""
    mends = ", and --repair OUT mends it" if first.repair else ""
    raise CheckpointError(f"{path} is faulty: {first}{others}; 'bitfold check {path}' lists all{mends}")
