"""8-bit floats as DeepSeek-V3 has them, and transformers' FineGrainedFP8Config (docs/foreign.md): `weight` [n, k] in
e4m3 and `weight_scale_inv`, one float32 for each block of 128 x 128, which is what a weight is multiplied with, its
name notwithstanding.

Its inputs are rounded with a scale for each 128 of a row, which bitfold doesn't do: they stay floats, which is told
(`Scheme.left_out`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.fields import Fields
from bitfold.foreign.scheme import ReadPlane, Scheme, Unfit, check_matrix, check_names, check_tensor
from bitfold.formats import ceil_div, parse
from bitfold.qtensor import QTensor
from bitfold.section import ModuleEntry
from bitfold.shards import TensorSpec

SCALES = "weight_scale_inv"
SIGNATURE = (SCALES,)
PARTS = ("weight", SCALES)
ACTIVATIONS = ("activation_scale", "input_scale")


@dataclass(frozen=True)
class BlockScheme(Scheme):
    """rows, columns: of a block that shares a scale; static: whether inputs have a scale from calibration."""

    rows: int = 128
    columns: int = 128
    static: bool = False

    @property
    def format(self) -> str:
        return parse(f"fp8-e4m3-b{self.rows}x{self.columns}").canonical

    @property
    def left_out(self) -> str:
        scale = "one scale from calibration" if self.static else f"a scale for each {self.columns} of a row"
        return f"rounds their inputs to 8-bit floats with {scale}"

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        if (entry.kind, entry.format, entry.g_idx) != ("linear", self.format, False):
            raise Unfit(
                f"it is {entry.format}, an {entry.kind}; linear layers in {self.format} have a place there"
            )
        n, k = entry.shape
        shapes = {"weight": (torch.float8_e4m3fn, (n, k)), SCALES: (torch.float32, self._blocks(n, k))}
        return {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()}

    def entry(self, tensors: Mapping[str, Tensor]) -> ModuleEntry:
        check_names(tensors, PARTS, ACTIVATIONS)
        n, k = check_matrix(tensors, "weight", torch.float8_e4m3fn)
        check_tensor(tensors, SCALES, (torch.float32,), self._blocks(n, k))
        return ModuleEntry("linear", self.format, (n, k))

    def unpack(self, tensors: Mapping[str, Tensor]) -> QTensor:
        entry = self.entry(tensors)
        planes = {"codes": tensors["weight"].view(torch.uint8), "scales": tensors[SCALES]}
        return QTensor(entry.format, entry.matrix, planes)

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        self.specs(ModuleEntry("linear", qtensor.format, qtensor.shape, g_idx=qtensor.g_idx is not None))
        return {"weight": qtensor.planes["codes"].view(torch.float8_e4m3fn), SCALES: qtensor.planes["scales"]}

    def _blocks(self, n: int, k: int) -> tuple[int, int]:
        return ceil_div(n, self.rows), ceil_div(k, self.columns)


@dataclass(frozen=True)
class FineGrainedConfig:
    """kept: modules that aren't quantized, and all that lies in them."""

    default: BlockScheme
    kept: tuple[str, ...] = ()

    def scheme(self, module: str) -> BlockScheme | None:
        inside = any(f".{name}." in f".{module}." for name in self.kept)
        return None if inside else self.default

    def to_json(self) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [self.default.rows, self.default.columns],
            "modules_to_not_convert": list(self.kept) or None,
        }


def read_config(section: Mapping[str, Any], origin: Path) -> FineGrainedConfig:
    """The checked quantization_config; origin: the file that it is in.

    Raises CheckpointError where its blocks are none of a format, and for a way to round weights that isn't e4m3's.
    """
    fields = Fields(section, origin)
    fields.take("fmt", str, "e4m3", ("e4m3",))
    fields.take("scale_fmt", str, "float32", ("float32",))
    size = fields.take("weight_block_size", list)
    powers = [1 << i for i in range(1, 21)]
    if len(size) != 2 or not all(type(one) is int for one in size) or size[0] not in powers or size[1] < 16:
        fields.refuse("weight_block_size", "a power of 2 of rows and at least 16 columns, as [128, 128] is")
    kept = fields.optional("modules_to_not_convert", list) or fields.optional("ignored_layers", list) or []
    activations = fields.take("activation_scheme", str, "dynamic", ("dynamic", "static"))
    rows, columns = size
    return FineGrainedConfig(BlockScheme(rows, columns, activations == "static"), tuple(map(str, kept)))
