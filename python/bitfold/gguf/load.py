"""GGUF files as torch models: transformers' configuration and modules, made from the metadata, on the file's own bytes.

Weights in block formats stay packed: they become the plane "blocks" of a QuantLinear or QuantEmbedding, mapped from the
file. What export.py does to a model on its way into a file is undone: the rows of Llama's q and k go back into order
(whole rows of blocks, so nothing is rounded), Gemma's norms lose the 1 they were given, stacks of experts get their
halves together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import hf
from bitfold.checkpoint import listed
from bitfold.formats import FORMATS
from bitfold.gguf import architectures, hyperparameters
from bitfold.gguf.architectures import Placement
from bitfold.gguf.export import interleaved
from bitfold.gguf.library import GGMLQuantizationType
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.reader import PLAIN, read_gguf
from bitfold.gguf.rope import LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS
from bitfold.gguf.vocabulary import tokenizer_of
from bitfold.nn import QuantEmbedding, QuantLinear, QuantModule
from bitfold.qtensor import QTensor
from bitfold.shards import CheckpointError

_ROTARY = (LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS)
_COMPUTED = (torch.float32, torch.float16, torch.bfloat16)


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
    _check(file, placements)
    dtype = dtype or _default_dtype(file, placements)
    model = hf.empty_causal_lm(path, config, dtype)
    _fill(model, file, placements, dtype)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not missing, missing
    if torch.device(device).type != "cpu":
        model.to(device)
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.prepare()
    return model.eval()


def config_of(file: GgufModel) -> dict[str, Any]:
    """config.json of the model in a file. Raises CheckpointError for an architecture that bitfold doesn't run."""
    values = {key: value.value for key, value in file.metadata.items()}
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = {name: _values(file.tensors[name]) for name in _ROTARY if name in file.tensors}
    return hyperparameters.to_config(values, shapes, factors)


def _values(tensor: GgufTensor) -> list[float]:
    if tensor.type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise CheckpointError(
            f"'{tensor.name}' is {tensor.type.name} {list(tensor.shape)}; it must be one row of F32"
        )
    return [hyperparameters.shortest(value) for value in tensor.read(0, 1).reshape(-1).tolist()]


def _check(file: GgufModel, placements: Mapping[str, Placement]) -> None:
    """Every tensor of the model is there, in the shape that the metadata makes, and of a type that can be computed
    with."""
    extra = [name for name in file.tensors if name not in placements and name not in _ROTARY]
    if extra:
        raise CheckpointError(f"the file holds {listed(extra)}, which the model of its metadata doesn't have")
    missing = [name for name in placements if name not in file.tensors]
    if missing:
        raise CheckpointError(f"the file lacks {listed(missing)}, which its metadata asks for")
    for name, placement in placements.items():
        tensor = file.tensors[name]
        if tensor.shape != placement.shape:
            raise CheckpointError(
                f"'{name}' has shape {list(tensor.shape)}, but the file's metadata makes it {list(placement.shape)}"
            )
        dtype = PLAIN.get(tensor.type)
        if dtype is None and (tensor.type.name.lower() not in FORMATS or len(tensor.shape) != 2):
            kind = "a stack of experts" if len(tensor.shape) == 3 else "a tensor"
            raise CheckpointError(
                f"'{name}' is {kind} in {tensor.type.name}, which bitfold can't compute with"
            )
        if dtype is not None and dtype not in _COMPUTED:
            raise CheckpointError(f"'{name}' is {tensor.type.name}; bitfold computes with F32, F16 and BF16")


def _default_dtype(file: GgufModel, placements: Mapping[str, Placement]) -> torch.dtype:
    """The dtype of the matrices where all are plain and alike, else float32."""
    found = {PLAIN.get(file.tensors[name].type) for name, row in placements.items() if not row.keeps_f32}
    return next(iter(found)) or torch.float32 if len(found) == 1 else torch.float32


# ---- values ----


def _fill(model: nn.Module, file: GgufModel, placements: Mapping[str, Placement], dtype: torch.dtype) -> None:
    """Put every tensor of the file where it belongs in the model, whose parameters have no values yet."""
    runs: dict[str, list[tuple[int, Tensor]]] = {}  # by parameter: its rows from a first one on
    for name, placement in placements.items():
        tensor, spans = file.tensors[name], placement.sources[0]
        if tensor.type not in PLAIN:
            _put_packed(model, spans[0].source, _packed(tensor, placement), dtype)
            continue
        values, at = _plain(tensor, placement).to(dtype), 0
        for span in spans:
            runs.setdefault(span.source, []).append((span.begin, values[at : at + span.end - span.begin]))
            at += span.end - span.begin
    for target, pieces in runs.items():
        in_order = [values for _, values in sorted(pieces, key=lambda piece: piece[0])]
        values = in_order[0] if len(in_order) == 1 else torch.cat(in_order)
        home, _, leaf = target.rpartition(".")
        parameters = model.get_submodule(home)._parameters
        parameters[leaf] = nn.Parameter(values.view(parameters[leaf].shape), requires_grad=False)  # type: ignore[union-attr]
    if "output.weight" not in placements:
        _tie(model)


def _plain(tensor: GgufTensor, placement: Placement) -> Tensor:
    """The values as transformers has them: [rows, columns]."""
    values = tensor.read(0, tensor.rows)
    if placement.heads:
        order = _back(placement)
        values = values[:, order] if len(placement.shape) == 1 else values[order]
    return values - placement.shift if placement.shift else values


def _packed(tensor: GgufTensor, placement: Placement) -> QTensor:
    """The blocks as transformers has the rows; mapped, if these stay in order."""
    blocks = tensor.read(0, tensor.rows)
    if placement.heads:
        blocks = blocks[_back(placement)]
    n, k = tensor.shape
    return QTensor(tensor.type.name.lower(), (n, k), {"blocks": blocks})


def _back(placement: Placement) -> Tensor:
    """For each row of a projection in transformers the row in the file."""
    return interleaved(placement.shape[0], placement.heads).argsort()


def _put_packed(model: nn.Module, name: str, qtensor: QTensor, dtype: torch.dtype) -> None:
    """Swap the module of the weight `name` for one that holds it packed."""
    path = name.removesuffix(".weight")
    home, _, leaf = path.rpartition(".")
    old: Any = model.get_submodule(path)
    new: QuantModule
    if isinstance(old, nn.Embedding):
        new = QuantEmbedding(qtensor, old.padding_idx, dtype)
    else:
        new = QuantLinear(qtensor, old.bias)
    setattr(model.get_submodule(home), leaf, new)


def _tie(model: Any) -> None:
    """Let the output head have the weight of the embedding."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantEmbedding):
        model.set_output_embeddings(QuantLinear(embedding.qtensor))
    else:
        head.weight = embedding.weight
