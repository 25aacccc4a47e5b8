"""One number in every format: its bits, what is stored, and how far apart the format's numbers lie.

Floats are stored by themselves. A code means nothing without a scale: there the number is put into a group whose
largest weight is given, and the scale follows from that as in any encoding. Bits, values and spacings are what the
library encodes and decodes; only fp32 comes from torch itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold import _C
from bitfold.formats import FORMATS, Format, parse
from bitfold.grids import grid
from bitfold.qtensor import encode, pack


@dataclass(frozen=True)
class Stored:
    """A number in one format.

    format: its family ("fp16", "int4"); used: the format string that encoded it; code: as an integer, signed for
    the symmetric integer formats; bits: "sign exponent mantissa" of a float, the stored bits of a code; scale: None
    for plain floats; value: what is read back; smallest: least number above 0; spacing: from the stored value to
    the next one away from 0 (at the end of the range: towards it); note: what happened beside rounding.
    """

    format: str
    used: str
    code: int
    bits: str
    scale: float | None
    value: float
    error: float
    smallest: float
    largest: float
    spacing: float
    note: str = ""


def explain_number(number: float, absmax: float | None = None) -> list[Stored]:
    """A number in fp32, all float families, and all families of codes.

    absmax: the largest magnitude of the group that the number is in; None: the least power of two that is not
    below it.

    Raises ValueError unless the number is finite and fits fp32, and absmax is at least its magnitude.
    """
    if not math.isfinite(number) or math.isinf(torch.tensor(number, dtype=torch.float32).item()):
        raise ValueError(f"the number is {number:g}; it must be finite and fit a 32-bit float")
    if absmax is None:
        absmax = default_absmax(number)
    if not abs(number) <= absmax < math.inf or absmax == 0:
        raise ValueError(
            f"absmax is {absmax:g}; it must be above 0 and at least {abs(number):g}, the number itself"
        )
    floats = [_fp32(number)]
    codes = []
    for family, format in FORMATS.items():
        if format.grid == "block":
            continue  # its scales are those of many numbers
        if format.grid in ("cast", "minifloat"):
            floats.append(_float(number, family, format))
        else:
            codes.append(_code(number, family, absmax))
    return floats + codes


def default_absmax(number: float) -> float:
    """The least power of two that is not below the number's magnitude, 1 for 0; a scale of less than 2^-100 would
    come near the end of fp32."""
    return 2.0 ** max(-100, math.ceil(math.log2(abs(number)))) if number else 1.0


def _fp32(number: float) -> Stored:
    stored = torch.tensor(number, dtype=torch.float32)
    limits = torch.finfo(torch.float32)
    away = torch.nextafter(stored.abs(), torch.tensor(math.inf))
    near = torch.nextafter(stored.abs(), torch.tensor(0.0))
    spacing = (away - stored.abs() if away.isfinite() else stored.abs() - near).item()
    code = int(stored.view(torch.int32)) & 0xFFFFFFFF
    return Stored(
        format="fp32",
        used="fp32",
        code=code,
        bits=_float_bits(code, torch.float32),
        scale=None,
        value=stored.item(),
        error=stored.item() - number,
        smallest=limits.smallest_normal * limits.eps,
        largest=limits.max,
        spacing=spacing,
    )


# ---- floats ----

# The torch dtype with the same bits, which knows how many of them are exponent.
_SAME_BITS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8-e4m3": torch.float8_e4m3fn,
    "fp8-e5m2": torch.float8_e5m2,
}


def _float(number: float, family: str, format: Format) -> Stored:
    """A plain float. An 8-bit one is stored with the scale 1, which a group has whose largest weight is the
    format's largest number."""
    largest = next(row["grid_max"] for row in _C.families() if row["family"] == family)
    beyond = abs(number) > largest
    inside = math.copysign(min(abs(number), largest), number)
    if format.grid == "cast":
        qtensor = encode(torch.tensor([[inside]], dtype=torch.float64), format.canonical, clamp=True)
        code = int(qtensor.unpack().codes.view(torch.int16)) & 0xFFFF
    else:
        weight = torch.tensor([[inside, largest]], dtype=torch.float64)
        qtensor = encode(weight, f"{family}-channel-sfp32")
        code = int(qtensor.unpack().codes[0, 0])
    value = float(qtensor.decode()[0, 0])
    points = _grid(family)
    return Stored(
        format=family,
        used=family,
        code=code,
        bits=_float_bits(code, _SAME_BITS[family]),
        scale=None,
        value=value,
        error=value - number,
        smallest=float(points[points > 0][0]),
        largest=float(points[-1]),
        spacing=_spacing(points, value),
        note="beyond the largest number: stored as the largest" if beyond else _vanished(number, value),
    )


def _float_bits(code: int, dtype: torch.dtype) -> str:
    """ "0 10000 1001001000": sign, exponent and mantissa."""
    limits = torch.finfo(dtype)
    mantissa = round(-math.log2(limits.eps))
    digits = f"{code:0{limits.bits}b}"
    return f"{digits[0]} {digits[1:-mantissa]} {digits[-mantissa:]}"


# ---- codes ----


def _code(number: float, family: str, absmax: float) -> Stored:
    format = one_scale_a_row(family)
    qtensor = encode(torch.tensor([[number, absmax]], dtype=torch.float64), format.canonical)
    unpacked = qtensor.unpack()
    assert unpacked.scales is not None
    stored, scale = int(unpacked.codes[0, 0]), float(unpacked.scales[0, 0])
    value = float(qtensor.decode()[0, 0])
    points = _grid(family) * scale
    return Stored(
        format=family,
        used=format.canonical,
        code=stored - (1 << (format.bits - 1)) if format.grid == "integer" else stored,
        bits=f"{stored:0{format.bits}b}",
        scale=scale,
        value=value,
        error=value - number,
        smallest=float(points[points > 0][0]),
        largest=float(points[-1]),
        spacing=_spacing(points, value),
        note=_vanished(number, value),
    )


def one_scale_a_row(family: str) -> Format:
    """The format of a family that gives a short row one scale, in fp32."""
    return parse(f"{family}-channel-sfp32" if FORMATS[family].grid == "integer" else f"{family}-b64-sfp32")


def _vanished(number: float, value: float) -> str:
    return "too small: stored as 0" if number and not value else ""


def _grid(family: str) -> Tensor:
    """Every finite number of a family with the scale 1, ascending, float64."""
    format = FORMATS[family]
    if format.grid == "cast":
        codes = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(_SAME_BITS[family])[:, None]
        decoded = pack(codes, format=format.canonical).decode()
    else:
        known = grid(format)
        assert known is not None
        decoded = known
    points = decoded.double().flatten()
    return points[points.isfinite()].unique()


def _spacing(points: Tensor, value: float) -> float:
    """From a number of an ascending grid to its neighbour away from 0, or towards 0 at the end."""
    at = int((points - value).abs().argmin())
    step = 1 if value >= 0 else -1
    neighbour = at + step if 0 <= at + step < len(points) else at - step
    return abs(float(points[neighbour] - points[at]))
