"""All that is looked at in a checkpoint, in order: files, configuration, tensors of each module, zero points,
the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitfold import hf
from bitfold.check import values
from bitfold.check.files import read_files, read_one
from bitfold.check.foreign import examine_foreign
from bitfold.check.own import examine_own
from bitfold.check.problem import Progress, Report
from bitfold.section import ModuleEntry
from bitfold.shards import CONFIG_FILE, CheckpointError, StoredTensor, read_json
from bitfold.versions import MissingExtraError
from bitfold.writer import is_bitfold_checkpoint

_FLOATS = ("F64", "F32", "F16", "BF16")


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
        raise hf.not_there(path)
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
        entries, used = examine_own(path, config, stored, report, progress)
    else:
        entries, used = examine_foreign(path, stored, report, progress)
    plain = {name: tensor for name, tensor in stored.items() if name not in used}
    if thorough:
        for name, tensor in plain.items():
            if tensor.dtype in _FLOATS:
                values.check_finite(name, read_one(tensor), report)
        if config and not any(problem.kind == "configuration" for problem in report.problems):
            _check_model(path, config, entries, plain, report)
    return report


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
