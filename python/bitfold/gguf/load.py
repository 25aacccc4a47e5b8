"""GGUF files as torch models: transformers' configuration and modules, made from the metadata, on the file's own bytes.

Weights in block formats stay packed: they become the plane "blocks" of a QuantLinear or QuantEmbedding, mapped from the
file. restore.py undoes what export.py does to a model on its way into a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold import hf
from bitfold.embeddings import QuantEmbedding
from bitfold.experts import QuantStack, put_stack
from bitfold.gguf import architectures, hyperparameters
from bitfold.gguf.keys import shortest
from bitfold.gguf.library import GGMLQuantizationType
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.reader import read_gguf
from bitfold.gguf.restore import Restored, restored
from bitfold.gguf.rope import ROTARY
from bitfold.gguf.vocabulary import tokenizer_of
from bitfold.nn import PlaneModule, QuantLinear, announce
from bitfold.qtensor import QTensor
from bitfold.quantize import quantized_like
from bitfold.shards import CheckpointError


def load(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """A model from a GGUF file; packed weights stay packed and, on the CPU, mapped from the file.

    Args:
        path: the file (the first of a split one). It must not change while the model lives.
        device: where the model goes.
        dtype: compute in this dtype; norms, biases and plain matrices are cast to it. None: the dtype of the file's
            matrices where all are plain and alike, else float32.

    Returns:
        A transformers causal language model, in eval mode.

    Raises:
        CheckpointError: the file is damaged or incomplete, has an architecture that bitfold doesn't run, or tensors of
            a type that it doesn't compute with.
        MissingExtraError: gguf or transformers is not installed.
    """
    path = Path(path)
    try:
        return build(read_gguf(path), path, device=device, dtype=dtype)
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a GGUF file, as transformers has them.

    Raises CheckpointError for a damaged file, and where it has no tokenizer or one that bitfold doesn't know.
    """
    path = Path(path)
    file = read_gguf(path)
    try:
        return tokenizer_of(file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def build(
    file: GgufModel, path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """`load`, of a model that is read already; path: where it is from, for messages."""
    config = config_of(file)
    placements = architectures.placements(hf.typed_config(path, config))
    tensors = restored(file, placements)
    dtype = dtype or default_dtype(tensors.values())
    model = hf.empty_causal_lm(path, config, dtype)
    _fill(model, tensors.values(), dtype)
    if "output.weight" not in placements:
        _tie(model)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not missing, missing
    if torch.device(device).type != "cpu":
        model.to(device)
    for module in model.modules():
        if isinstance(module, PlaneModule):
            module.prepare()
    announce(model)
    return model.eval()


def config_of(file: GgufModel) -> dict[str, Any]:
    """config.json of the model in a file. Raises CheckpointError for an architecture that bitfold doesn't run."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = {name: _values(file.tensors[name]) for name in ROTARY if name in file.tensors}
    return hyperparameters.to_config(file.metadata, shapes, factors)


def _values(tensor: GgufTensor) -> list[float]:
    if tensor.type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise CheckpointError(
            f"'{tensor.name}' is {tensor.type.name} {list(tensor.shape)}; it must be one row of F32"
        )
    values = tensor.read(0, 1).reshape(-1).tolist()
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise CheckpointError(f"'{tensor.name}' holds values that are no factors; they must be positive")
    return [shortest(value) for value in values]


def default_dtype(tensors: Iterable[Restored]) -> torch.dtype:
    """The dtype of the matrices where all are plain and alike, else float32."""
    found = {tensor.dtype for tensor in tensors if not all(place.keeps_f32 for _, place, _ in tensor.parts)}
    return found.pop() if len(found) == 1 and torch.uint8 not in found else torch.float32


# ---- values ----


def _fill(model: nn.Module, tensors: Iterable[Restored], dtype: torch.dtype) -> None:
    """Give the model its values; its parameters have none yet."""
    for tensor in tensors:
        home, _, leaf = tensor.name.rpartition(".")
        if tensor.format is not None and tensor.is_stack:
            put_stack(model, tensor.name, QuantStack(tensor.format, tensor.shape, {"blocks": tensor.read()}))
            continue
        if tensor.format is not None:
            _swap(model, home, QTensor(tensor.format, tensor.matrix, {"blocks": tensor.read()}), dtype)
            continue
        values = tensor.read()
        values = (values - tensor.shift if tensor.shift else values).to(dtype)
        model.get_submodule(home)._parameters[leaf] = nn.Parameter(values, requires_grad=False)


def _swap(model: nn.Module, name: str, qtensor: QTensor, dtype: torch.dtype) -> None:
    """Put a module that holds its weight packed in the place of the module `name`."""
    home, _, leaf = name.rpartition(".")
    new = quantized_like(model.get_submodule(name), qtensor, dtype)
    setattr(model.get_submodule(home), leaf, new)


def _tie(model: Any) -> None:
    """Let the output head have the weight of the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantEmbedding):
        model.set_output_embeddings(QuantLinear(embedding.qtensor))
    else:
        head.weight = embedding.weight
