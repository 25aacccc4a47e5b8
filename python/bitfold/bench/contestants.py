"""Who takes part in a case: bitfold's formats and torch. The peers are in peers.py and llama.py.

All of them are plain data: how to make one more copy of a matrix in memory, what to call on it, and which
float64 matrix it means, which is what validation needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bitfold
from bitfold.formats import parse
from bitfold.nn import QuantLinear
from bitfold.qtensor import LinearPlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Multiplier:
    """One that computes x @ W^T on a matrix W [n, k] of its own.

    kind: "bitfold", "torch" or "peer"; nbytes: of one matrix as the product reads it; dtypes: of the
    cases it takes part in; weights: the float64 [n, k] that its matrix means; copy: puts one more
    matrix into memory and returns x [m, k] -> y [m, n]; tolerance: of the relative error, by dtype; takes: the
    dtype of its x and y, where that isn't the case's; format: the format that it shares with others, to be compared;
    plan: what bitfold runs for m rows of a dtype.
    """

    name: str
    kind: str
    nbytes: int
    dtypes: tuple[str, ...]
    weights: Callable[[], Tensor]
    copy: Callable[[], Callable[[Tensor], Tensor]]
    tolerance: dict[str, float]
    takes: str | None = None
    format: str | None = None
    plan: Callable[[int, torch.dtype], LinearPlan] | None = None

    def activations(self, x: Tensor) -> Tensor:
        """x of a case as this one takes it."""
        return x if self.takes is None else x.to(DTYPES[self.takes])


@dataclass(frozen=True)
class Coder:
    """One that encodes and decodes matrices.

    bits: of a code; encode: [n, k] -> its packed form; decode: that and a dtype -> [n, k]; clone: one more
    packed matrix in memory; nbytes: of a packed matrix; blocks: the bytes of a packed matrix, where `format` is
    one of those whose bytes (and decoded bits) every contestant of that format must agree about; dtypes: that it
    decodes to.
    """

    name: str
    kind: str
    bits: int
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any, torch.dtype], Tensor]
    clone: Callable[[Any], Any]
    nbytes: Callable[[Any], int]
    format: str | None = None
    blocks: Callable[[Any], Tensor] | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)


@dataclass(frozen=True)
class Peer:
    """A kernel of another library.

    library: what it is asked for and absent as; needs: the shapes it takes, [n, k] -> why not, or None;
    linear: a float32 weight [n, k] -> its Multiplier; coder: its Coder, important: the one that is given the
    importance of columns. None where it has no such thing. beside: the format whose runs alone it takes part in;
    devices: that it has these kernels on.
    """

    name: str
    library: str
    needs: Callable[[int, int], str | None]
    linear: Callable[[Tensor], Multiplier] | None = None
    coder: Callable[[], Coder] | None = None
    important: Callable[[], Coder] | None = None
    beside: str | None = None
    devices: tuple[str, ...] = ("cpu",)


# Relative norm errors: docs/architecture.md has bitfold's own promises, torch's and the peers' are as seen
# (aten's int4 1.7e-3, bitsandbytes 3.0e-3 through its bf16 scales), with room.
BITFOLD_TOLERANCE = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 5e-6}
INT8_TOLERANCE = dict.fromkeys(DTYPES, 1.2e-2)
TORCH_TOLERANCE = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 5e-6}


def bitfold_multiplier(weight: Tensor, format: str, activations: str = "float") -> Multiplier:
    """bitfold's linear as a model runs it: a prepared QuantLinear; "q4_k int8" is named after its activations."""
    qtensor = bitfold.encode(weight, format)

    def copy() -> Callable[[Tensor], Tensor]:
        module = QuantLinear(clone(qtensor), activations=activations).eval()
        module.prepare()
        return module

    def plan(m: int, dtype: torch.dtype) -> LinearPlan:
        return bitfold.plan_linear(format, m, *qtensor.shape, dtype, weight.device, activations=activations)

    return Multiplier(
        format if activations == "float" else f"{format} {activations}",
        "bitfold",
        qtensor.nbytes,
        tuple(DTYPES),
        lambda: qtensor.decode(torch.float64),
        copy,
        BITFOLD_TOLERANCE if activations == "float" else INT8_TOLERANCE,
        format=parse(format).canonical,
        plan=plan if activations == "float" or parse(format).grid == "block" else None,
    )


def with_outliers(m: int, k: int) -> Tensor:
    """An x [m, k] as models have them: gaussian, and of 20 to 60 in half a percent of the columns, always the same."""
    x = torch.randn(m, k).clamp(-5, 5)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1), device="cpu")
    columns = order[: max(1, round(0.005 * k))].to(x.device)
    x[:, columns] = torch.randn(m, len(columns)).sign() * (20 + 40 * torch.rand(m, len(columns)))
    return x


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


def bitfold_coder(format: str, important: bool = False) -> Coder:
    """bitfold's encode and decode of one format; important: with the importance of columns."""
    found = parse(format)
    return Coder(
        format,
        "bitfold",
        found.bits,
        lambda weight: bitfold.encode(
            weight, format, importance=importance(weight.shape[1]) if important else None
        ),
        lambda qtensor, dtype: qtensor.decode(dtype),
        clone,
        lambda qtensor: qtensor.nbytes,
        found.canonical,
        (lambda qtensor: qtensor.planes["blocks"]) if found.grid == "block" else None,
    )


@lru_cache(maxsize=4)
def importance(k: int) -> Tensor:
    """One importance vector for all contestants: E[x^2] of columns spreads over some orders of magnitude."""
    return torch.randn(k, generator=torch.Generator().manual_seed(0), device="cpu").square() + 1e-3


def clone(qtensor: bitfold.QTensor) -> bitfold.QTensor:
    """The same matrix in memory of its own."""
    planes = {name: plane.clone() for name, plane in qtensor.planes.items()}
    return bitfold.QTensor(qtensor.format, qtensor.shape, planes, qtensor.layout)
