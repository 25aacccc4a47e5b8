"""What a layer may lose before a rule of a recipe passes it over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OutlierBound:
    """Bounds on what is measured of a layer on a text (bitfold.outliers.keep); None: no bound.

    loss: norm of the change of the layer's output, computed as the rule says, over norm of the output; share: of the
    columns of its input that have an outlier in a sequence, mean over sequences.

    Raises ValueError where neither is given, and for what is negative, no number, or a share above 1.
    """

    loss: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if not given:
            raise ValueError("keep_outlier_layers has no bound; it must have a loss, a share, or both")
        for name, value in given.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value < float("inf"):
                raise ValueError(f"keep_outlier_layers: {name} is {value!r}; it must be a number, 0 or above")
        if self.share is not None and self.share > 1:
            raise ValueError(f"keep_outlier_layers: share is {self.share}; it must be at most 1")

    def __str__(self) -> str:
        said = [f"lose more than {self.loss:.3g} of their output"] if self.loss is not None else []
        said += (
            [f"have outliers in more than {self.share:.3g} of their input's columns"]
            if self.share is not None
            else []
        )
        return " or ".join(said)

    def is_exceeded(self, loss: float, share: float) -> bool:
        return (self.loss is not None and loss > self.loss) or (self.share is not None and share > self.share)


def read(value: Any) -> OutlierBound:
    """As it stands in a recipe's TOML: a number, which is the loss, or a table of loss and share.

    Raises ValueError for anything else.
    """
    if not isinstance(value, Mapping):
        return OutlierBound(loss=value)
    unknown = set(value) - {"loss", "share"}
    if unknown:
        raise ValueError(
            f"keep_outlier_layers has the unknown key {min(unknown)!r}; it must be 'loss' or 'share'"
        )
    return OutlierBound(**value)
