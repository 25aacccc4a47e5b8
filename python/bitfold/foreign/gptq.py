"""GPTQ's checkpoints (AutoGPTQ, GPTQModel), versions 1 and 2, of 2, 3, 4 and 8 bits (docs/foreign.md).

Words run along the input features: `qweight` [k * b / 32, n] has the transposed words of the plane `codes`. Zero
points are packed along the output features, `qzeros` [g, n * b / 32]. Version 1 stores each zero point less 1. With 2,
4 and 8 bits a whole word of ones is subtracted: where a zero point is 0 the borrow runs into its neighbours, and
adding the same word takes it back. With 3 bits, whose fields straddle words, each zero point wraps around by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfold import _C
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
from bitfold.qtensor import QTensor, pack
from bitfold.section import ModuleEntry
from bitfold.shards import CheckpointError, TensorSpec

SIGNATURE = ("qweight",)
PARTS = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = {"gptq": 1, "gptq_v2": 2}
"""checkpoint_format of the configuration -> version."""

_ONES = {bits: sum(1 << i for i in range(0, words.WORD, bits)) for bits in (2, 4, 8)}
"""A 1 in every field of a word: what version 1 subtracts from the whole word."""


@dataclass(frozen=True)
class GptqScheme(Scheme):
    """bits: 2, 3, 4 or 8; group: input features that share a scale, -1 for all; symmetric: whether the configuration
    says that every zero point is 2^(bits - 1); version: 1 or 2.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    version: int = 1

    def specs(self, entry: ModuleEntry, plane: ReadPlane | None = None) -> dict[str, TensorSpec]:
        self._check_fits(entry)
        n, k = entry.shape
        groups = 1 if self.group == -1 else ceil_div(k, self.group)
        return {
            "qweight": TensorSpec("qweight", torch.int32, (words.words_of(k, self.bits), n)),
            "qzeros": TensorSpec("qzeros", torch.int32, (groups, words.words_of(n, self.bits))),
            "scales": TensorSpec("scales", scale_dtype(entry.format), (groups, n)),
            "g_idx": TensorSpec("g_idx", torch.int32, (k,)),
        }

    def entry(self, tensors: Mapping[str, Tensor]) -> ModuleEntry:
        check_names(tensors, PARTS[:3], PARTS[3:])
        rows, n = check_matrix(tensors, "qweight", torch.int32)
        k = rows * words.WORD // self.bits
        if k * self.bits != rows * words.WORD or n * self.bits % words.WORD:
            raise ValueError(
                f"qweight is {[rows, n]}, which are no whole words of {self.bits} bits along both axes"
            )
        groups = 1 if self.group == -1 else ceil_div(k, self.group)
        check_tensor(tensors, "scales", (torch.float16, torch.bfloat16, torch.float32), (groups, n))
        check_tensor(tensors, "qzeros", (torch.int32,), (groups, n * self.bits // words.WORD))
        format = integer(self.bits, self.group, not self.symmetric, tensors["scales"].dtype)
        matters = False
        if "g_idx" in tensors:
            check_tensor(tensors, "g_idx", (torch.int32,), (k,))
            matters = not torch.equal(tensors["g_idx"], self._neighbours(k))
        if matters and self.group == -1:
            raise ValueError("g_idx has more than one group, but group_size is -1: one for the whole row")
        return ModuleEntry("linear", format, (n, k), g_idx=matters)

    def unpack(self, tensors: Mapping[str, Tensor]) -> QTensor:
        entry = self.entry(tensors)
        n, k = entry.shape
        planes = {
            "codes": words.to_plane(tensors["qweight"].t(), self.bits, k),
            "scales": tensors["scales"].t().contiguous(),
        }
        zeros = self._zeros(tensors["qzeros"], n)
        if self.symmetric:
            wrong = (zeros != 1 << self.bits - 1).nonzero()
            if len(wrong):
                group, row = wrong[0].tolist()
                raise ValueError(
                    f"the zero point of group {group} of output {row} is {int(zeros[group, row])}; with sym it must be "
                    f"{1 << self.bits - 1} (version {self.version} of the format)"
                )
        else:
            planes["zeros"] = words.to_plane(words.pack(zeros.t(), self.bits), self.bits, zeros.shape[0])
        if not entry.g_idx:
            return QTensor(entry.format, entry.matrix, planes)
        # The planes want the columns of a group together.
        codes = words.unpack(tensors["qweight"].t(), self.bits, k)
        asym = None if self.symmetric else zeros.t().contiguous()
        return pack(codes, planes["scales"], asym, format=entry.format, g_idx=tensors["g_idx"])

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        format = self._check_fits(
            ModuleEntry(
                "linear", qtensor.format, qtensor.shape, qtensor.layout, g_idx=qtensor.g_idx is not None
            )
        )
        k = qtensor.shape[1]
        if qtensor.g_idx is None:
            codes, g_idx = words.from_plane(qtensor.planes["codes"]), self._neighbours(k)
        else:
            codes, g_idx = words.pack(qtensor.unpack().codes, self.bits), qtensor.g_idx
        scales = qtensor.planes["scales"]
        if format.asymmetric:
            zeros = words.unpack(words.from_plane(qtensor.planes["zeros"]), self.bits, scales.shape[1])
        else:
            zeros = torch.full(tuple(scales.shape), 1 << self.bits - 1, dtype=torch.uint8)
        return {
            "qweight": codes.t().contiguous(),
            "qzeros": self._packed_zeros(zeros.t()),
            "scales": scales.t().contiguous(),
            "g_idx": g_idx,
        }

    def _zeros(self, qzeros: Tensor, n: int) -> Tensor:
        """uint8 [g, n]. int32 sums wrap around, as the writer's differences did; 3 bits wrap each by itself."""
        if self.version == 2:
            return words.unpack(qzeros, self.bits, n)
        if self.bits == 3:
            return words.unpack(qzeros, 3, n) + 1 & 7
        return words.unpack(qzeros + self._ones(), self.bits, n)

    def _packed_zeros(self, zeros: Tensor) -> Tensor:
        """The inverse of `_zeros`."""
        if self.version == 2:
            return words.pack(zeros, self.bits)
        if self.bits == 3:
            return words.pack(zeros - 1 & 7, 3)
        return words.pack(zeros, self.bits) - self._ones()

    def _ones(self) -> Tensor:
        return torch.tensor(_ONES[self.bits], dtype=torch.int64).to(torch.int32)

    def _neighbours(self, k: int) -> Tensor:
        """The g_idx that says nothing: groups of neighbouring columns."""
        return torch.arange(k, dtype=torch.int32) // (k if self.group == -1 else self.group)

    def _check_fits(self, entry: ModuleEntry) -> Format:
        format = integer_format(entry)
        n, k = entry.shape
        if (format.bits, format.group) != (self.bits, self.group):
            raise Unfit(f"it is {format}, not {self.bits} bits with the group size {self.group}")
        if self.symmetric and format.asymmetric:
            raise Unfit(f"it is {format}, which has zero points, and the configuration says sym")
        per = words.WORD if self.bits == 3 else words.WORD // self.bits
        if n % per or k % per:
            raise Unfit(f"it is {n} x {k}; GPTQ packs {per} numbers of {self.bits} bits along both axes")
        return format


@dataclass(frozen=True)
class GptqConfig:
    """The quantization_config of a GPTQ checkpoint.

    default: of every quantized module; rules: (sign, pattern, scheme) of GPTQModel's `dynamic`, the first whose pattern
    matches a module's name decides; "-" leaves it alone. desc_act: whether columns were quantized in the order of
    their activations; lm_head: whether the output head is quantized.
    """

    default: GptqScheme
    desc_act: bool = False
    lm_head: bool = False
    rules: tuple[tuple[str, str, GptqScheme], ...] = ()
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scheme(self, module: str) -> GptqScheme | None:
        for sign, pattern, scheme in self.rules:
            if re.match(pattern, module):
                return None if sign == "-" else scheme
        return self.default

    def to_json(self) -> dict[str, Any]:
        name = next(name for name, version in FORMATS.items() if version == self.default.version)
        fields: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.default.bits,
            "group_size": self.default.group,
            "desc_act": self.desc_act,
            "sym": self.default.symmetric,
            "lm_head": self.lm_head,
            "checkpoint_format": name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"bitfold:{_C.__version__}"]},
        }
        if self.dynamic:
            fields["dynamic"] = dict(self.dynamic)
        return fields


