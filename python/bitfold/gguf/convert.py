"""A GGUF file as a model directory, and a model directory as a GGUF file.

Blocks stay the blocks they are, in one direction as in the other. What may round is a change of dtype that was asked
for, and the 1 that Gemma's norms are given in a file. Either way every tensor is read back from what was written, as
the other direction reads it, and compared with its source.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold import hf
from bitfold.gguf import architectures, mixes
from bitfold.gguf.export import open_directory
from bitfold.gguf.layout import TensorInfo, lay_out
from bitfold.gguf.load import config_of, default_dtype
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.reader import PLAIN, read_gguf
from bitfold.gguf.restore import Restored, restored
from bitfold.gguf.vocabulary import tokenizer_of
from bitfold.gguf.writer import GgufWriter, check_target_file
from bitfold.qtensor import QTensor
from bitfold.section import ModuleEntry, QuantizationConfig
from bitfold.shards import TensorSpec
from bitfold.writer import SHARD_BYTES, CheckpointWriter, check_target

_PIECE = 1 << 22  # weights read at a time

Progress = Callable[[str, int, int], None]
"""Told after each piece: the tensor's name, the weights done so far, the weights to do in all."""


@dataclass(frozen=True)
class Status:
    """What became of one tensor. name: in the GGUF file; before, after: its types; largest: error of a value; relative:
    norm of the errors over norm of the values."""

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    largest: float
    relative: float

    @property
    def exact(self) -> bool:
        """Every value is the same."""
        return self.largest == 0


# ---- a file becomes a directory ----


