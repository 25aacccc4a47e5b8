"""Embeddings on a quantized weight, and those of models that multiply their rows by a number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bitfold.nn import PlaneModule, QuantModule, empty_qtensor
from bitfold.qtensor import QTensor


class QuantEmbedding(QuantModule):
    """nn.Embedding on a quantized weight: integer ids [...] -> [..., embedding_dim] of `dtype`.

    qtensor: [num_embeddings, embedding_dim]; dtype: of the output, follows `.to(dtype)`; scale: multiplies the output,
    itself rounded to `dtype`, as Gemma's embeddings do. padding_idx is kept for those who ask; the weight is frozen, so
    it has no effect here.
    """

    def __init__(
        self,
        qtensor: QTensor,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ):
        if qtensor.g_idx is not None:
            raise ValueError("qtensor has g_idx; the weight of an embedding must have none")
        super().__init__(qtensor)
        self.num_embeddings, self.embedding_dim = qtensor.shape
        self.padding_idx = padding_idx
        self.dtype = dtype
        self.scale = scale

    @classmethod
    def empty(
        cls,
        format: str,
        n: int,
        k: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        layout: str = "rows",
        scale: float = 1.0,
    ) -> QuantEmbedding:
        """One with uninitialised planes, to load into."""
        return cls(empty_qtensor(format, n, k, device, layout), padding_idx, dtype, scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlaneModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        n, k = self.shape
        rows = torch.ops.bitfold.embedding(ids, self.planes(), self.format, n, k, self.dtype, self.layout)
        return scaled(rows, self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}, format={self.format}"


class ScaledEmbedding(nn.Embedding):
    """nn.Embedding whose output is multiplied by a number, as Gemma's are."""

    scalar_embed_scale = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        return scaled(super().forward(ids), self.scalar_embed_scale)


def scaled(rows: Tensor, scale: float) -> Tensor:
    """The rows times a number, which is rounded to their dtype."""
    return rows if scale == 1 else rows * torch.tensor(scale, dtype=rows.dtype, device=rows.device)


def embedding_scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows by: sqrt(hidden size) in transformers' Gemma, 12 in its MiniCPM3 (both have
    subclasses of nn.Embedding for it), 1 elsewhere.

    Raises ValueError for a subclass of nn.Embedding that does something else, or more: T5Gemma 2's has a second
    parameter.
    """
    if isinstance(module, QuantEmbedding):
        return module.scale
    if type(module) is nn.Embedding:
        return 1.0
    scale = getattr(module, "scalar_embed_scale", None)
    if not isinstance(scale, (int, float)) or module._parameters.keys() != {"weight"}:
        raise ValueError(f"it is a {type(module).__name__}, a subclass of nn.Embedding")
    return float(scale)
