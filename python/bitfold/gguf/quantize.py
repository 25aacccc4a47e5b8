"""Quantizing a model into a GGUF file: planned as a whole, then read, encoded and written a few rows at a time.

What comes out is what llama-quantize makes of the same model, in names, order, metadata and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from bitfold.gguf import mixes
from bitfold.gguf.assign import Choice, Facts, Item, Overrides, assign
from bitfold.gguf.importance import Importance
from bitfold.gguf.layout import Layout, TensorInfo, lay_out
from bitfold.gguf.library import GGMLQuantizationType, GGUFValue, GGUFValueType
from bitfold.gguf.mixes import EMBEDDING, FLOATS, HEAD, Mix
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.reader import read_gguf
from bitfold.gguf.scan import row_bytes
from bitfold.gguf.words import quoted
from bitfold.gguf.writer import GgufWriter, check_target_file
from bitfold.qtensor import QTensor, encode
from bitfold.shards import CheckpointError

QUANTIZATION_VERSION = 2
PIECE = 1 << 22  # values read, encoded and handed on at a time
_ARCHITECTURE = "general.architecture"
_VERSION_KEY, _TYPE_KEY = "general.quantization_version", "general.file_type"
_LONGEST_PATH = 127  # bytes of a file's name that llama-quantize notes
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_T = TypeVar("_T")

Progress = Callable[[str, int, int], None]
"""Told after each piece: the tensor's name, the source bytes done so far, the source bytes to do in all."""


@dataclass(frozen=True)
class Plan:
    """What a file will be, before a weight is read."""

    mix: Mix
    choices: tuple[Choice, ...]
    layout: Layout

    @property
    def parameters(self) -> int:
        return sum(choice.parameters for choice in self.choices)

    @property
    def file_bytes(self) -> int:
        return self.layout.nbytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data, without header and padding."""
        return sum(info.nbytes for info in self.layout.infos)

    @property
    def bits_per_weight(self) -> float:
        """Effective, over all tensors."""
        return 8 * self.tensor_bytes / max(1, self.parameters)


@dataclass(frozen=True)
class Made:
    """One tensor of a file that was written. relative_rmse: norm of the change over norm of the source; None where it
    wasn't measured."""

    choice: Choice
    bytes_before: int
    bytes_after: int
    relative_rmse: float | None


@dataclass(frozen=True)
class Summary:
    """A file that was written."""

    plan: Plan
    tensors: tuple[Made, ...]

    @property
    def bytes_before(self) -> int:
        return sum(made.bytes_before for made in self.tensors)


def facts_of(metadata: Mapping[str, GGUFValue]) -> Facts:
    """What the rules ask of a model, from its metadata.

    Raises CheckpointError where it names no architecture, no number of layers, or has a text for a number.
    """
    if _ARCHITECTURE not in metadata:
        raise CheckpointError(f"the model's metadata has no {_ARCHITECTURE}")
    architecture = str(metadata[_ARCHITECTURE].value)

    def number(key: str, default: int) -> int:
        value = metadata.get(f"{architecture}.{key}")
        if value is None:
            return default
        first = value.value[0] if isinstance(value.value, list) and value.value else value.value
        if not isinstance(first, int):
            shown = quoted(str(first))
            raise CheckpointError(
                f"{quoted(f'{architecture}.{key}')} of the metadata is no whole number but {shown}"
            )
        return first

    if f"{architecture}.block_count" not in metadata:
        raise CheckpointError(f"the model's metadata has no {quoted(f'{architecture}.block_count')}")
    heads = number("attention.head_count", 0)
    return Facts(
        architecture,
        layers=number("block_count", 0),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        experts=number("expert_count", 0),
    )