def to_directory(
    source: Path,
    target: Path,
    *,
    decode: torch.dtype | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Status]:
    """A GGUF file as a directory: a checkpoint of bitfold's with the file's blocks, or an unquantized one, if the file
    has none or with `decode`, the dtype of all weights then. Configuration and tokenizer are made from the metadata.

    Memory: one weight.

    Raises CheckpointError for a file that bitfold doesn't run and a target that is taken, ValueError for values that
    `decode` can't hold, OSError where the target can't be written.
    """
    target = check_target(target, force=force)
    file = read_gguf(source)
    config = config_of(file)
    placements = architectures.placements(hf.typed_config(source, config))
    tensors = restored(file, placements)
    dtype = decode or default_dtype(tensors.values())
    model: Any = hf.empty_causal_lm(source, config, dtype)
    specs = {name: _spec(tensor, decode) for name, tensor in tensors.items()}
    count = Count(progress, 2 * sum(math.prod(tensor.shape) for tensor in tensors.values()))
    with CheckpointWriter(target, list(specs.values()), force=force, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(specs[name].name, _written(tensor, specs[name].dtype))
            count.add(name, math.prod(tensor.shape))
        with tempfile.TemporaryDirectory() as folder:
            for made in tokenizer_of(file).save_pretrained(folder):
                if Path(made).is_file():
                    writer.add_copy(Path(made))
        described = model.config.to_diff_dict() | {
            "architectures": [type(model).__name__],
            "dtype": str(dtype).removeprefix("torch."),
        }
        if "general.name" in file.metadata:
            described["_name_or_path"] = file.metadata["general.name"].value
        if any(spec.dtype == torch.uint8 for spec in specs.values()):
            described["quantization_config"] = _quantization(file, model, tensors, dtype).to_json()
        writer.commit(described)
    back, _ = open_directory(target, dtype=torch.float32)
    after = {
        part.name: _type_of(specs[name], tensor)
        for name, tensor in tensors.items()
        for part, *_ in tensor.parts
    }
    return list(
        _compared({name: _Wanted(file.tensors[name], after[name]) for name in placements}, back, count)
    )


def _type_of(spec: TensorSpec, tensor: Restored) -> str:
    """What a tensor has become, as GGUF calls it."""
    if spec.dtype == torch.uint8 and tensor.format is not None:
        return tensor.format.upper()
    return next(kind.name for kind, dtype in PLAIN.items() if dtype == spec.dtype)


def _spec(tensor: Restored, decode: torch.dtype | None) -> TensorSpec:
    """What a tensor becomes in the directory."""
    if tensor.format is not None and decode is None:
        return TensorSpec(f"{tensor.module}.blocks", torch.uint8, tensor.stored_shape)
    return TensorSpec(tensor.name, decode or (torch.float32 if tensor.shift else tensor.dtype), tensor.shape)


def _written(tensor: Restored, dtype: torch.dtype) -> Tensor:
    values = tensor.read()
    if dtype == torch.uint8:
        return values
    if tensor.format is not None:
        blocks = values.view(-1, values.shape[-1])
        decoded = QTensor(tensor.format, tensor.matrix, {"blocks": blocks}).decode(dtype)
        cast = decoded.view(tensor.shape)
    else:
        cast = (values.to(torch.float32) - tensor.shift if tensor.shift else values).to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all():
        raise ValueError(f"{tensor.name} has values beyond float16's 65504: decode to bfloat16 or float32")
    return cast


def _quantization(
    file: GgufModel, model: Any, tensors: Mapping[str, Restored], dtype: torch.dtype
) -> QuantizationConfig:
    """What the checkpoint says of its blocks; its recipe is the name of the file type."""
    number = file.metadata.get("general.file_type")
    mix = next(
        (mix for mix in mixes.MIXES.values() if number is not None and mix.number == number.value), None
    )
    modules: dict[str, ModuleEntry] = {}
    tied: dict[str, str] = {}
    embedding = next(tensor for tensor in tensors.values() if tensor.parts[0][0].name == "token_embd.weight")
    for tensor in tensors.values():
        if tensor.format is not None:
            kind = "embedding" if tensor is embedding else "experts" if tensor.is_stack else "linear"
            modules[tensor.module] = ModuleEntry(
                kind, tensor.format, tensor.shape, dtype=dtype if tensor is embedding else None
            )
    if model.config.tie_word_embeddings:
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        plane = "weight" if embedding.format is None else "blocks"
        tied[f"{head}.{plane}"] = f"{embedding.module}.{plane}"
        if embedding.format is not None:
            modules[head] = ModuleEntry("linear", embedding.format, modules[embedding.module].shape)
    return QuantizationConfig("gguf" if mix is None else mix.name.lower(), modules, tied)


# ---- a directory becomes a file ----


def to_file(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: Progress | None = None,
    remark: Callable[[str], None] | None = None,
) -> list[Status]:
    """A model directory as a GGUF file: an unquantized one with matrices of `dtype` (None: as they are stored), or one
    that bitfold quantized in block formats, with these blocks. Memory: a few rows.

    Raises CheckpointError for a directory that GGUF has no word for and a target that is taken, OSError where the
    target can't be written.
    """
    target = check_target_file(target, force=force)
    model, rows = open_directory(source, dtype=dtype, remark=remark)
    infos = [TensorInfo(tensor.name, tensor.shape, tensor.type) for tensor in model.tensors.values()]
    count = Count(progress, 2 * sum(math.prod(tensor.shape) for tensor in model.tensors.values()))
    with GgufWriter(target, lay_out(model.metadata, infos), force=force) as writer:
        for tensor in model.tensors.values():
            for begin, end in _pieces(tensor):
                writer.write(tensor.name, tensor.read(begin, end))
                count.add(tensor.name, (end - begin) * tensor.columns)
        writer.commit()
    wanted = {
        name: _Wanted(
            GgufTensor(name, own.placement.shape, own.type, own.source),
            model.tensors[name].type.name,
            own.placement.shift,
        )
        for name, own in rows.items()
    }
    return list(_compared(wanted, read_gguf(target), count))


# ---- comparing ----


@dataclass(frozen=True)
class _Wanted:
    """A tensor as the source has it, the type it has become, and what is to be added to its values."""

    tensor: GgufTensor
    after: str
    shift: float = 0.0


def _compared(wanted: Mapping[str, _Wanted], found: GgufModel, count: Count) -> Iterator[Status]:
    for name, source in wanted.items():
        tensor = found.tensors[name]
        largest = errors = values = 0.0
        for begin, end in _pieces(tensor):
            one, other = source.tensor.read(begin, end), tensor.read(begin, end)
            same = one.dtype == other.dtype and source.tensor.type == tensor.type and not source.shift
            if not (same and torch.equal(one, other)):
                exact = _values(source.tensor, one).double() + source.shift
                error = _values(tensor, other).double() - exact
                largest = max(largest, error.abs().max().item())
                errors += torch.linalg.vector_norm(error).item() ** 2
                values += torch.linalg.vector_norm(exact).item() ** 2
            count.add(name, (end - begin) * tensor.columns)
        relative = math.sqrt(errors / values) if values else 0.0
        yield Status(name, tensor.shape, source.tensor.type.name, source.after, largest, relative)


def _values(tensor: GgufTensor, rows: Tensor) -> Tensor:
    if tensor.type in PLAIN:
        return rows
    return QTensor(tensor.type.name.lower(), (len(rows), tensor.columns), {"blocks": rows}).decode()


def _pieces(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE // tensor.columns)
    for begin in range(0, tensor.rows, step):
        yield begin, min(tensor.rows, begin + step)


class Count:
    """Tells `progress` how many weights are done, of how many."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, name: str, weights: int) -> None:
        self._done += weights
        if self._progress is not None:
            self._progress(name, self._done, self._total)
