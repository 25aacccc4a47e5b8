"""A Hugging Face model directory as a GgufModel: its tensors under GGUF's names, in GGUF's row order, a few rows at a
time, and all metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitfold import hf, shards
from bitfold.checkpoint import listed
from bitfold.gguf import architectures, hyperparameters
from bitfold.gguf.architectures import Placement, Span
from bitfold.gguf.library import (
    GGMLQuantizationType,
    GGUFValue,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    Metadata,
)
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.tokenizer import read_tokenizer
from bitfold.shards import CONFIG_FILE, CheckpointError, StoredTensor

FILE_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_REMAP_EVERY = 256 << 20  # bytes read from one mapping of a file before it is dropped
# Stored beside the weights by old libraries, or parts of a model that sees and hears: not of the text model.
_SKIPPED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "audio_tower.")


def read_directory(
    path: str | Path, *, dtype: torch.dtype | None = None, remark: Callable[[str], None] | None = None
) -> GgufModel:
    """The model of a Hugging Face directory. Reads the configuration, the tokenizer and the headers of its files.

    Args:
        path: with config.json, safetensors files and the tokenizer's files.
        dtype: of the matrices: float32, float16 or bfloat16. None: as they are stored. Vectors are F32 always.
        remark: told what of the model a GGUF file doesn't say, though it runs.

    Raises:
        CheckpointError: an architecture, a configuration or a tokenizer that GGUF has no word for, a directory that is
            incomplete or quantized, tensors that don't fit the configuration; and, as rows are read, values that are
            too large for float16.
        MissingExtraError: transformers is not installed.
    """
    path = Path(path)
    config = hf.read_config(path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unknown method")
        raise CheckpointError(f"{path} is quantized already, by '{method}'; give the unquantized model")
    typed = hf.typed_config(path, config)
    try:
        placements = architectures.placements(typed)
        keys, factors = hyperparameters.to_metadata(typed)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for text in hyperparameters.remarks(typed) if remark is not None else ():
        remark(text)  # type: ignore[misc]
    stored = _stored(path, placements, tied="output.weight" not in placements)
    chosen = {name: _choose(path, placement, stored) for name, placement in placements.items()}
    dtype = dtype or _common_dtype(path, placements, chosen, stored)
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype is {dtype}, it must be torch.float32, torch.float16 or torch.bfloat16")

    mapped = _Files()
    tensors = {name: _rotary(name, values) for name, values in factors.items()}
    for name, placement in placements.items():
        kind, _ = FILE_TYPES[torch.float32 if placement.keeps_f32 else dtype]
        rows = _Rows(mapped, placement, chosen[name], stored, torch.float32 if placement.keeps_f32 else dtype)
        tensors[name] = GgufTensor(name, placement.shape, kind, rows.read)
    metadata = _metadata(path, architectures.of_config(typed).name, keys, dtype, tensors)
    vocabulary = placements["token_embd.weight"].shape[0]
    metadata |= read_tokenizer(path, vocabulary)
    metadata["general.quantization_version"] = GGUFValue(2, GGUFValueType.UINT32)
    files = tuple(dict.fromkeys(tensor.path for tensor in stored.values()))
    return GgufModel(metadata, tensors, files)


# ---- metadata ----


def _metadata(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    dtype: torch.dtype,
    tensors: Mapping[str, GgufTensor],
) -> dict[str, GGUFValue]:
    """general.* from the directory's name and model card, as the gguf package makes them, and the model's own keys."""
    writer = GGUFWriter(None, architecture)
    writer.add_type("model")
    try:
        described = Metadata.load(None, path, None, sum(math.prod(t.shape) for t in tensors.values()))
    except Exception as error:  # whatever a model card may make the package raise
        raise CheckpointError(f"{path}: its README.md can't be read ({hf.reason(error)})") from None
    described.set_gguf_meta_model(writer)
    for key, value in keys.items():
        writer.add_key_value(key, value, _KINDS[type(value)])
    writer.add_file_type(FILE_TYPES[dtype][1])
    return dict(writer.kv_data[0])


_KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}


# ---- which tensors ----


def _stored(path: Path, placements: Mapping[str, Placement], *, tied: bool) -> dict[str, StoredTensor]:
    """The directory's tensors by the names that the table has, without what isn't of the model."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in shards.read_directory(path).items():
        short = name.replace("language_model.", "")
        if name.endswith(_SKIPPED) or short.removeprefix("model.").startswith(_OTHER_PARTS):
            continue
        if tied and short == "lm_head.weight":
            continue
        found[short] = tensor
    known = {
        span.source for placement in placements.values() for source in placement.sources for span in source
    }
    extra = [name for name in found if name not in known]
    if extra:
        raise CheckpointError(
            f"{path} holds {listed(extra)}, which the model of its {CONFIG_FILE} doesn't have"
        )
    return found


