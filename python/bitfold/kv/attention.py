"""The attention function "bitfold" of transformers: scores and sums from packed keys and values, nothing decoded.

A model that was loaded with attn_implementation="bitfold" calls `forward` with what the cache's update returned. From a
QuantizedCache, in calls of few tokens, that is `Packed`: no tensor, so that code which would compute on keys and values
by itself fails with a sentence instead of computing nonsense. Whatever else comes are whole tensors, and
scaled_dot_product_attention is asked, as transformers' own "sdpa" does.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold import ops_kv
from bitfold.kv.store import Store

NAME = "bitfold"


@dataclass(frozen=True)
class Packed:
    """What stands for the keys or the values of a call: the tokens of `store`, of which the last `visible` count."""

    what: str
    store: Store
    visible: int

    @property
    def shape(self) -> torch.Size:
        keys = self.store.keys
        return torch.Size((*keys.shape[:2], self.visible, keys.shape[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.store.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.store.keys.device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"the {self.what} of a QuantizedCache are packed for the attention function {NAME!r}, and this model asks "
            f"for their {name!r}: load it with another attn_implementation, for which the cache decodes them"
        )


def reads(config: Any) -> bool:
    """Whether the model that a configuration belongs to calls `forward`."""
    return getattr(config, "_attn_implementation", None) == NAME


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Packed,
    value: Tensor | Packed,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, rows, head size] -> [batch, rows, heads, head size], as transformers' interface wants it.

    attention_mask: bool (True: seen) or a number to add, broadcast to [batch, heads, rows, tokens]; None: causal.
    Raises ValueError for what the packed kernel doesn't compute: dropout, a soft cap, sinks, a position bias.
    """
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if not isinstance(key, Packed):
        raise TypeError(
            f"key is a {type(key).__name__}; it must be a tensor, or what a QuantizedCache returns"
        )
    extra = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if dropout:
        extra.append("dropout")
    if extra:
        raise ValueError(
            f"this model's attention has {', '.join(extra)}, which {NAME!r} doesn't compute on a packed cache: load it "
            "with attn_implementation='eager'"
        )
    rows = query.shape[2]
    if attention_mask is None and rows > 1:
        ones = torch.ones(rows, key.visible, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(key.visible - rows)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key.store, key.visible, attention_mask, scale), None


def attend(query: Tensor, store: Store, visible: int, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * query keys^T + mask) values over the last `visible` tokens of a store: see `forward`."""
    blocks = store.blocks
    return ops_kv.attention(
        query, *store.latest(visible), blocks.format, blocks.group, blocks.value_group, mask, scale
    )


def enter() -> None:
    """Put the function, and sdpa's masks for it, into transformers' tables."""
    tables = sys.modules["transformers.modeling_utils"]
    from transformers import masking_utils

    tables.AttentionInterface.register(NAME, forward)
    masking_utils.AttentionMaskInterface.register(NAME, masking_utils.sdpa_mask)
