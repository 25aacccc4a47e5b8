"""What a quantized checkpoint will hold, tensor by tensor, before a weight is read.

The model is built on the meta device to learn which modules there are; a recipe decides on names and shapes; the
sizes of all planes follow from the formats. Quantizing a directory, its dry run and the plan share this, so what
is predicted is what is written.

Where transformers has the experts of a layer in one tensor, most checkpoints have a matrix for each, under other names
(`_NAMINGS`). What is written has transformers' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import hf
from bitfold.checkpoint import check_shapes
from bitfold.experts import DOWN, GATE_UP, expert_name
from bitfold.fields import shown
from bitfold.quantize import describe
from bitfold.rules import Assignment, ModuleInfo
from bitfold.section import ModuleEntry
from bitfold.shards import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    StoredTensor,
    TensorSpec,
    listed,
    read_directory,
    read_tensors,
)

ENCODABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Source:
    """A model directory before quantizing.

    stored: its tensors by name, from the headers of its files (has_weights) or as config.json makes them;
    model: what config.json describes, without weights (the meta device; its buffers are real); state: its tensors;
    config: config.json; model_config: the configuration as transformers reads it.
    """

    path: Path
    config: dict[str, Any]
    model_config: Any
    stored: Mapping[str, StoredTensor]
    model: nn.Module
    state: Mapping[str, Tensor]
    infos: Mapping[str, ModuleInfo]
    ignored: Any
    has_weights: bool


@dataclass(frozen=True)
class Step:
    """One tensor of the model: what it is called there, its shape, and the format of its module (None: kept).

    parts: what it is made of, one after the other from the first row of the first expert on: one tensor of the source
    or, of a stack of experts, one or two for each of them.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]
    module: str
    format: str | None

    @property
    def dtype(self) -> torch.dtype:
        """That the source has it in."""
        return self.parts[0].torch_dtype

    @property
    def source_bytes(self) -> int:
        """Bytes of what it is made of."""
        return sum(part.nbytes for part in self.parts)

    @property
    def experts(self) -> int:
        """How many matrices a stack has, 0 of what is none."""
        return self.shape[0] if self.module and len(self.shape) == 3 else 0

    @property
    def layers(self) -> list[str]:
        """What each of its matrices is called: its module or, of a stack, one name for each expert."""
        return [expert_name(self.module, e) for e in range(self.experts)] if self.experts else [self.module]

    def specs(self) -> list[TensorSpec]:
        """What it becomes."""
        if self.format is None:
            return [TensorSpec(self.name, self.dtype, self.shape)]
        parts = ModuleEntry("experts" if self.experts else "linear", self.format, self.shape).parts()
        return [TensorSpec(f"{self.module}.{part}", spec.dtype, spec.shape) for part, spec in parts.items()]

    @property
    def nbytes(self) -> int:
        """Bytes of what it becomes."""
        return sum(spec.nbytes for spec in self.specs())


def read_steps(steps: Iterable[Step]) -> Iterator[tuple[Step, Iterator[Tensor]]]:
    """Each tensor as it is read: the whole of it or, of a stack of experts, one matrix after the other, mapped. The
    tensors of a step must be taken before the next step."""
    steps = list(steps)
    stored = read_tensors(part for step in steps for part in step.parts)
    for step in steps:
        yield step, _read(step, stored)


def _read(step: Step, stored: Iterator[tuple[str, Tensor]]) -> Iterator[Tensor]:
    if not step.experts:
        yield next(stored)[1]
    elif len(step.parts) == 1:
        yield from next(stored)[1]
    else:
        each = len(step.parts) // step.experts
        for _ in range(step.experts):
            parts = [next(stored)[1] for _ in range(each)]
            yield parts[0] if each == 1 else torch.cat(parts)


def read_source(path: Path, *, config_suffices: bool = False) -> Source:
    """What a model directory holds; reads config.json and the headers of its safetensors files.

    config_suffices: without safetensors files the tensors are those that config.json makes, in its dtype.

    Raises CheckpointError where the directory is incomplete, truncated or quantized already, and
    MissingExtraError where transformers is not installed.
    """
    config = hf.read_config(path)
    if section := config.get("quantization_config"):
        method = section.get("quant_method") if isinstance(section, dict) else None
        by = "an unknown method" if method is None else shown(method)
        raise CheckpointError(f"{path} is quantized already, by {by}; give the unquantized model")
    has_weights = not config_suffices or any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE))
    stored = read_directory(path) if has_weights else {}
    model = hf.empty_causal_lm(path, config, hf.config_dtype(config))
    state = model.state_dict(keep_vars=True)
    if not has_weights:
        stored = {name: _unwritten(path, name, state[name]) for name in groups(state)}
    return Source(
        path=path,
        config=config,
        model_config=model.config,
        stored=stored,
        model=model,
        state=state,
        infos=describe(model),
        ignored=hf.ignored_names(model),
        has_weights=has_weights,
    )


