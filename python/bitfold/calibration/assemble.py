"""The checkpoint of a calibration: finished blocks out of the journal, and the rest of the source, tensor by tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitfold.calibration import overlap
from bitfold.calibration.job import Job
from bitfold.calibration.journal import Journal
from bitfold.layout import Step, read_steps
from bitfold.nn import KEPT_PARTS
from bitfold.pipeline import REPORT_FILE, Origin, give_back_memory, quantization_config, report, write_tensor
from bitfold.quantize import CalibrationSummary, ModuleSummary, QuantizationSummary
from bitfold.shards import StoredTensor, TensorSpec, read_tensors
from bitfold.writer import CheckpointWriter, files_to_copy


def assemble(
    job: Job,
    journal: Journal,
    target: Path,
    *,
    force: bool,
    shard_bytes: int,
    origin: Origin | None = None,
) -> QuantizationSummary:
    """Write the checkpoint from the finished blocks and the rest of the source."""
    finished: dict[str, StoredTensor] = {}
    summaries: dict[str, ModuleSummary] = {}
    for block in range(len(job.blocks.names)):
        finished.update(journal.tensors(block))
        for entry in journal.report(block):
            summaries[entry["name"]] = _read_summary(entry)
    done = [_done_parts(step, finished) for step in job.steps]
    specs: list[TensorSpec] = []
    for step, parts in zip(job.steps, done, strict=True):
        specs += [TensorSpec(p.name, p.torch_dtype, p.shape) for p in parts] if parts else step.specs()
    with CheckpointWriter(target, specs, force=force, shard_bytes=shard_bytes) as writer:
        for step, parts in zip(job.steps, done, strict=True):
            for name, tensor in read_tensors(parts):
                writer.write(name, tensor)
            if not parts:
                _write_outside(job, step, writer, summaries)
            give_back_memory()
        summary = QuantizationSummary(
            recipe=job.recipe.name,
            modules=tuple(summaries[n] for step in job.steps if step.format is not None for n in step.layers),
            parameters=sum(math.prod(step.shape) for step in job.steps),
            bytes_before=sum(step.source_bytes for step in job.steps),
            bytes_after=sum(spec.nbytes for spec in specs),
        )
        described = {"calibration": job.described(), **(origin.described if origin else {})}
        writer.add_json(REPORT_FILE, {**report(summary), **described})
        seen = overlap.sample_of(job.text.ids)
        if origin is not None:
            seen = np.union1d(seen, overlap.from_json(origin.seen, target / overlap.FILE))
        writer.add_json(overlap.FILE, overlap.to_json(seen))
        for file in files_to_copy(job.source.path):
            writer.add_copy(file)
        section = quantization_config(job.recipe, job.steps, job.source, job.assignments, finished)
        writer.commit({**job.source.config, "quantization_config": section.to_json()})
    return summary


def _done_parts(step: Step, finished: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """What a tensor of the source became in a finished block; empty where it lies in none."""
    if step.name in finished:
        return [finished[step.name]]
    names = [spec.name for spec in step.specs()]
    if names[0] not in finished:
        return []
    beside = [f"{step.module}.{part}" for part in ("g_idx", *KEPT_PARTS)]
    return [finished[name] for name in [*names, *beside] if name in finished]


def _write_outside(
    job: Job, step: Step, writer: CheckpointWriter, summaries: dict[str, ModuleSummary]
) -> None:
    """Write a tensor that is in no block: kept, or rounded to nearest."""
    ((_, tensors),) = read_steps([step])
    for expert, tensor in enumerate(tensors):
        made = write_tensor(step, tensor, writer, expert if step.experts else None)
        rule = job.assignments[step.module].rule if step.module else None
        for summary in made:
            if rule is not None and rule.needs_calibration:
                note = "rounded plainly: it is outside of the decoder blocks"
                summary = dataclasses.replace(summary, calibration=CalibrationSummary("rtn", note=note))
            summaries[summary.name] = summary


def _read_summary(entry: Mapping[str, Any]) -> ModuleSummary:
    """A module's summary as the journal keeps it."""
    calibration = entry["calibration"]
    fields = {
        **entry,
        "shape": tuple(entry["shape"]),
        "calibration": None if calibration is None else CalibrationSummary(**calibration),
    }
    return ModuleSummary(**fields)
