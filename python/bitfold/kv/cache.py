"""`bitfold.QuantizedCache`: transformers' Cache, with keys and values in fewer bits.

What a call attends to: its own tokens exactly, recent ones exactly, older ones as they were packed. With the attention
function "bitfold" (attention.py) a call of few tokens gets `Packed` in the place of keys and values, and nothing is
decoded; every other call, and every other attention function, gets decoded tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitfold import versions
from bitfold.kv.attention import NAME, Packed, reads
from bitfold.kv.blocks import DEFAULT_GROUP, FORMATS, BlockFormat, value_group_of
from bitfold.kv.store import DEFAULT_RESIDUAL, FEW, Store

versions.KV_CACHE.require("a quantized KV cache")
from transformers import PreTrainedConfig  # noqa: E402
from transformers.cache_utils import (  # noqa: E402
    Cache,
    CacheLayerMixin,
    DummyLayer,
    get_layer_types_and_kwargs,
)

_FULL, _SLIDING = ("full_attention",), ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Options:
    """format: of kv.blocks.FORMATS; group: tokens whose keys share a step; residual: recent tokens that stay exact;
    value_group: channels of a value that share one (None: value_group_of)."""

    format: str
    group: int
    residual: int
    value_group: int | None


class QuantizedLayer(CacheLayerMixin):
    """One layer's part of a QuantizedCache; window: tokens that it sees, None for all."""

    is_croppable = True

    def __init__(self, options: Options, config: Any, window: int | None = None):
        super().__init__()
        self.options = options
        self.config = config
        self.window = self.sliding_window = window
        self.is_sliding = window is not None
        self.record_past = False
        self.cumulative_length = 0
        self.store: Store | None = None

    def __repr__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        return f"{self.options.format}{window}"

    # ---- what attention asks for ----

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"keys have the shape {list(key_states.shape)} and values {list(value_states.shape)}; a QuantizedCache "
                "needs both to be the same"
            )
        options, head = self.options, key_states.shape[-1]
        blocks = BlockFormat(
            options.format, options.group, head, options.value_group or value_group_of(options.format, head)
        )
        self.store = Store.like(blocks, options.residual, key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add the tokens of a call; returns what it attends to (see the head of this file)."""
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        store = self.store
        assert store is not None
        if not self.record_past:
            self._trim()
        count = key_states.shape[2]
        visible = self._seen() + count
        self.cumulative_length += count
        if count <= FEW:
            store.append(key_states, value_states)
            if reads(self.config):
                return Packed("keys", store, visible), Packed("values", store, visible)
            return store.decode(visible)
        keys, values = key_states, value_states
        if visible > count:
            keys, values = store.decode(visible - count, keys, values)
        if self.window is not None and count >= self.window and not self.record_past:
            store.clear()
            start = count - (self.window - 1)
            store.append_prompt(key_states[:, :, start:], value_states[:, :, start:])
        else:
            store.append_prompt(key_states, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a call of `query_length` attends to, and the position of the first."""
        seen = self._seen()
        return seen + query_length, self.cumulative_length - seen

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def _seen(self) -> int:
        """Tokens of the past that the next call sees."""
        return self.cumulative_length if self.window is None else min(self.cumulative_length, self.window - 1)

    def _trim(self) -> None:
        if self.store is not None:
            self.store.forget(self.store.tokens - self._seen())

    # ---- what generation does to a cache ----

    def activate_past_recording(self) -> None:
        """From now on tokens that leave the window stay until `crop` is called, which may need them."""
        self.record_past = self.window is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the -tokens_to_remove latest tokens."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; it must be negative, the number of tokens to remove, or 0"
            )
        if self.store is None:
            return
        left = self.cumulative_length + tokens_to_remove
        if left < 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; the cache has {self.cumulative_length} tokens"
            )
        if tokens_to_remove < 0 and self._lost() > max(0, left - (self.window or left + 1) + 1):
            raise RuntimeError(
                "the tokens that the window saw before are gone; call activate_past_recording() before the first "
                "token that is to be removed"
            )
        self.store.crop(-tokens_to_remove)
        self.cumulative_length = left
        self._trim()

    def _lost(self) -> int:
        """Tokens at the front that are stored no more."""
        return self.cumulative_length - (0 if self.store is None else self.store.tokens)

    def reset(self) -> None:
        self.store = None
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.store.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.store.map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        raise NotImplementedError("a QuantizedCache stays on its device: offloading must be False")

    prefetch = offload


class QuantizedCache(Cache):
    """A KV cache in fewer bits, for `generate(cache=...)` and forward passes of a transformers model.

    config: the model's own (model.config), whose layer types, windows and attention function count; format: "int8",
    "fp8" (e4m3) or "int4"; group: tokens whose keys share a step, a multiple of 16; residual: so many recent tokens
    stay exact, and up to group - 1 more that fill no group yet; value_group: channels of a value that share a step, the
    head size or a divisor of it that is a multiple of 16 (None: the head size, with int4 64 where that divides it).

    With a model loaded with attn_implementation="bitfold", calls of at most 8 tokens read the blocks as they lie; with
    any other attention function they are decoded in each call (`repr` says which).

    Raises ValueError for options that don't fit, and for models whose layers keep something else than keys and values.
    """

    def __init__(
        self,
        config: Any,
        format: str = "int8",
        *,
        group: int = DEFAULT_GROUP,
        residual: int = DEFAULT_RESIDUAL,
        value_group: int | None = None,
    ):
        if residual < 0:
            raise ValueError(f"residual is {residual}; it must be at least 0")
        if format not in FORMATS:
            raise ValueError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
        BlockFormat(
            format, group, value_group or group, value_group or group
        )  # the group, before a head is known
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(
                f"config is a {type(config).__name__}; it must be the configuration of a model: model.config"
            )
        self.config = config.get_text_config(decoder=True)
        self.options = Options(format, group, residual, value_group)
        layers: list[Any] = []
        for kind, settings in zip(*get_layer_types_and_kwargs(self.config), strict=True):
            if kind == "dummy":
                layers.append(DummyLayer())
            elif kind in (*_FULL, *_SLIDING):
                layers.append(QuantizedLayer(self.options, self.config, settings.get("sliding_window")))
            else:
                raise ValueError(
                    f"the model has layers of the kind {kind!r}; a QuantizedCache has {', '.join((*_FULL, *_SLIDING))}"
                )
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, over all layers."""
        return sum(layer.store.nbytes for layer in self._quantized() if layer.store is not None)

    def _quantized(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    def __repr__(self) -> str:
        options, attention = self.options, self.config._attn_implementation
        how = (
            "read as they lie by calls of few tokens"
            if attention == NAME
            else f"decoded in every call for the attention function {attention!r}"
        )
        return (
            f"QuantizedCache({options.format}, group {options.group}, residual {options.residual}, "
            f"{len(self._quantized())} layers, {self.get_seq_length()} tokens, {self.nbytes} bytes; blocks are {how})"
        )
