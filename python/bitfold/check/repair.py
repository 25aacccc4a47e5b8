"""A checkpoint without the faults whose right values are known: labels, zero points, orders of outputs,
indexes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.check import sample
from bitfold.check.examine import examine
from bitfold.check.files import read_files, read_one
from bitfold.check.problem import Problem, Progress, Report
from bitfold.check.zeros import Finding
from bitfold.foreign import words
from bitfold.foreign.owners import QUANTIZE_CONFIG_FILE, read_owner
from bitfold.qtensor import QTensor, pack
from bitfold.section import read_quantization
from bitfold.shards import CONFIG_FILE, CheckpointError, StoredTensor, TensorSpec, read_json
from bitfold.writer import SHARD_BYTES, CheckpointWriter, files_to_copy


@dataclass(frozen=True)
class Repaired:
    """before, after: the reports of what there was and of what was written; done: the faults that are gone."""

    before: Report
    after: Report
    done: tuple[Problem, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "repaired": [str(problem) for problem in self.done],
        }


def repair(
    source: str | Path,
    target: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Repaired:
    """Write a checkpoint directory anew without the faults that have a sure repair; all other tensors keep their
    bytes.

    Args:
        source: the directory. It is not changed.
        target: the directory to make; it must not exist. It appears as a whole or not at all.
        shard_bytes: the largest size of a file.
        progress: told after each module that is examined.

    Raises:
        CheckpointError: there is no fault, or none with a sure repair; or files are missing or damaged, so that the
            copy would be too.
        OSError: the target can't be written.
    """
    source, target = Path(source), Path(target)
    before = examine(source, progress=progress)
    if source.is_file():
        raise CheckpointError(f"{source} is a file; only directories are repaired")
    sure = tuple(problem for problem in before.problems if problem.repair)
    if not sure:
        what = (
            f"{len(before.problems)} faults, none of which has a sure repair"
            if before.problems
            else "no fault"
        )
        raise CheckpointError(f"{source} has {what}, so nothing is written")
    gone = [problem for problem in before.problems if problem.kind in ("file-missing", "file-damaged")]
    if gone:
        raise CheckpointError(f"{source} can't be repaired: {gone[0]}")
    stored = read_files(source, Report(source))
    rewritten = _modules(source, before, stored)
    specs, placed = [], set()
    for name, tensor in stored.items():
        module = next((module for module in rewritten if name.startswith(f"{module}.")), None)
        if module is None:
            specs.append(TensorSpec(name, tensor.torch_dtype, tensor.shape))
        elif module not in placed:
            placed.add(module)
            made = {**_others(module, rewritten[module], stored), **rewritten[module].tensors()}
            specs += [
                TensorSpec(f"{module}.{part}", values.dtype, tuple(values.shape))
                for part, values in made.items()
            ]
    config = read_json(source / CONFIG_FILE)
    with CheckpointWriter(target, specs, shard_bytes=shard_bytes) as writer:
        for name, tensor in stored.items():
            if not any(name.startswith(f"{module}.") for module in rewritten):
                writer.write(name, read_one(tensor))
        for module, work in rewritten.items():
            for part, values in {**_others(module, work, stored), **work.tensors()}.items():
                writer.write(f"{module}.{part}", values)
        for file in files_to_copy(source):
            if file.name == QUANTIZE_CONFIG_FILE and before.labels:
                writer.add_json(file.name, _relabelled(read_json(file), before.labels))
            else:
                writer.add_copy(file)
        if before.labels and isinstance(config.get("quantization_config"), dict):
            section = _relabelled(config["quantization_config"], before.labels)
            config = {**config, "quantization_config": section}
        writer.commit(config)
    after = examine(target)
    left = {(problem.kind, problem.where.replace(str(target), str(source))) for problem in after.problems}
    done = tuple(problem for problem in sure if (problem.kind, problem.where) not in left)
    return Repaired(before, after, done)


def _relabelled(section: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the labels that are right; GPTQModel says checkpoint_format twice."""
    changed = {**section, **labels}
    if "checkpoint_format" in labels and "format" in section:
        changed["format"] = labels["checkpoint_format"]
    return json.loads(json.dumps(changed))


