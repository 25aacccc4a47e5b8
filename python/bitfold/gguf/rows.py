"""Rows of GGUF tensors out of the safetensors files of a directory: mapped, gathered, in the order of the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitfold.gguf.architectures import Placement, Span
from bitfold.gguf.library import GGMLQuantizationType
from bitfold.shards import CheckpointError, StoredTensor

_REMAP_EVERY = 256 << 20  # bytes read from one mapping of a file before it is dropped


@dataclass(frozen=True)
class Stored:
    """A weight in a directory. shape: of its values; format: of the blocks that `tensor` is made of, None of values."""

    tensor: StoredTensor
    shape: tuple[int, ...]
    format: str | None = None


class MappedFiles:
    """The safetensors files. A mapping is dropped and made anew every few hundred MiB, so that pages already read leave
    the process as soon as nobody holds their tensors."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._read = 0

    def matrix(self, stored: StoredTensor, rows: int) -> Tensor:
        """The whole tensor, mapped, as [rows, columns]; rows: how many of them will be read."""
        if self._read > _REMAP_EVERY:
            self._open, self._read = {}, 0
        self._read += rows * stored.shape[-1] * stored.torch_dtype.itemsize
        try:
            if stored.path not in self._open:
                self._open[stored.path] = safe_open(stored.path, framework="pt", device="cpu")
            tensor = self._open[stored.path].get_tensor(stored.name)
        except SafetensorError as error:
            raise CheckpointError(f"{stored.path}: tensor '{stored.name}' can't be read ({error})") from None
        return tensor.reshape(-1, stored.shape[-1])


class Rows:
    """One tensor of a file to be made: its rows are runs of rows that the directory has.

    dtype: of the values it is to have; None: blocks, which stay as they are. type: of what the directory has.
    """

    def __init__(
        self,
        files: MappedFiles,
        placement: Placement,
        spans: tuple[Span, ...],
        stored: Mapping[str, Stored],
        dtype: torch.dtype | None,
    ) -> None:
        self.placement = placement
        self.dtype = dtype
        first = stored[spans[0].source]
        self.type = GGMLQuantizationType[(first.format or first.tensor.dtype).upper()]
        self._files = files
        self._spans = [(span, stored[span.source].tensor) for span in spans]

    def source(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of the tensor as a matrix, as the directory has the values, without shift and dtype."""
        placement = self.placement
        if placement.heads and len(placement.shape) > 1:
            ((_, stored),) = self._spans
            order = interleaved(placement.shape[0], placement.heads)
            return self._files.matrix(stored, end - begin)[order[begin:end]]
        parts = list(self._parts(begin, end))
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        if placement.heads:  # a bias: one row, its values in the order of the weight's rows
            return values[:, interleaved(placement.shape[0], placement.heads)]
        return values

    def read(self, begin: int, end: int) -> Tensor:
        """What the file gets of them."""
        values = self.source(begin, end)
        if self.placement.shift:
            values = values.to(torch.float32) + self.placement.shift
        return values if self.dtype in (None, values.dtype) else self._cast(values)

    def _parts(self, begin: int, end: int) -> Iterator[Tensor]:
        """The runs that rows [begin, end) lie in, cut to them."""
        at = 0
        for span, stored in self._spans:
            first, last = max(begin, at), min(end, at + span.end - span.begin)
            if first < last or (begin == end and at == 0):
                offset = span.begin - at
                yield self._files.matrix(stored, last - first)[first + offset : last + offset]
            at += span.end - span.begin

    def _cast(self, values: Tensor) -> Tensor:
        cast = values.to(self.dtype)
        if self.dtype == torch.float16 and not torch.equal(cast.isfinite(), values.isfinite()):
            raise CheckpointError(
                f"'{self.placement.name}' has values beyond float16's 65504: write it in bfloat16 or float32"
            )
        return cast


def interleaved(rows: int, heads: int) -> Tensor:
    """For each row of a projection in the file the row in transformers: the two halves of a head take turns."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)
