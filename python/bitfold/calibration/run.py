"""Quantizing a model directory by what its layers multiply: block after block, each finished one durable.

What a layer gets is what the blocks and layers before it, quantized, make of the text. A block's weights are mapped
when its turn comes and gone when it is done; what stays is the samples' activations. Layers outside of the blocks (an
output head that the recipe names) and embeddings are rounded to nearest, as `quantize_checkpoint` does it.

Nothing is written to the target until all blocks are finished; then their tensors are copied out of the journal
(journal.py) and the rest is quantized from the source, tensor by tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold import hf, layout, recipes
from bitfold.activations import FLOAT
from bitfold.calibration import data
from bitfold.calibration.activations import Activations, are_kept
from bitfold.calibration.assemble import assemble
from bitfold.calibration.blocks import BlockModel, Call
from bitfold.calibration.collect import BlockRun, bundle_of
from bitfold.calibration.job import Job
from bitfold.calibration.journal import Journal
from bitfold.calibration.methods import METHODS, Rounded, round_plainly
from bitfold.calibration.processes import Processes
from bitfold.calibration.ranges import kept_for
from bitfold.calibration.workers import Workers
from bitfold.experts import DOWN, GATE_UP, QuantStack, stack_name
from bitfold.formats import parse
from bitfold.layout import Step
from bitfold.nn import KEPT_PARTS
from bitfold.pipeline import Origin, check_finite, give_back_memory
from bitfold.qtensor import QTensor
from bitfold.quantize import (
    CalibrationSummary,
    ModuleSummary,
    QuantizationSummary,
    summarize,
)
from bitfold.rules import Assignment, Recipe, Rule, assign
from bitfold.shards import StoredTensor, read_tensors
from bitfold.writer import SHARD_BYTES, check_target, refuse_source, remove_abandoned

ACTIVATIONS = ("ram", "disk")
_BLOCK = 1000  # units of progress for a block

Progress = Callable[[str, int, int], None]
"""Told as work goes on: what is worked on, the work done so far, the work to do in all."""


def quantize_calibrated(
    source: str | Path,
    target: str | Path,
    recipe: str | Path | Recipe,
    calibration: str | Path,
    *,
    samples: int = data.SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    allow_uncalibrated: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    activations: str = "ram",
    work_dir: str | Path | None = None,
    restart: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    origin: Origin | None = None,
    progress: Progress | None = None,
) -> QuantizationSummary:
    """Quantize a Hugging Face model directory into a new one, calibrated on a text.

    Args:
        source: the directory of a causal language model: config.json, safetensors, tokenizer.
        target: the directory to make, as `quantize_checkpoint` makes it; bitfold_report.json says more, and
            bitfold_calibration.json holds what tells whether another text overlaps with this one.
        recipe: what `recipes.get` takes.
        calibration: a text file, JSON lines, or "dataset:NAME" (data.py).
        samples, sequence_length, seed: what is drawn from it; sequence_length None: 2048 or the model's context.
        allow_uncalibrated: round plainly what the calibration text never reaches, and mark it, instead of an error.
        dtype: to compute in. Weights stay as they are stored.
        device: where blocks compute.
        activations: "ram", or "disk": in two files of the work folder.
        work_dir: for finished blocks; None: a hidden folder beside the target. A run that was stopped, however, goes on
            from there when it is called again with the same arguments.
        restart: drop what an earlier run left there.
        force: replace a bitfold checkpoint that is at `target`, at the end.
        shard_bytes: the largest size of a file.
        origin: how the recipe was chosen, where that is to be noted.
        progress: told as work goes on.

    Memory: a block, the Hessian of one layer and what its solver takes, and the activations of all samples. The same
    bytes come out for any number of threads, interrupted or not.

    Raises:
        CheckpointError: as `quantize_checkpoint`; the model's blocks can't be found or run one at a time; the work
            folder is that of a run with another model, recipe or calibration.
        ValueError: as `quantize_checkpoint`; the recipe needs no calibration; the text is empty or too short;
            activations aren't finite (the block is named); the text never reaches a layer, unless that is allowed.
        OSError: a file can't be read or written.
        MissingExtraError: transformers, or for data sets datasets, is not installed.
    """
    source, target = Path(source), Path(target)
    recipe = recipes.get(recipe)
    if not recipe.gains:
        raise ValueError(
            f"recipe {recipe.name!r} rounds to nearest and has no use for a text to calibrate on: give one with a "
            "method, such as gptq-int4-g128, or with activations, such as llm-int8, or leave --calibration away "
            "(bitfold.quantize_checkpoint)"
        )
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}, it must be one of {', '.join(ACTIVATIONS)}")
    target = check_target(target, force=force)
    refuse_source(source, target)
    model = layout.read_source(source)
    assignments = assign(recipe, model.infos)
    steps = layout.steps(model, assignments)
    blocks = BlockModel(model, steps, dtype, torch.device(device))
    _refuse_outside(recipe, assignments, steps, blocks.names)
    text = data.read(
        calibration,
        hf.load_tokenizer(source),
        samples=samples,
        sequence_length=sequence_length or hf.context_up_to(model.model_config, data.SEQUENCE_LENGTH),
        seed=seed,
    )
    folder = Path(work_dir) if work_dir is not None else target.parent / f".{target.name}.calibration"
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(Processes())
        workers = stack.enter_context(Workers())
        share = processes.share(len(text.ids), bundle_of(text.ids.shape[1]))
        if not share:
            raise ValueError(
                f"samples is {samples}, too few of {text.ids.shape[1]} tokens for {processes.size} processes: each "
                f"must have at least {bundle_of(text.ids.shape[1])}"
            )
        told = progress if processes.rank == 0 else None
        job = _Run(
            model,
            recipe,
            assignments,
            steps,
            blocks,
            text,
            share,
            processes,
            workers,
            allow_uncalibrated,
            told,
        )
        journal = Journal(folder, job.fingerprint(workers), restart=restart)
        if processes.rank == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(target)
            stack.enter_context(journal)
        journal.finished = processes.from_rank(0, journal.finished)
        job.calibrate(journal, folder if activations == "disk" else None)
        summary = None
        if processes.rank == 0:
            summary = assemble(job, journal, target, force=force, shard_bytes=shard_bytes, origin=origin)
            journal.drop()
        return processes.from_rank(0, summary)


def _refuse_outside(
    recipe: Recipe, assignments: Mapping[str, Assignment], steps: Sequence[Step], blocks: Sequence[str]
) -> None:
    """Raises ValueError where a layer outside of the blocks needs what is found within them alone."""
    for step in steps:
        wanted = assignments[step.module].activations if step.module else FLOAT
        if wanted.needs_calibration and not step.name.startswith(tuple(f"{block}." for block in blocks)):
            raise ValueError(
                f"recipe {recipe.name!r} gives {step.module} the activations '{wanted}', but it is outside of the "
                f"decoder blocks, where nothing is calibrated; they must be 'float' or '{wanted.having()}'"
            )


@dataclass(frozen=True)
class _Run(Job):
    """The loop over the blocks. share: the samples of this process."""

    share: range
    processes: Processes
    workers: Workers
    allow_uncalibrated: bool
    progress: Progress | None

    def calibrate(self, journal: Journal, folder: Path | None) -> None:
        """Quantize the blocks that are not in the journal yet; folder: for activations, None: they stay in RAM."""
        first, count = journal.finished, len(self.blocks.names)
        if first == count:
            return
        hidden = self.source.model_config.get_text_config(decoder=True).hidden_size
        rows = self.text.ids[self.share.start : self.share.stop]
        shape, dtype, rank = (*rows.shape, hidden), self.blocks.dtype, self.processes.rank
        on_disk = folder is not None and are_kept(folder, shape, dtype, first, rank)
        inputs = Activations(shape, dtype, folder, first if on_disk else 0, rank)
        self._tell("the first block's inputs", 0)
        if on_disk:
            calls = self.blocks.first_inputs(rows[:2], lambda sample, x: None)
        else:
            calls = self.blocks.first_inputs(rows, inputs.write_first)
        for index in range(first if on_disk else 0, count):
            run = self._run_of(index, calls[index], inputs)
            if index < first:
                self._restore(run, journal.tensors(index))
                run.write_outputs()
                inputs.advance()
            else:
                modules = self._quantize(run)
                tensors = self._tensors_of(run)
                run.write_outputs()
                inputs.advance()
                if rank == 0:
                    journal.add(index, tensors, modules)
                self.processes.wait()
                del tensors
            del run
            give_back_memory()
            self._tell(self.blocks.names[index], (index + 1) * _BLOCK)

    def _run_of(self, index: int, call: Call, inputs: Activations) -> BlockRun:
        name = self.blocks.names[index]
        rules = {}
        for step in self._steps_of(name):
            rule = self.assignments[step.module].rule if step.format is not None else None
            if rule is not None:
                rules.update({layer.removeprefix(f"{name}."): rule for layer in step.layers})
        module = self.blocks.load(index)
        for key, parameter in module.named_parameters():
            check_finite(f"{name}.{key}", parameter)
        return BlockRun(
            name,
            module,
            rules,
            call,
            inputs,
            self.workers,
            self.blocks.dtype,
            self.processes,
            config=self.source.model_config,
            stored=self._kept(name),
        )

    def _steps_of(self, block: str) -> list[Step]:
        """The tensors of a block."""
        return [step for step in self.steps if step.name.startswith(f"{block}.")]

    def _is_open(self, step: Step) -> bool:
        """Whether it is a stack of experts that is taken apart while its block is quantized."""
        return bool(step.experts) and self.source.infos[step.module].obstacle is None

    def _kept(self, block: str) -> dict[str, torch.dtype]:
        """The dtypes in which the tensors of a block that are not quantized are stored, by their names within it (of
        experts, that of each matrix)."""
        found = {}
        for step in self._steps_of(block):
            names = [f"{layer}.weight" for layer in step.layers] if self._is_open(step) else [step.name]
            if step.format is None:
                found.update({name.removeprefix(f"{block}."): step.dtype for name in names})
        return found

    def _quantize(self, run: BlockRun) -> list[dict[str, Any]]:
        """Quantize a block's layers; returns what is to be reported."""
        self._refuse_unreached(run, [name for name in run.never_run if _needs_inputs(run.rules[name])])
        for name, method in METHODS.items():
            layers = [layer for group in run.groups for layer in group if run.rules[layer].method == name]
            if layers and method.prepare is not None:
                method.prepare(run, layers)
        run.settle(self._kept(run.name))
        modules = []
        run.forget()
        for number, group in enumerate((*run.groups, run.never_run)):
            kept = self._kept_for(run, group)
            rounded = dict(self._round_group(run, group, number))
            for layer, made in rounded.items():
                modules.append(self._summary(run, layer, made, kept.get(layer)))
                run.replace(layer, made.qtensor, kept.get(layer))
        run.close()
        return [dataclasses.asdict(module) for module in modules]

    def _kept_for(self, run: BlockRun, group: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """What the layers of a group keep for their activations, by what goes into them now. Experts, whose stacks have
        no place for it, and layers that nothing reaches keep nothing."""
        found = {}
        for layer in group:
            activations = run.rules[layer].activations
            if activations.gains and stack_name(layer) == layer and layer not in run.never_run:
                try:
                    found[layer] = kept_for(activations, run.ranges(layer), run.linear(layer).weight)
                except ValueError as error:
                    raise ValueError(f"{run.name}.{layer}: {error}") from error
        return found

    def _refuse_unreached(self, run: BlockRun, layers: Sequence[str]) -> None:
        """Raises ValueError, naming them, where there are layers that no token reaches, unless that is allowed."""
        if layers and not self.allow_uncalibrated:
            names = dict.fromkeys(
                name.removesuffix(f".{GATE_UP}").removesuffix(f".{DOWN}") for name in layers
            )
            listed = ", ".join(f"{run.name}.{name}" for name in names)
            raise ValueError(
                f"the calibration text never reaches {listed}: a longer text may, and --allow-uncalibrated "
                "(allow_uncalibrated=True) rounds such layers plainly and marks them"
            )

    def _round_group(self, run: BlockRun, group: Sequence[str], number: int) -> Iterator[tuple[str, Rounded]]:
        """Round layers that share an input; a process rounds some of them, and gets the others."""
        own: dict[str, Rounded] = {}
        for turn, layer in enumerate(group):
            self._tell(f"{run.name}.{layer}", self._done(run, number))
            method = METHODS[run.rules[layer].method]
            reached = layer not in run.never_run
            shared = method.gather is not None and reached
            if method.gather is not None and shared:
                method.gather(run, layer)
                # An expert may have lost its tokens to what was rounded before it.
                reached = run.tokens(layer) > 0
                self._refuse_unreached(run, [] if reached else [layer])
            if not shared or turn % self.processes.size == self.processes.rank:
                own[layer] = _round(run, layer, reached)
            give_back_memory()
        for turn, layer in enumerate(group):
            yield layer, self.processes.from_rank(turn % self.processes.size, own.get(layer))

    def _summary(
        self, run: BlockRun, layer: str, made: Rounded, kept: Mapping[str, Tensor] | None
    ) -> ModuleSummary:
        weight = run.linear(layer).weight
        summary = summarize(f"{run.name}.{layer}", weight, made.qtensor)
        step = next(step for step in self._steps_of(run.name) if f"{run.name}.{layer}" in step.layers)
        before = step.source_bytes // max(1, step.experts)
        found, after = made.summary, summary.bytes_after
        if kept is not None:
            found = dataclasses.replace(
                found or CalibrationSummary("rtn"),
                x_scale=kept["x_scale"].item() if "x_scale" in kept else None,
                outliers=None if "x_scale" in kept else len(kept.get("outlier_columns", ())),
            )
            after += sum(tensor.nbytes for tensor in kept.values())
        return dataclasses.replace(summary, bytes_before=before, bytes_after=after, calibration=found)

    def _tensors_of(self, run: BlockRun) -> dict[str, Tensor]:
        """What a quantized block is in the checkpoint."""
        tensors = {name: tensor.detach() for name, tensor in run.module.state_dict().items()}
        kept = self._kept(run.name)
        tensors = {name: tensor.to(kept.get(name, tensor.dtype)) for name, tensor in tensors.items()}
        return {f"{run.name}.{name}": tensor for name, tensor in tensors.items()}

    def _restore(self, run: BlockRun, stored: Mapping[str, StoredTensor]) -> None:
        """Make a block what it became when it was finished."""
        tensors = dict(read_tensors(stored.values()))
        device = self.blocks.device
        stacks: dict[str, QuantStack | Tensor] = {}
        for step in self._steps_of(run.name):
            within = step.module.removeprefix(f"{run.name}.")
            if step.format is None:
                if self._is_open(step):
                    stacks[within] = tensors.pop(step.name).to(device)
                continue
            planes = {law.name: tensors[f"{step.module}.{law.name}"] for law in parse(step.format).planes}
            if step.experts:
                stack = QuantStack(step.format, step.shape, planes).to(device)
                stack.activations = self.assignments[step.module].activations.having()
                stacks[within] = stack
                continue
            n, k = step.shape
            qtensor = QTensor(step.format, (n, k), planes, g_idx=tensors.get(f"{step.module}.g_idx"))
            kept = {part: f"{step.module}.{part}" for part in KEPT_PARTS}
            kept_here = {part: tensors[name].to(device) for part, name in kept.items() if name in tensors}
            run.replace(within, qtensor.to(device), kept_here)
        run.close(stacks)
        plain = (name for name in self._kept(run.name) if f"{run.name}.{name}" in tensors)
        run.set({name: tensors[f"{run.name}.{name}"] for name in plain})

    def _done(self, run: BlockRun, group: int) -> int:
        block = self.blocks.names.index(run.name)
        return block * _BLOCK + group * _BLOCK // (len(run.groups) + 1)

    def _tell(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(what, done, len(self.blocks.names) * _BLOCK)


def _needs_inputs(rule: Rule) -> bool:
    """Whether a layer that no input reaches can't be made as its rule has it."""
    return METHODS[rule.method].needs_inputs or rule.activations.needs_calibration


def _round(run: BlockRun, layer: str, reached: bool) -> Rounded:
    method = METHODS[run.rules[layer].method]
    if reached or not _needs_inputs(run.rules[layer]):
        return method.round(run, layer)
    note = "rounded plainly: the calibration text never reaches it"
    if run.rules[layer].activations.is_static:
        note += "; its inputs get a step for each row"
    return Rounded(round_plainly(run, layer).qtensor, CalibrationSummary("rtn", note=note))
