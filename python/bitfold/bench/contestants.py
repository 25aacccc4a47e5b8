"""Who takes part in a case: bitfold's formats and torch. The peers are in peers.py.

All of them are plain data: how to make one more copy of a matrix in memory, what to call on it, and which
float64 matrix it means, which is what validation needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bitfold
from bitfold.formats import parse
from bitfold.nn import QuantLinear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Multiplier:
    """One that computes x @ W^T on a matrix W [n, k] of its own.

    kind: "bitfold", "torch" or "peer"; nbytes: of one matrix as the product reads it; dtypes: of the
    activations it takes part with; weights: the float64 [n, k] that its matrix means; copy: puts one more
    matrix into memory and returns x [m, k] -> y [m, n]; tolerance: of the relative error, by dtype.
    """

    name: str
    kind: str
    nbytes: int
    dtypes: tuple[str, ...]
    weights: Callable[[], Tensor]
    copy: Callable[[], Callable[[Tensor], Tensor]]
    tolerance: dict[str, float]


@dataclass(frozen=True)
class Coder:
    """One that encodes and decodes matrices.

    bits: of a code; encode: [n, k] -> its packed form; decode: that and a dtype -> [n, k]; clone: one more
    packed matrix in memory; nbytes: of a packed matrix.
    """

    name: str
    kind: str
    bits: int
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any, torch.dtype], Tensor]
    clone: Callable[[Any], Any]
    nbytes: Callable[[Any], int]


# Relative norm errors: docs/architecture.md has bitfold's own promises, torch's and the peers' are as seen
# (aten's int4 1.7e-3, bitsandbytes 3.0e-3 through its bf16 scales), with room.
BITFOLD_TOLERANCE = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 5e-6}
TORCH_TOLERANCE = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 5e-6}


def bitfold_multiplier(weight: Tensor, format: str) -> Multiplier:
    """bitfold's linear as a model runs it: a QuantLinear that is prepared."""
    qtensor = bitfold.encode(weight, format)

    def copy() -> Callable[[Tensor], Tensor]:
        module = QuantLinear(clone(qtensor)).eval()
        module.prepare()
        return module

    return Multiplier(
        format,
        "bitfold",
        qtensor.nbytes,
        tuple(DTYPES),
        lambda: qtensor.decode(torch.float64),
        copy,
        BITFOLD_TOLERANCE,
    )


def torch_multiplier(weight: Tensor, dtype: str) -> Multiplier:
    """torch's F.linear on a matrix of the dtype of the activations."""
    matrix = weight.to(DTYPES[dtype])

    def copy() -> Callable[[Tensor], Tensor]:
        own = matrix.clone()
        return lambda x: F.linear(x, own)

    return Multiplier(
        f"torch {dtype}",
        "torch",
        matrix.nbytes,
        (dtype,),
        lambda: matrix.double(),
        copy,
        TORCH_TOLERANCE,
    )


def bitfold_coder(format: str) -> Coder:
    """bitfold's encode and decode of one format."""
    return Coder(
        format,
        "bitfold",
        parse(format).bits,
        lambda weight: bitfold.encode(weight, format),
        lambda qtensor, dtype: qtensor.decode(dtype),
        clone,
        lambda qtensor: qtensor.nbytes,
    )


def clone(qtensor: bitfold.QTensor) -> bitfold.QTensor:
    """The same matrix in memory of its own."""
    planes = {name: plane.clone() for name, plane in qtensor.planes.items()}
    return bitfold.QTensor(qtensor.format, qtensor.shape, planes, qtensor.layout)
