"""Several processes that calibrate one model together, started by torchrun.

Each holds its share of the samples: whole bundles of those whose products are summed at a time, so that the same
numbers are summed as by one process. Sums are float64 and made in the order of the ranks. The layers of a group are
solved by different ranks; each gets what the others made. Rank 0 keeps the finished blocks and writes the result; all
of them must see its folders.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
_PIECE = 1 << 24  # numbers that are summed at a time


def is_first() -> bool:
    """Whether this process is the one that speaks: alone, or rank 0 of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


class Processes:
    """The processes of this run; a context manager. `rank` of `size`; one process alone sends nothing.

    Where torchrun started this process and nobody has made a process group, one is made (gloo) and taken down at the
    end.
    """

    rank, size = 0, 1

    def __enter__(self) -> Processes:
        self._ours = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available():
            if not dist.is_initialized():
                dist.init_process_group("gloo")
                self._ours = True
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        return self

    def share(self, count: int, bundle: int) -> range:
        """This rank's share of `count` samples: whole bundles, in the order of the ranks."""
        bundles = -(-count // bundle)
        begin, end = (bundles * rank // self.size * bundle for rank in (self.rank, self.rank + 1))
        return range(min(begin, count), min(end, count))

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor, contiguous, by the sum of those of all ranks, in the order of the ranks."""
        if self.size == 1:
            return
        for piece in tensor.view(-1).split(_PIECE):
            mine = piece.cpu()
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(parts, mine)
            total = parts[0]
            for part in parts[1:]:
                total += part
            piece.copy_(total)

    def join(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, one rank's after the other's."""
        if self.size == 1:
            return rows
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)

    def from_rank(self, rank: int, value: T | None) -> T:
        """What one rank has, on all of them; value: counts on that rank alone."""
        if self.size == 1:
            assert value is not None
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=rank)
        return box[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the others may never come to a common end: torchrun ends them.
        if self._ours and error is None:
            dist.destroy_process_group()
