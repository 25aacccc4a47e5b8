"""A model as GGUF sees it: typed metadata in order, and named tensors that are read a few rows at a time.

A GGUF file and a Hugging Face directory are both read into this; what quantizes, converts and writes sees nothing
else, so none of it holds more than a few rows of a model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bitfold.gguf.library import GGMLQuantizationType, GGUFValue


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, not yet read.

    shape: outermost dimension first, as torch has it (the file lists the dimensions the other way round); type: F32,
    F16, BF16 or a block type; read: rows [begin, end) of the tensor seen as a matrix [rows, columns], as a torch tensor
    of the plain dtype, or of a block type as uint8 [end - begin, bytes per row]. What read returns may lie in mapped
    memory: it is not written to.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    read: Callable[[int, int], torch.Tensor]

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GgufModel:
    """metadata: values with their GGUF types (of an array, a list), in the order of the file; tensors: by name, in the
    order of the file; files: what the tensors are read from, which nothing may be written over."""

    metadata: dict[str, GGUFValue]
    tensors: dict[str, GgufTensor]
    files: tuple[Path, ...] = ()
