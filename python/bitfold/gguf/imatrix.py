"""What importance files of llama.cpp say: sums of squares of each matrix's inputs, column by column. Needs no extra.

imatrix_file.py reads and writes them, bitfold.imatrix measures them, importance.py is what quantizing makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """sums: float32 [experts, columns], of the squares of an input column over all tokens of an expert; counts: int64
    [experts], how many tokens those were. A matrix that is no stack has one expert."""

    sums: Tensor
    counts: Tensor

    def mean(self) -> Tensor:
        """E[x^2]: float32 [experts, columns], one division; all ones for an expert that saw no token."""
        counts = self.counts[:, None]
        return torch.where(counts > 0, self.sums / counts.clamp(min=1).float(), 1.0)


@dataclass(frozen=True)
class Imatrix:
    """What an importance file holds: entries by the GGUF names of the matrices.

    datasets: names of the texts; chunks: of how many pieces of text it was made (0: unknown); chunk_size: tokens of a
    chunk (0: unknown, the older form doesn't say).
    """

    entries: dict[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
