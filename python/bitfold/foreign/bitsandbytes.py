"""bitsandbytes' checkpoints: nf4 and fp4, nested too, and int8 (docs/foreign.md).

Four bits: the bytes of `weight` are those of the plane `codes`, and blocks run over the flattened matrix; where whole
blocks fill a row that is the layout `rows`, else `flat`. Eight bits: w = q * SCB / 127; our scale is SCB / 127 rounded
to float32, the one thing in this room that rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold.activations import THRESHOLD, Activations, llm_int8
from bitfold.fields import Fields
from bitfold.foreign.scheme import (
    ReadPlane,
    Scheme,
    Unfit,
    check_matrix,
    check_names,
    check_tensor,
)
from bitfold.formats import Format, ceil_div, parse, plane_shapes
from bitfold.grids import code_values
from bitfold.qtensor import QTensor
from bitfold.section import ModuleEntry
from bitfold.shards import TensorSpec

KINDS = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
SIGNATURE = (*(STATE + kind for kind in KINDS), "SCB")
PARTS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *SIGNATURE,
    "weight_format",
)
NESTED = 256  # blocks whose scales are nested together
BLOCKS = tuple(1 << i for i in range(5, 13))
INT8 = "int8-channel-sfp32"
LLM_INT8 = llm_int8()  # with the threshold that the library has by default
_NO_PRODUCT = "w = q * SCB / 127 is not q * scale to the bit"


@dataclass(frozen=True)
class FourBitScheme(Scheme):
    """kind: "nf4" or "fp4". What else there is to know is said beside each weight; dtype: that of the weights before
    they were quantized, which is written there.
    """

    kind: str = "nf4"
    dtype: torch.dtype = torch.bfloat16

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        format = self._check_fits(entry)
        n, k = entry.shape
        blocks = ceil_div(n * k, format.group)
        nested = format.scale == "nested"
        offset = plane("nested_offset") if nested and plane is not None else None
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight": (torch.uint8, (ceil_div(n * k, 2), 1)),
            "weight.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
            STATE + self.kind: (torch.uint8, (len(self._state(format, n, k, offset)),)),
        }
        if nested:
            shapes["weight.nested_absmax"] = torch.float32, (ceil_div(blocks, NESTED),)
            shapes["weight.nested_quant_map"] = torch.float32, (256,)
        return {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()}

    def entry(self, tensors: Mapping[str, Tensor]) -> ModuleEntry:
        return self._read(tensors)[0]

    def unpack(self, tensors: Mapping[str, Tensor]) -> QTensor:
        entry, offset = self._read(tensors)
        shapes = plane_shapes(entry.format, *entry.matrix, entry.layout)
        stored = {
            "codes": tensors["weight"].contiguous().view(torch.uint8),
            "scales": tensors["weight.absmax"],
        }
        if offset is not None:
            stored["nested_scales"] = tensors["weight.nested_absmax"]
            stored["nested_offset"] = torch.tensor([offset], dtype=torch.float32)
        planes = {name: plane.reshape(shapes[name]) for name, plane in stored.items()}
        return QTensor(entry.format, entry.matrix, planes, entry.layout)

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        entry = ModuleEntry(
            "linear", qtensor.format, qtensor.shape, qtensor.layout, g_idx=qtensor.g_idx is not None
        )
        format = self._check_fits(entry)
        planes = qtensor.planes
        state = self._state(format, *qtensor.shape, planes.get("nested_offset"))
        tensors = {
            "weight": planes["codes"].reshape(-1, 1),
            "weight.absmax": planes["scales"].reshape(-1),
            "weight.quant_map": quant_map(self.kind),
            STATE + self.kind: torch.tensor(list(state), dtype=torch.uint8),
        }
        if format.scale == "nested":
            tensors["weight.nested_absmax"] = planes["nested_scales"]
            tensors["weight.nested_quant_map"] = nested_map()
        return tensors

    def _state(self, format: Format, n: int, k: int, offset: Tensor | None) -> bytes:
        """The text that lies beside a weight: JSON, as json.dumps writes it."""
        fields: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": format.group,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [n, k],
        }
        if format.scale == "nested":
            fields |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
            fields["nested_offset"] = 0.0 if offset is None else offset.item()
        return json.dumps(fields).encode()

    def _read(self, tensors: Mapping[str, Tensor]) -> tuple[ModuleEntry, float | None]:
        """What a weight is, and the offset of its nested scales."""
        state = _read_state(tensors, STATE + self.kind)
        nested = state.get("nested_offset") is not None
        more = ("weight.nested_absmax", "weight.nested_quant_map") if nested else ()
        check_names(tensors, ("weight", "weight.absmax", "weight.quant_map", STATE + self.kind, *more))
        n, k = state["shape"]
        block, blocks = state["blocksize"], ceil_div(n * k, state["blocksize"])
        if state.get("quant_type") != self.kind:
            raise ValueError(
                f"its quant_state says quant_type {state.get('quant_type')!r}, its name {self.kind}"
            )
        weight = tensors["weight"]
        if weight.numel() * weight.dtype.itemsize != ceil_div(n * k, 2):
            raise ValueError(
                f"weight has {weight.numel() * weight.dtype.itemsize} bytes; {n} x {k} weights of 4 bits are "
                f"{ceil_div(n * k, 2)}"
            )
        check_tensor(tensors, "weight.absmax", (torch.uint8 if nested else torch.float32,), (blocks,))
        _check_map(tensors, "weight.quant_map", quant_map(self.kind))
        if nested:
            check_tensor(tensors, "weight.nested_absmax", (torch.float32,), (ceil_div(blocks, NESTED),))
            _check_map(tensors, "weight.nested_quant_map", nested_map())
            if state.get("nested_blocksize") != NESTED or state.get("nested_dtype") != "float32":
                raise ValueError(f"its nested scales are not float32 for {NESTED} blocks each")
        format = parse(f"{self.kind}-b{block}{'-dq' if nested else ''}").canonical
        layout = "rows" if k % block == 0 else "flat"
        return ModuleEntry("linear", format, (n, k), layout), float(
            state["nested_offset"]
        ) if nested else None

    def _check_fits(self, entry: ModuleEntry) -> Format:
        format = parse(entry.format)
        k = entry.shape[1]
        if format.family != self.kind or format.scale not in ("fp32", "nested"):
            raise Unfit(f"it is {format}; bitsandbytes has {self.kind} with float32 or nested scales")
        if entry.kind != "linear" or entry.g_idx:
            raise Unfit(
                f"it is {format}, an {entry.kind}{' with g_idx' if entry.g_idx else ''}; linear layers alone fit"
            )
        if format.group not in BLOCKS:
            raise Unfit(f"it is {format}; bitsandbytes' blocks have {', '.join(map(str, BLOCKS))} weights")
        if entry.layout == "rows" and k % format.group:
            raise Unfit(
                f"its rows of {k} weights end in shorter blocks, and bitsandbytes' blocks run on into the next row"
            )
        return format


def quant_map(kind: str) -> Tensor:
    """float32 [16]: the value of each code."""
    values = code_values(f"{kind}-b64")
    assert values is not None
    return values


def nested_map() -> Tensor:
    """float32 [256]: the dynamic map (docs/formats.md, "dq"), read off matrices with one block each, whose scales are
    the entries.
    """
    one = int((quant_map("nf4") == 1).nonzero()[0])
    planes = {
        "codes": torch.full((256, 16), one << 4 | one, dtype=torch.uint8),
        "scales": torch.arange(256, dtype=torch.uint8)[:, None],
        "nested_scales": torch.ones(1),
        "nested_offset": torch.zeros(1),
    }
    return QTensor("nf4-b32-dq", (256, 32), planes).decode()[:, 0].contiguous()


def _read_state(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The checked JSON beside a weight of 4 bits."""
    if name not in tensors:
        raise ValueError(f"it lacks {name}")
    try:
        state = json.loads(bytes(tensors[name].tolist()))
        shape, block = state["shape"], state["blocksize"]
        sound = (
            len(shape) == 2
            and all(isinstance(size, int) and size > 0 for size in shape)
            and block in BLOCKS
            and math.isfinite(state.get("nested_offset") or 0.0)
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{name} is not the JSON of a matrix: {error}") from None
    if not sound:
        raise ValueError(f"{name} says shape {shape} and blocksize {block}, which no weight of 4 bits has")
    return state


def _check_map(tensors: Mapping[str, Tensor], name: str, wanted: Tensor) -> None:
    check_tensor(tensors, name, (torch.float32,), tuple(wanted.shape))
    wrong = (tensors[name] != wanted).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"{name} has {float(tensors[name][i])} for code {i}; it must be {float(wanted[i])}")


