"""The tensors of a transformers model in a GGUF file: export.py undone, tensor by tensor, nothing rounded.

The rows of Llama's q and k go back into order (whole rows, also of blocks), stacks of experts get their halves
together. The 1 that Gemma's norms were given is left to the caller to take away, for that may round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold.formats import FORMATS, plane_shapes
from bitfold.gguf.architectures import Placement
from bitfold.gguf.model import GgufModel, GgufTensor
from bitfold.gguf.reader import PLAIN
from bitfold.gguf.rope import ROTARY
from bitfold.gguf.rows import interleaved
from bitfold.shards import CheckpointError, listed

_COMPUTED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Restored:
    """One tensor of the transformers model, not yet read.

    name: in its state_dict; shape: there; format: of blocks, None of a plain tensor; shift: to be taken from its
    values; parts: the tensors of the file that it is made of, each with its place and the runs of rows that belong
    here: (first row here, first row there, rows).
    """

    name: str
    shape: tuple[int, ...]
    format: str | None
    shift: float
    parts: tuple[tuple[GgufTensor, Placement, tuple[tuple[int, int, int], ...]], ...]

    @property
    def module(self) -> str:
        """The name of the module whose weight or bias it is; a stack of experts is one under its own name."""
        return self.name if self.is_stack else self.name.rpartition(".")[0]

    @property
    def is_stack(self) -> bool:
        """Whether it has a matrix for each expert."""
        return len(self.shape) == 3

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of what `read` returns."""
        if self.format is None:
            return self.shape
        n, k = self.shape[-2:]
        return (*self.shape[:-2], *plane_shapes(self.format, n, k)["blocks"])

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; of a stack of experts the rows of all."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` returns."""
        return torch.uint8 if self.format else PLAIN[self.parts[0][0].type]

    def read(self) -> Tensor:
        """The values in the dtype of the file, with the shift still in them, or the blocks: uint8 [rows, bytes of a
        row], of a stack [experts, rows, bytes of a row]. Mapped where the rows lie in the file in this order."""
        runs = []
        for tensor, placement, places in self.parts:
            values = tensor.read(0, tensor.rows)
            if placement.heads:
                order = interleaved(placement.shape[0], placement.heads).argsort()
                values = values[order] if len(placement.shape) > 1 else values[:, order]
            runs += [(here, values[there : there + rows]) for here, there, rows in places]
        in_order = [values for _, values in sorted(runs, key=lambda run: run[0])]
        values = in_order[0] if len(in_order) == 1 else torch.cat(in_order)
        return values.view(self.stored_shape)


def restored(file: GgufModel, placements: Mapping[str, Placement]) -> dict[str, Restored]:
    """All tensors of the model, by their names there, in the order of the table.

    Raises CheckpointError where a tensor is missing, is not of the model, has another shape than the metadata makes, or
    is of a type that bitfold doesn't compute with.
    """
    _check_names(file, placements)
    made: dict[str, list[tuple[GgufTensor, Placement, list[tuple[int, int, int]]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, placement in placements.items():
        tensor = file.tensors[name]
        _check(tensor, placement)
        there = 0
        places: dict[str, list[tuple[int, int, int]]] = {}
        for span in placement.sources[0]:
            runs, rows = places.setdefault(span.source, []), span.end - span.begin
            if runs and runs[-1][0] + runs[-1][2] == span.begin and runs[-1][1] + runs[-1][2] == there:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + rows)  # one run, which can stay mapped
            else:
                runs.append((span.begin, there, rows))
            shapes[span.source] = span.shape
            there += rows
        for source, runs in places.items():
            made.setdefault(source, []).append((tensor, placement, runs))
    return {name: _restored(name, shapes[name], parts) for name, parts in made.items()}


def _restored(
    name: str,
    shape: tuple[int, ...],
    parts: list[tuple[GgufTensor, Placement, list[tuple[int, int, int]]]],
) -> Restored:
    (first, placement, _), *others = parts
    for other, _, _ in others:
        if other.type != first.type:
            raise CheckpointError(
                f"'{first.name}' is {first.type.name} and '{other.name}' {other.type.name}, but transformers has them "
                "in one tensor"
            )
    format = None if first.type in PLAIN else first.type.name.lower()
    frozen = tuple((tensor, place, tuple(runs)) for tensor, place, runs in parts)
    return Restored(name, shape, format, placement.shift, frozen)


def _check_names(file: GgufModel, placements: Mapping[str, Placement]) -> None:
    extra = [name for name in file.tensors if name not in placements and name not in ROTARY]
    if extra:
        raise CheckpointError(f"the file holds {listed(extra)}, which the model of its metadata doesn't have")
    missing = [name for name in placements if name not in file.tensors]
    if missing:
        raise CheckpointError(f"the file lacks {listed(missing)}, which its metadata asks for")


def _check(tensor: GgufTensor, placement: Placement) -> None:
    if tensor.shape != placement.shape:
        raise CheckpointError(
            f"'{tensor.name}' has shape {list(tensor.shape)}, but the file's metadata makes it {list(placement.shape)}"
        )
    if tensor.type in PLAIN:
        if PLAIN[tensor.type] not in _COMPUTED:
            raise CheckpointError(
                f"'{tensor.name}' is {tensor.type.name}; bitfold computes with F32, F16 and BF16"
            )
    elif tensor.type.name.lower() not in FORMATS:
        raise CheckpointError(f"'{tensor.name}' is {tensor.type.name}, which bitfold can't compute with")
