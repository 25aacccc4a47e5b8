"""The same numbers in another format: codes, scales and zero points moved to a grid that holds them.

A matrix of integers w = (code - zero) * scale has the same values with more bits, with smaller groups that repeat the
scale, with scales of another dtype that holds them, with zero points that all are the middle of the codes; and three
of GGUF's blocks are matrices of integers in groups of 32. `regrid` goes from any of these to any other where the
values are the same to the bit, and says why where they aren't. Asked to, it rounds scales and minima to their dtype;
codes it never changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold.foreign.scheme import Unfit, integer, scale_dtype
from bitfold.formats import Format, ceil_div, parse
from bitfold.qtensor import QTensor, pack

BLOCKS = {"q4_0": "int4-g32", "q4_1": "int4-g32-asym", "q8_0": "int8-g32"}
"""GGUF's blocks that are integers, and the format that has the same numbers."""
_COLUMNS = 32  # of each of these blocks


def as_integers(format: Format) -> Format:
    """The integers that a block is; any other format as it is."""
    return parse(BLOCKS.get(format.family, format.canonical))


def regrid(qtensor: QTensor, format: str, *, rounding: bool = False) -> QTensor:
    """The same weights in `format`, with its g_idx if it has one.

    rounding: scales, and minima of blocks, that the new format has no number for are rounded to nearest.

    Raises Unfit, with the reason, where the format can't hold the values.
    """
    target, source = parse(format), parse(qtensor.format)
    if target.canonical == source.canonical:
        return qtensor
    if source.family in BLOCKS:
        return regrid(_from_blocks(qtensor), format, rounding=rounding)
    if target.family in BLOCKS:
        target.check_columns(qtensor.shape[1])
        return _to_blocks(regrid(qtensor, BLOCKS[target.family], rounding=rounding), target, rounding)
    family = source.grid if source.grid == "integer" else source.family
    wanted = target.grid if target.grid == "integer" else target.family
    if family != wanted or source.grid in ("cast", "block") or "nested" in (source.scale, target.scale):
        raise Unfit(f"{source} is of another grid than {target}")
    if qtensor.layout != "rows":
        raise Unfit("its blocks run across the rows")
    of = _groups(qtensor, source, target)
    codes, scales, zeros, *_ = qtensor.unpack()
    assert scales is not None
    if source.grid == "integer":
        middle = torch.full(tuple(scales.shape), 1 << source.bits - 1, dtype=torch.uint8)
        zeros = middle if zeros is None else zeros
        if not target.asymmetric:
            codes, zeros = _centred(codes, zeros, qtensor.g_idx, source, target), None
        elif target.bits < source.bits and max(int(codes.max()), int(zeros.max())) >= 1 << target.bits:
            raise Unfit(f"its codes of {source.bits} bits don't fit {target.bits}")
    scales = _cast(scales, scale_dtype(target.canonical), rounding)
    n = qtensor.shape[0]
    if target.group_rows == source.group_rows == 1:
        rows = 1 if target.group == 0 else n
        moved = [None if plane is None else plane.expand(rows, -1) for plane in (scales, zeros)]
    else:  # floats, which have no zeros
        tall = target.group_rows == source.group_rows
        moved = [scales if tall else scales.repeat_interleave(source.group_rows, 0)[:n], None]
    moved = [None if plane is None else plane[:, of].contiguous() for plane in moved]
    return pack(codes, *moved, format=target.canonical, g_idx=qtensor.g_idx)


def _groups(qtensor: QTensor, source: Format, target: Format) -> Tensor:
    """Of which group of the source each group of the target is."""
    k = qtensor.shape[1]
    if qtensor.g_idx is not None and target.group != source.group:
        raise Unfit(
            f"its groups of {source.group} columns are not neighbours (it has g_idx), and {target}'s are"
        )
    if target.group_rows not in (1, source.group_rows):
        raise Unfit(f"{target} has one scale for {target.group_rows} rows together, and {source} hasn't")
    if source.group == target.group or (target.group == -1 and source.group == 0):
        return torch.arange(ceil_div(k, source.group) if source.group > 0 else 1)
    if target.group <= 0 or (source.group > 0 and source.group % target.group):
        raise Unfit(f"{target} has one scale for weights that have several in {source}")
    starts = torch.arange(ceil_div(k, target.group)) * target.group
    return starts // source.group if source.group > 0 else torch.zeros_like(starts)


