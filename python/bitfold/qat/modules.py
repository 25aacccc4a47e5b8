"""Layers that compute with rounded weights and train the unrounded ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfold.activations import FLOAT, Activations
from bitfold.activations import read as read_activations
from bitfold.embeddings import embedding_scale, scaled
from bitfold.formats import Format, parse
from bitfold.qat.fake import check_learned, pack_learned, round_inputs, round_learned, round_to
from bitfold.qtensor import QTensor
from bitfold.quantize import encode_named
from bitfold.quantizers import grid


class _FakeQuantized(nn.Module):
    """What both layers share: a weight, the format it will have, and its steps where those train."""

    weight: nn.Parameter
    steps: nn.Parameter | None

    def _hold(self, name: str, weight: nn.Parameter, format: str, steps: nn.Parameter | None) -> None:
        self.name = name
        self.format: Format = parse(format)
        self.format.check_columns(weight.shape[1])
        self.weight = weight
        self.register_parameter("steps", steps)

    def rounded(self) -> Tensor:
        """The weight as it will be, in the dtype of the one that trains."""
        try:
            if self.steps is None:
                return round_to(self.weight, self.format.canonical)
            return round_learned(self.weight, self.steps, self.format)
        except ValueError as error:
            raise ValueError(f"{self.name}.weight: {error}") from error

    def qtensor(self) -> QTensor:
        """The weight as it will be, packed: the codes that `rounded` decodes."""
        if self.steps is None:
            return encode_named(f"{self.name}.weight", self.weight, self.format.canonical)
        return pack_learned(self.weight, self.steps, self.format)


class FakeQuantLinear(_FakeQuantized):
    """nn.Linear with a rounded weight: [..., in_features] -> [..., out_features].

    name: for messages; weight, bias: of the layer that it stands for, the same Parameters; steps: float32 [n or 1,
    groups], None where scales follow the weights; activations: what is done with inputs first.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        format: str,
        steps: nn.Parameter | None = None,
        activations: str | Activations = FLOAT,
    ):
        super().__init__()
        weight: Any = linear.weight
        self._hold(name, weight, format, steps)
        self.register_parameter("bias", linear.bias)
        self.out_features, self.in_features = linear.weight.shape
        self.activations = trainable_activations(activations)

    def forward(self, x: Tensor) -> Tensor:
        rounded = round_inputs(x.reshape(-1, self.in_features), self.activations, self.format)
        return F.linear(rounded.reshape(x.shape), self.rounded(), self.bias)

    def extra_repr(self) -> str:
        learned = "" if self.steps is None else ", learned steps"
        return f"{self.in_features}, {self.out_features}, format={self.format}, activations={self.activations}{learned}"


class FakeQuantEmbedding(_FakeQuantized):
    """nn.Embedding with a rounded weight; scale: multiplies its output, as Gemma's embeddings do."""

    def __init__(self, name: str, embedding: nn.Embedding, format: str, steps: nn.Parameter | None = None):
        super().__init__()
        weight: Any = embedding.weight
        self._hold(name, weight, format, steps)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx
        self.scale = embedding_scale(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        return scaled(F.embedding(ids, self.rounded(), self.padding_idx), self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}"


def trainable_activations(activations: str | Activations) -> Activations:
    """Raises ValueError for activations that there aren't, or that take something from calibration."""
    wanted = read_activations(activations)
    if wanted.needs_calibration:
        raise ValueError(
            f"activations is '{wanted}', which take something from calibration; it must be float, int8, fp8 or llm-int8"
        )
    return wanted


def first_steps(weight: Tensor, format: str) -> nn.Parameter:
    """Steps to start from: those that GPTQ's search finds, for each group a fraction of its range."""
    check_learned(format)
    fitted = grid.fit(weight.detach().float(), format, search=True)
    return nn.Parameter(fitted.logical["scales"].to(torch.float32))
