"""A model whose residual stream is rotated: the same outputs, no channel larger than the others.

What is added to the stream is written rotated, what reads it undoes the rotation: embedding rows e become e Q, writers
Qᵀ W, readers W Q. A norm without a weight doesn't see a rotation, so its weight goes into its readers first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitfold.calibration import mappings
from bitfold.quantizers.transforms import hadamard_rotation


@torch.no_grad()
def rotate(model: nn.Module, seed: int = 0) -> None:
    """Rotate the residual stream of a transformers model by a Hadamard matrix with random signs, in place.

    Weights stay in their dtype: exact but for their rounding. An output head that shares its weight with the embedding
    gets one of its own, as only one of them follows the last norm.

    Raises ValueError for an unknown architecture, and for one with norms between its layers and the stream (Gemma 2 and
    3), whose weights multiply channels of the stream itself, or with experts.
    """
    config: Any = model.config
    known = mappings.architecture(config)
    if not known.writers:
        raise ValueError(
            f"the model is a {config.model_type!r}, which has norms between its layers and the residual stream, or "
            "experts: it can't be rotated"
        )
    body: Any = model.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=head.weight.requires_grad)
        config.tie_word_embeddings = False
    rotation = hadamard_rotation(embedding.embedding_dim, seed)
    embedding.weight.copy_(rotation.apply(embedding.weight))
    _read(body.norm, [head], known.offset, rotation.apply)
    for block in body.layers:
        for feed in known.feeds:
            source: Any = block.get_submodule(feed.source)
            if not isinstance(source, nn.Linear):
                readers = [block.get_submodule(name) for name in feed.targets]
                _read(source, readers, known.offset, rotation.apply)
        for name in known.writers:
            writer = block.get_submodule(name)
            writer.weight.copy_(rotation.apply(writer.weight.T).T)
            if writer.bias is not None:
                writer.bias.copy_(rotation.apply(writer.bias))


def _read(norm: Any, readers: list[Any], offset: float, rotate: Any) -> None:
    """Put a norm's weight into its readers, and rotate their columns."""
    factors: Tensor = norm.weight.to(torch.float64) + offset
    norm.weight.fill_(1 - offset)
    for reader in readers:
        reader.weight.copy_(rotate(reader.weight.to(torch.float64) * factors))
