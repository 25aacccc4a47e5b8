"""Some rows of a quantized matrix as numbers, whoever stored it.

Evidence of where zero points lie comes from groups, and some thousand of them are as good as all: rows are
taken from four places of a matrix, in runs of whole words of what is packed along the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitfold.foreign.scheme import Scheme
from bitfold.formats import parse
from bitfold.qtensor import QTensor, column_order

RUN = 32  # rows: whole words, whatever the bits
_GROUPS = 8192  # groups that are looked at, where there are so many
_CODES = 1 << 22  # and codes, at most
_LEAST = 128  # but so many rows
_RUNS = 4


@dataclass(frozen=True)
class Numbers:
    """codes: uint8 [n, k], the columns of a group together; zeros: int16 [n, G]; scales: float [n, G]; group:
    columns; rows: which rows of the matrix these are, int64 [n].
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    group: int
    rows: Tensor


# Of each part of a module the axis of rows, and whether it is packed along it; others are taken whole.
_ROWS = {
    "gptq": {"qweight": (1, False), "qzeros": (1, True), "scales": (1, False)},
    "awq": {"qweight": (1, True), "qzeros": (1, True), "scales": (1, False)},
    "compressed-tensors": {
        "weight_packed": (0, False),
        "weight": (0, False),
        "weight_scale": (0, False),
        "weight_zero_point": (0, True),
    },
}


def places(n: int, k: int, groups: int) -> list[tuple[int, int]]:
    """The runs of rows that are looked at of an n x k matrix with `groups` groups in a row."""
    count = max(_LEAST, min(-(-_GROUPS // groups), max(_CODES // max(1, k), 1)))
    if count >= n or n < 2 * RUN:
        return [(0, n)]
    each = -(-count // (_RUNS * RUN)) * RUN
    blocks = n // RUN
    starts = sorted({(blocks * i // _RUNS) * RUN for i in range(_RUNS)})
    return [(start, min(start + each, stop)) for start, stop in zip(starts, [*starts[1:], n], strict=True)]


def rows_of(
    owner: str, scheme: Any, tensors: Mapping[str, Tensor], begin: int, end: int, n: int
) -> dict[str, Tensor]:
    """The tensors that a module of rows `begin` to `end` would have."""
    found = {}
    for part, tensor in tensors.items():
        axis, packed = _ROWS[owner].get(part, (0, False))
        if part == "weight_shape":
            found[part] = torch.tensor([end - begin, int(tensor[1])], dtype=tensor.dtype)
        elif part not in _ROWS[owner] or tensor.dim() < 2:
            found[part] = tensor
        elif packed and tensor.dtype == torch.int32:
            bits = getattr(scheme, "bits", 4)
            found[part] = tensor.narrow(axis, begin * bits // 32, -(-(end - begin) * bits // 32))
        else:
            found[part] = tensor.narrow(axis, begin, end - begin)
    return found


def of_module(owner: str, scheme: Scheme, tensors: Mapping[str, Tensor]) -> Numbers | None:
    """Rows of a foreign module; None where its weights are no integers by groups or rows. Zero points are taken
    as they are stored, whatever the configuration says of symmetry.

    Raises ValueError as the scheme does.
    """
    entry = scheme.entry(tensors)
    format = parse(entry.format)
    if owner not in _ROWS or format.grid != "integer" or format.group == 0:
        return None
    free = as_stored(scheme)
    n, k = entry.shape
    groups = -(-k // format.group) if format.group > 0 else 1
    parts = []
    for begin, end in places(n, k, groups):
        qtensor = free.unpack(rows_of(owner, scheme, tensors, begin, end, n))
        parts.append(of_qtensor(qtensor, torch.arange(begin, end)))
    return joined(parts)


def as_stored(scheme: Any) -> Any:
    """The scheme that reads zero points from the tensors where there are some."""
    if hasattr(scheme, "version"):
        return replace(scheme, symmetric=False)
    if hasattr(scheme, "zero_point"):
        return replace(scheme, zero_point=True)
    return scheme


def of_planes(qtensor: QTensor) -> Numbers | None:
    """Rows of a matrix in bitfold's own planes; None where it has no integers by groups or rows."""
    format = parse(qtensor.format)
    if format.grid != "integer" or format.group == 0 or qtensor.layout != "rows":
        return None
    n, k = qtensor.shape
    groups = -(-k // format.group) if format.group > 0 else 1
    parts = []
    for begin, end in places(n, k, groups):
        planes = {name: plane[begin:end].contiguous() for name, plane in qtensor.planes.items()}
        part = QTensor(qtensor.format, (end - begin, k), planes, qtensor.layout, qtensor.g_idx)
        parts.append(of_qtensor(part, torch.arange(begin, end)))
    return joined(parts)


def of_qtensor(qtensor: QTensor, rows: Tensor) -> Numbers:
    """A whole matrix of integers with groups or rows of their own scale."""
    format = parse(qtensor.format)
    logical = qtensor.unpack()
    codes = logical.codes
    if qtensor.g_idx is not None:
        codes = codes[:, column_order(qtensor.g_idx)]
    assert logical.scales is not None
    scales = logical.scales
    half = torch.full(tuple(scales.shape), 1 << format.bits - 1, dtype=torch.int16)
    zeros = half if logical.zeros is None else logical.zeros.to(torch.int16)
    return Numbers(codes, zeros, scales, format.group if format.group > 0 else codes.shape[1], rows)


def joined(parts: list[Numbers]) -> Numbers:
    """The rows of several runs of one matrix."""
    return Numbers(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.zeros for part in parts]),
        torch.cat([part.scales for part in parts]),
        parts[0].group,
        torch.cat([part.rows for part in parts]),
    )
