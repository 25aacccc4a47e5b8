"""What a recipe will cost, before anything is computed: bytes of the checkpoint, and the memory to run it (memory.py).

config.json is enough. The bytes of a checkpoint are exact, for they come from the layout that quantizing itself
writes by (layout.py); what a text decides, which columns of a weight LLM.int8() keeps in 16 bits, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from bitfold import formats, layout, recipes
from bitfold.activations import COPIED, Activations
from bitfold.activations import read as read_activations
from bitfold.layout import Source, Step
from bitfold.memory import REPACKED_BYTES, Memory, Run, activation, kv_cache, run_notes, run_of, workspace
from bitfold.presets import ATTENTION
from bitfold.qtensor import plan_linear
from bitfold.rules import Assignment, ModuleInfo, Recipe, assign

CLASSES = ("embeddings", "attention", "MLP", "experts", "other", "head", "rest")
"""Classes of tensors. "other" are linear layers elsewhere and routers, "rest" norms, biases and what else is kept."""
_MLP = ("*mlp*.*", "*ffn*.*", "*feed_forward*.*", "*.expert*.*")

X_SCALE_BYTES = torch.float32.itemsize  # of the step that static activations have
UNQUANTIZED = "unquantized"  # what stands in a recipe's place for the model as it is


@dataclass(frozen=True)
class Entry:
    """One tensor, or all planes of one quantized module.

    tensor_class: of CLASSES; format: of its planes, or the dtype that it keeps; quantized: whether it has planes;
    reason: why it gets that format; activations: what a layer does with its input.
    """

    name: str
    tensor_class: str
    format: str
    quantized: bool
    shape: tuple[int, ...]
    nbytes: int
    reason: str
    activations: str = "float"

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Budget:
    """What one recipe costs. notes: fallbacks and exceptions, one sentence each."""

    recipe: str
    entries: tuple[Entry, ...]
    memory: Memory
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def parameters(self) -> int:
        return sum(entry.parameters for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model, kept tensors included."""
        return 8 * self.nbytes / max(1, self.parameters)

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Of the quantized weights alone, scales included; None where there are none."""
        chosen = [entry for entry in self.entries if entry.quantized]
        weights = sum(entry.parameters for entry in chosen)
        return 8 * sum(entry.nbytes for entry in chosen) / weights if weights else None

    def class_bytes(self) -> dict[str, int]:
        """Bytes of each class of tensors that the model has, in the order of CLASSES."""
        sums = {name: 0 for name in CLASSES if any(entry.tensor_class == name for entry in self.entries)}
        for entry in self.entries:
            sums[entry.tensor_class] += entry.nbytes
        return sums


def plan_checkpoint(
    path: str | Path,
    recipe: str | Path | Recipe,
    *,
    context: int | None = None,
    batch: int = 1,
    kv_format: str | None = None,
) -> Budget:
    """What quantizing a model directory by a recipe will cost; config.json is enough, no weight is read.

    context: tokens of a sequence (None: what the model can take, at most 4096); batch: sequences at once;
    kv_format: "fp32", "fp16", "bf16", "int8", "fp8" or "int4" (None: the dtype the model computes in).

    Raises CheckpointError for a directory that is no model, ValueError for a recipe that is unknown or doesn't fit
    and for sizes below 1, MissingExtraError where transformers is not installed.
    """
    source = layout.read_source(Path(path), config_suffices=True)
    return budget(source, recipes.get(recipe), run_of(source, context, batch, kv_format))


def budget(source: Source, recipe: Recipe, run: Run) -> Budget:
    """What one recipe costs. Raises ValueError where the recipe doesn't fit the model, with the reason."""
    return _budget(source, recipe.name, assign(recipe, source.infos), run)


def unquantized(source: Source, run: Run) -> Budget:
    """What the model costs as it is."""
    kept = {name: Assignment(None, None, "not quantized") for name in source.infos}
    return _budget(source, UNQUANTIZED, kept, run)


