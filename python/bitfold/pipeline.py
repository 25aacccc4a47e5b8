"""Quantizing a model directory into another one, tensor by tensor, without ever holding the model in memory.

The model is built on the meta device to learn which modules there are; the recipe decides on names and
shapes; the sizes of all planes follow from the format, so every file is laid out before the first weight is
read. Then each weight is mapped, encoded, compared with its source and written.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold import hf, recipes
from bitfold.checkpoint import (
    ModuleEntry,
    QuantizationConfig,
    check_shapes,
    listed,
)
from bitfold.formats import parse
from bitfold.quantize import ModuleSummary, QuantizationSummary, describe, encode_named, summarize
from bitfold.recipes import Assignment, ModuleInfo, Recipe
from bitfold.shards import CheckpointError, StoredTensor, TensorSpec, read_directory, read_tensors
from bitfold.writer import SHARD_BYTES, CheckpointWriter, check_target, files_to_copy

REPORT_FILE = "bitfold_report.json"
ENCODABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FINITE_CHUNK = 1 << 20  # elements checked for NaN at a time

Progress = Callable[[str, int, int], None]
"""Told after each tensor: its name, the source bytes done so far, the source bytes to do in all."""


@dataclass(frozen=True)
class _Step:
    """One tensor of the source: what it is called in the model, and the format of its module (None: kept)."""

    name: str
    stored: StoredTensor
    module: str
    format: str | None

    def specs(self) -> list[TensorSpec]:
        """What it becomes."""
        if self.format is None:
            return [TensorSpec(self.name, self.stored.torch_dtype, self.stored.shape)]
        n, k = self.stored.shape
        laws = parse(self.format).planes
        return [TensorSpec(f"{self.module}.{law.name}", law.dtype, law.shape(n, k)) for law in laws]


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Recipe,
    *,
    force: bool = False,
    clamp: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizationSummary:
    """Quantize a Hugging Face model directory into a new one.

    Args:
        source: the directory of a causal language model: config.json and safetensors, in one file or several.
        target: the directory to make; tokenizer and generation settings are copied along, and what was done
            is noted in bitfold_report.json. It appears as a whole at the end, or not at all.
        recipe: what `recipes.get` takes.
        force: replace a bitfold checkpoint that is at `target`, at the end.
        clamp: with cast formats, values out of range become the largest finite one instead of an error.
        shard_bytes: the largest size of a file.
        progress: told after each tensor.

    Memory: about one weight matrix and its planes, whatever the size of the model.

    Raises:
        CheckpointError: the source is incomplete, truncated or contradicts its config.json; the target is
            taken or its disk too small.
        ValueError: the recipe is unknown or doesn't fit; a weight holds NaN or doesn't fit its format.
        OSError: the target can't be written.
        MissingExtraError: transformers is not installed.
    """
    source, target = Path(source), Path(target)
    recipe = recipes.get(recipe)
    config = hf.read_config(source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise CheckpointError(f"{source} is quantized already, by '{method}'; give the unquantized model")
    target = check_target(target, force=force)
    if source.resolve().is_relative_to(target):
        raise CheckpointError(f"{target} is or contains the model to quantize; choose another output")

    stored = read_directory(source)
    model = hf.empty_causal_lm(source, config, hf.config_dtype(config))
    infos = describe(model)
    assignments = recipes.assign(recipe, infos)
    state = model.state_dict(keep_vars=True)
    steps = _plan(source, stored, state, infos, assignments, hf.ignored_names(model))
    specs = [spec for step in steps for spec in step.specs()]
    bytes_before = sum(step.stored.nbytes for step in steps)
    bytes_after = sum(spec.nbytes for spec in specs)

    summaries: list[ModuleSummary] = []
    done = 0
    with CheckpointWriter(target, specs, force=force, shard_bytes=shard_bytes) as writer:
        for step, (_, tensor) in zip(steps, read_tensors(step.stored for step in steps), strict=True):
            if step.format is None:
                check_finite(step.name, tensor)
                writer.write(step.name, tensor)
            else:
                qtensor = encode_named(step.name, tensor, step.format, clamp=clamp)
                summaries.append(summarize(step.module, tensor, qtensor))
                for plane, values in qtensor.planes.items():
                    writer.write(f"{step.module}.{plane}", values)
                del qtensor, values
            del tensor
            _give_back_memory()
            done += step.stored.nbytes
            if progress is not None:
                progress(step.name, done, bytes_before)
        summary = QuantizationSummary(
            recipe=recipe.name,
            modules=tuple(summaries),
            parameters=sum(math.prod(step.stored.shape) for step in steps),
            bytes_before=bytes_before,
            bytes_after=bytes_after,
        )
        writer.add_json(REPORT_FILE, report(summary))
        for file in files_to_copy(source):
            writer.add_copy(file)
        section = _quantization_config(recipe, steps, state, infos, assignments)
        writer.commit({**config, "quantization_config": section.to_json()})
    return summary


def _give_back_memory() -> None:
    """Return freed heap pages to the system: glibc keeps what aligned blocks of changing size left behind, which
    would add up to several matrices."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _plan(
    source: Path,
    stored: Mapping[str, StoredTensor],
    state: Mapping[str, Tensor],
    infos: Mapping[str, ModuleInfo],
    assignments: Mapping[str, Assignment],
    ignored: Any,
) -> list[_Step]:
    """One step for each distinct tensor of the model, in the order in which they lie in the files."""
    used = {name: tensor for name, tensor in stored.items() if name in state or not ignored.search(name)}
    check_shapes(source, used, state)
    weights = {
        f"{module}.{parameter}": module for module, info in infos.items() for parameter in info.parameters
    }
    steps, missing = [], []
    for owner, names in _groups(state).items():
        present = [used[name] for name in names if name in used]
        if not present:
            missing.append(owner)
            continue
        _check_same(present)
        module = weights.get(owner, "")
        format = assignments[module].format if module else None
        if format is not None and present[0].torch_dtype not in ENCODABLE:
            raise CheckpointError(
                f"{source}: '{owner}' is {present[0].dtype}, no floating-point weight to quantize"
            )
        steps.append(_Step(owner, present[0], module, format))
    if missing:
        raise CheckpointError(f"{source} lacks {listed(missing)}, which its config.json asks for")
    order = {name: i for i, name in enumerate(stored)}
    return sorted(steps, key=lambda step: order[step.stored.name])