def _choose(path: Path, placement: Placement, stored: Mapping[str, StoredTensor]) -> tuple[Span, ...]:
    """In which of the ways a placement allows the directory holds the tensor."""
    for spans in placement.sources:
        if all(span.source in stored for span in spans):
            for span in spans:
                tensor = stored[span.source]
                if tensor.shape != span.shape:
                    raise CheckpointError(
                        f"{tensor.path}: tensor '{tensor.name}' has shape {list(tensor.shape)}, but {CONFIG_FILE} "
                        f"makes it {list(span.shape)}"
                    )
                if tensor.dtype not in ("F32", "F16", "BF16"):
                    raise CheckpointError(
                        f"{tensor.path}: tensor '{tensor.name}' is {tensor.dtype}; GGUF wants weights of F32, F16 or "
                        "BF16"
                    )
            return spans
    ways = [next(span.source for span in spans if span.source not in stored) for spans in placement.sources]
    raise CheckpointError(f"{path} lacks '{' or '.join(ways)}', which its {CONFIG_FILE} asks for")


def _common_dtype(
    path: Path,
    placements: Mapping[str, Placement],
    chosen: Mapping[str, Sequence[Span]],
    stored: Mapping[str, StoredTensor],
) -> torch.dtype:
    """The one dtype in which the matrices are stored."""
    found: dict[str, str] = {}
    for name, placement in placements.items():
        if not placement.keeps_f32:
            found |= {stored[span.source].dtype: span.source for span in chosen[name]}
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise CheckpointError(
            f"{path} has matrices of {one} ('{first}') and of {other} ('{second}'): say in which dtype to write them"
        )
    return stored[next(iter(found.values()))].torch_dtype


# ---- values ----


class _Files:
    """The mapped safetensors files. A mapping is dropped and made anew every few hundred MiB, so that pages already
    read leave the process as soon as nobody holds their tensors."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._read = 0

    def matrix(self, stored: StoredTensor, nbytes: int) -> Tensor:
        """The whole tensor, mapped, as [rows, columns]; nbytes: how much of it will be read."""
        if self._read > _REMAP_EVERY:
            self._open, self._read = {}, 0
        self._read += nbytes
        try:
            if stored.path not in self._open:
                self._open[stored.path] = safe_open(stored.path, framework="pt", device="cpu")
            tensor = self._open[stored.path].get_tensor(stored.name)
        except SafetensorError as error:
            raise CheckpointError(f"{stored.path}: tensor '{stored.name}' can't be read ({error})") from None
        return tensor.reshape(-1, stored.shape[-1])


class _Rows:
    """Rows of one tensor of the file, made from the runs of rows that the directory has."""

    def __init__(
        self,
        files: _Files,
        placement: Placement,
        spans: tuple[Span, ...],
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
    ) -> None:
        self._files = files
        self._placement = placement
        self._spans = [(span, stored[span.source]) for span in spans]
        self._dtype = dtype

    def read(self, begin: int, end: int) -> Tensor:
        placement = self._placement
        if placement.heads and len(placement.shape) > 1:
            ((_, stored),) = self._spans
            values = self._mapped(stored, end - begin)[
                interleaved(placement.shape[0], placement.heads)[begin:end]
            ]
        else:
            parts = list(self._parts(begin, end))
            values = parts[0] if len(parts) == 1 else torch.cat(parts)
            if placement.heads:  # a bias: one row, its values in the order of the weight's rows
                values = values[:, interleaved(placement.shape[0], placement.heads)]
        if placement.shift:
            values = values.to(torch.float32) + placement.shift
        return self._cast(values)

    def _mapped(self, stored: StoredTensor, rows: int) -> Tensor:
        return self._files.matrix(stored, rows * stored.shape[-1] * stored.torch_dtype.itemsize)

    def _parts(self, begin: int, end: int) -> Iterator[Tensor]:
        """The runs that rows [begin, end) lie in, cut to them."""
        at = 0
        for span, stored in self._spans:
            first, last = max(begin, at), min(end, at + span.end - span.begin)
            if first < last:
                offset = span.begin - at
                yield self._mapped(stored, last - first)[first + offset : last + offset]
            at += span.end - span.begin
        if begin == end:
            yield torch.empty(0, self._placement.shape[-1])

    def _cast(self, values: Tensor) -> Tensor:
        if values.dtype == self._dtype:
            return values
        cast = values.to(self._dtype)
        if self._dtype == torch.float16 and not torch.equal(cast.isfinite(), values.isfinite()):
            raise CheckpointError(
                f"'{self._placement.name}' has values beyond float16's 65504: write it in bfloat16 or float32"
            )
        return cast


def interleaved(rows: int, heads: int) -> Tensor:
    """For each row of a projection in the file the row in transformers: the two halves of a head take turns."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _rotary(name: str, values: list[float]) -> GgufTensor:
    tensor = torch.tensor([values], dtype=torch.float32)
    return GgufTensor(name, (len(values),), GGMLQuantizationType.F32, lambda begin, end: tensor[begin:end])
