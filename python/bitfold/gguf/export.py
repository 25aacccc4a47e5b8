"""A Hugging Face model directory as a GgufModel: its tensors under GGUF's names, in GGUF's row order, a few rows at a
time, and all metadata."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitfold import hf, shards
from bitfold.formats import parse
from bitfold.gguf import architectures, hyperparameters, mixes
from bitfold.gguf.architectures import Placement, Span
from bitfold.gguf.library import GGMLQuantizationType, GGUFValue, GGUFValueType, GGUFWriter, Metadata
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.rows import MappedFiles, Rows, Stored
from bitfold.gguf.tokenizer import read_tokenizer
from bitfold.gguf.words import quoted
from bitfold.section import QuantizationConfig, read_quantization
from bitfold.shards import CONFIG_FILE, CheckpointError, listed

TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
FILE_TYPES = {dtype: mixes.get(kind.name).number for dtype, kind in TYPES.items()}
# Stored beside the weights by old libraries, or parts of a model that sees and hears: not of the text model.
_SKIPPED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "audio_tower.")


def read_directory(
    path: str | Path, *, dtype: torch.dtype | None = None, remark: Callable[[str], None] | None = None
) -> GgufModel:
    """The model of a Hugging Face directory. Reads the configuration, the tokenizer and the headers of its files.

    Args:
        path: with config.json, safetensors files and the tokenizer's files; unquantized, or quantized by bitfold in
            block formats, whose blocks are taken as they are.
        dtype: of the plain matrices: float32, float16 or bfloat16. None: as they are stored. Vectors are F32 always.
        remark: told what of the model a GGUF file doesn't say, though it runs.

    Raises:
        CheckpointError: an architecture, a configuration, a tokenizer or a format that GGUF has no word for, a
            directory that is incomplete, tensors that don't fit the configuration; and, as rows are read, values that
            are too large for float16.
        MissingExtraError: transformers is not installed.
    """
    return open_directory(Path(path), dtype=dtype, remark=remark)[0]


def open_directory(
    path: Path, *, dtype: torch.dtype | None = None, remark: Callable[[str], None] | None = None
) -> tuple[GgufModel, dict[str, Rows]]:
    """`read_directory`, and of the tensors that the directory holds the rows with the values there."""
    if dtype not in (None, *FILE_TYPES):
        raise ValueError(f"dtype is {dtype}, it must be torch.float32, torch.float16 or torch.bfloat16")
    config = hf.read_config(path)
    quantization = read_quantization(path, config) if config.get("quantization_config") else None
    typed = hf.typed_config(path, config)
    try:
        placements = architectures.placements(typed)
        keys, factors = hyperparameters.to_metadata(typed)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    for text in hyperparameters.remarks(typed) if remark is not None else ():
        remark(text)  # type: ignore[misc]
    stored = _stored(path, placements, quantization)
    chosen = {name: _choose(path, placement, stored) for name, placement in placements.items()}
    dtype = dtype or _common_dtype(path, placements, chosen, stored)

    mapped = MappedFiles()
    tensors = {name: _rotary(name, values) for name, values in factors.items()}
    rows = {}
    for name, placement in placements.items():
        format = stored[chosen[name][0].source].format
        own = None if format else torch.float32 if placement.keeps_f32 else dtype
        rows[name] = Rows(mapped, placement, chosen[name], stored, own)
        kind = GGMLQuantizationType[format.upper()] if format else TYPES[own]  # type: ignore[index]
        tensors[name] = GgufTensor(name, placement.shape, kind, rows[name].read)
    number = _file_type(dtype, tensors, quantization)
    metadata = _metadata(path, architectures.of_config(typed).name, keys, number, tensors)
    metadata |= read_tokenizer(path, placements["token_embd.weight"].shape[0], remark)
    _check_name(path, metadata)
    metadata["general.quantization_version"] = GGUFValue(2, GGUFValueType.UINT32)
    files = tuple(dict.fromkeys(weight.tensor.path for weight in stored.values()))
    return GgufModel(metadata, tensors, files), rows


# ---- metadata ----


def _metadata(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    file_type: int,
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
    writer.add_file_type(file_type)
    return dict(writer.kv_data[0])


# llama.cpp takes a model for Phi-3 if its general.name says so, whatever its architecture, and then doesn't read a
# vocabulary that lacks one of these ("unordered_map::at").
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")


def _check_name(path: Path, metadata: Mapping[str, GGUFValue]) -> None:
    name = metadata["general.name"].value if "general.name" in metadata else ""
    tokens = set(metadata["tokenizer.ggml.tokens"].value)
    missing = [token for token in _PHI3_TOKENS if token not in tokens]
    if missing and any(each in name.lower() for each in _PHI3_NAMES):
        raise CheckpointError(
            f"{path} is named {quoted(name)}, which llama.cpp takes for Phi-3, and its tokenizer lacks Phi-3's token "
            f"{missing[0]}, without which llama.cpp doesn't read it; rename the directory, or its model card's model"
        )


_KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}


def _file_type(
    dtype: torch.dtype, tensors: Mapping[str, GgufTensor], quantization: QuantizationConfig | None
) -> int:
    """general.file_type: that of the plain dtype, or of blocks the mix they were made by, if the checkpoint names one,
    else that of the type that most weights have."""
    weights: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.type not in TYPES.values():
            weights[tensor.type.name] += math.prod(tensor.shape)
    if quantization is None or not weights:
        return FILE_TYPES[dtype]
    mix = mixes.find(quantization.recipe) or mixes.find(weights.most_common(1)[0][0])
    return FILE_TYPES[dtype] if mix is None else mix.number


# ---- which tensors ----


def _stored(
    path: Path, placements: Mapping[str, Placement], quantization: QuantizationConfig | None
) -> dict[str, Stored]:
    """The directory's weights by the names that the table has, without what isn't of the model."""
    modules = {} if quantization is None else quantization.modules
    tied = "output.weight" not in placements
    found: dict[str, Stored] = {}
    for name, tensor in shards.read_directory(path).items():
        short = name.replace("language_model.", "")
        home = name.rpartition(".")[0]
        if name.endswith(_SKIPPED) or short.removeprefix("model.").startswith(_OTHER_PARTS):
            continue
        if tied and short == "lm_head.weight":
            continue
        if home in modules and not name.endswith(".bias"):
            entry = modules[home]
            if parse(entry.format).grid != "block":
                raise CheckpointError(f"{path}: '{home}' is {entry.format}, which GGUF has no type for")
            if tensor.shape != entry.parts()["blocks"].shape:
                raise CheckpointError(f"{tensor.path}: tensor '{name}' has shape {list(tensor.shape)}")
            found[entry.weight_of(home)] = Stored(tensor, entry.shape, entry.format)
        else:
            found[short] = Stored(tensor, tensor.shape)
    known = {
        span.source for placement in placements.values() for source in placement.sources for span in source
    }
    extra = [name for name in found if name not in known]
    if extra:
        raise CheckpointError(
            f"{path} holds {listed(extra)}, which the model of its {CONFIG_FILE} doesn't have"
        )
    return found


def _choose(path: Path, placement: Placement, stored: Mapping[str, Stored]) -> tuple[Span, ...]:
    """In which of the ways a placement allows the directory holds the tensor."""
    for spans in placement.sources:
        if all(span.source in stored for span in spans):
            for span in spans:
                weight = stored[span.source]
                tensor = weight.tensor
                if weight.shape != span.shape:
                    raise CheckpointError(
                        f"{tensor.path}: tensor '{tensor.name}' has shape {list(weight.shape)}, but {CONFIG_FILE} "
                        f"makes it {list(span.shape)}"
                    )
                if weight.format is None and tensor.dtype not in ("F32", "F16", "BF16"):
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
    stored: Mapping[str, Stored],
) -> torch.dtype:
    """The one dtype in which the plain matrices are stored; float32 where there are none."""
    found: dict[torch.dtype, str] = {}
    for name, placement in placements.items():
        weights = [stored[span.source] for span in chosen[name]]
        if not placement.keeps_f32:
            found |= {
                weight.tensor.torch_dtype: weight.tensor.name for weight in weights if not weight.format
            }
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise CheckpointError(
            f"{path} has matrices of {one} ('{first}') and of {other} ('{second}'): say in which dtype to write them"
        )
    return next(iter(found), torch.float32)


def _rotary(name: str, values: list[float]) -> GgufTensor:
    tensor = torch.tensor([values], dtype=torch.float32)
    return GgufTensor(name, (len(values),), GGMLQuantizationType.F32, lambda begin, end: tensor[begin:end])
