"""compressed-tensors (llm-compressor, vLLM): integers packed or as int8, and fp8, by groups of modules
(docs/foreign.md).

`weight_packed` [n, ceil(k * b / 32)] is a view of the plane `codes`: words run along the input features and hold q +
2^(b-1), as ours do. Scales [n, g] are the plane `scales`, in 16 or 32 bits. Zero points of packed weights run along
the *output* features, [ceil(n * b / 32), g]. Activations that are rounded to 8-bit floats, token by token or with the
scale `input_scale`, are our "fp8" and "fp8-static"; others stay floats, which is told (`Scheme.left_out`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.activations import FLOAT, Activations
from bitfold.fields import Fields
from bitfold.foreign import words
from bitfold.foreign.scheme import (
    SCALES,
    ReadPlane,
    Scheme,
    Unfit,
    check_matrix,
    check_names,
    check_tensor,
    integer,
    scale_dtype,
)
from bitfold.formats import Format, ceil_div, parse
from bitfold.qtensor import QTensor, pack
from bitfold.section import ModuleEntry
from bitfold.shards import CheckpointError, TensorSpec

SIGNATURE = ("weight_packed", "weight_scale")
INPUT_SCALE = "input_scale"
PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
ACTIVATIONS = (INPUT_SCALE, "input_zero_point", "output_scale", "output_zero_point")
"""What may lie beside a weight for activations of 8 bits."""

PACKED, INTEGERS, FLOATS, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
STORAGE = (PACKED, INTEGERS, FLOATS, NAIVE)
STRATEGIES = ("tensor", "channel", "group", "block")
FP8 = "fp8-e4m3"
_BLOCK_ROWS = tuple(1 << i for i in range(1, 21))


@dataclass(frozen=True)
class CompressedScheme(Scheme):
    """storage: one of STORAGE; type: "int" or "float"; group: as the strategy says, -1 ("channel"), 0 ("tensor") or
    columns; by_group: whether the order of columns is stored (actorder "group"); rows: that share their scales
    ("block"); activations: "float", "fp8" or "fp8-static"; left_out: as Scheme has it.
    """

    storage: str = PACKED
    type: str = "int"
    bits: int = 4
    group: int = 128
    symmetric: bool = True
    by_group: bool = False
    rows: int = 1
    activations: Activations = FLOAT
    left_out: str = ""

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        self._check_fits(entry)
        n, k = entry.shape
        scale = scale_dtype(entry.format)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.storage == PACKED:
            shapes["weight_packed"] = torch.int32, (n, words.words_of(k, self.bits))
            shapes["weight_shape"] = torch.int64, (2,)
        else:
            shapes["weight"] = torch.float8_e4m3fn if self.type == "float" else torch.int8, (n, k)
        shapes["weight_scale"] = scale, self._scale_shape(n, k)
        if not self.symmetric:
            shapes["weight_zero_point"] = self._zero_point(n, k)
        if self.by_group:
            shapes["weight_g_idx"] = torch.int32, (k,)
        if self.activations.is_static:
            shapes[INPUT_SCALE] = torch.float32, (1,)
        return {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()}

    def entry(self, tensors: Mapping[str, Tensor]) -> ModuleEntry:
        packed = self.storage == PACKED
        needed = ("weight_packed", "weight_shape", "weight_scale") if packed else ("weight", "weight_scale")
        optional = ("weight_g_idx",) if self.by_group else ()
        # Old versions store zeros of symmetric weights too.
        zeros, more = (("weight_zero_point",), ()) if not self.symmetric else ((), ("weight_zero_point",))
        check_names(tensors, (*needed, *zeros, *optional, *self.beside), (*more, *ACTIVATIONS))
        n, k = self._shape(tensors)
        scales = tensors["weight_scale"]
        self._check_scales(scales, n, k)
        if self.type == "float":
            columns = f"g{self.group}" if self.rows == 1 else f"b{self.rows}x{self.group}"
            where = {-1: "channel", 0: "tensor"}.get(self.group, columns)
            format = parse(f"{FP8}-{where}-{SCALES[scales.dtype]}").canonical
        else:
            format = integer(self.bits, self.group, not self.symmetric, scales.dtype)
        if "weight_zero_point" in tensors and not (self.symmetric and not tensors["weight_zero_point"].any()):
            self._zeros(tensors["weight_zero_point"], n, k)
        matters = False
        if self.by_group:
            check_tensor(tensors, "weight_g_idx", (torch.int32,), (k,))
            neighbours = torch.arange(k, dtype=torch.int32) // self.group
            matters = not torch.equal(tensors["weight_g_idx"], neighbours)
        return ModuleEntry("linear", format, (n, k), g_idx=matters, activations=self.activations)

    @property
    def beside(self) -> tuple[str, ...]:
        return (INPUT_SCALE,) if self.activations.is_static else ()

    def kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.activations.is_static:
            return {}
        scale = tensors[INPUT_SCALE]
        if scale.numel() != 1 or scale.dtype not in SCALES or not 0 < float(scale) < math.inf:
            raise ValueError(
                f"{INPUT_SCALE} is {scale.dtype} {list(scale.shape)} {scale.flatten()[:1].tolist()}; it must be one "
                "number of 16 or 32 bits above 0"
            )
        return {"x_scale": scale.to(torch.float32).reshape(())}

    def pack_kept(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {INPUT_SCALE: kept["x_scale"].reshape(1)} if self.activations.is_static else {}

    def unpack(self, tensors: Mapping[str, Tensor]) -> QTensor:
        entry = self.entry(tensors)
        n, k = entry.shape
        planes = {"codes": self._codes(tensors, n, k), "scales": tensors["weight_scale"].reshape(-1, 1)}
        if self.group > 0:
            planes["scales"] = tensors["weight_scale"]
        if "weight_zero_point" in tensors:
            zeros = self._zeros(tensors["weight_zero_point"], n, k)
            if not self.symmetric:
                planes["zeros"] = words.to_plane(words.pack(zeros, self.bits), self.bits, zeros.shape[1])
            elif tensors["weight_zero_point"].any() and (zeros != 1 << self.bits - 1).any():
                raise ValueError("weight_zero_point has other values than 0, and the weights are symmetric")
        if not entry.g_idx:
            return QTensor(entry.format, entry.matrix, planes)
        codes = words.unpack(words.from_plane(planes["codes"]), self.bits, k)
        asym = None if self.symmetric else self._zeros(tensors["weight_zero_point"], n, k)
        return pack(codes, planes["scales"], asym, format=entry.format, g_idx=tensors["weight_g_idx"])

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        entry = ModuleEntry(
            "linear", qtensor.format, qtensor.shape, qtensor.layout, g_idx=qtensor.g_idx is not None
        )
        format = self._check_fits(entry)
        n, k = qtensor.shape
        codes = qtensor.planes["codes"]
        if qtensor.g_idx is not None:
            codes = words.to_plane(words.pack(qtensor.unpack().codes, self.bits), self.bits, k)
        scales = qtensor.planes["scales"]
        tensors = {"weight_scale": scales.reshape(self._scale_shape(n, k))}
        if self.storage == PACKED:
            tensors["weight_packed"] = words.from_plane(codes)
            tensors["weight_shape"] = torch.tensor([n, k])
        elif self.type == "float":
            tensors["weight"] = codes.view(torch.float8_e4m3fn)
        else:
            tensors["weight"] = self._signed(words.unpack(words.from_plane(codes), self.bits, k))
        if not self.symmetric:
            zeros = torch.full(tuple(scales.shape), 1 << self.bits - 1, dtype=torch.uint8)
            if format.asymmetric:
                stream = words.from_plane(qtensor.planes["zeros"])
                zeros = words.unpack(stream, self.bits, scales.shape[1])
            if self.storage == PACKED:
                tensors["weight_zero_point"] = words.pack(zeros.t(), self.bits).t().contiguous()
            else:
                tensors["weight_zero_point"] = self._signed(zeros).reshape(self._scale_shape(n, k))
        if self.by_group:
            neighbours = torch.arange(k, dtype=torch.int32) // self.group
            tensors["weight_g_idx"] = neighbours if qtensor.g_idx is None else qtensor.g_idx
        return tensors

    def _shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        if self.storage != PACKED:
            dtype = torch.float8_e4m3fn if self.type == "float" else torch.int8
            return check_matrix(tensors, "weight", dtype)
        rows, packed = check_matrix(tensors, "weight_packed", torch.int32)
        check_tensor(tensors, "weight_shape", (torch.int64, torch.int32), (2,))
        n, k = tensors["weight_shape"].tolist()
        if n != rows or k < 1 or words.words_of(k, self.bits) != packed:
            raise ValueError(
                f"weight_shape is {[n, k]}, but weight_packed is {[rows, packed]}, which is another number of weights "
                f"of {self.bits} bits"
            )
        return n, k

    def _groups(self, k: int) -> int:
        return ceil_div(k, self.group) if self.group > 0 else 1

    def _scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        return (1,) if self.group == 0 else (ceil_div(n, self.rows), self._groups(k))

    def _check_scales(self, scales: Tensor, n: int, k: int) -> None:
        wanted = self._scale_shape(n, k)
        fits = tuple(scales.shape) == wanted or (self.group <= 0 and scales.numel() == wanted[0])
        if not fits or scales.dtype not in SCALES:
            raise ValueError(
                f"weight_scale is {scales.dtype} {list(scales.shape)}; for {n} x {k} it must be {list(wanted)} of 16 "
                "or 32 bits"
            )

    def _zero_point(self, n: int, k: int) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape of weight_zero_point as the newest version has it."""
        if self.storage != PACKED:
            return torch.int8, self._scale_shape(n, k)
        rows = 1 if self.group == 0 else n
        return torch.int32, (words.words_of(rows, self.bits), self._groups(k))

    def _zeros(self, stored: Tensor, n: int, k: int) -> Tensor:
        """uint8 [n or 1, g]: zero points as we have them, from words along the rows or from int8."""
        rows, groups = (1 if self.group == 0 else n), self._groups(k)
        dtype, shape = self._zero_point(n, k)
        if stored.dtype == torch.int8 and stored.numel() == rows * groups:
            return self._unsigned("weight_zero_point", stored.reshape(rows, groups))
        if (stored.dtype, tuple(stored.shape)) != (dtype, shape):
            raise ValueError(
                f"weight_zero_point is {stored.dtype} {list(stored.shape)}; it must be {dtype} {list(shape)}"
            )
        return words.unpack(stored.t(), self.bits, rows).t().contiguous()

    def _codes(self, tensors: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """The plane of codes, in the order in which the columns are stored."""
        if self.storage == PACKED:
            return words.to_plane(tensors["weight_packed"], self.bits, k)
        if self.type == "float":
            return tensors["weight"].view(torch.uint8)
        return words.to_plane(
            words.pack(self._unsigned("weight", tensors["weight"]), self.bits), self.bits, k
        )

    def _unsigned(self, name: str, numbers: Tensor) -> Tensor:
        """int8 as codes. Raises ValueError where they are beyond the bits."""
        half, least, most = 1 << self.bits - 1, int(numbers.min()), int(numbers.max())
        if least < -half or most >= half:
            raise ValueError(
                f"{name} goes from {least} to {most}; with {self.bits} bits it must be from {-half} to {half - 1}"
            )
        return (numbers.to(torch.int16) + (1 << self.bits - 1)).to(torch.uint8)

    def _signed(self, codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) - (1 << self.bits - 1)).to(torch.int8)

    def _check_fits(self, entry: ModuleEntry) -> Format:
        format = parse(entry.format)
        grid = format.family if self.type == "float" else format.grid
        if entry.kind != "linear" or entry.layout != "rows" or grid not in ("integer", FP8):
            raise Unfit(
                f"it is {format}, an {entry.kind}; linear layers of integers or {FP8} have a place there"
            )
        if (format.bits, format.group, format.group_rows) != (self.bits, self.group, self.rows):
            raise Unfit(f"it is {format}, not {self.bits} bits with the group {self.group}")
        if self.symmetric and format.asymmetric:
            raise Unfit(f"it is {format}, which has zero points, and the configuration says symmetric")
        if entry.g_idx and not self.by_group:
            raise Unfit(
                "its groups are not neighbouring columns (act-order without static groups), and compressed-tensors has "
                "had no g_idx since version 0.20"
            )
        return format


