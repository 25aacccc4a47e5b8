"""What torch must know about the ops of the KV cache (csrc/torch/kv.cpp) beside their kernels: shapes, and that only
exact tokens have gradients."""

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


def _unpack_shape(
    pages: Sequence[Tensor],
    blocks: int,
    first: int,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    format: str,
    group: int,
    value_group: int,
) -> list[Tensor]:
    check_device(*keys, *values, *pages)
    batch, heads, _, head = keys[0].shape
    tokens = blocks * group - first + sum(x.shape[2] for x in keys)
    return [keys[0].new_empty((batch, heads, tokens, head)) for _ in range(2)]


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.pages, ctx.tokens = len(inputs[0]), [x.shape[2] for x in inputs[3]]


def _unpack_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Exact tokens are copied, so their gradients are parts of the output's; what is packed has none."""
    keys, values = (
        list(grad[:, :, grad.shape[2] - sum(ctx.tokens) :].split(ctx.tokens, 2)) for grad in grads
    )
    return [None] * ctx.pages, None, None, keys, values, None, None, None


def register(namespace: str) -> None:
    """Registers the above for the ops of `namespace`, whose schemas are those of bitfold's."""
    for name, shape in (
        ("kv_pack", _pack_shape),
        ("kv_unpack", _unpack_shape),
        ("kv_attention", _attention_shape),
    ):
        torch.library.register_fake(f"{namespace}::{name}", shape)
    for name in ("kv_pack", "kv_attention"):
        torch.library.register_autograd(f"{namespace}::{name}", refuse_backward(name))
    torch.library.register_autograd(f"{namespace}::kv_unpack", _unpack_backward, setup_context=_unpack_setup)


register("bitfold")


# ---- calls past the autograd kernel, which is Python and has nothing to do ----

_pack = torch.ops.bitfold.kv_pack.default
_unpack = torch.ops.bitfold.kv_unpack.default
_attention = torch.ops.bitfold.kv_attention.default


def pack(keys: Tensor, values: Tensor, format: str, group: int, value_group: int) -> Tensor:
    """torch.ops.bitfold.kv_pack; what is packed is cut off from any gradient."""
    return _pack(keys.detach(), values.detach(), format, group, value_group)


def unpack(
    pages: list[Tensor], blocks: int, first: int, keys: list[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor]:
    """torch.ops.bitfold.kv_unpack."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        new = _unpack(pages, blocks, first, keys, *arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            new = _unpack(pages, blocks, first, keys, *arguments)
    return new[0], new[1]


def attention(query: Tensor, pages: list[Tensor], *arguments: Any) -> Tensor:
    """torch.ops.bitfold.kv_attention."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _attention(query, pages, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return _attention(query, pages, *arguments)
