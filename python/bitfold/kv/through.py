"""A model as it computes while it decodes: a few tokens at a time, the past from a KV cache. What `bitfold eval --kv`
measures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import versions
from bitfold.kv.store import FEW


class Through(nn.Module):
    """Calls model(input_ids) by way of a cache that begins empty, FEW tokens at a time.

    format: of the cache, one of bitfold.kv.blocks.FORMATS; None: transformers' DynamicCache, in the model's own dtype.
    options: of bitfold.QuantizedCache. `nbytes`: of the quantized cache at the end of the latest call.
    """

    def __init__(self, model: nn.Module, format: str | None, **options: Any):
        super().__init__()
        self.model = model
        self.format = format
        self.options = options
        self.nbytes = 0

    def new_cache(self) -> Any:
        config = getattr(self.model, "config", None)
        if self.format is not None:
            from bitfold.kv.cache import QuantizedCache

            return QuantizedCache(config, self.format, **self.options)
        return versions.KV_CACHE.require("a KV cache").DynamicCache(config=config)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits [rows, tokens, vocabulary] of input_ids [rows, tokens]; use_cache: as evaluate.py says it, and of no
        account."""
        cache = self.new_cache()
        parts = [
            self.model(input_ids=ids, cache=cache, use_cache=True).logits for ids in input_ids.split(FEW, 1)
        ]
        if self.format is not None:
            self.nbytes = cache.nbytes
        return SimpleNamespace(logits=torch.cat(parts, 1))