def _centred(codes: Tensor, zeros: Tensor, g_idx: Tensor | None, source: Format, target: Format) -> Tensor:
    """Codes [n, k] with the zero point in the middle of the target's."""
    n, k = codes.shape
    group = source.group if source.group > 0 else k
    of = torch.arange(k) // group if g_idx is None else g_idx.to(torch.int64)
    moved = codes.to(torch.int16) - zeros.to(torch.int16).expand(n, -1)[:, of] + (1 << target.bits - 1)
    if codes.numel() and (int(moved.min()) < 0 or int(moved.max()) >= 1 << target.bits):
        raise Unfit(f"code - zero goes beyond the {target.bits} bits that {target} has around 0")
    return moved.to(torch.uint8)


def _cast(values: Tensor, dtype: torch.dtype, rounding: bool, what: str = "scales") -> Tensor:
    cast = values.to(dtype)
    if not torch.equal(cast.to(torch.float64), values.to(torch.float64)):
        if not rounding:
            raise Unfit(f"not all of its {what} are numbers of {_name(dtype)}")
        if not cast.isfinite().all():
            raise Unfit(f"its {what} go up to {float(values.abs().max()):.4g}, beyond {_name(dtype)}")
    return cast


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- blocks: docs/gguf-blocks.md ----


def _from_blocks(qtensor: QTensor) -> QTensor:
    family = parse(qtensor.format).family
    n, k = qtensor.shape
    blocks = qtensor.planes["blocks"].reshape(n, k // _COLUMNS, -1)
    heads = 2 if family == "q4_1" else 1
    scales, *minima = blocks[..., : 2 * heads].contiguous().view(torch.float16).unbind(-1)
    packed = blocks[..., 2 * heads :]
    codes = packed ^ 0x80 if family == "q8_0" else torch.cat([packed & 15, packed >> 4], -1)
    zeros = _zeros_of(scales, minima[0]) if minima else None
    return pack(codes.reshape(n, k).contiguous(), scales.contiguous(), zeros, format=BLOCKS[family])


def _zeros_of(scales: Tensor, minima: Tensor) -> Tensor:
    """The zero points that make minima of scales: minimum = -zero * scale."""
    one, other = scales.to(torch.float64), minima.to(torch.float64)
    zeros = torch.where(one == 0, 0.0, -other / one).nan_to_num().round().clamp(0, 15)
    if not torch.equal(-zeros * one, other):
        raise Unfit("its minima are no whole multiples, 0 to 15, of its scales")
    return zeros.to(torch.uint8)


def _to_blocks(qtensor: QTensor, target: Format, rounding: bool) -> QTensor:
    if qtensor.g_idx is not None:
        raise Unfit(f"its groups of columns are not neighbours (it has g_idx), and {target}'s are")
    n, k = qtensor.shape
    codes, scales, zeros, *_ = qtensor.unpack()
    assert scales is not None
    codes = codes.reshape(n, k // _COLUMNS, _COLUMNS)
    heads = [scales]
    if zeros is not None:
        minima = -zeros.to(torch.float32) * scales.to(torch.float32)  # exact: 4 bits times 11
        heads.append(_cast(minima, torch.float16, rounding, "minima, -zero * scale,"))
    packed = codes ^ 0x80 if target.family == "q8_0" else codes[..., :16] | codes[..., 16:] << 4
    first = torch.stack(heads, -1).contiguous().view(torch.uint8)
    blocks = torch.cat([first, packed], -1).reshape(n, -1).contiguous()
    return QTensor(target.canonical, (n, k), {"blocks": blocks})


def nearest_integers(format: Format) -> Format:
    """The integers that a weight in `format` would be encoded as: with its bits, groups and kind of zero points where
    it has such, else with those that are nearest.
    """
    known = as_integers(format)
    if known.grid == "integer":
        return known
    if format.grid == "block":
        bits = next(bits for bits in (2, 3, 4, 8) if bits >= format.bits)
        finer = format.family in ("q2_k", "q3_k", "q6_k")
        minima = format.family in ("q5_1", "q2_k", "q4_k", "q5_k")
        return parse(integer(bits, 16 if finer else 32, minima, torch.float16))
    bits = 4 if format.grid == "codebook" else 8
    group = -1 if format.grid == "cast" else format.group
    return parse(integer(bits, group, False, torch.float16))
