"""The numbers that a format can write, as the library itself decodes them: nothing here knows a codebook."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitfold.formats import Format, parse
from bitfold.qtensor import QTensor, pack


def code_values(format: Format | str) -> Tensor | None:
    """The value of every code with the scale 1 and the zero point 0: float32 [2^bits], in the order of the
    codes, NaN where a code means none. None for the cast families, whose codes are the floats themselves, and for
    blocks, whose scales can't be set apart from their codes.
    """
    parsed = parse(format) if isinstance(format, str) else format
    if parsed.grid in ("cast", "block"):
        return None
    codes = torch.arange(1 << parsed.bits, dtype=torch.uint8)[:, None]
    return _pack_like(parsed, codes, None).decode()[:, 0]


def grid(format: Format | str) -> Tensor | None:
    """The finite values of `code_values`, each once, ascending; None where those are."""
    values = code_values(format)
    return None if values is None else values[values.isfinite()].unique()


def scales(qtensor: QTensor) -> Tensor:
    """The scale of every weight: float32 [n, k], nested scales worked out.

    Raises ValueError for a cast family, which has none, and for blocks.
    """
    format = parse(qtensor.format)
    values = code_values(format)
    if values is None:
        raise ValueError(f"the format is {format}; it must be one with a plane of scales")
    one = int((values == 1).nonzero()[0])
    codes = torch.full(qtensor.shape, one, dtype=torch.uint8, device=qtensor.device)
    return _pack_like(format, codes, qtensor).decode()


def zeros(qtensor: QTensor) -> Tensor | None:
    """The zero point of every weight: float32 [n, k], None for a format without zero points."""
    format = parse(qtensor.format)
    if not format.asymmetric:
        return None
    unpacked = qtensor.unpack()
    ones = torch.ones_like(unpacked.scales) if unpacked.scales is not None else None
    codes = torch.zeros_like(unpacked.codes)
    plain = pack(
        codes, ones, unpacked.zeros, format=format.canonical, layout=qtensor.layout, g_idx=qtensor.g_idx
    )
    return -plain.decode()


def positions(weight: Tensor, qtensor: QTensor) -> Tensor:
    """Where weights lie on the grid of their format: weight / scale + zero, float32 [n, k], so that the
    points of `grid` are what rounding takes them to. 0 where the scale is 0: a group of zeros.
    """
    scale = scales(qtensor)
    where = torch.where(scale == 0, 0.0, weight.detach().to(torch.float32) / scale)
    offset = zeros(qtensor)
    return where if offset is None else where + torch.where(scale == 0, 0.0, offset)


def _pack_like(format: Format, codes: Tensor, qtensor: QTensor | None) -> QTensor:
    """A matrix of `codes` with the scales of `qtensor` (None: the scale 1) and zero points 0."""
    layout = "rows" if qtensor is None else qtensor.layout
    n, k = codes.shape if layout == "rows" else (1, codes.numel())
    logical = {} if qtensor is None else {**qtensor.unpack()._asdict()}
    planes: dict[str, Tensor] = {}
    for law in format.planes[1:]:
        shape = law.logical_shape(n, k)
        if law.name == "zeros" or qtensor is None:
            # A nested scale is map[code] * nested_scale + offset: 0 and 1 make it 1.
            value = (
                1 if law.name == "nested_offset" or (law.name == "scales" and law.dtype != torch.uint8) else 0
            )
            planes[law.name] = torch.full(shape, value, dtype=law.dtype)
        else:
            planes[law.name] = logical[law.name]
    g_idx = None if qtensor is None else qtensor.g_idx
    return pack(codes, format=format.canonical, layout=layout, g_idx=g_idx, **planes)


def code_entropy(qtensor: QTensor) -> tuple[int, float]:
    """How many different codes are used, and their entropy in bits: at most the bits of a code."""
    counts = qtensor.unpack().codes.flatten().to(torch.int64).bincount().to(torch.float64)
    shares = counts[counts > 0] / counts.sum()
    return len(shares), max(0.0, -math.fsum((shares * shares.log2()).tolist()))
