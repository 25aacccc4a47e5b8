"""Columns with outliers, of weights and of activations: two different things under one name.

A column of x (a feature) that holds a magnitude of 6 or more anywhere is an outlier of LLM.int8() (Dettmers et
al. 2022, section 3.2), which computes it in 16 bits. For weights there is no such rule in the literature; here a
column of W has an outlier where one of its weights is 6 times the matrix's root mean square or more: then that
weight, not the others, sets the scale of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATION_THRESHOLD = 6.0  # magnitude
WEIGHT_THRESHOLD = 6.0  # times the root mean square of the matrix


@dataclass(frozen=True)
class Column:
    """A column with outliers. index: which; peak: its largest magnitude."""

    index: int
    peak: float


@dataclass(frozen=True)
class Feature(Column):
    """A column of x with outliers, and how steady it is.

    token_share, sequence_share: of tokens, and of sequences, that have an outlier in it; same_sign: share of its
    outliers that have the sign of the most of them, 0.5 to 1; mean: magnitude over all tokens.
    """

    token_share: float
    sequence_share: float
    same_sign: float
    mean: float


@dataclass(frozen=True)
class Columns:
    """The columns of one matrix, or of the input that some modules share.

    names: of the modules; columns: how many there are; median, peak: of the columns' largest magnitudes; outliers: the
    largest first. Magnitudes of weights are in units of the matrix's root mean square.
    """

    names: tuple[str, ...]
    columns: int
    median: float
    peak: float
    outliers: Sequence[Column]


@dataclass(frozen=True)
class Inputs(Columns):
    """What some layers multiply, over a text: `outliers` are features.

    tokens: how many inputs there were; token_share: of tokens with an outlier in any column; sixteen: share of the
    columns that have an outlier in a sequence, mean over sequences: what LLM.int8() computes in 16 bits; stream:
    whether the columns are those of the residual stream, behind a norm.
    """

    outliers: tuple[Feature, ...]
    tokens: int
    token_share: float
    sixteen: float
    stream: bool


def weight_columns(name: str, weight: Tensor) -> Columns:
    """The columns of an [n, k] weight."""
    values = weight.detach()
    squares = torch.zeros((), dtype=torch.float64)
    peaks = torch.zeros(values.shape[1])
    rows = max(1, (1 << 22) // max(1, values.shape[1]))  # no copy of the matrix in float32
    for part in values.split(rows):
        part = part.to(torch.float32)
        squares += torch.linalg.vector_norm(part, dtype=torch.float64).cpu() ** 2
        peaks = torch.maximum(peaks, part.abs().amax(0).cpu())
    rms = float((squares / max(1, values.numel())).sqrt())
    peaks /= rms or 1.0
    found = [Column(j, float(peaks[j])) for j in (peaks >= WEIGHT_THRESHOLD).nonzero()[:, 0].tolist()]
    return Columns((name,), len(peaks), *_range(peaks), largest_first(found))


def largest_first(columns: Sequence[Column]) -> tuple:
    return tuple(sorted(columns, key=lambda column: (-column.peak, column.index)))


def _range(peaks: Tensor) -> tuple[float, float]:
    """Median and largest."""
    return float(peaks.median()), float(peaks.max())


class Tally:
    """Sums over the inputs of a layer, a sequence at a time. threshold: from which magnitude on a value is an
    outlier."""

    def __init__(self, columns: int, threshold: float) -> None:
        self.threshold = threshold
        self.peaks = torch.zeros(columns)
        self._sizes = torch.zeros(columns, dtype=torch.float64)
        self._tokens, self._positive, self._sequences = (
            torch.zeros(columns, dtype=torch.int64) for _ in range(3)
        )
        self._seen = self._hit = self._calls = 0
        self._sixteen = 0.0

    def add(self, x: Tensor) -> None:
        """x: [tokens, k], of one sequence."""
        if not len(x):
            return
        x = x.to(torch.float32).cpu()
        size = x.abs()
        is_outlier = size >= self.threshold
        in_any = is_outlier.any(0)
        self.peaks = torch.maximum(self.peaks, size.amax(0))
        self._sizes += size.sum(0, dtype=torch.float64)
        self._tokens += is_outlier.sum(0)
        self._positive += (is_outlier & (x > 0)).sum(0)
        self._sequences += in_any
        self._hit += int(is_outlier.any(1).sum())
        self._seen += len(x)
        self._calls += 1
        self._sixteen += float(in_any.double().mean())

    def inputs(self, names: Sequence[str], stream: bool) -> Inputs:
        """What was added. Raises ValueError where nothing was."""
        if not self._seen:
            raise ValueError(f"the text never reaches {names[0]}: give a longer one")
        found = [self._feature(j) for j in (self.peaks >= self.threshold).nonzero()[:, 0].tolist()]
        return Inputs(
            tuple(names),
            len(self.peaks),
            *_range(self.peaks),
            largest_first(found),
            self._seen,
            self._hit / self._seen,
            self._sixteen / self._calls,
            stream,
        )

    def _feature(self, j: int) -> Feature:
        tokens, positive = int(self._tokens[j]), int(self._positive[j])
        return Feature(
            j,
            float(self.peaks[j]),
            tokens / self._seen,
            int(self._sequences[j]) / self._calls,
            max(positive, tokens - positive) / tokens,
            float(self._sizes[j]) / self._seen,
        )
