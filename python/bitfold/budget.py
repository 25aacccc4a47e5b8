"""What a recipe will cost, before anything is computed: bytes of the checkpoint, memory to run it.

config.json is enough. The bytes of a checkpoint are exact, for they come from the layout that quantizing itself
writes by (layout.py). The memory to run is the sum of

    weights      the planes of quantized modules and all tensors that are kept: as in the checkpoint
    repacked     copies of weights in another order for speed: none today
    KV cache     2 * layers * KV heads * head size * context * batch numbers of the model's dtype; of int8, fp8 and
                 int4 the blocks and buffers that bitfold.QuantizedCache allocates for them (docs/kv-cache.md)
    activation   the largest block of linear layers under one parent, read as one prompt: its widest input, all of
                 its outputs and two copies of the hidden state at once, batch * context rows in the dtype the model
                 computes in (the output head sees one row a sequence, as in generation)
    workspace    what the kernel of one layer allocates (`workspace_bytes`), an upper bound

What Python, torch and a model's own code hold (interpreter and libraries, attention scores that are written out,
sums in float32) comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from bitfold import formats, hf, layout, recipes
from bitfold.activations import read as read_activations
from bitfold.kv import blocks as kv
from bitfold.kv import store
from bitfold.layout import Source, Step
from bitfold.presets import ATTENTION
from bitfold.qtensor import plan_linear
from bitfold.rules import Assignment, ModuleInfo, Recipe, assign

CLASSES = ("embeddings", "attention", "MLP", "experts", "other", "head", "rest")
"""Classes of tensors. "other" are linear layers elsewhere and routers, "rest" norms, biases and what else is kept."""
_MLP = ("*mlp*.*", "*ffn*.*", "*feed_forward*.*", "*.expert*.*")

_KV_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}  # of a number in a cache that isn't quantized
KV_FORMATS = (*_KV_BYTES, *kv.FORMATS)
"""Formats of the KV cache: what a model computes in, and bitfold.QuantizedCache's."""
_KV_OF_DTYPE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

UNQUANTIZED = "unquantized"  # what stands in a recipe's place for the model as it is
DEFAULT_CONTEXT = 4096  # tokens, where the model itself can take so many


@dataclass(frozen=True)
class Run:
    """How the model is to run: tokens of a sequence, sequences at once, format of the KV cache, threads."""

    context: int
    batch: int
    kv_format: str
    threads: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Memory:
    """Bytes to run a model; see the head of this file. kv_cache: None where it can't be told."""

    weights: int
    repacked: int
    kv_cache: int | None
    activation: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.repacked + (self.kv_cache or 0) + self.activation + self.workspace


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


def run_of(source: Source, context: int | None = None, batch: int = 1, kv_format: str | None = None) -> Run:
    """The run that is meant, defaults filled in. Raises ValueError for what can't be."""
    for name, value in (("context", context), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    dtype = hf.config_dtype(source.config)
    if kv_format is not None and kv_format not in KV_FORMATS:
        raise ValueError(f"kv_format is {kv_format!r}; it must be one of {', '.join(KV_FORMATS)}")
    longest = longest_context(source)
    return Run(
        context=context or min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT),
        batch=batch,
        kv_format=kv_format or _KV_OF_DTYPE.get(dtype, "fp32"),
        threads=torch.get_num_threads(),
        dtype=dtype,
    )


