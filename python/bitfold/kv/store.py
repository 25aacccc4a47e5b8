"""The tokens of one layer: packed blocks for the older ones, exact numbers for the recent ones. torch alone.

Blocks lie in pages of PAGE blocks, allocated as they are needed, so that a token never moves another one: appending
costs the same however long the past is. Recent tokens lie in front of the blocks in a buffer of the model's dtype,
at least `residual` of them; when another group of them is older than that, it is packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitfold.kv.blocks import BlockFormat

PAGE = 8  # blocks
DEFAULT_RESIDUAL = 64
# New tokens of one call up to which attention reads blocks as they lie; a call with more is a prompt.
FEW = 8


def nbytes_of(blocks: BlockFormat, tokens: int, itemsize: int, residual: int = DEFAULT_RESIDUAL) -> int:
    """Bytes of a Store for one sequence and key-value head once a prompt of so many tokens is in it; itemsize: of a
    number that isn't packed."""
    packed = max(0, tokens - residual) // blocks.group
    buffers = 2 * (residual + blocks.group + FEW) * blocks.head * itemsize
    return -(-packed // PAGE) * PAGE * blocks.nbytes + buffers


class Latest(NamedTuple):
    """Some of a Store's latest tokens: those of the first `packed` blocks in `pages` from token `first` on, then the
    exact ones in `keys` and `values`."""

    pages: list[Tensor]
    packed: int
    first: int
    keys: Tensor
    values: Tensor


@dataclass
class Store:
    """Keys and values [batch, heads, tokens, head] of a layer.

    blocks: how they are packed; residual: recent tokens that are never packed; pages: uint8 [batch, heads, PAGE,
    nbytes]; packed: blocks in them; begin: packed tokens at the front that no longer count; keys, values: the buffer
    of the recent ones, of which the first `recent` count.
    """

    blocks: BlockFormat
    residual: int
    keys: Tensor
    values: Tensor
    pages: list[Tensor]
    packed: int = 0
    begin: int = 0
    recent: int = 0

    @classmethod
    def like(cls, blocks: BlockFormat, residual: int, keys: Tensor) -> Store:
        """An empty one for tokens as `keys` has them."""
        shape = (*keys.shape[:2], residual + blocks.group + FEW, keys.shape[3])
        return cls(blocks, residual, keys.new_empty(shape), keys.new_empty(shape), [])

    @property
    def tokens(self) -> int:
        return self.packed * self.blocks.group - self.begin + self.recent

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *self.pages))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens, at most FEW. What was there before is packed first, so that these are exact in this call."""
        self._pack()
        self._put(keys, values)

    def append_prompt(self, keys: Tensor, values: Tensor) -> None:
        """Add any number of tokens, and pack all that is not recent."""
        group = self.blocks.group
        count = max(0, self.recent + keys.shape[2] - self.residual) // group * group
        if count > 0:
            if self.recent > 0:
                before = self.exact()
                keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
                self.recent = 0
            self._write(self.blocks.pack(keys[:, :, :count], values[:, :, :count]))
            keys, values = keys[:, :, count:], values[:, :, count:]
        self._put(keys, values)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the recent tokens, views."""
        return self.keys[:, :, : self.recent], self.values[:, :, : self.recent]

    def latest(self, count: int) -> Latest:
        """Where the `count` latest tokens are."""
        keys, values = self.exact()
        if count <= self.recent:
            start = self.recent - count
            return Latest([], 0, 0, keys[:, :, start:], values[:, :, start:])
        return Latest(self.pages, self.packed, self.begin + self.tokens - count, keys, values)

    def decode(self, count: int | None = None, *then: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the `count` latest tokens (None: of all), and behind them those in `then`, keys and values
        too: new tensors in the model's dtype."""
        at = self.latest(self.tokens if count is None else count)
        behind = [[x.to(self.keys.dtype)] for x in then] or [[], []]
        keys, values = [at.keys, *behind[0]], [at.values, *behind[1]]
        return self.blocks.unpack(at.pages, at.packed, at.first, keys, values)

    def forget(self, count: int) -> None:
        """Drop the `count` oldest tokens; a page goes when all of its tokens are dropped."""
        group, packed = self.blocks.group, self.packed * self.blocks.group - self.begin
        self.begin += min(count, packed)
        while self.packed > 0 and self.begin >= min(PAGE, self.packed) * group:
            blocks = min(PAGE, self.packed)
            del self.pages[0]
            self.packed -= blocks
            self.begin -= blocks * group
        if count > packed:
            self._shift(count - packed)

    def crop(self, count: int) -> None:
        """Drop the `count` latest tokens. What is left of a block is decoded, and packed again once it fills one."""
        if count <= self.recent:
            self.recent -= count
            return
        group, end = self.blocks.group, self.begin + self.tokens - count
        whole, rest = divmod(end, group)
        front = max(0, self.begin - whole * group)
        self.recent = 0
        if rest > front:
            page, place = divmod(whole, PAGE)
            keys, values = self.blocks.unpack_anywhere(
                self.pages[page][:, :, place : place + 1], self.keys.dtype
            )
            self._put(keys[:, :, front:rest], values[:, :, front:rest])
        self.packed = whole if self.begin < whole * group else 0
        self.begin = self.begin if self.packed > 0 else 0
        del self.pages[-(-self.packed // PAGE) :]

    def clear(self) -> None:
        """Drop all tokens."""
        self.pages.clear()
        self.packed = self.begin = self.recent = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put change(tensor) in the place of every tensor, all of which have the batch as their first dimension."""
        self.keys, self.values = change(self.keys), change(self.values)
        self.pages = [change(page) for page in self.pages]

    # ---- within ----

    def _pack(self) -> None:
        group = self.blocks.group
        count = max(0, self.recent - self.residual) // group * group
        if count > 0:
            self._write(self.blocks.pack(self.keys[:, :, :count], self.values[:, :, :count]))
            self._shift(count)

    def _write(self, blocks: Tensor) -> None:
        done, total = 0, blocks.shape[2]
        while done < total:
            place = self.packed % PAGE
            if place == 0:
                self.pages.append(blocks.new_empty((*blocks.shape[:2], PAGE, blocks.shape[3])))
            take = min(PAGE - place, total - done)
            self.pages[-1][:, :, place : place + take] = blocks[:, :, done : done + take]
            done += take
            self.packed += take

    def _shift(self, count: int) -> None:
        """Drop recent tokens at the front."""
        self.recent -= count
        for buffer in (self.keys, self.values):
            buffer[:, :, : self.recent] = buffer[:, :, count : count + self.recent].clone()

    def _put(self, keys: Tensor, values: Tensor) -> None:
        end = self.recent + keys.shape[2]
        self.keys[:, :, self.recent : end] = keys.detach()  # gradients end at the cache
        self.values[:, :, self.recent : end] = values.detach()
        self.recent = end