@dataclass(frozen=True)
class _Work:
    """A module whose tensors are made anew; alone: its zero points were packed each by itself."""

    owner: str
    scheme: Any
    finding: Finding
    alone: bool
    stored: Mapping[str, StoredTensor]

    def tensors(self) -> dict[str, Tensor]:
        found = {part: read_one(tensor) for part, tensor in self.stored.items()}
        if self.owner == "bitfold":
            entry = self.scheme
            g_idx = found.pop("g_idx", None)
            fixed = _fixed(
                QTensor(entry.format, entry.matrix, found, entry.layout, g_idx), self.finding, None
            )
            return {**fixed.planes, **({} if g_idx is None else {"g_idx": g_idx})}
        free = sample.as_stored(self.scheme)
        qtensor = free.unpack(found)
        single = None
        if self.alone:
            raw = words.unpack(found["qzeros"], free.bits, qtensor.shape[0]).t()
            single = ((raw.to(torch.int16) + 1) % (1 << free.bits)).to(torch.uint8).contiguous()
        return free.pack(_fixed(qtensor, self.finding, single))


def _fixed(qtensor: QTensor, finding: Finding, single: Tensor | None) -> QTensor:
    """The matrix with right zero points, and its outputs in the right order; single: zero points to take
    instead.
    """
    logical = qtensor.unpack()
    assert logical.zeros is not None
    codes, zeros = logical.codes, logical.zeros
    if finding.order is not None:
        codes = codes if finding.order.codes is None else _eights(codes, finding.order.codes)
        zeros = zeros if finding.order.zeros is None else _eights(zeros, finding.order.zeros)
    zeros = zeros if single is None else single
    moved = ((zeros.to(torch.int16) + finding.shift) % (1 << finding.bits)).to(torch.uint8)
    right = logical._replace(codes=codes.contiguous(), zeros=moved.contiguous())
    return pack(**right._asdict(), format=qtensor.format, layout=qtensor.layout)


def _eights(values: Tensor, order: Sequence[int]) -> Tensor:
    return values.reshape(-1, 8, values.shape[1])[:, list(order)].reshape(values.shape)


def _modules(source: Path, before: Report, stored: Mapping[str, StoredTensor]) -> dict[str, _Work]:
    """The modules whose tensors are made anew. Where the label is at fault no zero point moves."""
    moved = "checkpoint_format" not in before.labels
    found: dict[str, _Work] = {}
    if before.owner == "bitfold":
        modules = read_quantization(source, read_json(source / CONFIG_FILE)).modules
        for name, finding in before.findings.items():
            if finding.shift:
                parts = {part: stored[f"{name}.{part}"] for part in modules[name].parts()}
                found[name] = _Work("bitfold", modules[name], finding, False, parts)
        return found
    owned = read_owner(source)
    if owned is None:
        return found
    owner, settings = owned
    for name, finding in before.findings.items():
        kept = finding if moved else replace(finding, shift=0)
        alone = before.alone and finding.borrows is not None and finding.borrows.count > 0
        if kept.shift or kept.order or alone:
            held = {part: stored[f"{name}.{part}"] for part in owner.parts if f"{name}.{part}" in stored}
            found[name] = _Work(owner.name, settings.scheme(name), kept, alone, held)
    return found


def _others(module: str, work: _Work, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """What lies under the module's name and isn't part of its weight: a bias, scales of activations."""
    names = [name for name in stored if name.startswith(f"{module}.")]
    parts = [name.removeprefix(f"{module}.") for name in names]
    return {part: read_one(stored[f"{module}.{part}"]) for part in parts if part not in work.stored}