def read_model(path: str | Path, *, remark: Callable[[str], None] | None = None) -> GgufModel:
    """The model in a GGUF file, or in a Hugging Face directory. remark: told what of it a GGUF file doesn't say.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return read_gguf(path)
    from bitfold.gguf.export import read_directory

    return read_directory(path, remark=remark)


def plan_gguf(
    source: GgufModel | str | Path,
    mix: str | Mix,
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    *,
    importance: Importance | None = None,
    allow_requantize: bool = False,
) -> Plan:
    """What quantizing will write, to the byte; reads no weight. Arguments and errors as `quantize_gguf`."""
    source = source if isinstance(source, GgufModel) else read_model(source)
    mix = mixes.get(mix) if isinstance(mix, str) else mix
    if importance is not None:
        importance.check_model(source.tensors)
    items = [Item(tensor.name, tensor.shape, tensor.type.name) for tensor in source.tensors.values()]
    choices = tuple(
        assign(
            mix,
            facts_of(source.metadata),
            items,
            overrides,
            has_importance=bool(importance and importance.means),
        )
    )
    for choice in choices:
        _check_source(choice, allow_requantize)
        _check_importance(choice, mix, importance)
    infos = [TensorInfo(choice.name, choice.shape, GGMLQuantizationType[choice.after]) for choice in choices]
    return Plan(mix, choices, lay_out(_metadata(source.metadata, mix, importance), infos))


def quantize_gguf(
    source: GgufModel | str | Path,
    target: str | Path,
    mix: str | Mix,
    overrides: Overrides = Overrides(),  # noqa: B008  (frozen)
    *,
    importance: Importance | None = None,
    allow_requantize: bool = False,
    measure: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Quantize a model into a GGUF file.

    Args:
        source: a GGUF file (the first of a split one), a Hugging Face directory, or what `read_model` made of them.
        target: the file to make. It appears as a whole at the end, or not at all.
        mix: a file type, such as "q4_k_m".
        overrides: what is wanted otherwise.
        importance: how much each column counts in the search for scales.
        allow_requantize: quantize tensors again that are quantized already, which loses more than once.
        measure: decode what was encoded and note the error of each tensor.
        force: replace a GGUF file that is at `target`, at the end.
        progress: told after each piece.

    Memory: some pieces of four million weights, whatever the size of the model.

    Raises:
        CheckpointError: the target is taken or its disk too small, or is the source; the importance is of another
            model; a tensor is quantized already.
        ValueError: the file type is unknown; a weight holds NaN or doesn't fit its type.
        OSError: the target can't be written.
    """
    target = check_target_file(Path(target), force=force)
    source = source if isinstance(source, GgufModel) else read_model(source)
    if target in (file.resolve() for file in source.files):
        raise CheckpointError(f"{target} is the model to quantize; choose another output")
    plan = plan_gguf(source, mix, overrides, importance=importance, allow_requantize=allow_requantize)
    sizes = {name: _nbytes(tensor) for name, tensor in source.tensors.items()}
    total, done = sum(sizes.values()), 0
    made = []
    with GgufWriter(target, plan.layout, force=force) as writer:
        for choice, info in zip(plan.choices, plan.layout.infos, strict=True):
            tensor = source.tensors[choice.name]
            error = _Error() if measure and choice.quantized and choice.after != choice.before else None
            vectors = _vectors(choice, importance)
            for piece in _ahead(_pieces(tensor, vectors)):
                result = _convert(choice, piece)
                writer.write(choice.name, result)
                if error is not None:
                    error.add(choice, piece.rows, result)
                done += piece.rows.nbytes
                if progress is not None:
                    progress(choice.name, done, total)
            made.append(Made(choice, sizes[choice.name], info.nbytes, error.value if error else None))
        writer.commit()
    return Summary(plan, tuple(made))


# ---- before a weight is read ----


def _nbytes(tensor: GgufTensor) -> int:
    return tensor.rows * row_bytes(tensor.type, tensor.columns)


def _check_source(choice: Choice, allow_requantize: bool) -> None:
    if choice.after == choice.before or choice.before in FLOATS:
        return
    if choice.before not in mixes.BLOCKS:
        raise CheckpointError(
            f"{quoted(choice.name)} is {choice.before}, which bitfold can't decode to make it {choice.after}"
        )
    if not allow_requantize:
        raise CheckpointError(
            f"{quoted(choice.name)} is {choice.before} already; start from an unquantized file, or pass "
            "--allow-requantize (allow_requantize=True), which loses more"
        )


def _check_importance(choice: Choice, mix: Mix, importance: Importance | None) -> None:
    """Q2_K_S is a file type for importance files alone: by itself its error is too large to be of use."""
    vectors = _vectors(choice, importance)
    needs_one = mix.name == "Q2_K_S" and choice.after == "Q2_K" and choice.before != "Q2_K"
    if needs_one and vectors is None and mixes.role_of(choice.name) not in (HEAD, EMBEDDING):
        raise CheckpointError(
            f"{mix.name} needs importance (--imatrix) for every tensor in Q2_K, and there is none for "
            f"{quoted(choice.name)}"
        )


def _metadata(
    source: Mapping[str, GGUFValue], mix: Mix, importance: Importance | None
) -> dict[str, GGUFValue]:
    """The source's pairs in their order, then what says how the file was made."""
    metadata = {key: value for key, value in source.items() if key not in (_VERSION_KEY, _TYPE_KEY)}

    def u32(value: int) -> GGUFValue:
        return GGUFValue(value, GGUFValueType.UINT32)

    metadata[_VERSION_KEY] = u32(QUANTIZATION_VERSION)
    metadata[_TYPE_KEY] = u32(mix.number)
    if importance is not None and importance.means:
        path = importance.path.encode("utf-8", "surrogateescape")[:_LONGEST_PATH]
        metadata["quantize.imatrix.file"] = GGUFValue(path, GGUFValueType.STRING)
        if importance.dataset:
            metadata["quantize.imatrix.dataset"] = GGUFValue(importance.dataset, GGUFValueType.STRING)
        metadata["quantize.imatrix.entries_count"] = u32(len(importance.means))
        if importance.chunks > 0:
            metadata["quantize.imatrix.chunks_count"] = u32(importance.chunks)
    return metadata


