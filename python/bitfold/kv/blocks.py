"""Blocks of packed keys and values, as csrc/formats/kv.hpp lays them out: what their numbers mean, on any device.

A block is a group of tokens of one key-value head. Keys share a step (and an offset) along the tokens, one for each
channel; values along the channels, one for each token: Liu et al. (2024), KIVI, section 3. A number is code * step +
offset, where the offset is the smallest number of those that share it and the step their range over the largest code;
fp8 (e4m3) has no offset, and its step is the largest magnitude over 448. Numbers that share a step with one that is
not finite come back as NaN.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold import _C, ops_kv

FORMATS: tuple[str, ...] = tuple(_C.kv_formats())
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class BlockFormat:
    """format: of FORMATS; group: tokens of a block; head: numbers of a key and of a value; value_group: channels of a
    value with a step of their own."""

    format: str
    group: int
    head: int
    value_group: int

    def __post_init__(self) -> None:
        _ = self.law  # raises ValueError for what no block has

    @functools.cached_property
    def law(self) -> dict[str, Any]:
        """Where the parts of a block begin; bits, most, offsets: of its codes (csrc/torch/module.cpp)."""
        return dict(_C.kv_block(self.format, self.group, self.head, self.value_group))

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return int(self.law["bytes"])

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """Blocks, uint8 [batch, heads, blocks, nbytes], of keys and values [batch, heads, blocks * group, head]."""
        if self._native(keys):
            return ops_kv.pack(keys, values, self.format, self.group, self.value_group)
        return self.pack_anywhere(keys, values)

    def pack_anywhere(self, keys: Tensor, values: Tensor) -> Tensor:
        """The same bytes by torch's own ops."""
        law, (batch, heads, tokens, head) = self.law, keys.shape
        count, groups = tokens // self.group, self.head // self.value_group
        out = keys.new_zeros((batch, heads, count, self.nbytes), dtype=torch.uint8)
        shape = (batch, heads, count, self.group, head)
        key_codes, key_step, key_offset = self._encode(keys.reshape(shape).float().transpose(-1, -2))
        rows = values.reshape(*shape[:-1], groups, self.value_group).float()
        value_codes, value_step, value_offset = self._encode(rows)
        padding = law["value_row"] - head
        value_codes = torch.nn.functional.pad(value_codes.flatten(-2), (0, padding))
        parts = [
            (0, self._to_bytes(key_codes)),
            (law["value_codes"], self._to_bytes(value_codes)),
            (law["key_steps"], key_step.view(torch.uint8)),
            (law["value_steps"], value_step.squeeze(-1).transpose(-1, -2).contiguous().view(torch.uint8)),
        ]
        if law["offsets"]:
            parts.append((law["key_offsets"], key_offset.view(torch.uint8)))
            parts.append(
                (
                    law["value_offsets"],
                    value_offset.squeeze(-1).transpose(-1, -2).contiguous().view(torch.uint8),
                )
            )
        for at, data in parts:
            flat = data.flatten(3)
            out[..., at : at + flat.shape[-1]] = flat
        return out

    def unpack(
        self, pages: list[Tensor], blocks: int, first: int, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, tokens, head], new tensors: those of the first `blocks` blocks of pages
        [batch, heads, blocks, nbytes], from token `first` on, and after them those of `keys` and `values`, at least one
        tensor each."""
        if self._native(keys[0]):
            return ops_kv.unpack(
                pages, blocks, first, keys, values, self.format, self.group, self.value_group
            )
        old_keys, old_values, left = [], [], blocks
        for page in pages:
            part = self.unpack_anywhere(page[:, :, : max(left, 0)], keys[0].dtype)
            old_keys.append(part[0])
            old_values.append(part[1])
            left -= page.shape[2]
        return (
            torch.cat([*old_keys, *keys], 2)[:, :, first:],
            torch.cat([*old_values, *values], 2)[:, :, first:],
        )

    def unpack_anywhere(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same of blocks [batch, heads, blocks, nbytes] alone, in `dtype`, by torch's own ops."""
        law, (batch, heads, count, _) = self.law, blocks.shape
        groups, shape = self.head // self.value_group, (batch, heads, count * self.group, self.head)

        def floats(at: int, *shape: int) -> Tensor:
            end = at + 4 * math.prod(shape)
            return blocks[..., at:end].contiguous().view(torch.float32).unflatten(-1, shape)

        def codes(at: int, *shape: int) -> Tensor:
            end = at + law["bits"] * math.prod(shape) // 8
            return self._from_bytes(blocks[..., at:end].contiguous()).unflatten(-1, shape)

        keys = codes(0, self.head, self.group) * floats(law["key_steps"], self.head, 1)
        values = codes(law["value_codes"], self.group, law["value_row"])[..., : self.head]
        values = values.unflatten(-1, (groups, self.value_group))
        values = values * floats(law["value_steps"], groups, self.group, 1).transpose(-2, -3)
        if law["offsets"]:
            keys = keys + floats(law["key_offsets"], self.head, 1)
            values = values + floats(law["value_offsets"], groups, self.group, 1).transpose(-2, -3)
        return keys.transpose(-1, -2).reshape(shape).to(dtype), values.reshape(shape).to(dtype)

    @staticmethod
    def _native(x: Tensor) -> bool:
        """Whether there are kernels where a tensor is."""
        return x.device.type == "cpu" or (x.is_cuda and bool(_C.build_info()["cuda"]))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [..., n] uint8, steps and offsets [..., 1] of rows [..., n] that share them."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        spread = high - low if self.law["offsets"] else torch.maximum(high, -low)
        step = spread / self.law["most"] + 0.0  # here and in offset: no -0
        offset = low + 0.0 if self.law["offsets"] else torch.zeros_like(low)
        sound = x.isfinite().all(-1, keepdim=True) & step.isfinite()
        step, offset = torch.where(sound, step, torch.nan), torch.where(sound, offset, 0.0)
        scaled = torch.where(step > 0, (x - offset) / step, 0.0)
        if self.law["offsets"]:
            return scaled.round().clamp(0, self.law["most"]).to(torch.uint8), step, offset
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), step, offset

    def _to_bytes(self, codes: Tensor) -> Tensor:
        codes = codes.contiguous()
        return codes if self.law["bits"] == 8 else codes[..., 0::2] | codes[..., 1::2] << 4

    def _from_bytes(self, data: Tensor) -> Tensor:
        """Codes as the numbers that they stand for before the step."""
        if self.law["bits"] == 4:
            data = torch.stack([data & 15, data >> 4], -1).flatten(-2)
        return (data if self.law["offsets"] else data.view(torch.float8_e4m3fn)).float()


def value_group_of(format: str, head: int) -> int:
    """The channels of a value that share a step where nobody says: all of them, with 4 bits 64 where that divides."""
    return 64 if format == "int4" and head % 64 == 0 else head
