"""A quantized model wherever it lies: in a checkpoint directory of bitfold's or of another library's, or in a GGUF
file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitfold import checkpoint, hf
from bitfold.activations import Activations
from bitfold.foreign.owners import read_owner
from bitfold.nn import set_activations
from bitfold.writer import is_bitfold_checkpoint


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    activations: str | Activations | None = None,
) -> nn.Module:
    """Load a quantized model; the weights stay quantized and, on the CPU, memory-mapped.

    Args:
        path: a checkpoint directory that bitfold wrote, or one of GPTQ, AWQ, compressed-tensors or bitsandbytes, whose
            weights become bitfold's formats, exactly (docs/foreign.md); or a GGUF file (of a split one the first). It
            must not change while the model lives.
        model: the unquantized model to load a checkpoint into (its own weights are dropped; the meta device will do).
            None: a transformers causal language model is built from the configuration.
        device: where the model goes.
        dtype: compute in this dtype; norms, biases and plain weights are cast to it. None: as they are stored (of a
            GGUF file: the dtype of its matrices where none is packed, else float32).
        activations: what all quantized linear layers are to do with their inputs (docs/activations.md), None: what the
            checkpoint says. "int8" rounds them to 8 bits, with weights in GGUF's block formats as llama.cpp does;
            layers that aren't quantized compute as ever.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: files are missing, truncated or contradict each other, a newer bitfold wrote them, or bitfold
            doesn't run the architecture of a GGUF file; or `bitfold check` finds a fault in a directory of another
            library.
        ValueError: a quantized layer can't be multiplied with such activations, or there is none.
        MissingExtraError: transformers or gguf is needed and not installed.
    """
    loaded = _load(Path(path), model, device, dtype)
    if activations is not None:
        set_activations(loaded, activations)
    return loaded


def _load(
    path: Path, model: nn.Module | None, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Module:
    if not path.is_file():
        if is_bitfold_checkpoint(path) or read_owner(path) is None:
            return checkpoint.load(path, model=model, device=device, dtype=dtype)
        from bitfold.check.examine import refuse_faults
        from bitfold.foreign.load import load as load_foreign

        refuse_faults(path)
        return load_foreign(path, model=model, device=device, dtype=dtype)
    if model is not None:
        raise ValueError("model was given, but a GGUF file makes its own: it must be None")
    from bitfold.gguf.load import load as load_gguf

    return load_gguf(path, device=device, dtype=dtype)


def is_quantized(path: Path) -> bool:
    """Whether `load` reads it: a file, or a directory that bitfold or one of the owners of foreign/ wrote."""
    return path.is_file() or is_bitfold_checkpoint(path) or read_owner(path) is not None


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory or a GGUF file. Raises CheckpointError where there is none to be read."""
    path = Path(path)
    if not path.is_file():
        return hf.load_tokenizer(path)
    from bitfold.gguf.load import load_tokenizer as load_gguf_tokenizer

    return load_gguf_tokenizer(path)