# ---- pieces ----


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor that go by one vector of importance; begin: the first of them in the tensor as a matrix."""

    rows: Tensor
    begin: int
    importance: Tensor | None


def _vectors(choice: Choice, importance: Importance | None) -> Tensor | None:
    """Float32 [experts, columns] where the tensor is encoded and there is importance for it."""
    if importance is None or choice.after == choice.before or choice.after in FLOATS:
        return None
    return importance.of(choice.name, choice.shape)


def _pieces(tensor: GgufTensor, vectors: Tensor | None) -> Iterator[_Piece]:
    step = max(1, PIECE // tensor.columns)
    stacks = 1 if vectors is None else vectors.shape[0]
    rows = tensor.rows // stacks  # of one expert
    for stack in range(stacks):
        vector = None if vectors is None else vectors[stack]
        for begin in range(stack * rows, (stack + 1) * rows, step):
            end = min(begin + step, (stack + 1) * rows)
            yield _Piece(tensor.read(begin, end), begin, vector)


def _ahead(pieces: Iterable[_T]) -> Iterator[_T]:
    """The same; each is asked for before the one in front of it is used, so that reading can begin early."""
    iterator = iter(pieces)
    waiting = next(iterator, None)
    while waiting is not None:
        current, waiting = waiting, next(iterator, None)
        yield current


def _convert(choice: Choice, piece: _Piece) -> Tensor:
    """The bytes or numbers of the piece in the type it gets."""
    rows = piece.rows
    if choice.after == choice.before:
        if choice.after in mixes.TYPES:
            floats = rows if choice.after in FLOATS else _decode(choice.after, rows, choice.shape[-1])
            _check_finite(choice, piece.begin, floats, "")
        return rows
    floats = rows if choice.before in FLOATS else _decode(choice.before, rows, choice.shape[-1])
    if choice.after in FLOATS:
        result = floats.to(_DTYPES[choice.after])
        _check_finite(choice, piece.begin, result, f" as {choice.after}")
        return result
    try:
        return _encode(floats, choice.after, piece.importance)
    except ValueError as error:
        _check_finite(choice, piece.begin, floats, "")
        place = f"rows {piece.begin} to {piece.begin + len(rows) - 1}"
        raise ValueError(f"{quoted(choice.name)}, {place}, can't be {choice.after}: {error}") from error


def _encode(floats: Tensor, kind: str, importance: Tensor | None) -> Tensor:
    """Blocks that llama.cpp takes for valid; ValueError where a block of its encoder isn't.

    That is what `encode` refuses, but for MXFP4: blocks of numbers below 2^-126 become zeros there.
    """
    if kind == "MXFP4":
        blocks = encode(floats, "mxfp4", clamp=True).planes["blocks"]
        if not (blocks[:, :: mixes.row_bytes(kind, mixes.block_values(kind))] == 255).any():
            return blocks
    return encode(floats, kind.lower(), importance=importance).planes["blocks"]


def _decode(kind: str, rows: Tensor, columns: int) -> Tensor:
    return QTensor(kind.lower(), (len(rows), columns), {"blocks": rows}).decode()


def _check_finite(choice: Choice, begin: int, rows: Tensor, what: str) -> None:
    """Raises ValueError, naming the row and the column, where there is a NaN or an infinity."""
    # In one pass that makes nothing: both are NaN where anything is.
    if torch.isfinite(torch.stack(torch.aminmax(rows))).all():
        return
    row, column = (int(i) for i in (~torch.isfinite(rows)).nonzero()[0])
    raise ValueError(
        f"{quoted(choice.name)} holds {rows[row, column].item()}{what} in row {begin + row}, column {column}; it must "
        "be finite"
    )


class _Error:
    """The error of a tensor, summed over its pieces in float64."""

    def __init__(self) -> None:
        self.squares = self.norm = 0.0

    def add(self, choice: Choice, rows: Tensor, result: Tensor) -> None:
        columns = choice.shape[-1]
        source = rows if choice.before in FLOATS else _decode(choice.before, rows, columns)
        source = source.to(torch.float32)
        got = result.to(torch.float32) if choice.after in FLOATS else _decode(choice.after, result, columns)
        self.squares += torch.linalg.vector_norm(got - source, dtype=torch.float64).item() ** 2
        self.norm += torch.linalg.vector_norm(source, dtype=torch.float64).item() ** 2

    @property
    def value(self) -> float:
        return math.sqrt(self.squares / self.norm) if self.norm > 0 else 0.0
