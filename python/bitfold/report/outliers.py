"""Columns with outliers, of weights and of activations: two different things under one name.

A column of x (a feature) that holds a magnitude of 6 or more anywhere is an outlier of LLM.int8() (Dettmers et
al. 2022, section 3.2), which computes it in 16 bits. For weights there is no such rule in the literature; here a
column of W has an outlier where one of its weights is 6 times the matrix's root mean square or more: then that
weight, not the others, sets the scale of its group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.evaluate import Windows

ACTIVATION_THRESHOLD = 6.0  # magnitude
WEIGHT_THRESHOLD = 6.0  # times the root mean square of the matrix

Progress = Callable[[int, int], None]
"""Told after each window: the tokens seen so far, the tokens to see in all."""


@dataclass(frozen=True)
class Columns:
    """The columns of one matrix, or of the input that some modules share.

    names: of the modules; columns: how many there are; median, peak: of the columns' largest magnitudes;
    outliers: (column, its largest magnitude), the largest first; token_share: of tokens with an outlier, None
    for weights. Magnitudes of weights are in units of the matrix's root mean square.
    """

    names: tuple[str, ...]
    columns: int
    median: float
    peak: float
    outliers: tuple[tuple[int, float], ...]
    token_share: float | None = None


def weight_columns(name: str, weight: Tensor) -> Columns:
    """The columns of an [n, k] weight."""
    values = weight.detach().to(torch.float32)
    rms = float(torch.linalg.vector_norm(values, dtype=torch.float64)) / max(1, values.numel()) ** 0.5
    peaks = values.abs().amax(0) / (rms or 1.0)
    return _columns((name,), peaks, WEIGHT_THRESHOLD)


@torch.no_grad()
def activation_columns(
    model: nn.Module, names: Iterable[str], windows: Windows, progress: Progress | None = None
) -> tuple[Columns, ...]:
    """The columns of the inputs of linear modules over a text; modules that are given the same input share
    an entry.
    """
    seen: dict[str, _Seen] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_watch(seen, name))
        for name in names
        if isinstance(model.get_submodule(name), nn.Linear)
    ]
    try:
        tokens = sum(len(ids) for ids in windows.ids)
        done = 0
        device = next(model.parameters()).device
        for ids in windows.ids:
            model(input_ids=ids[None].to(device), use_cache=False)
            done += len(ids)
            if progress is not None:
                progress(done, tokens)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple, list[str]] = {}
    for name, found in seen.items():
        groups.setdefault((found.tokens, found.hit, *found.peaks.tolist()), []).append(name)
    return tuple(
        _columns(tuple(members), seen[members[0]].peaks, ACTIVATION_THRESHOLD, seen[members[0]].share)
        for members in groups.values()
    )


@dataclass(frozen=True)
class _Seen:
    """The inputs of one module: each column's largest magnitude, tokens, and tokens with an outlier."""

    peaks: Tensor
    tokens: int
    hit: int

    @property
    def share(self) -> float:
        return self.hit / max(1, self.tokens)


def _watch(seen: dict[str, _Seen], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).to(torch.float32).abs()
        hit = int((x.amax(1) >= ACTIVATION_THRESHOLD).sum())
        now = _Seen(x.amax(0), len(x), hit)
        before = seen.get(name)
        if before is not None:
            now = _Seen(torch.maximum(before.peaks, now.peaks), before.tokens + now.tokens, before.hit + hit)
        seen[name] = now

    return hook


def _columns(
    names: tuple[str, ...], peaks: Tensor, threshold: float, token_share: float | None = None
) -> Columns:
    outliers = (peaks >= threshold).nonzero()[:, 0].tolist()
    ranked = sorted(((j, float(peaks[j])) for j in outliers), key=lambda pair: -pair[1])
    return Columns(names, len(peaks), float(peaks.median()), float(peaks.max()), tuple(ranked), token_share)