@dataclass(frozen=True)
class CompressedConfig:
    """The quantization_config of a compressed-tensors checkpoint.

    groups: (targets, scheme); a target is "Linear", a module's name, or "re:" and a pattern. ignore: names and patterns
    of modules that aren't quantized.
    """

    groups: tuple[tuple[tuple[str, ...], CompressedScheme], ...]
    ignore: tuple[str, ...] = ()

    def scheme(self, module: str) -> CompressedScheme | None:
        if any(_matches(target, module) for target in self.ignore):
            return None
        for targets, scheme in self.groups:
            if any(target == "Linear" or _matches(target, module) for target in targets):
                return scheme
        return None

    def to_json(self) -> dict[str, Any]:
        groups = {f"group_{i}": _group_json(*group) for i, group in enumerate(self.groups)}
        storage = {scheme.storage for _, scheme in self.groups}
        return {
            "quant_method": "compressed-tensors",
            "format": storage.pop() if len(storage) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
        }


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def _group_json(targets: tuple[str, ...], scheme: CompressedScheme) -> dict[str, Any]:
    strategy = {-1: "channel", 0: "tensor"}.get(scheme.group, "group" if scheme.rows == 1 else "block")
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.type,
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group if strategy == "group" else None,
        "dynamic": False,
    }
    if strategy == "block":
        weights["block_structure"] = [scheme.rows, scheme.group]
    if scheme.by_group:
        weights["actorder"] = "group"
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": _inputs_json(scheme.activations),
        "output_activations": None,
        "format": scheme.storage,
    }


