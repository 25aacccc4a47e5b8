"""SmoothQuant of a decoder block (Xiao et al. 2022): channels with large inputs become smaller, their weights larger.

Where inputs are rounded too, a channel far larger than the others takes all steps of its row, or of the whole layer.
Scales of max|x|^alpha / max|w|^(1 - alpha) even out both sides, channel by channel, over the whole text. Each feed of
the block (mappings.py) gets its scales: norms, as in the paper, and the linear layers that feed others, whose rows are
divided. Rows with a scale of their own lose nothing by that.

All of it is done before anything of the block is rounded, and the block computes what it did (scaling.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitfold.calibration import mappings, scaling
from bitfold.calibration.collect import BlockRun
from bitfold.calibration.mappings import Fold
from bitfold.quantizers.transforms import SmoothOptions, smooth_scales


def options(run: BlockRun, name: str) -> SmoothOptions:
    """Those of a layer's rule, or as they are by default."""
    return run.rules[name].options or SmoothOptions()


@torch.no_grad()
def prepare(run: BlockRun, names: Sequence[str]) -> None:
    """Smooth the feeds of the block that lead to layers `names`.

    Raises ValueError for a model of which it isn't known what feeds what.
    """
    wanted: list[tuple[Fold, list[str], Tensor]] = []
    for fold in mappings.folds(run.module, run.config):
        layers = [name for name in fold.feed.targets if name in names]
        if layers:
            wanted.append((fold, layers, fold.largest(_largest_inputs(run, layers))))
    # A layer's rows are divided before its own columns are looked at.
    for fold, layers, largest in sorted(wanted, key=lambda item: not isinstance(item[0].source, nn.Linear)):
        weights = [fold.largest(_largest_weights(run.linear(name).weight))[None] for name in layers]
        scales = smooth_scales(largest, weights, options(run, layers[0]).alpha)
        scaling.apply_scales(run, fold, scales)
    run.forget()


def _largest_weights(weight: Tensor) -> Tensor:
    """Of each column of a weight [n, k] the largest absolute value: [k], without a copy of the weight."""
    return torch.maximum(weight.amax(0), -weight.amin(0))


def _largest_inputs(run: BlockRun, layers: Sequence[str]) -> Tensor:
    """Of each column the largest absolute input that one of these layers has: float32 [k]. Experts have the tokens that
    are sent to them."""
    return torch.stack([run.ranges(names[0]).columns for names in run.share_input(layers)]).amax(0)
