"""AWQ of a decoder block: each feed of the block (mappings.py) gets its scales, each layer its clipping.

All of it is done before anything of the block is rounded, with the inputs that its layers have by then: what the blocks
before it, quantized, make of the text. Feeds from linear layers come before those from norms, so that a layer's rows
have been divided when its own columns are scaled and it is rounded.

What goes into an expert are the tokens that are sent to it: its matrices have a Hessian of their own, and the scales of
the norm before the experts are those with the smallest sum of changes over all of them.

Weights that are to be quantized are held in float32 from here on; norms are divided in the dtype that the checkpoint
stores them in, and columns multiplied by what that left. Where a linear layer or a bias stays in 16 bits, scales are
powers of two: so the block computes what it did before, to float32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.calibration import mappings
from bitfold.calibration.collect import BlockRun
from bitfold.calibration.mappings import Fold
from bitfold.experts import stack_name
from bitfold.qtensor import QTensor
from bitfold.quantizers import awq
from bitfold.quantizers.awq import AwqOptions
from bitfold.quantizers.transforms import divide_norm


@dataclass(frozen=True, eq=False)
class Note:
    """What AWQ made of a layer.

    qtensor: None where another method is to round it; output_error, rounding_error: norms of the output's change over
    that of the output, of the result (None: there is none yet) and of plain rounding; alpha: of the scales.
    """

    qtensor: QTensor | None
    output_error: float | None
    rounding_error: float
    alpha: float


@torch.no_grad()
def prepare(run: BlockRun, names: Sequence[str]) -> None:
    """Scale the feeds of the block that lead to layers `names`, and quantize these; `run.notes` has a Note of each.

    Raises ValueError for a model of which it isn't known what feeds what, and what `awq` raises.
    """
    folds = mappings.folds(run.module, run.config)
    for fold in sorted(folds, key=lambda fold: not isinstance(fold.source, nn.Linear)):
        layers = [name for name in fold.feed.targets if name in names]
        if layers:
            _scale(run, fold, layers)
    alone = [name for name in names if name not in run.notes]
    for name in alone:
        ones = torch.ones(run.linear(name).in_features, dtype=torch.float64, device=run.device)
        searched = _search(run, [[name]], ones[:1], spread=torch.zeros_like(ones, dtype=torch.int64))
        _round(run, name, 0, searched, run.hessian(name), ones)


def _scale(run: BlockRun, fold: Fold, layers: list[str]) -> None:
    """One feed: search, fold, round."""
    parts = run.share_input(layers)
    alone = len(parts) == 1
    magnitudes = run.magnitudes(layers[0]) if alone else run.routing(_home_of_experts(layers)).magnitudes
    searched = _search(run, parts, fold.reduce(magnitudes), fold.spread)
    gram = run.hessian(layers[0]) if alone else None
    columns: Tensor | None = apply_scales(run, fold, searched.scales)
    if gram is None:  # of experts there are too many to hold: they are summed again, of the divided inputs
        run.forget()
        columns = None
    place = 0
    for names in parts:
        gram = run.hessian(names[0]) if columns is None else gram
        assert gram is not None
        for name in names:
            _round(run, name, place, searched, gram, columns)
            place += 1


def apply_scales(run: BlockRun, fold: Fold, scales: Tensor) -> Tensor:
    """Divide what feeds by scales [channels] and multiply the columns that read it.

    Where 16 bits must hold the result, scales are the powers of two next to them, and 1 for channels that a norm can't
    be divided by these without rounding: Gemma's, which is stored as the distance from 1. Returns the factors of the
    columns (`Fold.apply`). What the run has summed is of the inputs before.
    """
    source: Any = fold.source
    dtype = run.stored.get(f"{fold.feed.source}.weight")
    touched = [*fold.feed.targets, *([fold.feed.source] if isinstance(source, nn.Linear) else [])]
    floats = {f"{name}.weight": run.linear(name).weight.float() for name in touched if name in run.rules}
    run.set(floats, same=True)
    if any(_is_16_bit(run, f"{name}.weight") for name in touched) or (
        isinstance(source, nn.Linear) and _is_16_bit(run, f"{fold.feed.source}.bias")
    ):
        scales = scales.log2().round().exp2()
        if not isinstance(source, nn.Linear):
            _, left = divide_norm(source.weight.to(dtype or source.weight.dtype), scales, fold.offset)
            scales = torch.where(left == scales, scales, 1.0)
    return fold.apply(scales, dtype)


def _home_of_experts(layers: list[str]) -> str:
    """The name of the experts that are among layers with different inputs: "mlp.experts"."""
    return next(stack_name(name) for name in layers if stack_name(name) != name).rpartition(".")[0]


def _is_16_bit(run: BlockRun, tensor: str) -> bool:
    """Whether the checkpoint has a tensor unquantized and in fewer bits than float32."""
    dtype = run.stored.get(tensor)
    return dtype is not None and dtype.itemsize < 4


def _options(run: BlockRun, name: str) -> AwqOptions:
    return run.rules[name].options or AwqOptions()


def _format(run: BlockRun, name: str) -> str:
    format = run.rules[name].format
    assert format is not None
    return format


def _search(run: BlockRun, parts: list[list[str]], magnitudes: Tensor, spread: Tensor) -> awq.Scaled:
    """parts: layers, those together that have one Hessian."""

    def inputs() -> Iterator[awq.Shared]:
        for names in parts:
            weights = [run.linear(name).weight for name in names]
            yield awq.Shared(weights, [_format(run, name) for name in names], run.hessian(names[0]))

    try:
        searched = awq.search_common_scales(
            inputs, magnitudes, _options(run, parts[0][0]), spread=spread, map=run.map
        )
    except ValueError as error:
        names = [name for part in parts for name in part]
        raise ValueError(f"{run.name}: {', '.join(names)}: {error}") from error
    return run.agree(searched)


def _round(
    run: BlockRun, name: str, place: int, searched: awq.Scaled, gram: Tensor, columns: Tensor | None
) -> None:
    """Clip and round a layer whose columns have been multiplied by `columns` since gram was summed (None: by none)."""
    weight, format, options = run.linear(name).weight, _format(run, name), _options(run, name)
    energy = searched.energy[place]
    rounding_error = _relative(searched.rounding_errors[place], energy)
    if options.then != "round":
        run.notes[name] = Note(None, None, rounding_error, searched.alpha)
        return
    shares = None
    if options.clip and awq.can_clip(format):
        shares = awq.search_clip(weight, format, gram, columns=columns, map=run.map)
    try:
        qtensor = awq.quantize(weight, format, shares)
    except ValueError as error:
        raise ValueError(f"{run.name}.{name}.weight: {error}") from error
    left = awq.output_error(weight, qtensor, gram, columns=columns, map=run.map)
    run.notes[name] = Note(qtensor, _relative(left, energy), rounding_error, searched.alpha)


def _relative(error: float, energy: float) -> float:
    return math.sqrt(max(0.0, error) / energy) if energy > 0 else 0.0
