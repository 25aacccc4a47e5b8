"""Keys, values and pages for the tests of the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(rng, *shape) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype("f4"))


def past(rng, batch: int, heads: int, tokens: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys with channels of their own mean and size, as models have them, and values."""
    keys = randn(rng, batch, heads, tokens, head) * randn(rng, head).exp() + 4 * randn(rng, head)
    return keys, randn(rng, batch, heads, tokens, head)


def paged(blocks: Tensor, size: int) -> list[Tensor]:
    """Pages of `size` blocks, the last with room that holds nothing that counts."""
    pages = []
    for page in blocks.split(size, 2):
        room = torch.full((*blocks.shape[:2], size, blocks.shape[3]), 255, dtype=torch.uint8)
        room[:, :, : page.shape[2]] = page
        pages.append(room)
    return pages