def _budget(source: Source, name: str, assignments: Mapping[str, Assignment], run: Run) -> Budget:
    entries = tuple(
        _entry(step, source, assignments) for step in layout.steps(source, assignments, compare_tied=False)
    )
    multiplied = [
        (item.format, info, item.activations)
        for name, item in assignments.items()
        if item.format is not None and (info := source.infos[name]).kind in ("linear", "experts")
    ]
    memory = Memory(
        weights=sum(entry.nbytes for entry in entries),
        repacked=REPACKED_BYTES,
        kv_cache=kv_cache(source, run),
        activation=activation(source.infos, run),
        workspace=max(
            (workspace(format, info, run, inputs) for format, info, inputs in multiplied), default=0
        ),
    )
    return Budget(name, entries, memory, tuple(_notes(source, assignments, entries, run)))


# ---- the checkpoint ----


def _entry(step: Step, source: Source, assignments: Mapping[str, Assignment]) -> Entry:
    info = source.infos.get(step.module)
    kept = str(step.dtype).removeprefix("torch.")
    if info is None:
        reason = "neither a linear layer nor an embedding: never quantized"
        return Entry(step.name, "rest", kept, False, step.shape, step.nbytes, reason)
    activations = assignments[step.module].activations
    return Entry(
        name=step.module if step.format else step.name,
        tensor_class=_class_of(step.module, info),
        format=step.format or kept,
        quantized=step.format is not None,
        shape=step.shape,
        nbytes=step.nbytes + (X_SCALE_BYTES if activations.is_static else 0),
        reason=assignments[step.module].reason,
        activations=str(activations),
    )


def _class_of(name: str, info: ModuleInfo) -> str:
    if info.is_head:
        return "head"
    if info.kind == "embedding":
        return "embeddings"
    if info.kind == "experts":
        return "experts"
    if info.is_router:
        return "other"
    if fnmatchcase(name, ATTENTION):
        return "attention"
    return "MLP" if any(fnmatchcase(name, pattern) for pattern in _MLP) else "other"


def nominal_bytes(parameters: float) -> dict[str, float]:
    """Bytes of so many parameters at so many bits each and nothing else, the figures that people quote: by
    format."""
    bits = {"fp32": 8 * torch.float32.itemsize}
    bits |= {name: formats.parse(name).bits for name in ("fp16", "int8", "int4")}
    return {name: parameters * count / 8 for name, count in bits.items()}


# ---- what must be said ----


def _notes(
    source: Source, assignments: Mapping[str, Assignment], entries: tuple[Entry, ...], run: Run
) -> Iterable[str]:
    for reason, names in grouped((entry.reason, entry.name) for entry in entries if not entry.quantized):
        kept = next(entry.format for entry in entries if entry.name == names[0])
        yield f"{listed(names)} {'stays' if len(names) == 1 else 'stay'} {kept}: {reason}"
    for name, info in source.infos.items():
        if info.tied_to is not None:
            yield f"{name} shares the weight of {info.tied_to}, which is counted once"
    for text, names in grouped(_ragged(entries)):
        yield f"{text} in {listed(names)}"
    multiplied = (name for name, info in source.infos.items() if info.kind in ("linear", "experts"))
    chosen = {assignments[name].format for name in multiplied if assignments[name].activations.is_float}
    for text, names in grouped(
        (entry.activations, entry.name) for entry in entries if entry.activations != "float"
    ):
        yield f"activations '{text}' in {listed(names)}: {_said_of(read_activations(text))}"
    for format in sorted(filter(None, chosen)):
        plan = plan_linear(format, 1, 1, 1, run.dtype)
        if plan.regime != "fused":
            yield f"{format}: one row at a time goes through the {plan.regime} kernel: {plan.reason}"
    yield from run_notes(source, run)


def _said_of(activations: Activations) -> str:
    """What they are, and what of them no size here has."""
    if not activations.gains or activations.is_static:
        return activations.says
    return f"{activations.says}; a text for calibration adds copies of at most one column in {COPIED}, not counted here"


def _ragged(entries: Iterable[Entry]) -> Iterable[tuple[str, str]]:
    for entry in entries:
        group = formats.parse(entry.format).group if entry.quantized else 0
        if group > 0 and entry.shape[-1] % group:
            yield f"{entry.format}: the last group of a row has fewer than {group} columns", entry.name


def grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Names by what is said of them."""
    groups: dict[str, list[str]] = {}
    for text, name in pairs:
        groups.setdefault(text, []).append(name)
    return list(groups.items())


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
