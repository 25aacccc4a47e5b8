"""What is common to all owners of checkpoint formats: how one of them stores the weight of one linear layer.

An *owner* is the library whose files they are; a *scheme* is all that its configuration says of one module's weight.
Each owner's file has one or two schemes, frozen dataclasses with the methods of `Scheme`: from the tensors of a module
to a QTensor, and back. Both directions move integers and copy floats; nothing is computed, so nothing is rounded
(bitsandbytes' int8 excepted, whose scale is a quotient).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from bitfold.formats import Format, parse
from bitfold.qtensor import QTensor
from bitfold.section import ModuleEntry
from bitfold.shards import TensorSpec

SCALES = {torch.float16: "sfp16", torch.bfloat16: "sbf16", torch.float32: "sfp32"}
"""How a format string names the dtype of its scales."""


ReadPlane = Callable[[str], Tensor]
"""A plane of the weight that is to be stored, by its name."""


class Unfit(ValueError):
    """An owner's files have no place for a weight as it is; the message is the reason."""


class Store(Protocol):
    """Where weights are written to.

    Names of tensors are those within the module: "qweight", not "model.layers.0.mlp.up_proj.qweight".
    """

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        """The tensors that a weight like `entry` is stored as. plane: asked for where a size depends on values, as
        that of the text does in which bitsandbytes writes the offset of nested scales.

        Raises Unfit as `pack` does.
        """
        ...

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """The weight's tensors. Raises Unfit, with the reason, where `qtensor` isn't of a format and shape that are
        stored there.
        """
        ...

    def pack_kept(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of what a layer keeps beside its weight for its activations (`nn.KEPT_PARTS`)."""
        return {}

    def pack_rounds(self, qtensor: QTensor) -> str:
        """What of a weight `pack` rounds; "" for nothing, as nearly everywhere."""
        return ""


class Scheme(Store, Protocol):
    """How an owner stores a module's weight."""

    def entry(self, tensors: Mapping[str, Tensor]) -> ModuleEntry:
        """What the tensors hold: format, shape, layout, and whether there is a g_idx that matters.

        Looks at shapes and dtypes, and at the values of small tensors (g_idx, shapes); raises ValueError where
        something is missing, unknown, or of another dtype or shape than the others want.
        """
        ...

    def unpack(self, tensors: Mapping[str, Tensor]) -> QTensor:
        """The weight; the inverse of `pack`. Raises ValueError as `entry` does, and where values contradict the
        scheme.
        """
        ...

    @property
    def beside(self) -> tuple[str, ...]:
        """Of the tensors beside a weight (`Owner.beside`) those that it looks at."""
        return ()

    def kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the layer keeps beside its weight for the activations of its entry (`nn.KEPT_PARTS`). Raises ValueError
        where that can't be."""
        return {}

    @property
    def left_out(self) -> str:
        """What its owner does with the layer's inputs or outputs and bitfold doesn't: "rounds their inputs ..."; "" for
        nothing.
        """
        return ""

    def unpack_rounds(self, tensors: Mapping[str, Tensor]) -> str:
        """What of a weight `unpack` rounds; "" for nothing."""
        return ""

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weights [n, k] as the owner means them: float32 where that is exact, else float64."""
        return self.unpack(tensors).decode()


class Config(Protocol):
    """What an owner's quantization_config says of a model, checked."""

    def scheme(self, module: str) -> Scheme | None:
        """How the weight of a linear layer is stored, by the layer's name; None where it isn't quantized."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The section quantization_config of config.json."""
        ...


# ---- formats ----


def integer(bits: int, group: int, asymmetric: bool, scale: torch.dtype) -> str:
    """The format string of integers; group: columns, -1 for a scale a row, 0 for a scale a matrix."""
    where = {-1: "channel", 0: "tensor"}.get(group, f"g{group}")
    zeros = "-asym" if asymmetric else ""
    return parse(f"int{bits}-{where}{zeros}-{SCALES[scale]}").canonical


def integer_format(entry: ModuleEntry) -> Format:
    """The parsed format of a linear layer's matrix of integers. Raises Unfit for another."""
    format = parse(entry.format)
    if entry.kind != "linear":
        raise Unfit(f"it is an {entry.kind}; only linear layers have a place there")
    if format.grid != "integer" or entry.layout != "rows":
        raise Unfit(f"it is {format}, whose grid is not one of integers")
    return format


def scale_dtype(format: str) -> torch.dtype:
    """The dtype of a format's plane of scales."""
    return next(law.dtype for law in parse(format).planes if law.name == "scales")


# ---- checks of what a file says ----


def check_names(
    tensors: Mapping[str, Tensor], wanted: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Raises ValueError unless the tensors are those `wanted`, and perhaps some that are `optional`."""
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in (*wanted, *optional)]
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)} too"
        raise ValueError(f"it {what}; its tensors must be {', '.join(wanted)}")


def check_tensor(
    tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless a tensor has one of the dtypes, and the shape that the others make."""
    tensor = tensors[name]
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {' or '.join(map(str, dtypes))} {list(shape)}"
        )


def check_matrix(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> tuple[int, int]:
    """The shape of a tensor. Raises ValueError unless it is a matrix of `dtype` that isn't empty."""
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be a matrix of {dtype} that isn't empty"
        )
    rows, columns = tensor.shape
    return rows, columns