def read_config(section: Mapping[str, Any], origin: Path) -> CompressedConfig:
    """The checked quantization_config of a compressed-tensors checkpoint; origin: the file that it is in.

    Raises CheckpointError for a way to store weights that bitfold doesn't read: sparsity, transforms that are computed
    with the activations, blocks of another number of rows than a power of 2, 4-bit floats.
    """
    fields = Fields(section, origin)
    for key in ("sparsity_config", "transform_config"):
        value = section.get(key) or {}
        if not isinstance(value, dict) or (value and value.get("format") != "dense"):
            fields.refuse(key, "empty: bitfold reads neither sparse nor transformed weights")
    if section.get("kv_cache_scheme"):
        fields.refuse("kv_cache_scheme", "null: bitfold keeps the KV cache as floats")
    if section.get("quantization_status", "compressed") != "compressed":
        fields.refuse("quantization_status", "compressed")
    read = []
    for name, inner in fields.objects("config_groups").items():
        group = section["config_groups"][name]
        targets = tuple(map(str, inner.take("targets", list)))
        storage = (inner if group.get("format") else fields).take("format", str, None, STORAGE)
        scheme = _scheme(inner.section("weights"), group["weights"], storage)
        inputs = group.get("input_activations")
        activations = _activations(inputs)
        left_out = _left_out(inputs if activations.is_float else None, group.get("output_activations"))
        read.append((targets, replace(scheme, activations=activations, left_out=left_out)))
    if not read:
        raise CheckpointError(f"{origin}: quantization_config.config_groups is empty")
    return CompressedConfig(tuple(read), tuple(map(str, fields.take("ignore", list, []))))


