"""What the page knows of formats, asked of the library: no value of a format is written down here or there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitfold import _C
from bitfold.formats import FORMATS, Format, parse, stored_bytes
from bitfold.grids import code_values
from bitfold.outliers.columns import ACTIVATION_THRESHOLD
from bitfold.outliers.ways import LARGEST, WAYS
from bitfold.qtensor import encode

FLOATS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8-e4m3": torch.float8_e4m3fn,
    "fp8-e5m2": torch.float8_e5m2,
}
SCALED = (
    "fp8-e4m3",
    "fp8-e5m2",
    "int8",
    "int4",
    "int3",
    "int2",
    "nf4",
    "fp4",
)  # shown, of the formats with scales
COUNT = 1024  # weights of the example
GROUPS = (1024, 512, 256, 128, 64, 32)  # the first is one scale for all
OUTLIERS = (203, 611, 874)  # where the example's outliers go
CHANNEL = 611  # the large one, where the example is a row of inputs


def tables() -> dict[str, object]:
    """All that the page is given, ready for JSON.

    floats: bits of the fields of each floating-point format; formats: those with scales, the value of every
    code in the order of the codes (None: NaN; infinities as strings) at the scale 1; weights: the example;
    features: how the ways of bitfold.outliers round it as a row of inputs.
    """
    weights = example()
    return {
        "version": _C.__version__,
        "floats": [{"name": name, **_layout(dtype)} for name, dtype in FLOATS.items()],
        "formats": [_describe(name, FORMATS[name]) for name in SCALED],
        "weights": weights.tolist(),
        "sigma": float(weights.std()),
        "outliers": list(OUTLIERS),
        "groups": list(GROUPS),
        "features": {
            "channel": CHANNEL,
            "threshold": ACTIVATION_THRESHOLD,
            "group": WAYS["int8-g128"].group,
            "largest": LARGEST,
        },
    }


def example() -> Tensor:
    """Weights as they might lie in a row of a matrix: float32 [COUNT], normal, of a width that changes
    slowly. Rounded to five decimals, which are exact enough to be written down.
    """
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(COUNT, generator=generator, dtype=torch.float64)
    width = 0.02 * (1 + 0.6 * torch.sin(torch.arange(COUNT, dtype=torch.float64) * (4 * math.pi / COUNT)))
    return (normal * width).mul(1e5).round().div(1e5).to(torch.float32)


def _layout(dtype: torch.dtype) -> dict[str, object]:
    """Bits of exponent and mantissa, and the bias, from what torch says of a dtype."""
    info = torch.finfo(dtype)
    mantissa = -round(math.log2(info.eps))
    return {
        "bits": info.bits,
        "exponent": info.bits - 1 - mantissa,
        "mantissa": mantissa,
        "bias": 1 - round(math.log2(info.smallest_normal)),
    }


def _describe(name: str, format: Format) -> dict[str, object]:
    values = code_values(format)
    assert values is not None
    letter = "b" if format.grid == "codebook" else "g"
    groups = {group: parse(f"{name}-{letter}{group}") for group in GROUPS}
    one = encode(torch.ones(1, COUNT), groups[COUNT].canonical)
    return {
        "name": name,
        "grid": format.grid,
        "bits": format.bits,
        "scale": format.scale,
        "values": [_number(value) for value in values.tolist()],
        # The value that the largest weight of a group is given: what a scale is the largest weight divided by.
        "top": float(values[int(one.unpack().codes[0, 0])]),
        "groups": {
            group: {"format": one.canonical, "bits": 8 * stored_bytes(one, 1, COUNT) / COUNT}
            for group, one in groups.items()
        },
    }


def _number(value: float) -> float | str | None:
    """JSON has no infinities and no NaN."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
