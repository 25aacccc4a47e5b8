"""What feeds what in a decoder block, by architecture: the places where a channel may be scaled without a change.

One row of ARCHITECTURES for each kind of model. A feed names a norm or a linear layer, which of its outputs count, and
the linear layers whose inputs they are. Between both there may be only what treats each channel for itself and keeps
factors: attention's weighted means (of values), a product with something else (of the up projection with the activated
gate). Queries and keys are rotated and meet in a product, gates go through a function: these feed nothing.

Of a mixture of experts the norm feeds the router and all experts, so that the scales of its channels are common to all
of them; within an expert its up projection feeds its down projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.calibration.experts import opened
from bitfold.quantizers.transforms import divide_norm, divide_rows, multiply_columns


class Part(Enum):
    """Which rows of a source become which columns of its targets."""

    ALL = "row i is column i"
    SECOND_HALF = "row n / 2 + i is column i: the up projection behind the gate"
    VALUES = "a value head is read by all query heads of its group"
    LAST_VALUES = "the same, behind the queries and keys in one matrix"


@dataclass(frozen=True)
class Feed:
    """`source` feeds `targets`: names of modules within a block. `*`: of an expert; where both have it, of the same
    one, else of all."""

    source: str
    targets: tuple[str, ...]
    part: Part = Part.ALL


@dataclass(frozen=True)
class Architecture:
    """The feeds of a block, in the order in which a block computes. Those of which a block has no modules are left out:
    models of mixtures may have layers without experts.

    offset: what a norm adds to its weight before it multiplies; writers: the layers whose outputs are added to the
    residual stream as they are, empty where norms stand between, or experts' weights.
    """

    feeds: tuple[Feed, ...]
    offset: float = 0.0
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")


def _split(attention_norm: str, mlp_norm: str) -> tuple[Feed, ...]:
    """Projections of their own."""
    return (
        Feed(attention_norm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Feed("self_attn.v_proj", ("self_attn.o_proj",), Part.VALUES),
        Feed(mlp_norm, ("mlp.gate_proj", "mlp.up_proj")),
        Feed("mlp.up_proj", ("mlp.down_proj",)),
    )


def _fused(attention_norm: str, mlp_norm: str) -> tuple[Feed, ...]:
    """Queries, keys and values in one matrix, gate and up projection in another."""
    return (
        Feed(attention_norm, ("self_attn.qkv_proj",)),
        Feed("self_attn.qkv_proj", ("self_attn.o_proj",), Part.LAST_VALUES),
        Feed(mlp_norm, ("mlp.gate_up_proj",)),
        Feed("mlp.gate_up_proj", ("mlp.down_proj",), Part.SECOND_HALF),
    )


_LLAMA = Architecture(_split("input_layernorm", "post_attention_layernorm"))
# The norms behind attention and MLP go into the residual stream and feed no linear layer.
_GEMMA_2 = Architecture(_split("input_layernorm", "pre_feedforward_layernorm"), offset=1.0, writers=())

_EXPERTS = "mlp.experts.*.gate_up_proj"
_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")


def _mixture(*shared: str) -> Architecture:
    """As _LLAMA, with experts in some blocks. shared: what else the norm before them feeds."""
    return Architecture(
        (
            *_LLAMA.feeds,
            Feed("post_attention_layernorm", (_EXPERTS, "mlp.gate", *shared)),
            Feed(_EXPERTS, ("mlp.experts.*.down_proj",), Part.SECOND_HALF),
            *([Feed(_SHARED[1], ("mlp.shared_expert.down_proj",))] if shared else []),
        ),
        writers=(),
    )


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "mixtral": _mixture(),
        "qwen2_moe": _mixture(*_SHARED, "mlp.shared_expert_gate"),
        "qwen3_moe": _mixture(),
        "gemma": Architecture(_LLAMA.feeds, offset=1.0),
        "gemma2": _GEMMA_2,
        "gemma3_text": _GEMMA_2,
        "phi3": Architecture(_fused("input_layernorm", "post_attention_layernorm")),
    }
)
"""By model_type."""


def architecture(config: Any) -> Architecture:
    """The row of a model. config: as transformers reads it. Raises ValueError for a model that has none."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"the model is a {config.model_type!r}, and which layers feed which is known only of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[config.model_type]


