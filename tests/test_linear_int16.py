"""linear of bf16 and fp16 rows with blocks, where x is rounded to 16 bits (docs/gguf-blocks.md, "Activations of 16
bits"): what the rounding is worth at its worst, whom it concerns, and that nothing else decides a result.
"""

from __future__ import annotations

import bitfold
import numpy as np
import pytest
import torch
from bitfold.formats import parse
from cases import block_formats
from test_gguf_blocks import of_blocks, tame_blocks
from test_linear import draw, exact

every_block = pytest.mark.parametrize("format", block_formats())
HALVES = (torch.bfloat16, torch.float16)
ROUNDED = bitfold.plan_linear("q4_k", 9, 64, 256, torch.bfloat16).operands == "int16"
only_there = pytest.mark.skipif(
    not ROUNDED, reason="this instruction set multiplies bytes no faster than fp32"
)
MOST = np.float32(127 * 256 + 127)  # the largest code


def rounded(x: torch.Tensor, values: int) -> np.ndarray:
    """x as it is multiplied, in float64: [m, k]. Codes and steps are found in binary32."""
    blocks = x.float().numpy().reshape(len(x), -1, values)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    steps, inverse = largest / MOST, MOST / largest
    codes = np.rint(blocks * inverse)
    assert codes.dtype == steps.dtype == np.float32
    return (codes.astype(np.float64) * steps).reshape(x.shape)


def error(y: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(exact(y) - expected) / np.linalg.norm(expected))


def test_whom_it_concerns():
    """Batches of more than 8 rows of 16 bits, on the sets that say so; never fp32, never 8 rows."""
    there = bitfold._C.isa() in ("avx512_vnni", "avx512_bf16")
    for format in block_formats():
        for m, dtype, expected in (
            (9, torch.bfloat16, there),
            (500, torch.float16, there),
            (8, torch.bfloat16, False),
            (9, torch.float32, False),
        ):
            plan = bitfold.plan_linear(format, m, 64, 256, dtype)
            assert (plan.operands == "int16") == expected, (format, m, dtype)
            assert plan.regime == ("fused" if m == 8 else "tiled")
    assert bitfold.plan_linear("int8", 9, 64, 256, torch.bfloat16).operands != "int16"


@only_there
@every_block
def test_sums(format, rng):
    """Nothing is lost but what rounding x loses, and rounding y: float64 of the rounded x gives the same bits but where
    a sum lies at a tie, so in one of some hundreds."""
    values = parse(format).group
    for n, count, m in [(1, 1, 9), (5, 3, 10), (33, 2, 11), (70, 9, 12), (64, 17, 37)]:
        qtensor = of_blocks(tame_blocks(rng, format, n, count), format)
        w = exact(qtensor.decode(torch.float64))
        for dtype in HALVES:
            x = draw(rng, m, count * values, dtype=dtype)
            x[:, 1::5] /= 64
            x /= 64  # fp16 ends at 65504
            bias = draw(rng, n, dtype=dtype)
            y = bitfold.linear(x, qtensor, bias)
            expected = torch.from_numpy(rounded(x, values) @ w.T + exact(bias))
            what = f"{format} {dtype} m={m} n={n} k={count * values}"
            size = np.sqrt((exact(x) ** 2) @ (w.T**2)) + np.abs(exact(bias))
            unit = torch.finfo(dtype).eps
            assert y.dtype == dtype
            assert (
                np.abs(exact(y) - exact(expected)) <= unit / 2 * np.abs(exact(expected)) + 3e-6 * size
            ).all(), what
            assert (y != expected.to(dtype)).float().mean() < 0.02 + 3.0 / y.numel(), what


@only_there
@every_block
def test_the_worst_x(format, rng):
    """A number that is far larger than all others of its block takes their digits: at most 2.5e-4 of its norm (128 k
    numbers half a step off). The promise for fp16, which is the narrower one, holds."""
    values = parse(format).group
    w = torch.from_numpy(rng.standard_normal((64, 4 * values)).astype(np.float32))
    qtensor = bitfold.encode(w, format)
    reference = exact(qtensor.decode(torch.float64))
    for dtype, promise in ((torch.float16, 1e-3), (torch.bfloat16, 4e-3)):
        for ratio in (10.0, 1e3, 2.0 * float(MOST), 1e5):
            x = torch.rand(16, 4 * values, generator=torch.Generator().manual_seed(1)) + 0.5
            x[:, ::values] = ratio
            x = (x * (1000 / ratio)).to(dtype)
            difference = np.linalg.norm(rounded(x, values) - exact(x), axis=1)
            assert (difference <= 2.5e-4 * np.linalg.norm(exact(x), axis=1)).all()
            assert error(bitfold.linear(x, qtensor), exact(x) @ reference.T) < promise, (format, dtype, ratio)


@every_block
def test_ordinary_x(format, rng):
    """Rounding y is all that shows: fp16's share of it is 2.1e-4, bf16's 1.7e-3."""
    w = torch.from_numpy(rng.standard_normal((64, 4096)).astype(np.float32))
    qtensor = bitfold.encode(w, format)
    reference = exact(qtensor.decode(torch.float64))
    for dtype, limit in ((torch.float16, 2.4e-4), (torch.bfloat16, 1.9e-3)):
        x = draw(rng, 24, 4096, dtype=dtype)
        product = exact(x) @ reference.T
        found = error(bitfold.linear(x, qtensor), product)
        rounding = error(torch.from_numpy(product).to(dtype), product)
        assert found < limit, f"{format} {dtype}: {found:.2e}"
        assert found < 1.1 * rounding, (
            f"{format} {dtype}: {found:.2e}, rounding the result alone gives {rounding:.2e}"
        )


@every_block
def test_rows_and_threads_do_not_matter(format, rng, threads):
    k = 5 * parse(format).group
    qtensor = of_blocks(tame_blocks(rng, format, 203, 5), format)
    x = draw(rng, 300, k, dtype=torch.bfloat16)  # more than are multiplied at a time
    together = bitfold.linear(x, qtensor)
    for count in (1, 2, 4):
        threads(count)
        assert torch.equal(bitfold.linear(x, qtensor), together)
        for m in (9, 10, 25, 299):
            assert torch.equal(bitfold.linear(x[-m:], qtensor), together[-m:])


@every_block
def test_nan_and_infinity_stay_in_their_row(format, rng):
    k = 3 * parse(format).group
    qtensor = of_blocks(tame_blocks(rng, format, 40, 3), format)
    for dtype in HALVES:
        for bad in (float("nan"), float("inf"), -float("inf")):
            x = draw(rng, 20, k, dtype=dtype)
            clean = bitfold.linear(x, qtensor)
            x[7, k - 1] = bad
            y = bitfold.linear(x, qtensor)
            assert not torch.isfinite(y[7]).any()
            others = [j for j in range(20) if j != 7]
            assert torch.equal(y[others], clean[others])


@pytest.mark.isa
@every_block
def test_small_and_large_x(format, rng):
    """Down to 2^-100 and up to where y overflows, x of any size has the same digits."""
    values = parse(format).group
    qtensor = of_blocks(tame_blocks(rng, format, 24, 2), format)
    w = exact(qtensor.decode(torch.float64))
    x = draw(rng, 10, 2 * values, dtype=torch.bfloat16)
    for power in (-90, -60, -20, 20, 60, 90):
        scaled = x * 2.0**power
        y = bitfold.linear(scaled, qtensor)
        assert error(y, exact(scaled) @ w.T) < 4e-3, power
    assert torch.equal(bitfold.linear(torch.zeros_like(x), qtensor), torch.zeros(10, 24, dtype=x.dtype))
