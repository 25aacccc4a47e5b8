"""A quantized model directory, bitfold's own or another library's, as what a conversion reads: weights and other
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold import hf
from bitfold.foreign.directory import read_foreign
from bitfold.nn import KEPT_PARTS, put_copies
from bitfold.qtensor import QTensor, Unpacked
from bitfold.section import ModuleEntry, read_quantization
from bitfold.shards import CheckpointError, StoredTensor, listed, read_directory, read_tensors
from bitfold.writer import is_bitfold_checkpoint

_PARTS = {*Unpacked._fields, "blocks", *KEPT_PARTS}
"""What bitfold calls the tensors of a quantized module."""


@dataclass(frozen=True)
class Source:
    """config: config.json without quantization_config; modules: the quantized ones, tied ones once; plain: all other
    tensors; tied: names of tensors that aren't stored, and whose they are; aliases: modules whose weight is that of
    another, and of which; recipe: what the checkpoint says it is of.

    qtensor, decode: a module's weight by the module's name, and its values as the owner means them; kept: what its
    layer keeps for its activations; rounds: what of a module's weight qtensor has rounded, "" for nothing; remarks:
    what the directory says that a conversion doesn't keep.
    """

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, ModuleEntry]
    plain: Mapping[str, StoredTensor]
    tied: Mapping[str, str]
    recipe: str
    qtensor: Callable[[str], QTensor]
    kept: Callable[[str], dict[str, Tensor]]
    decode: Callable[[str], Tensor]
    rounds: Callable[[str], str]
    aliases: Mapping[str, tuple[ModuleEntry, str]]
    remarks: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of what isn't quantized."""
        return hf.config_dtype(dict(self.config))


def open_source(path: Path) -> Source:
    """Raises CheckpointError as `read_quantization` and `read_foreign` do."""
    return _own(path) if is_bitfold_checkpoint(path) else _foreign(path)


def _own(path: Path) -> Source:
    config = hf.read_config(path)
    quantization = read_quantization(path, config)
    stored = read_directory(path)
    modules, aliases = {}, {}
    for name, entry in quantization.modules.items():
        owners = [
            quantization.tied[f"{name}.{part}"]
            for part in entry.parts()
            if f"{name}.{part}" in quantization.tied
        ]
        if owners:
            aliases[name] = entry, owners[0].rpartition(".")[0]
        else:
            modules[name] = entry
    planes = {f"{name}.{part}" for name, entry in modules.items() for part in entry.parts()}
    missing = sorted(planes - stored.keys())
    if missing:
        raise CheckpointError(f"{path} lacks '{missing[0]}', which its quantization_config names")

    def qtensor(name: str) -> QTensor:
        entry = modules[name]
        names = [part for part in entry.parts() if part not in KEPT_PARTS]
        wanted = [stored[f"{name}.{part}"] for part in names]
        parts = dict(read_tensors(sorted(wanted, key=lambda tensor: tensor.path)))
        tensors = {part: parts[f"{name}.{part}"] for part in names}
        g_idx = tensors.pop("g_idx", None)
        try:
            return QTensor(entry.format, entry.matrix, tensors, entry.layout, g_idx)
        except ValueError as error:
            raise CheckpointError(f"{path}: '{name}': {error}") from None

    plain = {name: tensor for name, tensor in stored.items() if name not in planes}
    left = [name for name in plain if name.rpartition(".")[2] in _PARTS]
    if left:
        raise CheckpointError(
            f"{path} holds {listed(left)} of modules that its quantization_config doesn't name"
        )
    tied = {alias: owner for alias, owner in quantization.tied.items() if owner not in planes}

    def kept(name: str) -> dict[str, Tensor]:
        found = [stored[f"{name}.{part}"] for part in modules[name].parts() if part in KEPT_PARTS]
        return {full.removeprefix(f"{name}."): tensor for full, tensor in read_tensors(found)}

    def decode(name: str) -> Tensor:
        weight = qtensor(name).decode()
        if modules[name].activations.exact_outliers:
            put_copies(weight, **kept(name))
        return weight

    def rounds(name: str) -> str:
        copies = modules[name].outliers if modules[name].activations.exact_outliers else 0
        return f"the layer has copies of {copies} columns in 16 bits" if copies else ""

    return Source(
        path,
        _without_section(config),
        modules,
        plain,
        tied,
        quantization.recipe,
        qtensor,
        kept,
        decode,
        rounds,
        aliases,
    )


def _foreign(path: Path) -> Source:
    directory = read_foreign(path)

    def decode(name: str) -> Tensor:
        return directory.modules[name].scheme.decode(directory.tensors(name))

    remarks = directory.left_out
    if directory.unused:
        remarks += (
            f"{len(directory.unused)} tensors of scales of activations are left out: those activations stay floats",
        )
    return Source(
        path,
        _without_section(directory.config),
        {name: module.entry for name, module in directory.modules.items()},
        directory.plain,
        {},
        directory.owner.name,
        directory.qtensor,
        directory.kept,
        decode,
        lambda name: directory.modules[name].scheme.unpack_rounds(directory.tensors(name)),
        {},
        remarks,
    )


def _without_section(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}
