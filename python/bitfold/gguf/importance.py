"""How much the columns of a model's weights count: what an importance file (imatrix) says, and where it is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.gguf.mixes import EMBEDDING, role_of
from bitfold.gguf.words import quoted
from bitfold.shards import CheckpointError


@dataclass(frozen=True)
class Importance:
    """Mean squares of the activations that each column of a weight is multiplied with.

    path: of the file they come from, as it was given; means: by the name of the weight, float32, for each expert (one
    of an ordinary weight) as many as it has columns; dataset: the text they were measured on, "" if it isn't known;
    chunks: how many pieces of it, 0 if that isn't known.
    """

    path: str
    means: Mapping[str, Tensor]
    dataset: str = ""
    chunks: int = 0

    def check_model(self, names: Collection[str]) -> None:
        """Raises CheckpointError where none of the file's weights is one of a model's, whose names are given."""
        if self.means and not any(name in names for name in self.means):
            raise CheckpointError(
                f"{self.path} is of another model: none of its {len(self.means)} weights, such as "
                f"{next(iter(self.means))!r}, is in this one"
            )

    def of(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """For a weight of the shape [..., experts, rows, columns]: float32 [experts, columns], None where the file has
        nothing for it. What it may have for an embedding of another size is passed over, as llama-quantize does it.

        Raises CheckpointError where the file is one of another model, or its numbers are none.
        """
        means = self.means.get(name)
        if means is None:
            return None
        columns, experts = shape[-1], math.prod(shape[:-2])
        if means.numel() != columns * experts:
            if role_of(name) == EMBEDDING:
                return None
            stack = f" for each of {experts} experts" if experts > 1 else ""
            raise CheckpointError(
                f"{self.path} has {means.numel()} numbers for {quoted(name)}, which has {columns} columns{stack}: it "
                "is of another model"
            )
        if not torch.isfinite(means).all():
            raise CheckpointError(f"{self.path} has a number for {quoted(name)} that is not finite")
        return means.to(torch.float32).reshape(experts, columns)
