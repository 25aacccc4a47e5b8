"""What is looked at in a checkpoint that another library quantized: whose tensors it has, each module, and labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfold.check import sample, values, zeros
from bitfold.check.files import read_one
from bitfold.check.problem import Progress, Report
from bitfold.check.told import listed_modules, tell
from bitfold.foreign.owners import OWNERS, Owner, read_owner
from bitfold.foreign.scheme import Config
from bitfold.section import ModuleEntry
from bitfold.shards import CONFIG_FILE, CheckpointError, StoredTensor, listed

_TELLING = {part: owner for owner in OWNERS.values() for part in owner.parts if part != "weight"}
MOST_WEIGHTS = 1 << 40  # of one matrix; more is a shape that overflowed


def examine_foreign(
    path: Path, stored: Mapping[str, StoredTensor], report: Report, progress: Progress | None
) -> tuple[dict[str, ModuleEntry], set[str]]:
    """The modules' entries, and the names of their tensors."""
    try:
        found = read_owner(path)
    except CheckpointError as error:
        report.misread(path / CONFIG_FILE, error)
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
    tell(path, owner.name, getattr(getattr(settings, "default", None), "version", None), found_zeros, report)
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
    own = [part for part in parts if part not in owner.beside or part in scheme.beside]
    tensors = {part: read_one(stored[f"{name}.{part}"]) for part in own}
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
        scheme.kept(tensors)
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