def read_config(section: Mapping[str, Any], origin: Path) -> GptqConfig:
    """The checked quantization_config of a GPTQ checkpoint; origin: the file that it is in.

    Raises CheckpointError for a value that the format doesn't have, and for other ways to pack than the int32 words of
    versions 1 and 2.
    """
    fields = Fields(section, origin)
    fields.take("pack_dtype", str, "int32", ("int32",))
    named = section.get("checkpoint_format") or section.get("format") or "gptq"
    if named not in tuple(FORMATS) or section.get("is_marlin_format"):
        raise CheckpointError(
            f"{origin}: quantization_config.checkpoint_format is {named!r}; bitfold reads {' and '.join(FORMATS)}"
        )
    default = _scheme(fields, GptqScheme(version=FORMATS[named]), required=True)
    dynamic = section.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(isinstance(rule, dict) for rule in dynamic.values()):
        fields.refuse("dynamic", "patterns of module names, each with its settings")
    rules = []
    for pattern, settings in dynamic.items():
        sign = pattern[0] if pattern[:2] in ("+:", "-:") else "+"
        text = pattern.removeprefix(f"{sign}:")
        try:
            re.compile(text)
        except re.error as error:
            fields.refuse("dynamic", f"patterns of module names ({text!r}: {error})")
        rules.append((sign, text, _scheme(Fields(settings, origin, f"dynamic[{pattern!r}]"), default)))
    return GptqConfig(
        default,
        fields.take("desc_act", bool, False),
        fields.take("lm_head", bool, False),
        tuple(rules),
        dynamic,
    )


def _scheme(fields: Fields, default: GptqScheme, required: bool = False) -> GptqScheme:
    bits = fields.take("bits", int, None if required else default.bits, words.BITS)
    group = fields.check_group(fields.take("group_size", int, None if required else default.group))
    return replace(default, bits=bits, group=group, symmetric=fields.take("sym", bool, default.symmetric))
