"""What torch must know about the ops of the KV cache (csrc/torch/kv.cpp) beside their kernels: shapes, and that there
are no gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfold import _C
from bitfold.ops import check_device, refuse_backward


def _pack_shape(keys: Tensor, values: Tensor, format: str, group: int, value_group: int) -> Tensor:
    check_device(keys, values)
    batch, heads, tokens, head = keys.shape
    nbytes = _C.kv_block(format, group, int(head), value_group)["bytes"]
    return keys.new_empty((batch, heads, tokens // group, nbytes), dtype=torch.uint8)


def _attention_shape(
    query: Tensor,
    pages: Sequence[Tensor],
    blocks: int,
    first: int,
    keys: Tensor,
    values: Tensor,
    format: str,
    group: int,
    value_group: int,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    check_device(query, *pages, keys, values, mask)
    batch, heads, rows, head = query.shape
    return query.new_empty((batch, rows, heads, head))


def register(namespace: str) -> None:
    """Registers the above for the ops of `namespace`, whose schemas are those of bitfold's."""
    for name, shape in (("kv_pack", _pack_shape), ("kv_attention", _attention_shape)):
        torch.library.register_fake(f"{namespace}::{name}", shape)
        torch.library.register_autograd(f"{namespace}::{name}", refuse_backward(name))


register("bitfold")


# ---- calls past the autograd kernel, which is Python and has nothing to do ----

_pack = torch.ops.bitfold.kv_pack.default
_attention = torch.ops.bitfold.kv_attention.default


def pack(keys: Tensor, values: Tensor, format: str, group: int, value_group: int) -> Tensor:
    """torch.ops.bitfold.kv_pack; what is packed is cut off from any gradient."""
    return _pack(keys.detach(), values.detach(), format, group, value_group)


def attention(query: Tensor, pages: list[Tensor], *arguments: Any) -> Tensor:
    """torch.ops.bitfold.kv_attention."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _attention(query, pages, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _attention(query, pages, *arguments)