def _groups(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of each distinct tensor of a model (tied ones have several), by its first name."""
    owners: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(owners.setdefault(id(tensor), name), []).append(name)
    return groups


def _check_same(tensors: list[StoredTensor]) -> None:
    """Tied weights may be stored under both names; then they must be the same."""
    first, *others = tensors
    for other in others:
        (_, one), (_, two) = read_tensors([first, other])
        if not torch.equal(one, two):
            raise CheckpointError(
                f"{other.path}: config.json ties '{other.name}' to '{first.name}', but their values differ"
            )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError, naming the place (row, column), where a tensor holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _FINITE_CHUNK):
        bad = ~torch.isfinite(flat[start : start + _FINITE_CHUNK].float())
        if bad.any():
            index = start + int(bad.nonzero()[0])
            place = [int(i) for i in torch.unravel_index(torch.tensor(index), tensor.shape)]
            raise ValueError(f"{name}: element {place} is {flat[index].item()}; it must be finite")


def _quantization_config(
    recipe: Recipe,
    steps: list[_Step],
    state: Mapping[str, Tensor],
    infos: Mapping[str, ModuleInfo],
    assignments: Mapping[str, Assignment],
) -> QuantizationConfig:
    """What `load` needs: every quantized module, and which tensors stand for others."""
    dtypes = {step.module: step.stored.torch_dtype for step in steps}
    modules: dict[str, ModuleEntry] = {}
    tied: dict[str, str] = {}
    for name, info in infos.items():
        format = assignments[name].format
        if format is None:
            continue
        owner = info.tied_to or name
        dtype = dtypes[owner] if info.kind == "embedding" else None
        modules[name] = ModuleEntry(info.kind, format, (info.shape[0], info.shape[1]), dtype=dtype)
        if owner != name:
            tied.update({f"{name}.{law.name}": f"{owner}.{law.name}" for law in parse(format).planes})
    kept = {step.name for step in steps if step.format is None}
    for owner, names in _groups(state).items():
        if owner in kept:
            tied.update(dict.fromkeys(names[1:], owner))
    return QuantizationConfig(recipe.name, modules, tied)


def report(summary: QuantizationSummary) -> dict[str, object]:
    """The summary as JSON: what bitfold_report.json holds."""
    modules = []
    for module in summary.modules:
        fields = dataclasses.asdict(module)
        fields["bits_per_weight"] = 8 * module.bytes_after / math.prod(module.shape)
        modules.append(fields)
    return {
        "recipe": summary.recipe,
        "parameters": summary.parameters,
        "quantized_parameters": summary.quantized_parameters,
        "share": summary.share,
        "bytes_before": summary.bytes_before,
        "bytes_after": summary.bytes_after,
        "modules": modules,
    }