def longest_context(source: Source) -> int | None:
    """Tokens that the model was made for, None where its configuration doesn't tell."""
    length = getattr(source.model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


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
    quantized = {
        name: (item.format, info)
        for name, item in assignments.items()
        if item.format is not None and (info := source.infos[name]).kind in ("linear", "experts")
    }
    memory = Memory(
        weights=sum(entry.nbytes for entry in entries),
        repacked=REPACKED_BYTES,
        kv_cache=kv_cache(source, run),
        activation=activation(source.infos, run),
        workspace=max((workspace(format, info, run) for format, info in quantized.values()), default=0),
    )
    return Budget(name, entries, memory, tuple(_notes(source, assignments, entries, run)))


# ---- the checkpoint ----


def _entry(step: Step, source: Source, assignments: Mapping[str, Assignment]) -> Entry:
    info = source.infos.get(step.module)
    kept = str(step.dtype).removeprefix("torch.")
    if info is None:
        reason = "neither a linear layer nor an embedding: never quantized"
        return Entry(step.name, "rest", kept, False, step.shape, step.nbytes, reason)
    return Entry(
        name=step.module if step.format else step.name,
        tensor_class=_class_of(step.module, info),
        format=step.format or kept,
        quantized=step.format is not None,
        shape=step.shape,
        nbytes=step.nbytes,
        reason=assignments[step.module].reason,
        activations=str(assignments[step.module].activations),
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


# ---- the memory to run ----

# No kernel repacks weights (QuantModule.prepare builds nothing).
REPACKED_BYTES = 0


def kv_cache(source: Source, run: Run) -> int | None:
    """Bytes of the KV cache; None where it can't be told, which `run_notes` says."""
    try:
        shape = hf.cache_shape(source.model_config)
    except ValueError:
        return None
    if run.kv_format in _KV_BYTES:
        return shape.numbers(run.context) * run.batch * _KV_BYTES[run.kv_format]
    return run.batch * shape.heads * quantized_cache(shape, run)


def quantized_cache(shape: hf.CacheShape, run: Run) -> int:
    """Bytes of a bitfold.QuantizedCache of default options for one head, over all layers: what it has allocated once a
    prompt of the context is in it."""
    group = kv.value_group_of(run.kv_format, shape.head_dim)
    blocks = kv.BlockFormat(run.kv_format, kv.DEFAULT_GROUP, shape.head_dim, group)
    return sum(
        store.nbytes_of(
            blocks, run.context if window is None else min(window - 1, run.context), run.dtype.itemsize
        )
        for window in shape.windows
    )


def activation(infos: Mapping[str, ModuleInfo], run: Run) -> int:
    """Bytes of the largest block's input and outputs: linear layers of one parent are one block. An estimate: what
    a model holds at once is its code's affair. Of experts it is one of them, to which all tokens may go."""
    hidden = max((info.shape[1] for info in infos.values() if info.kind == "embedding"), default=0)
    blocks: dict[str, list[ModuleInfo]] = {}
    for name, info in infos.items():
        if info.kind in ("linear", "experts"):
            blocks.setdefault(name if info.is_head else name.rpartition(".")[0], []).append(info)
    largest = 0
    for block in blocks.values():
        rows = run.batch * (1 if block[0].is_head else run.context)
        numbers = max(info.matrix[1] for info in block) + sum(info.matrix[0] for info in block) + 2 * hidden
        largest = max(largest, rows * numbers * run.dtype.itemsize)
    return largest


def workspace(format: str, info: ModuleInfo, run: Run) -> int:
    """Bytes of workspace of one linear layer or expert, of a prompt and of a token at a time."""
    n, k = info.matrix
    rows = run.batch * (1 if info.is_head else run.context)
    # Both are run: the prompt at once, then a token at a time.
    return max(workspace_bytes(format, m, n, k, run.dtype, run.threads) for m in (run.batch, rows))


def workspace_bytes(format: str, m: int, n: int, k: int, dtype: torch.dtype, threads: int) -> int:
    """Upper bound of what one `linear` of an [m, k] x and an [n, k] weight allocates on the CPU beside its result
    (csrc/cpu/linear.cpp), with k rounded up to 256, the most columns that a kernel takes at once:

        fused   x in fp32 and partial sums of it (at most 8 rows), the fp32 results, and for each thread the scales
                of a few rows of the weight
        tiled   at most 512 rows of x in fp32 (and up to 7 that fill the last tile), and for each thread a strip of
                decoded weights with its sums, at most 96 rows of 1024 columns
        floor   x in float64, and for each thread a decoded row

    Raises ValueError where the plan names a kernel that this formula doesn't know.
    """
    columns = 256 * math.ceil(k / 256)
    regime = plan_linear(format, m, n, k, dtype).regime
    if regime == "fused":
        return 4 * (10 * columns + k + m * n + n + threads * 16 * (k + 256))
    if regime == "tiled":
        rows = min(m, 512) + 7
        return 4 * (rows * columns + n + threads * (11 * columns + 96 * rows + 120 * 1024))
    if regime == "floor":
        return 8 * (m * k + n) + 4 * threads * k
    raise ValueError(f"the plan names the kernel {regime!r}; it must be fused, tiled or floor")


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
        yield f"activations '{text}' in {listed(names)}: {read_activations(text).says}"
    for format in sorted(filter(None, chosen)):
        plan = plan_linear(format, 1, 1, 1, run.dtype)
        if plan.regime != "fused":
            yield f"{format}: one row at a time goes through the {plan.regime} kernel: {plan.reason}"
    yield from run_notes(source, run)


def run_notes(source: Source, run: Run) -> Iterable[str]:
    """What must be said of the run, whatever the recipe."""
    try:
        hf.cache_shape(source.model_config)
    except ValueError as error:
        yield f"the KV cache is left out: {error}"
    longest = longest_context(source)
    if longest is not None and run.context > longest:
        yield f"a context of {run.context} tokens is more than the model was made for, {longest}"


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
