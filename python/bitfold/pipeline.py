"""Quantizing a model directory into another one, tensor by tensor, without ever holding the model in memory.

Every file is laid out before the first weight is read (layout.py). Then each weight is mapped, encoded, compared
with its source and written.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitfold import layout, recipes
from bitfold.fields import Fields
from bitfold.formats import parse
from bitfold.layout import Source, Step
from bitfold.quantize import ModuleSummary, QuantizationSummary, encode_named, refuse_calibration, summarize
from bitfold.rules import Assignment, Recipe, assign
from bitfold.section import ModuleEntry, QuantizationConfig
from bitfold.shards import StoredTensor, read_json
from bitfold.writer import SHARD_BYTES, CheckpointWriter, check_target, files_to_copy, refuse_source

REPORT_FILE = "bitfold_report.json"
SEEN_FILE = "bitfold_calibration.json"
"""What a checkpoint was calibrated on, or its formats chosen by (calibration/overlap.py)."""
_FINITE_CHUNK = 1 << 20  # elements checked for NaN at a time

Progress = Callable[[str, int, int], None]
"""Told after each tensor: its name, the source bytes done so far, the source bytes to do in all."""


@dataclass(frozen=True)
class Origin:
    """How a recipe was chosen for this model, to be noted beside it. report: what bitfold_report.json says of it, under
    `name`; seen: the passages of the texts that it was chosen by (`calibration.overlap.to_json`)."""

    report: Mapping[str, object]
    seen: Mapping[str, object]
    name: str = "allocation"

    @property
    def described(self) -> dict[str, object]:
        """For bitfold_report.json."""
        return {self.name: self.report}


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Recipe,
    *,
    force: bool = False,
    clamp: bool = False,
    shard_bytes: int = SHARD_BYTES,
    origin: Origin | None = None,
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
        origin: how the recipe was chosen, where that is to be noted.
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
    refuse_calibration(recipe)
    target = check_target(target, force=force)
    refuse_source(source, target)
    model = layout.read_source(source)
    assignments = assign(recipe, model.infos)
    steps = layout.steps(model, assignments)
    specs = [spec for step in steps for spec in step.specs()]
    bytes_before = sum(step.source_bytes for step in steps)
    bytes_after = sum(spec.nbytes for spec in specs)

    summaries: list[ModuleSummary] = []
    done = 0
    with CheckpointWriter(target, specs, force=force, shard_bytes=shard_bytes) as writer:
        for step, tensors in layout.read_steps(steps):
            for expert in range(step.experts) if step.experts else [None]:
                summaries += write_tensor(step, next(tensors), writer, expert, clamp=clamp)
                give_back_memory()
            done += step.source_bytes
            if progress is not None:
                progress(step.name, done, bytes_before)
        summary = QuantizationSummary(
            recipe=recipe.name,
            modules=tuple(summaries),
            parameters=sum(math.prod(step.shape) for step in steps),
            bytes_before=bytes_before,
            bytes_after=bytes_after,
        )
        writer.add_json(REPORT_FILE, {**report(summary), **(origin.described if origin else {})})
        if origin is not None:
            writer.add_json(SEEN_FILE, origin.seen)
        for file in files_to_copy(source):
            writer.add_copy(file)
        section = quantization_config(recipe, steps, model, assignments)
        writer.commit({**model.config, "quantization_config": section.to_json()})
    return summary


def write_tensor(
    step: Step, tensor: Tensor, writer: CheckpointWriter, expert: int | None, *, clamp: bool = False
) -> list[ModuleSummary]:
    """Write a tensor of the source, or one matrix of a stack of experts: as it is, or rounded to nearest, and what is
    to be said of that. Raises ValueError where it isn't finite or doesn't fit its format."""
    if step.format is None:
        check_finite(step.name, tensor)
        writer.write(step.name, tensor, expert)
        return []
    module = step.layers[expert or 0]
    qtensor = encode_named(f"{module}.weight", tensor, step.format, clamp=clamp)
    for plane, values in qtensor.planes.items():
        writer.write(f"{step.module}.{plane}", values, expert)
    return [summarize(module, tensor, qtensor)]


def give_back_memory() -> None:
    """Return freed heap pages to the system: glibc keeps what aligned blocks of changing size left behind, which
    would add up to several matrices."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


def quantization_config(
    recipe: Recipe,
    steps: list[Step],
    source: Source,
    assignments: Mapping[str, Assignment],
    calibrated: Mapping[str, StoredTensor] | None = None,
) -> QuantizationConfig:
    """What `load` needs: every quantized module, and which tensors stand for others; calibrated: the tensors of modules
    that calibration made, by name: what there is beside planes is found among them."""
    calibrated = calibrated or {}
    dtypes = {step.module: step.dtype for step in steps}
    modules: dict[str, ModuleEntry] = {}
    tied: dict[str, str] = {}
    for name, info in source.infos.items():
        format = assignments[name].format
        if format is None:
            continue
        owner = info.tied_to or name
        dtype = dtypes[owner] if info.kind == "embedding" else None
        copy = calibrated.get(f"{name}.outlier_weight")
        modules[name] = ModuleEntry(
            info.kind,
            format,
            info.shape,
            dtype=dtype,
            g_idx=f"{name}.g_idx" in calibrated,
            activations=assignments[name].activations.having(
                step=f"{name}.x_scale" in calibrated, outliers=copy is not None
            ),
            x_scale=f"{name}.x_scale" in calibrated,
            outliers=0 if copy is None else copy.shape[1],
            outlier_dtype=None if copy is None else copy.torch_dtype,
        )
        if owner != name:
            tied.update({f"{name}.{law.name}": f"{owner}.{law.name}" for law in parse(format).planes})
    kept = {step.name for step in steps if step.format is None}
    for owner, names in layout.groups(source.state).items():
        if owner in kept:
            tied.update(dict.fromkeys(names[1:], owner))
    return QuantizationConfig(recipe.name, modules, tied)


def report(summary: QuantizationSummary) -> dict[str, object]:
    """The summary as JSON: what bitfold_report.json holds."""
    modules = []
    for module in summary.modules:
        fields = dataclasses.asdict(module)
        if module.calibration is None:
            del fields["calibration"]
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


def noted_errors(path: Path) -> dict[str, float]:
    """What `report` noted beside a checkpoint: relative_rmse of each module by its name; empty where there is nothing.

    Raises CheckpointError where bitfold_report.json isn't what it made.
    """
    file = path / REPORT_FILE
    if not file.exists():
        return {}
    modules = Fields(read_json(file), file, "").entries("modules")
    return {module.take("name", str): module.number("relative_rmse") for module in modules}
