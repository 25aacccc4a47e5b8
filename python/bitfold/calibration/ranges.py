"""How large the inputs of a layer are, and what a layer keeps of that for its activations (bitfold/activations.py).

Of each sample and each column of a layer's inputs the largest absolute value and the sum of squares are kept, whatever
the number of tokens. Both are of one sample alone and found on one thread, so nothing depends on how many threads or
processes there are.

- Static activations: one step for the whole layer, that with which the largest input of the text becomes the largest
  code.
- LLM.int8() (Dettmers et al. 2022): the usual outlier columns, whose weights are kept in 16 bits too. A column is usual
  where it reaches the threshold in at least one of four samples. There are at most so many that they are one of 32
  columns; where more are usual, those with the largest inputs, by the sum of squares, are taken: what a code of the
  weight is wrong by counts as many times as its input is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitfold.activations import COPIED, KINDS, Activations

USUAL = 4  # a column is usual that has outliers in one of so many samples


@dataclass(frozen=True, eq=False)
class Ranges:
    """Of the inputs of a layer. largest: absolute values, float32 [samples, k]; squares: sums, float64 [samples, k]."""

    largest: Tensor
    squares: Tensor

    @cached_property
    def columns(self) -> Tensor:
        """The largest absolute input of each column: float32 [k]."""
        return self.largest.amax(0)

    @cached_property
    def energy(self) -> Tensor:
        """The sum of squares of each column, samples added up in order: float64 [k]."""
        total = torch.zeros_like(self.squares[0])
        for row in self.squares:
            total += row
        return total

    def step(self, largest_code: float) -> Tensor:
        """With which the largest input becomes the largest code: float32 []. Raises ValueError where inputs are zero
        throughout."""
        largest = self.columns.max().double()
        step = (largest / largest_code).float()
        if step == 0:
            raise ValueError("its inputs are zero throughout the calibration text, and have no step")
        return step

    def usual_outliers(self, threshold: float) -> Tensor:
        """The usual outlier columns (see the head of this file): int32 [c], ascending; c may be 0."""
        samples, k = self.largest.shape
        usual = USUAL * (self.largest >= threshold).sum(0) >= samples
        most = max(1, k // COPIED)
        if int(usual.sum()) > most:
            ranked = torch.where(usual, self.energy, -1.0).sort(descending=True, stable=True).indices
            usual = torch.zeros_like(usual).index_fill_(0, ranked[:most], True)
        return usual.nonzero()[:, 0].to(torch.int32)


def of_sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the inputs [tokens, k] of one sample: a row of `Ranges.largest` and one of `squares`."""
    if not len(x):
        return x.new_zeros(x.shape[1], dtype=torch.float32), x.new_zeros(x.shape[1], dtype=torch.float64)
    sizes = x.float().abs()
    return sizes.amax(0), sizes.double().square_().sum(0)


def kept_for(activations: Activations, ranges: Ranges, weight: Tensor) -> dict[str, Tensor]:
    """What a layer keeps for its activations, by the names of `QuantLinear`; weight: [n, k], unrounded.

    Raises ValueError where inputs are zero throughout and a step is wanted.
    """
    if activations.is_static:
        return {"x_scale": ranges.step(KINDS[activations.kind].largest)}
    columns = ranges.usual_outliers(activations.threshold)
    if not len(columns):
        return {}
    return {"outlier_columns": columns, "outlier_weight": in_16_bits(weight[:, columns.long()])}


def in_16_bits(weight: Tensor) -> Tensor:
    """In the dtype that it has, or in that of float16 and bfloat16 which is nearer (equal: float16)."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight.contiguous()
    exact = weight.double()
    half, brain = weight.to(torch.float16), weight.to(torch.bfloat16)
    errors = [(cast.double() - exact).square().sum() for cast in (half, brain)]
    return half if half.isfinite().all() and errors[0] <= errors[1] else brain