def _scheme(fields: Fields, weights: Mapping[str, Any], storage: str) -> CompressedScheme:
    kind = fields.take("type", str, "int", ("int", "float"))
    bits = fields.take("num_bits", int, 8, (8,) if kind == "float" else words.BITS)
    group = fields.optional("group_size", int)
    implied = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = fields.take("strategy", str, implied, STRATEGIES)
    size, rows = {"tensor": 0, "channel": -1}.get(strategy), 1
    if strategy == "block":
        rows, size = _block(fields)
    elif size is None:
        size = fields.check_group(fields.take("group_size", int))
    symmetric = fields.take("symmetric", bool, True)
    if (kind == "float") != (storage == FLOATS) and storage != NAIVE:
        fields.refuse("type", f"another: {storage} is not for {kind}s")
    if strategy == "block" and kind != "float":
        fields.refuse("strategy", f"another: bitfold has blocks of rows for floats alone, and this is {kind}")
    if kind == "float" and not symmetric:
        fields.refuse("symmetric", "true: floats have no zero points")
    # Spellings of "by the groups of the activations' order"; "weight" and "static" leave the columns in place.
    actorder = weights.get("actorder")
    if actorder not in (None, False, True, "group", "dynamic", "weight", "static"):
        fields.refuse("actorder", "group, weight or null")
    by_group = actorder in (True, "group", "dynamic")
    if by_group and (strategy != "group" or storage != PACKED):
        fields.refuse("actorder", f"null: {storage} with the strategy {strategy} has no order of columns")
    return CompressedScheme(storage, kind, bits, size, symmetric, by_group, rows)


def _block(fields: Fields) -> tuple[int, int]:
    """Rows and columns of a block."""
    structure = fields.take("block_structure", list)
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in structure)
    if len(structure) != 2 or not whole or structure[1] < 16 or structure[0] not in _BLOCK_ROWS:
        fields.refuse("block_structure", "a power of 2 of rows and at least 16 columns, as [128, 128] is")
    return structure[0], structure[1]


def _activations(inputs: Any) -> Activations:
    """What bitfold does of what is wanted of the inputs: rounding to e4m3 by rows, or with one static scale."""
    if not isinstance(inputs, dict):
        return FLOAT
    known = (inputs.get("type"), inputs.get("num_bits"), inputs.get("symmetric", True)) == ("float", 8, True)
    dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy")
    if known and dynamic is True and strategy == "token":
        return Activations("fp8")
    if known and dynamic is False and strategy == "tensor":
        return Activations("fp8-static")
    return FLOAT


def _left_out(inputs: Any, outputs: Any) -> str:
    """`Scheme.left_out` of rounding that bitfold doesn't do, in the configuration's own words."""
    kinds = (("inputs", inputs), ("outputs", outputs))
    return " and ".join(f"rounds their {kind}{_words(wanted)}" for kind, wanted in kinds if wanted)


def _words(wanted: Any) -> str:
    keys = ("type", "num_bits", "symmetric", "strategy", "group_size", "dynamic")
    told = (
        [(key, wanted[key]) for key in keys if wanted.get(key) is not None]
        if isinstance(wanted, dict)
        else []
    )
    return f" ({', '.join(f'{key} {json.dumps(value)}' for key, value in told)})" if told else ""


def _inputs_json(activations: Activations) -> dict[str, Any] | None:
    """`_activations` undone."""
    if activations.is_float:
        return None
    static = activations.is_static
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor" if static else "token",
        "dynamic": not static,
    }
