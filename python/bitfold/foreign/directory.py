"""A model directory that another library quantized: its modules and its other tensors, checked, and read one by one.

Which modules are quantized, the tensors say; how, the configuration. Both must agree on every module. Nothing but
headers and small tensors (an order of columns, a shape, a text) is read until a weight is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitfold import hf
from bitfold.foreign.owners import OWNERS, Owner, read_owner
from bitfold.foreign.scheme import Config, Scheme
from bitfold.qtensor import QTensor
from bitfold.section import ModuleEntry
from bitfold.shards import CheckpointError, StoredTensor, listed, read_directory, read_tensors

_TELLING = {part: owner for owner in OWNERS.values() for part in owner.parts if part != "weight"}
"""Names that no unquantized module has, and an owner that has them."""


@dataclass(frozen=True)
class ForeignModule:
    """A quantized linear layer: how its weight is stored, what it is, and its tensors by their names within it."""

    name: str
    scheme: Scheme
    entry: ModuleEntry
    stored: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in the files."""
        return sum(tensor.nbytes for tensor in self.stored.values())


@dataclass(frozen=True)
class ForeignDirectory:
    """config: config.json; settings: its quantization_config, checked; modules: those that are quantized; plain: all
    other tensors; unused: what lies beside weights and bitfold has no use for.
    """

    path: Path
    config: Mapping[str, Any]
    owner: Owner
    settings: Config
    modules: Mapping[str, ForeignModule]
    plain: Mapping[str, StoredTensor]
    unused: tuple[str, ...]

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of a module, by their names within it; mapped, not read."""
        return _read(self.modules[module].stored)

    @property
    def left_out(self) -> tuple[str, ...]:
        """A sentence for each thing that the owner does with activations and bitfold doesn't, and the layers that it
        does it with.
        """
        layers: dict[str, list[str]] = {}
        for name, module in self.modules.items():
            if what := module.scheme.left_out:
                layers.setdefault(what, []).append(name)
        return tuple(
            f"{len(names)} layer{'s' * (len(names) > 1)} ('{names[0]}'{', ...' * (len(names) > 1)}): "
            f"{self.owner.title} {what}, and bitfold doesn't: they stay floats"
            for what, names in layers.items()
        )

    def qtensor(self, module: str) -> QTensor:
        """The weight of a module. Raises CheckpointError where its values contradict the configuration."""
        try:
            return self.modules[module].scheme.unpack(self.tensors(module))
        except ValueError as error:
            raise _named(self.path, module, error) from None

    def kept(self, module: str) -> dict[str, Tensor]:
        """What a module keeps for its activations, by bitfold's names. Raises as `qtensor` does."""
        try:
            return self.modules[module].scheme.kept(self.tensors(module))
        except ValueError as error:
            raise _named(self.path, module, error) from None


def read_foreign(path: Path) -> ForeignDirectory:
    """A directory of one of OWNERS.

    Raises CheckpointError where it is none, where tensors are missing, of another owner, or of other shapes and dtypes
    than the configuration makes them, and where it says that a quantized module isn't.
    """
    owned = read_owner(path)
    if owned is None:
        raise CheckpointError(f"{path} is no checkpoint of {', '.join(OWNERS)}")
    owner, settings = owned
    config = hf.read_config(path)
    stored = read_directory(path)
    found = owner.modules(stored)
    used = {f"{name}.{part}" for name, parts in found.items() for part in parts}
    plain = {name: tensor for name, tensor in stored.items() if name not in used}
    _check_plain(path, owner, plain)
    if not found:
        raise CheckpointError(
            f"{path} says that it is quantized by {owner.title}, but none of its tensors is: they have no "
            f"{' or '.join(owner.signature)}"
        )
    modules = {}
    for name, parts in found.items():
        scheme = settings.scheme(name)
        if scheme is None:
            raise CheckpointError(
                f"{path}: '{name}' is quantized, but its quantization_config says that it isn't"
            )
        taken = [part for part in parts if part not in owner.beside or part in scheme.beside]
        own = {part: stored[f"{name}.{part}"] for part in taken}
        try:
            modules[name] = ForeignModule(name, scheme, scheme.entry(_read(own)), own)
        except ValueError as error:
            raise _named(path, name, error) from None
    unused = tuple(
        sorted(used - {tensor.name for module in modules.values() for tensor in module.stored.values()})
    )
    return ForeignDirectory(path, config, owner, settings, modules, plain, unused)


def _read(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    tensors = dict(read_tensors(sorted(stored.values(), key=lambda tensor: tensor.path)))
    return {part: tensors[tensor.name] for part, tensor in stored.items()}


def _check_plain(path: Path, owner: Owner, plain: Mapping[str, StoredTensor]) -> None:
    """What is left must look like tensors of modules that aren't quantized."""
    for name in plain:
        part = next((part for part in _TELLING if name.endswith(f".{part}")), None)
        if part is None:
            continue
        if part in owner.parts:
            raise CheckpointError(
                f"{path} holds '{name}', but no {' or '.join(owner.signature)} of '{name.removesuffix('.' + part)}'"
            )
        raise CheckpointError(
            f"{path} says that it is quantized by {owner.title}, but holds '{name}', a tensor of "
            f"{_TELLING[part].title}"
        )
    packed = [name for name, tensor in plain.items() if tensor.dtype not in _PLAIN]
    if packed:
        raise CheckpointError(
            f"{path} holds {listed(packed)} of no floating-point dtype and no quantized module"
        )


_PLAIN = ("F64", "F32", "F16", "BF16")


def _named(path: Path, module: str, error: ValueError) -> CheckpointError:
    return CheckpointError(f"{path}: '{module}': {error}")