@dataclass(frozen=True)
class EightBitScheme(Scheme):
    """int8 by rows, w = q * SCB / 127. activations: LLM.int8() with the configuration's threshold, of 0 plain int8."""

    activations: Activations = LLM_INT8

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        self._check_fits(entry)
        n, k = entry.shape
        return {
            "weight": TensorSpec("weight", torch.int8, (n, k)),
            "SCB": TensorSpec("SCB", torch.float32, (n,)),
            "weight_format": TensorSpec("weight_format", torch.uint8, ()),
        }

    def entry(self, tensors: Mapping[str, Tensor]) -> ModuleEntry:
        check_names(tensors, ("weight", "SCB"), ("weight_format",))
        n, k = check_matrix(tensors, "weight", torch.int8)
        check_tensor(tensors, "SCB", (torch.float32,), (n,))
        if "weight_format" in tensors and tensors["weight_format"].any():
            raise ValueError(
                f"weight_format is {tensors['weight_format'].tolist()}; it must be 0: rows, not a GPU's tiles"
            )
        return ModuleEntry("linear", INT8, (n, k), activations=self.activations)

    def unpack(self, tensors: Mapping[str, Tensor]) -> QTensor:
        entry = self.entry(tensors)
        planes = {
            "codes": tensors["weight"].view(torch.uint8) ^ 0x80,  # q + 128
            "scales": (tensors["SCB"] / 127)[:, None],
        }
        return QTensor(entry.format, entry.matrix, planes)

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """SCB is the scale times 127, rounded, which `unpack` brings back but where SCB is near a power of two."""
        self._check_fits(ModuleEntry("linear", qtensor.format, qtensor.shape, qtensor.layout))
        return {
            "weight": (qtensor.planes["codes"] ^ 0x80).view(torch.int8),
            "SCB": (qtensor.planes["scales"] * 127)[:, 0].contiguous(),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """float64: in float32 the owner rounds q * SCB / 127 in one way on a CPU and in others on GPUs."""
        self.entry(tensors)
        # q * SCB is exact, and one rounding, to 53 bits, follows.
        return tensors["weight"].to(torch.float64) * tensors["SCB"].to(torch.float64)[:, None] / 127

    def pack_rounds(self, qtensor: QTensor) -> str:
        same = torch.equal(self.decode(self.pack(qtensor)), qtensor.decode().to(torch.float64))
        return "" if same else f"{_NO_PRODUCT}: SCB, scale * 127, is rounded to float32"

    def unpack_rounds(self, tensors: Mapping[str, Tensor]) -> str:
        same = torch.equal(self.decode(tensors), self.unpack(tensors).decode().to(torch.float64))
        return "" if same else f"{_NO_PRODUCT}: the scale, SCB / 127, is rounded to float32"

    def _check_fits(self, entry: ModuleEntry) -> None:
        if parse(entry.format).canonical != INT8 or entry.kind != "linear" or entry.g_idx:
            raise Unfit(f"it is {entry.format}; bitsandbytes' int8 is {INT8}")


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """The quantization_config of a bitsandbytes checkpoint. kept: names of modules that aren't quantized
    (llm_int8_skip_modules), None for the library's choice: the output head; nested: whether scales are (it is said
    beside each weight, too).
    """

    default: FourBitScheme | EightBitScheme
    kept: tuple[str, ...] | None = None
    nested: bool = False

    def scheme(self, module: str) -> FourBitScheme | EightBitScheme | None:
        kept = ("lm_head",) if self.kept is None else self.kept
        return None if any(part in module for part in kept) else self.default

    def to_json(self) -> dict[str, Any]:
        four = self.default if isinstance(self.default, FourBitScheme) else None
        eight = self.default if isinstance(self.default, EightBitScheme) else None
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four is not None,
            "_load_in_8bit": four is None,
            "load_in_4bit": four is not None,
            "load_in_8bit": four is None,
            "bnb_4bit_compute_dtype": "float32" if four is None else str(four.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4" if four is None else four.kind,
            "bnb_4bit_use_double_quant": self.nested,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": None if self.kept is None else list(self.kept),
            "llm_int8_threshold": THRESHOLD if eight is None else eight.activations.threshold,
        }


def read_config(section: Mapping[str, Any], origin: Path) -> BitsAndBytesConfig:
    """The checked quantization_config of a bitsandbytes checkpoint; origin: the file that it is in.

    Raises CheckpointError where it says both 4 and 8 bits or neither, another kind of 4 bits, or a threshold that is
    none.
    """
    fields = Fields(section, origin)
    four, eight = fields.take("load_in_4bit", bool, False), fields.take("load_in_8bit", bool, False)
    if four == eight:
        fields.refuse("load_in_4bit", f"{not eight}, as load_in_8bit is {eight}")
    kept = fields.optional("llm_int8_skip_modules", list)
    names = None if kept is None else tuple(map(str, kept))
    if eight:
        threshold = fields.size("llm_int8_threshold", THRESHOLD)
        return BitsAndBytesConfig(EightBitScheme(llm_int8(threshold)), names)
    kind = fields.take("bnb_4bit_quant_type", str, "fp4", KINDS)
    return BitsAndBytesConfig(
        FourBitScheme(kind), names, fields.take("bnb_4bit_use_double_quant", bool, False)
    )