@dataclass(frozen=True, eq=False)
class Fold:
    """A feed of one block, bound to its modules.

    feed: of which no name has a `*`; targets: linear layers, and routers of experts, which have a weight [n, k] too;
    offset: of a norm as source; rows: of a linear layer as source, those that feed; spread: int64 [k], which of these
    channels each column of the targets reads.
    """

    feed: Feed
    source: nn.Module
    targets: tuple[nn.Module, ...]
    offset: float
    rows: slice
    spread: Tensor

    @property
    def channels(self) -> int:
        """How many scales there are to choose."""
        return self.rows.stop - self.rows.start

    def reduce(self, columns: Tensor) -> Tensor:
        """Means over the columns that read the same channel: [k] -> float64 [channels]."""
        sums = torch.zeros(self.channels, dtype=torch.float64, device=columns.device)
        sums.index_add_(0, self.spread, columns.to(torch.float64))
        return sums / self.spread.bincount(minlength=self.channels)

    def largest(self, columns: Tensor) -> Tensor:
        """The largest of the columns that read the same channel: [k], none negative -> float64 [channels]."""
        found = torch.zeros(self.channels, dtype=torch.float64, device=columns.device)
        return found.scatter_reduce_(0, self.spread, columns.to(torch.float64), "amax")

    @torch.no_grad()
    def apply(self, scales: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Divide the source's channels by `scales` [channels] and multiply the columns that read them, in place.

        dtype: that a norm will be stored in, None: the one that it has. Returns the factors of the columns, float64
        [k]: of a norm those that rounding to its dtype really left (`transforms.divide_norm`). Raises ValueError where
        scales are not positive and finite.
        """
        source: Any = self.source
        if isinstance(source, nn.Linear):
            source.weight.copy_(divide_rows(source.weight, scales, self.rows))
            if source.bias is not None:
                source.bias.copy_(divide_rows(source.bias, scales, self.rows))
            scales = scales.to(torch.float64)
        else:
            weight, scales = divide_norm(source.weight.to(dtype or source.weight.dtype), scales, self.offset)
            source.weight.copy_(weight)
        columns = scales[self.spread]
        targets: Any = self.targets
        for target in targets:
            target.weight.copy_(multiply_columns(target.weight, columns))
        return columns


def folds(block: nn.Module, config: Any) -> tuple[Fold, ...]:
    """The feeds of a decoder block, in the order in which it computes.

    block: with weights, its linear layers unquantized, its experts taken apart. Raises ValueError for an unknown
    architecture.
    """
    known = architecture(config)
    names = {name for name, _ in block.named_modules()}
    feeds = (own for feed in known.feeds for own in _of_experts(feed, block))
    return tuple(
        _bind(feed, block, config, known.offset)
        for feed in feeds
        if names.issuperset({feed.source, *feed.targets})
    )


def _of_experts(feed: Feed, block: nn.Module) -> list[Feed]:
    """A feed with the numbers of the block's experts in the place of `*`."""
    numbers = [range(experts.count) for _, experts in opened(block)] or [range(0)]
    if "*" in feed.source:
        return [
            Feed(
                feed.source.replace("*", str(e)),
                tuple(t.replace("*", str(e)) for t in feed.targets),
                feed.part,
            )
            for e in numbers[0]
        ]
    every = [[t.replace("*", str(e)) for e in numbers[0]] if "*" in t else [t] for t in feed.targets]
    if not all(every):
        return []
    return [Feed(feed.source, tuple(name for names in every for name in names), feed.part)]


def _bind(feed: Feed, block: nn.Module, config: Any, offset: float) -> Fold:
    source: Any = block.get_submodule(feed.source)
    targets: Any = tuple(block.get_submodule(name) for name in feed.targets)
    n, k = len(source.weight), targets[0].weight.shape[1]
    spread = torch.arange(k, device=source.weight.device)
    rows = slice(0, n)
    if feed.part is Part.SECOND_HALF:
        rows = slice(n // 2, n)
    elif feed.part in (Part.VALUES, Part.LAST_VALUES):
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        size = k // heads
        rows = slice(n - groups * size, n)
        spread = spread // size // (heads // groups) * size + spread % size
    return Fold(feed, source, targets, offset, rows, spread)
