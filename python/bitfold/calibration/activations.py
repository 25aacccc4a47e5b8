"""What goes into a decoder block for every sample: [samples, tokens, hidden], in RAM or in a mapped file.

In RAM a block's outputs take the place of its inputs, sample by sample. In files there are two, written in turn: the
inputs of a block stay what they are until its outputs are on the disk, so that an interrupted run goes on from them.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from bitfold.writer import check_room, sync


class Activations:
    """The inputs of the blocks, one block after the other.

    shape: (samples, tokens, hidden); folder: where the two files go; None: RAM; rank: of the process whose samples
    these are. `data` are the inputs of the current
    block; `write` puts an output away, `advance` makes the outputs the inputs of the next block.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        folder: Path | None,
        block: int = 0,
        rank: int = 0,
    ) -> None:
        self._shape, self._dtype, self._folder = shape, dtype, folder
        self._block, self._rank = block, rank
        if folder is None:
            self.data = self._next = torch.empty(shape, dtype=dtype)
            return
        check_room(folder / "x", 2 * self.nbytes)
        self.data, self._next = self._map(block), self._map(block + 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs of one block."""
        return math.prod(self._shape) * self._dtype.itemsize

    def _map(self, block: int) -> Tensor:
        assert self._folder is not None
        path = str(_path(self._folder, block, self._rank))
        with open(path, "ab"):  # from_file makes no file; what is there stays
            pass
        count = math.prod(self._shape)
        os.truncate(path, count * self._dtype.itemsize)
        return torch.from_file(path, shared=True, size=count, dtype=self._dtype).view(self._shape)

    def write(self, sample: int, output: Tensor) -> None:
        """Put away what the current block makes of a sample; in RAM its input is gone then."""
        self._next[sample].copy_(output)

    def write_first(self, sample: int, input: Tensor) -> None:
        """Put away the input of the first block."""
        self.data[sample].copy_(input)

    def advance(self) -> None:
        """Go on to the next block: the outputs, durable if they are in a file, become its inputs."""
        if self._folder is not None:
            sync(_path(self._folder, self._block + 1, self._rank))
        self._block += 1
        self.data, self._next = self._next, self.data


def are_kept(
    folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, block: int, rank: int = 0
) -> bool:
    """Whether an earlier run left the inputs of a block that isn't the first, once all blocks before it are
    finished."""
    path = _path(folder, block, rank)
    return block > 0 and path.exists() and path.stat().st_size == math.prod(shape) * dtype.itemsize


NAMES = r"activations-\d+-[01]"  # a pattern, of the files of `_path`


def _path(folder: Path, block: int, rank: int) -> Path:
    return folder / f"activations-{rank}-{block % 2}"
