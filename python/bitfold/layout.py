"""What a quantized checkpoint will hold, tensor by tensor, before a weight is read.

The model is built on the meta device to learn which modules there are; a recipe decides on names and shapes; the
sizes of all planes follow from the formats. Quantizing a directory, its dry run and the plan share this, so what
is predicted is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import hf
from bitfold.checkpoint import check_shapes, listed
from bitfold.formats import parse
from bitfold.quantize import describe
from bitfold.recipes import Assignment, ModuleInfo
from bitfold.shards import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    StoredTensor,
    TensorSpec,
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

    @property
    def nbytes(self) -> int:
        """Bytes of what it becomes."""
        return sum(spec.nbytes for spec in self.specs())


def read_source(path: Path, *, config_suffices: bool = False) -> Source:
    """What a model directory holds; reads config.json and the headers of its safetensors files.

    config_suffices: without safetensors files the tensors are those that config.json makes, in its dtype.

    Raises CheckpointError where the directory is incomplete, truncated or quantized already, and
    MissingExtraError where transformers is not installed.
    """
    config = hf.read_config(path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise CheckpointError(f"{path} is quantized already, by '{method}'; give the unquantized model")
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
        for name, tensor in source.stored.items()
        if name in state or not source.ignored.search(name)
    }
    check_shapes(path, used, state)
    weights = {
        f"{module}.{parameter}": module
        for module, info in source.infos.items()
        for parameter in info.parameters
    }
    found, missing = [], []
    for owner, names in groups(state).items():
        present = [used[name] for name in names if name in used]
        if not present:
            missing.append(owner)
            continue
        if compare_tied:
            _check_same(present)
        module = weights.get(owner, "")
        format = assignments[module].format if module else None
        if format is not None and present[0].torch_dtype not in ENCODABLE:
            raise CheckpointError(
                f"{path}: '{owner}' is {present[0].dtype}, no floating-point weight to quantize"
            )
        found.append(Step(owner, present[0], module, format))
    if missing:
        raise CheckpointError(f"{path} lacks {listed(missing)}, which its config.json asks for")
    order = {name: i for i, name in enumerate(source.stored)}
    return sorted(found, key=lambda step: order[step.stored.name])


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
