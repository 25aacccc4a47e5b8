"""Ways to compute a linear layer in 8 bits, to see what each loses.

Values are rounded to their 8 bits and multiplied in float32, so that the error is that of the rounding and of nothing
else. The step of a row, or of a group of its columns, is its largest magnitude over 127.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor, nn

from bitfold.qtensor import encode, linear

LARGEST = 127  # of the codes of a row of inputs


class Handling(Enum):
    """What becomes of columns in which some value of the call reaches the threshold."""

    ROUNDED = "as all others"
    ROUNDED_WEIGHT = "kept in x, rounded in the weight"
    EXACT = "kept in both"


@dataclass(frozen=True)
class Way:
    """format: of the weight; group: columns of x with a step of their own, None: a row has one; says: what it is, in a
    few words."""

    format: str
    group: int | None
    handling: Handling
    says: str


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "int8": Way(
            "int8-channel-sfp32", None, Handling.ROUNDED, "a step for each row of x and of the weight"
        ),
        "int8-g128": Way(
            "int8-g128-sfp32", 128, Handling.ROUNDED, "a step for 128 columns of a row of either"
        ),
        "llm-int8": Way(
            "int8-channel-sfp32", None, Handling.ROUNDED_WEIGHT, "int8, but outlier columns of x in 16 bits"
        ),
        "llm-int8-exact": Way(
            "int8-channel-sfp32", None, Handling.EXACT, "and the weight's in 16 bits too (exact outliers)"
        ),
    }
)
"""By name."""


def prepare(way: Way, weight: Tensor, threshold: float) -> Callable[[Tensor], Tensor]:
    """The layer, without bias, as a function of x: float32 [tokens, k] of one call -> [tokens, n].

    weight: [n, k], as it is stored; threshold: of outliers.
    """
    planes = encode(weight, way.format)

    def run(x: Tensor) -> Tensor:
        if way.handling is Handling.ROUNDED:
            return linear(round_rows(x, way.group), planes)
        outlier = (x.abs() >= threshold).any(0)
        rounded = round_rows(torch.where(outlier, 0.0, x), way.group)
        if way.handling is Handling.ROUNDED_WEIGHT:  # columns are rounded or kept: one product does for both
            return linear(torch.where(outlier, x, rounded), planes)
        return linear(rounded, planes) + x[:, outlier] @ weight[:, outlier].to(x.dtype).T

    return run


def round_rows(x: Tensor, group: int | None) -> Tensor:
    """x [tokens, k] with every row, or every `group` columns of a row, rounded to 8 bits."""
    k = x.shape[1]
    values = nn.functional.pad(x, (0, -k % (group or k))).unflatten(1, (-1, group or k))
    step = values.abs().amax(-1, keepdim=True) / LARGEST
    codes = torch.round(values / torch.where(step == 0, 1.0, step))
    return (codes * step).flatten(1)[:, :k]
