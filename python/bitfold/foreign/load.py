"""Checkpoints of other libraries as torch models on bitfold's kernels: weights are permuted into our planes as they
load.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import checkpoint, hf
from bitfold.foreign.directory import ForeignDirectory, read_foreign
from bitfold.section import QuantizationConfig
from bitfold.shards import DTYPES, StoredTensor, read_tensors

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A model of a directory that one of the owners of foreign/owners.py quantized; arguments as of `bitfold.load`.

    Weights go to the planes of bitfold's formats one at a time, integers moved and floats copied; where the bytes are
    the same (compressed-tensors, bitsandbytes) they stay mapped. Modules that aren't quantized stay what they are.

    Warns where the owner rounds activations in a way that bitfold doesn't.

    Raises CheckpointError as `read_foreign` does, and where the model has other modules or shapes.
    """
    directory = read_foreign(Path(path))
    for text in directory.left_out:
        warnings.warn(f"{path}: {text}", stacklevel=4)  # whoever called bitfold.load
    quantization = QuantizationConfig(
        directory.owner.name, {name: module.entry for name, module in directory.modules.items()}, {}
    )
    config: dict[str, Any] = dict(directory.config)
    if model is None and "model_type" in config:
        model = hf.empty_causal_lm(directory.path, config, dtype or hf.config_dtype(config))
        dtype = dtype or hf.config_dtype(config)
    stored = _stored(directory, model)
    values = _values(directory, stored)
    return checkpoint.assemble(
        directory.path, config, quantization, stored, values, model=model, device=device, dtype=dtype
    )


def _stored(directory: ForeignDirectory, model: nn.Module | None) -> dict[str, StoredTensor]:
    """Every tensor that the quantized model will have, without those that its architecture ignores."""
    ignored = None if model is None else hf.ignored_names(model)
    present = set() if model is None else set(model.state_dict())
    stored = {
        name: tensor
        for name, tensor in directory.plain.items()
        if name in present or ignored is None or not ignored.search(name)
    }
    for name, module in directory.modules.items():
        where = next(iter(module.stored.values())).path
        for spec in module.entry.parts().values():
            full = f"{name}.{spec.name}"
            stored[full] = StoredTensor(full, _CODES[spec.dtype], spec.shape, spec.nbytes, where)
    return stored


def _values(directory: ForeignDirectory, stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    plain = [tensor for name, tensor in directory.plain.items() if name in stored]
    yield from read_tensors(sorted(plain, key=lambda tensor: tensor.path))
    for name in directory.modules:
        qtensor = directory.qtensor(name)
        for plane, values in qtensor.planes.items():
            yield f"{name}.{plane}", values
        if qtensor.g_idx is not None:
            yield f"{name}.g_idx", qtensor.g_idx
        for part, values in directory.kept(name).items():
            yield f"{name}.{part}", values
