"""`bitfold inspect FILE|DIR`: what is in a checkpoint or a GGUF file, from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitfold import hf
from bitfold.cli.console import Json, natural, out, print_json, size, table
from bitfold.experts import stack_name
from bitfold.foreign.directory import read_foreign
from bitfold.foreign.owners import read_owner
from bitfold.gguf import mixes
from bitfold.gguf.magic import is_gguf
from bitfold.pipeline import noted_errors
from bitfold.section import ModuleEntry, QuantizationConfig, read_quantization
from bitfold.shards import CONFIG_FILE, CheckpointError, StoredTensor, read_directory, read_header
from bitfold.writer import is_bitfold_checkpoint

if TYPE_CHECKING:
    from bitfold.gguf.library import GGUFValue


@dataclass(frozen=True)
class Row:
    """A tensor, or all planes of a quantized module. relative_rmse: None where no report tells it; activations: what a
    layer does with its input, "" where that is nothing."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    relative_rmse: float | None = None
    activations: str = ""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, math.prod(self.shape))


def inspect(
    path: Annotated[Path, typer.Argument(help="A safetensors file, a GGUF file or a model directory.")],
    json: Json = False,
) -> None:
    """List tensors, formats, sizes and, where they were noted, errors of a checkpoint; of a GGUF file its metadata."""
    if path.is_file() and (path.suffix.lower() == ".gguf" or is_gguf(path)):
        _inspect_gguf(path, json)
        return
    heading: dict[str, object] = {"path": path}
    if path.is_dir() and read_owner(path) is not None:
        _inspect_foreign(path, json)
        return
    if path.is_dir():
        tensors = read_directory(path)
        quantization = None
        if is_bitfold_checkpoint(path):
            quantization = read_quantization(path, hf.read_config(path))
            heading |= {"recipe": quantization.recipe, "bitfold_version": quantization.version}
    else:
        tensors = read_header(path)
        quantization = None
        if is_bitfold_checkpoint(path.parent):
            quantization = read_quantization(path.parent, hf.read_config(path.parent))
    rows = _rows(tensors, quantization, _errors(path if path.is_dir() else path.parent))
    total = sum(tensor.nbytes for tensor in tensors.values())
    if json:
        modules = [{**vars(row), "bits_per_weight": row.bits_per_weight} for row in rows]
        print_json({**heading, "bytes": total, "entries": modules})
        return
    for key, value in heading.items():
        out.print(f"{key:<16} {value}")
    _show(rows, total)


