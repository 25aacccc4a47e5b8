"""Numbers that no sound checkpoint has: scales that are no numbers, weights that are none, orders of columns
that aren't.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold.check.problem import Report
from bitfold.formats import parse
from bitfold.grids import code_values
from bitfold.qtensor import QTensor

SCALES = (
    "scales",
    "weight_scale",
    "weight.absmax",
    "weight.nested_absmax",
    "SCB",
    "nested_scales",
    "nested_offset",
)
"""Names of tensors of scales within a module, whoever stored it."""
_SIGNED = (0.2, 0.8)  # the share of negative scales where their sign is part of the method
_AT_ONCE = 1 << 24  # numbers that are looked at together


def check_finite(name: str, tensor: Tensor, report: Report, kind: str = "weight-not-finite") -> bool:
    """Whether all numbers of a floating-point tensor are finite; a fault where not."""
    bad, first = 0, -1
    flat = tensor.reshape(-1)
    if flat.dtype.itemsize == 1:
        return True
    for begin in range(0, len(flat), _AT_ONCE):
        wrong = ~flat[begin : begin + _AT_ONCE].isfinite()
        if wrong.any():
            first = begin + int(wrong.nonzero()[0]) if first < 0 else first
            bad += int(wrong.sum())
    if bad:
        where = list(torch.unravel_index(torch.tensor(first), tuple(tensor.shape)))
        report.fault(
            kind,
            name,
            f"{bad} of its {len(flat)} numbers are not finite, the first {flat[first].item()} at "
            f"{[int(i) for i in where]}",
            "all must be finite",
        )
    return not bad


def check_scales(name: str, scales: Tensor, report: Report, *, signed: bool = False) -> bool:
    """Whether scales are finite and of one sign. signed: whether the method may use their sign (symmetric
    integers: then about half of them are negative)."""
    if not scales.is_floating_point():
        return True
    if not check_finite(name, scales, report, "scale-not-finite"):
        return False
    negative = int((scales < 0).sum())
    share = negative / max(1, scales.numel())
    if negative and not (signed and _SIGNED[0] <= share <= _SIGNED[1] and scales.numel() >= 32):
        at = [int(i) for i in (scales < 0).nonzero()[0]]
        report.fault(
            "scale-negative",
            name,
            f"{negative} of its {scales.numel()} scales are negative, the first {scales[tuple(at)].item():.6g} at {at}",
            "they must not be",
        )
        return False
    return True


def check_zero_scales(name: str, qtensor: QTensor, report: Report) -> None:
    """A scale of 0 is that of a group without weights, whose codes all mean 0; where they don't, weights were
    lost.
    """
    format = parse(qtensor.format)
    scales = qtensor.planes.get("scales")
    if (
        scales is None
        or not scales.is_floating_point()
        or format.grid == "block"
        or bool((scales != 0).all())
    ):
        return
    logical = qtensor.unpack()
    assert logical.scales is not None
    codes = logical.codes.to(torch.int64)
    n, k = codes.shape
    if qtensor.layout != "rows":
        codes, n, k = codes.reshape(1, -1), 1, n * k
    groups = torch.arange(k) // (format.group if format.group > 0 else max(1, k))
    if qtensor.g_idx is not None:
        groups = qtensor.g_idx.to(torch.int64)
    scales = logical.scales.repeat_interleave(format.group_rows, 0)[:n]
    zero = (scales == 0).expand(n, -1)[:, groups]
    if format.grid == "integer":
        half = torch.full_like(logical.scales, 1 << format.bits - 1, dtype=torch.int64)
        z = half if logical.zeros is None else logical.zeros.to(torch.int64)
        values = (codes - z.expand(n, -1)[:, groups]).to(torch.float32)
    else:
        table = code_values(format)
        assert table is not None
        values = table[codes]
    lost = int((zero & (values != 0)).sum())
    if lost:
        report.fault(
            "scale-zero",
            name,
            f"{int((logical.scales == 0).sum())} of its {logical.scales.numel()} scales are 0, and {lost} codes of "
            "their groups mean other weights than 0",
            "such a scale must be that of a group of zeros",
        )


def check_order(name: str, g_idx: Tensor, group: int, groups: int, report: Report) -> bool:
    """Whether g_idx gives every group its columns; group: columns of one, -1 for all."""
    k = len(g_idx)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        wrong = int(((g_idx < 0) | (g_idx >= groups)).sum())
        report.fault(
            "g_idx-range",
            name,
            f"{wrong} of its {k} entries are out of range, which goes from {low} to {high}",
            f"they must be from 0 to {groups - 1}",
        )
        return False
    size = k if group == -1 else group
    counts = torch.bincount(g_idx.to(torch.int64), minlength=groups)
    wanted = torch.full_like(counts, size)
    wanted[-1] = k - size * (groups - 1)
    if not torch.equal(counts, wanted):
        at = int((counts != wanted).nonzero()[0])
        report.fault(
            "g_idx-groups",
            name,
            f"gives group {at} {int(counts[at])} of the {k} columns, and the group size is {size}",
            f"it must give it {int(wanted[at])}",
        )
        return False
    return True
