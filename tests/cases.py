"""What the tests iterate over, and the way between torch tensors and the oracle's bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product

import bitfold
import numpy as np
import oracle
import oracle_floats
import torch
from bitfold import _C

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
PLANES = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
_BITS = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
    8: (torch.int64, np.uint64),
}

TALL = ("b2x16", "b4x33", "b128x128")
GROUPS = {"g": ("tensor", "channel", "g16", "g17", "g33", "g128"), "b": ("b32", "b33", "b64", "b256")}
SCALES = ("", "-sfp16", "-sbf16", "-sfp32")


def canonical(text: str) -> str:
    return bitfold.formats.parse(text).canonical


def plane_families() -> list[dict]:
    """Rows of the format table whose codes and scales lie in planes: what docs/formats.md and oracle.py describe."""
    return [row for row in _C.families() if row["grid"] != "block"]


def block_formats() -> list[str]:
    """GGUF's block types: one plane of blocks, no parameters."""
    return [row["family"] for row in _C.families() if row["grid"] == "block"]


def columns(format: str) -> int:
    """Columns for a test that wants a ragged last group in every format that can have one."""
    return 256 if format in block_formats() else 83


def every_format() -> list[str]:
    """Family x granularity x asym x scale dtype x dq, whatever the table allows; no blocks."""
    texts = []
    for row in plane_families():
        if row["grid"] == "cast":
            texts.append(row["family"])
            continue
        zeros = ("", "-asym") if row["asymmetric"] else ("",)
        scales = (*SCALES, "-dq") if row["nested"] else SCALES
        groups = (*GROUPS[row["group_letter"]], *(TALL if row["tall"] else ()))
        for group, zero, scale in product(groups, zeros, scales):
            texts.append(canonical(f"{row['family']}-{group}{zero}{scale}"))
    return list(dict.fromkeys(texts))


def some_formats() -> list[str]:
    """Every family with planes at its default, and each other axis once: for tests that multiply by much else."""
    more = [
        "fp8-e4m3-g17-sfp16",
        "fp8-e5m2-tensor",
        "fp8-e4m3-b128x128",
        "fp8-e5m2-b2x33-sbf16",
        "int8-tensor-asym",
        "int8-g33-sbf16",
        "int8-channel-asym",
    ]
    more += [
        "int4-g32-asym",
        "int4-g17",
        "int4-channel",
        "int3-g16-asym",
        "int3-g33",
        "int3-tensor",
        "int2-g16-asym",
    ]
    more += ["int2-g33-sfp32", "nf4-b32-dq", "nf4-b33", "fp4-b64-dq", "fp4-b32-sbf16", "nf4-b4096"]
    return [row["default"] for row in plane_families()] + more


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor as numpy unsigned integers."""
    signed, unsigned = _BITS[tensor.element_size()]
    return tensor.detach().contiguous().view(signed).numpy().view(unsigned)


def tensor_of(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A tensor of a plane dtype from the oracle's bits."""
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}[array.itemsize]
    return torch.from_numpy(np.array(array).view(signed)).view(PLANES[dtype])


def oracle_planes(qtensor: bitfold.QTensor) -> dict[str, np.ndarray]:
    return {name: bits(plane) for name, plane in qtensor.planes.items()}


def to_qtensor(
    planes: dict[str, np.ndarray], format: str, n: int, k: int, layout: str = "rows"
) -> bitfold.QTensor:
    laws = oracle.plane_shapes(format, n, k, layout)
    tensors = {name: tensor_of(array.reshape(laws[name][1]), laws[name][0]) for name, array in planes.items()}
    return bitfold.QTensor(format, (n, k), tensors, layout)


def assert_same_bits(actual: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """Bits equal, shape included; any NaN equals any other."""
    got = bits(actual)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, the oracle has {expected.shape}"
    expected = expected.view(got.dtype)
    wrong = got != expected
    if actual.is_floating_point() and wrong.any():
        wanted = torch.from_numpy(expected.view(f"i{expected.itemsize}").copy()).view(actual.dtype)
        wrong &= ~(torch.isnan(actual) & torch.isnan(wanted)).numpy()
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} differ, first at {first}: "
            f"0x{int(got[first]):x}, the oracle has 0x{int(expected[first]):x}"
        )


def assert_planes(qtensor: bitfold.QTensor, expected: dict[str, np.ndarray], what: str) -> None:
    assert list(qtensor.planes) == list(expected), what
    for name, plane in qtensor.planes.items():
        assert_same_bits(plane, expected[name], f"{what}, plane {name}")


def refusal(
    call: Callable[[], object],
    *needles: str,
    error: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> str:
    """The message of the error that `call` ends in: one sentence on one line, with every needle (a regex) in it."""
    try:
        call()
    except error as caught:
        message = str(caught)
    else:
        raise AssertionError(f"no error, wanted {error} that says {needles}")
    assert message.strip(), "an empty message"
    assert "\n" not in message, message
    for needle in needles:
        assert re.search(needle, message), f"no {needle!r} in: {message}"
    return message


def weights(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """float32 weights with rows of different size, skewed groups, zeros of both signs and a zero row.

    None is so small that a group of it alone would need a scale below fp16's.
    """
    w = rng.standard_normal((n, k)) * np.exp(rng.uniform(-2, 2, (n, 1))) + rng.uniform(-0.3, 0.3, (n, 1))
    w = np.copysign(np.maximum(np.abs(w), 0.05), w)
    w[rng.random((n, k)) < 0.05] = 0.0
    w[rng.random((n, k)) < 0.02] = -0.0
    if n > 2:
        w[n // 2] = 0.0
    return w.astype(np.float32)


def random_planes(
    rng: np.random.Generator, format: str, n: int, k: int, layout: str = "rows"
) -> dict[str, np.ndarray]:
    """Planes with every code possible, padding bits 0 and finite scales."""
    fmt = oracle.parse(format)
    if layout == "flat":
        n, k = 1, n * k
    shapes = oracle.plane_shapes(format, n, k)
    if fmt.kind == "cast":
        return {"codes": rng.integers(0, 2**16, (n, k)).astype(np.uint16)}
    codes = rng.integers(0, 2**fmt.bits, (n, k)).astype(np.uint8)
    planes = {"codes": oracle.pack_bits(codes, fmt.bits, fmt.grid.high_first)}
    scale_shape = shapes["scales"][1]
    if fmt.scale == "nested":
        planes["scales"] = rng.integers(0, 256, scale_shape).astype(np.uint8)
    else:
        values = (rng.standard_normal(scale_shape) * 0.05).astype(np.float32)
        planes["scales"] = oracle_floats.to_dtype(values, fmt.scale)
    if fmt.asymmetric:
        zeros = rng.integers(0, 2**fmt.bits, scale_shape).astype(np.uint8)
        planes["zeros"] = oracle.pack_bits(zeros, fmt.bits)
    if fmt.scale == "nested":
        for name in ("nested_scales", "nested_offset"):
            planes[name] = rng.uniform(0.01, 0.1, shapes[name][1]).astype(np.float32).view(np.uint32)
    return planes
