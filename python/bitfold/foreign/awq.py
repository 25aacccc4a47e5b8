"""AWQ's checkpoints in gemm order (AutoAWQ): 4 bits, a zero point a group, no order of columns (docs/foreign.md).

Words run along the output features: `qweight` [k, n / 8], `qzeros` [g, n / 8], each word with eight neighbouring
outputs in the order `ORDER`: first the even, then the odd ones. Zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.fields import Fields
from bitfold.foreign import words
from bitfold.foreign.scheme import (
    ReadPlane,
    Scheme,
    Unfit,
    check_matrix,
    check_names,
    check_tensor,
    integer,
    integer_format,
    scale_dtype,
)
from bitfold.formats import Format, ceil_div
from bitfold.qtensor import QTensor
from bitfold.section import ModuleEntry
from bitfold.shards import TensorSpec

SIGNATURE = ("qweight",)
PARTS = ("qweight", "qzeros", "scales")
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word, from the lowest, is output feature ORDER[i] of the word's eight."""
PLACE = tuple(ORDER.index(i) for i in range(8))


@dataclass(frozen=True)
class AwqScheme(Scheme):
    """group: input features that share a scale, -1 for all; zero_point: whether zero points differ from 8 (as the
    configuration says; they are stored in any case).
    """

    group: int = 128
    zero_point: bool = True

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        self._check_fits(entry)
        n, k = entry.shape
        groups = 1 if self.group == -1 else k // self.group
        return {
            "qweight": TensorSpec("qweight", torch.int32, (k, n // 8)),
            "qzeros": TensorSpec("qzeros", torch.int32, (groups, n // 8)),
            "scales": TensorSpec("scales", scale_dtype(entry.format), (groups, n)),
        }

    def entry(self, tensors: Mapping[str, Tensor]) -> ModuleEntry:
        check_names(tensors, PARTS)
        k, packed = check_matrix(tensors, "qweight", torch.int32)
        n = 8 * packed
        if self.group != -1 and k % self.group:
            raise ValueError(
                f"qweight is {[k, packed]}, but its {k} rows are no multiple of the group size {self.group}"
            )
        groups = 1 if self.group == -1 else k // self.group
        check_tensor(tensors, "scales", (torch.float16, torch.bfloat16), (groups, n))
        check_tensor(tensors, "qzeros", (torch.int32,), (groups, packed))
        format = integer(BITS, self.group, self.zero_point, tensors["scales"].dtype)
        return ModuleEntry("linear", format, (n, k))

    def unpack(self, tensors: Mapping[str, Tensor]) -> QTensor:
        entry = self.entry(tensors)
        planes = {"codes": _to_plane(tensors["qweight"]), "scales": tensors["scales"].t().contiguous()}
        zeros = _to_plane(tensors["qzeros"])
        if self.zero_point:
            planes["zeros"] = zeros
        else:
            found = words.unpack(words.from_plane(zeros), BITS, planes["scales"].shape[1])
            wrong = (found != 8).nonzero()
            if len(wrong):
                row, group = wrong[0].tolist()
                raise ValueError(
                    f"the zero point of group {group} of output {row} is {int(found[row, group])}; without zero_point "
                    "it must be 8"
                )
        return QTensor(entry.format, entry.matrix, planes)

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        format = self._check_fits(
            ModuleEntry(
                "linear", qtensor.format, qtensor.shape, qtensor.layout, g_idx=qtensor.g_idx is not None
            )
        )
        k = qtensor.shape[1]
        scales = qtensor.planes["scales"]
        groups = scales.shape[1]
        eights = torch.full((scales.shape[0], ceil_div(groups, 2)), 0x88, dtype=torch.uint8)
        zeros = qtensor.planes["zeros"] if format.asymmetric else eights
        return {
            "qweight": _from_plane(qtensor.planes["codes"], k),
            "qzeros": _from_plane(zeros, groups),
            "scales": scales.t().contiguous(),
        }

    def _check_fits(self, entry: ModuleEntry) -> Format:
        format = integer_format(entry)
        n, k = entry.shape
        if (format.bits, format.group) != (BITS, self.group) or format.scale == "fp32":
            raise Unfit(
                f"it is {format}; AWQ has {BITS} bits and 16-bit scales, here with the group size {self.group}"
            )
        if format.asymmetric and not self.zero_point:
            raise Unfit(
                f"it is {format}, which has zero points, and the configuration says zero_point: false"
            )
        if entry.g_idx:
            raise Unfit(
                "its groups are not neighbouring columns (act-order without static groups), and AWQ has no g_idx"
            )
        if n % 8 or (self.group != -1 and k % self.group):
            raise Unfit(f"it is {n} x {k}; AWQ packs 8 rows in a word, and groups must be whole")
        return format


# A byte of a word holds two output features of one column; a byte of a plane two columns of one output feature.


def _to_plane(packed: Tensor) -> Tensor:
    """Words [columns, n / 8] as a plane of 4 bits, uint8 [n, ceil(columns / 2)]."""
    columns, eighth = packed.shape
    padded = torch.nn.functional.pad(packed, (0, 0, 0, columns % 2))
    pairs = (
        padded.t().contiguous().view(-1).view(torch.uint8).view(eighth, -1, 2, 4)
    )  # ..., columns 2j and 2j + 1, bytes
    plane = torch.empty(eighth, 8, pairs.shape[1], dtype=torch.uint8)
    for byte in range(4):
        even, odd = pairs[..., byte].unbind(-1)
        plane[:, ORDER[2 * byte]] = even & 15 | odd << 4
        plane[:, ORDER[2 * byte + 1]] = even >> 4 | odd & 0xF0
    return plane.view(8 * eighth, -1)


def _from_plane(plane: Tensor, columns: int) -> Tensor:
    """The inverse of `_to_plane`."""
    eights = plane.view(len(plane) // 8, 8, -1)
    pairs = torch.empty(len(eights), eights.shape[2], 2, 4, dtype=torch.uint8)
    for byte in range(4):
        low, high = eights[:, ORDER[2 * byte]], eights[:, ORDER[2 * byte + 1]]
        pairs[:, :, 0, byte] = low & 15 | high << 4
        pairs[:, :, 1, byte] = low >> 4 | high & 0xF0
    words_of_eights = pairs.view(-1).view(torch.int32).view(len(eights), -1).t()[:columns]
    return words_of_eights.clone(memory_format=torch.contiguous_format)  # strides of one word, too


@dataclass(frozen=True)
class AwqConfig:
    """The quantization_config of an AWQ checkpoint. kept: parts of names of modules that aren't quantized
    (modules_to_not_convert).
    """

    default: AwqScheme
    kept: tuple[str, ...] = ()

    def scheme(self, module: str) -> AwqScheme | None:
        return None if any(part in module for part in self.kept) else self.default

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self.default.group,
            "zero_point": self.default.zero_point,
            "version": "gemm",
            "modules_to_not_convert": list(self.kept) or None,
        }


def read_config(section: Mapping[str, Any], origin: Path) -> AwqConfig:
    """The checked quantization_config of an AWQ checkpoint; origin: the file that it is in.

    Raises CheckpointError for a value that the format doesn't have, and for another order than gemm's.
    """
    fields = Fields(section, origin)
    # AutoAWQ's own files call them w_bit and q_group_size.
    fields.take("bits" if "bits" in section else "w_bit", int, None, (BITS,))
    key = "group_size" if "group_size" in section else "q_group_size"
    group = fields.check_group(fields.take(key, int), key)
    version = str(section.get("version") or "gemm").lower()
    if version != "gemm":
        fields.refuse("version", "gemm")
    kept = fields.take("modules_to_not_convert", list, [])
    return AwqConfig(AwqScheme(group, fields.take("zero_point", bool, True)), tuple(map(str, kept)))