def _inspect_foreign(path: Path, json: bool) -> None:
    directory = read_foreign(path)
    modules = [
        Row(
            name,
            module.entry.format,
            module.entry.shape,
            module.nbytes,
            activations=_activations_of(module.entry),
        )
        for name, module in directory.modules.items()
    ]
    plain = [Row(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in directory.plain.items()]
    rows = sorted([*modules, *plain], key=lambda row: natural(row.name))
    total = sum(row.nbytes for row in rows)
    if json:
        entries = [{**vars(row), "bits_per_weight": row.bits_per_weight} for row in rows]
        print_json({"path": path, "quant_method": directory.owner.name, "bytes": total, "entries": entries})
        return
    out.print(f"{'path':<16} {path}")
    out.print(f"{'quantized by':<16} {directory.owner.title}")
    _show(rows, total)


def _show(rows: Sequence[Row], total: int) -> None:
    with_errors = any(row.relative_rmse is not None for row in rows)
    with_activations = any(row.activations for row in rows)
    optional = (["activations"] if with_activations else []) + (["error"] if with_errors else [])
    shown = table("name", "format", "shape", "size", "bits/weight", *optional)
    for row in rows:
        error = "" if row.relative_rmse is None else f"{row.relative_rmse:.3%}"
        shape = " x ".join(map(str, row.shape))
        cells = (row.name, row.format, shape, size(row.nbytes), f"{row.bits_per_weight:.3f}")
        shown.add_row(
            *cells, *([row.activations] if with_activations else []), *([error] if with_errors else [])
        )
    out.print(shown)
    weights = sum(math.prod(row.shape) for row in rows)
    out.print(f"{len(rows)} entries, {weights:,} numbers, {size(total)}")


def _inspect_gguf(path: Path, json: bool) -> None:
    from bitfold.gguf.layout import TensorInfo
    from bitfold.gguf.reader import read_gguf

    model = read_gguf(path)
    infos = [TensorInfo(tensor.name, tensor.shape, tensor.type) for tensor in model.tensors.values()]
    rows = [Row(info.name, info.type.name, info.shape, info.nbytes) for info in infos]
    total = sum(row.nbytes for row in rows)
    number = model.metadata.get("general.file_type")
    mix = next(
        (mix.name for mix in mixes.MIXES.values() if number is not None and mix.number == number.value), None
    )
    heading = {"files": [str(file) for file in model.files], "file_type": mix}
    if json:
        metadata = {key: _value_json(value) for key, value in model.metadata.items()}
        entries = [{**vars(row), "bits_per_weight": row.bits_per_weight} for row in rows]
        print_json({**heading, "bytes": total, "metadata": metadata, "entries": entries})
        return
    for key, value in model.metadata.items():
        out.print(f"{key:<42} {_value_text(value)}", markup=False)
    if mix is not None:
        out.print(f"(file type {mix})")
    out.print()
    _show(rows, total)


_SHOWN = 4  # elements of an array
_LONGEST = 80  # characters of a text


def _value_json(value: GGUFValue) -> object:
    """A value of the metadata; of an array its type, its length and the first elements."""
    if not isinstance(value.value, list):
        return value.value
    kind = value.sub_type.name if value.sub_type is not None else None
    return {"array_of": kind, "count": len(value.value), "first": value.value[:_SHOWN]}


def _value_text(value: GGUFValue) -> str:
    if not isinstance(value.value, list):
        text = repr(value.value)
        return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    first = ", ".join(repr(element)[:_LONGEST] for element in value.value[:_SHOWN])
    rest = ", ..." if len(value.value) > _SHOWN else ""
    kind = value.sub_type.name if value.sub_type is not None else "?"
    return f"{len(value.value)} of {kind}: [{first}{rest}]"


def _rows(
    tensors: Mapping[str, StoredTensor], quantization: QuantizationConfig | None, errors: Mapping[str, float]
) -> list[Row]:
    """One row for each quantized module whose planes are here, one for each other tensor."""
    rows: dict[str, Row] = {}
    owners = {}
    for name, entry in quantization.modules.items() if quantization else ():
        owners.update({f"{name}.{part}": name for part in entry.parts()})
    for name, tensor in tensors.items():
        module = owners.get(name)
        if module is None or quantization is None:
            rows[name] = Row(name, tensor.dtype, tensor.shape, tensor.nbytes)
            continue
        entry = quantization.modules[module]
        _check_part(tensor, entry)
        before = rows[module].nbytes if module in rows else 0
        nbytes = before + tensor.nbytes
        rows[module] = Row(
            module, entry.format, entry.shape, nbytes, errors.get(module), _activations_of(entry)
        )
    return [rows[name] for name in sorted(rows, key=natural)]


def _activations_of(entry: ModuleEntry) -> str:
    return "" if entry.activations.is_float else str(entry.activations)


def _check_part(tensor: StoredTensor, entry: ModuleEntry) -> None:
    wanted = entry.parts()[tensor.name.rpartition(".")[2]].shape
    if tensor.shape != wanted:
        raise CheckpointError(
            f"{tensor.path}: '{tensor.name}' has shape {list(tensor.shape)}, {CONFIG_FILE} says {entry.format}, "
            f"which makes it {list(wanted)}"
        )


def _errors(path: Path) -> dict[str, float]:
    """The error of each module, if bitfold_report.json tells it; of a stack of experts the largest."""
    found: dict[str, float] = {}
    for module, error in noted_errors(path).items():
        for name in {module, stack_name(module)}:
            found[name] = max(found.get(name, 0.0), error)
    return found
