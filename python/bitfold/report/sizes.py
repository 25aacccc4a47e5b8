"""Where the bytes of a checkpoint are, from its headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitfold.section import QuantizationConfig
from bitfold.shards import StoredTensor, read_directory
from bitfold.text import natural

_CODES = (
    "codes",
    "blocks",
    "values",
)  # planes that hold weights themselves; a tensor that was kept is "values"


@dataclass(frozen=True)
class TensorSize:
    """A quantized weight with all its planes, or a tensor that was kept.

    format: canonical, or safetensors' dtype where kept; planes: bytes by name; source_bytes: in the base
    model, None where no base is given.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    planes: Mapping[str, int]
    quantized: bool
    source_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.planes.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, math.prod(self.shape))


@dataclass(frozen=True)
class ClassSize:
    """Tensors of one class, which are those whose names differ in numbers alone ("layers.*.mlp.up_proj").

    codes: bytes of codes or of kept values; others: bytes of scales, zero points and what else belongs to
    them.
    """

    name: str
    tensors: int
    weights: int
    codes: int
    others: int
    source_bytes: int | None

    @property
    def nbytes(self) -> int:
        return self.codes + self.others

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.weights)


def tensor_sizes(path: Path, quantization: QuantizationConfig, base: Path | None) -> tuple[TensorSize, ...]:
    """Every tensor of the checkpoint at `path`, layer by layer."""
    stored = read_directory(path)
    source = read_directory(base) if base is not None else {}
    sizes: dict[str, TensorSize] = {}
    planes: set[str] = set()
    for name, entry in quantization.modules.items():
        names = {part: f"{name}.{part}" for part in entry.parts()}
        planes.update(names.values())
        if next(iter(names.values())) in stored:  # a tied module's planes lie under the name of the other
            parts = {plane: stored[full].nbytes for plane, full in names.items()}
            before = _nbytes(source, entry.weight_of(name))
            sizes[name] = TensorSize(name, entry.format, entry.shape, parts, True, before)
    for name, tensor in stored.items():
        if name not in planes:
            parts = {"values": tensor.nbytes}
            before = _nbytes(source, name)
            sizes[name] = TensorSize(name, tensor.dtype, tensor.shape, parts, False, before)
    return tuple(sizes[name] for name in sorted(sizes, key=natural))


def _nbytes(stored: Mapping[str, StoredTensor], name: str) -> int | None:
    return stored[name].nbytes if name in stored else None


def class_sizes(tensors: tuple[TensorSize, ...]) -> tuple[ClassSize, ...]:
    """The tensors added up by class, the largest class first."""
    groups: dict[str, list[TensorSize]] = {}
    for tensor in tensors:
        groups.setdefault(class_name(tensor.name), []).append(tensor)
    classes = []
    for name, members in groups.items():
        before = [tensor.source_bytes for tensor in members if tensor.source_bytes is not None]
        codes = sum(tensor.planes.get(part, 0) for tensor in members for part in _CODES)
        classes.append(
            ClassSize(
                name=name,
                tensors=len(members),
                weights=sum(math.prod(tensor.shape) for tensor in members),
                codes=codes,
                others=sum(tensor.nbytes for tensor in members) - codes,
                source_bytes=sum(before) if len(before) == len(members) else None,
            )
        )
    return tuple(sorted(classes, key=lambda one: -one.nbytes))


def class_name(name: str) -> str:
    """A name without its numbers: "model.layers.3.mlp.up_proj" is of class "layers.*.mlp.up_proj"."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name.removeprefix("model.").removesuffix(".weight"))


def place(name: str) -> tuple[str, str]:
    """Layer and role of a module: ("3", "mlp.up_proj") of "model.layers.3.mlp.up_proj", ("", name) where the
    name has no number.
    """
    found = re.search(r"(?<![^.])(\d+)\.(.+)$", name)
    return (found.group(1), found.group(2)) if found else ("", name.removeprefix("model."))