def _unwritten(path: Path, name: str, tensor: Tensor) -> StoredTensor:
    return StoredTensor(name, _CODES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, path)


def steps(source: Source, assignments: Mapping[str, Assignment], *, compare_tied: bool = True) -> list[Step]:
    """One step for each distinct tensor of the model, in the order in which they lie in the files.

    compare_tied: read tied weights that are stored twice, to see that they are the same.

    Raises CheckpointError where a tensor is missing, has another shape than config.json says or can't be
    quantized, or where tied tensors differ.
    """
    path, state = source.path, source.state
    used = {
        name: tensor
        for name, tensor in _renamed(source.stored, state).items()
        if name in state or not source.ignored.search(name)
    }
    split = _split(source, used)
    pieces = {name: piece for parts in split.values() for name, piece in parts.items()}
    check_shapes(path, used, {**state, **pieces})
    weights = {info.weight_of(module): module for module, info in source.infos.items()}
    found, missing = [], []
    for owner, names in groups(state).items():
        wanted = list(split.get(owner, [name for name in names if name in used][:1] or [owner]))
        present = tuple(used[name] for name in wanted if name in used)
        if len(present) < len(wanted):
            missing += [name for name in wanted if name not in used]
            continue
        if compare_tied and owner not in split:
            _check_same([used[name] for name in names if name in used])
        _check_alike(path, owner, present)
        module = weights.get(owner, "")
        format = assignments[module].format if module else None
        if format is not None and present[0].torch_dtype not in ENCODABLE:
            raise CheckpointError(
                f"{path}: '{owner}' is {present[0].dtype}, no floating-point weight to quantize"
            )
        found.append(Step(owner, tuple(state[owner].shape), present, module, format))
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}, which its config.json asks for")
    order = {tensor.name: i for i, tensor in enumerate(source.stored.values())}
    return sorted(found, key=lambda step: order[step.parts[0].name])


# What the matrices of an expert are called, where each is a tensor by itself: gate, up and down projection.
_NAMINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
# What checkpoints call a module, and transformers: Mixtral's.
_OLD, _NEW = ".block_sparse_moe.", ".mlp."


def _renamed(stored: Mapping[str, StoredTensor], state: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """The tensors of a source under the names that transformers has for their modules."""
    if any(_OLD in name for name in state):
        return dict(stored)
    return {name.replace(_OLD, _NEW): tensor for name, tensor in stored.items()}


def _split(source: Source, used: Mapping[str, StoredTensor]) -> dict[str, dict[str, Tensor]]:
    """The stacks of experts that the source has as a matrix for each: the names of these in order, and their shapes (on
    the meta device), by the name of the stack."""
    found = {}
    for name, info in source.infos.items():
        home, _, leaf = name.rpartition(".")
        if info.kind != "experts" or name in used or leaf not in (GATE_UP, DOWN):
            continue
        experts, n, k = info.shape
        gate, up, down = next(
            (names for names in _NAMINGS if _is_named(home, names, experts, used)), _NAMINGS[0]
        )
        leaves = (gate, up) if leaf == GATE_UP else (down,)
        piece = torch.empty(n // len(leaves), k, device="meta")
        found[name] = {f"{home}.{e}.{part}.weight": piece for e in range(experts) for part in leaves}
    return found


def _is_named(home: str, names: tuple[str, ...], experts: int, used: Mapping[str, StoredTensor]) -> bool:
    """Whether any expert's matrix has one of these names."""
    return any(f"{home}.{e}.{name}.weight" in used for e in range(experts) for name in names)


def _check_alike(path: Path, name: str, parts: tuple[StoredTensor, ...]) -> None:
    """The matrices of a stack have one dtype."""
    other = next((part for part in parts if part.dtype != parts[0].dtype), None)
    if other is not None:
        raise CheckpointError(
            f"{path}: '{parts[0].name}' is {parts[0].dtype} and '{other.name}' {other.dtype}, but both are parts of "
            f"'{name}'"
        )


def groups(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of each distinct tensor of a model (tied ones have several), by its first name."""
    owners: dict[int, str] = {}
    named: dict[str, list[str]] = {}
    for name, tensor in state.items():
        named.setdefault(owners.setdefault(id(tensor), name), []).append(name)
    return named


def _check_same(tensors: list[StoredTensor]) -> None:
    """Tied weights may be stored under both names; then they must be the same."""
    first, *others = tensors
    for other in others:
        (_, one), (_, two) = read_tensors([first, other])
        if not torch.equal(one, two):
            raise CheckpointError(
                f"{other.path}: config.json ties '{other.name}' to '{first.name}', but their values differ"
            )
